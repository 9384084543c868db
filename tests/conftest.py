"""Settings and fixtures that tests share."""

import os

import pytest
from hypothesis import settings

from stackpkg import runs
from stackpkg.training import launch

settings.register_profile("shared machine", deadline=None)  # a slow moment of the machine is not a defect
settings.load_profile("shared machine")


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
