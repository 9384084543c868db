"""Settings and fixtures that tests share."""

import os

import pytest
from hypothesis import settings

from stackpkg import runs
from stackpkg.training import launch

settings.register_profile("shared machine", deadline=None)  # a slow moment of the machine is not a defect
settings.load_profile("shared machine")


def pytest_configure() -> None:
    """absl, which TensorBoard brings, keeps the stderr that it was imported under, and closes it when traitlets sets up
    logging, as the runner of notebooks does: were it that of pytest's capture, no test after that could be reported."""
    import absl.logging  # noqa: F401  here stderr is the real one


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory):
    """A throw-away repository: `outbox/` lies in it, and modules in it can be launched beside the package."""
    home, package = tmp_path_factory.mktemp("repository"), runs.root()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "root", lambda: home)
        patch.setattr(launch, "root", lambda: home)
        patch.setenv("PYTHONPATH", os.pathsep.join((str(package), os.environ.get("PYTHONPATH", ""))))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield home
