"""No test of an optional package is passed over where a workflow has installed it."""

import re
from pathlib import Path

import pytest
import yaml
from optional import missing

WORKFLOW = Path(__file__).parents[1] / ".github/workflows/slow.yml"


def test_a_package_that_must_be_there_and_is_not_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STACKPKG_OPTIONAL", raising=False)
    assert missing("no_such_package") and not missing("pytest")
    monkeypatch.setenv("STACKPKG_OPTIONAL", "1")
    assert not missing("pytest")
    with pytest.raises(ModuleNotFoundError, match="no_such_package is not installed"):
        missing("no_such_package")


def test_the_workflow_installs_what_these_tests_ask_for_and_lets_none_be_skipped() -> None:
    job = yaml.safe_load(WORKFLOW.read_text())["jobs"]["optional"]
    steps = "\n".join(step.get("run", "") for step in job["steps"])
    assert job["env"]["STACKPKG_OPTIONAL"]
    assert set(re.findall(r"([\w-]+)==[\d.]+", steps)) == {"lm-eval", "mlflow", "trackio", "wandb"}
    assert set(re.findall(r"tests/\w+\.py", steps)) == {"tests/test_harness.py", "tests/test_receivers.py"}
