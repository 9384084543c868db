"""A real job with real faults: the letters come, and nothing stays behind."""

import shutil
from pathlib import Path

import pytest

from stackpkg import calldrill
from stackpkg.telemetry import live


@pytest.mark.skipif(bool(live.missing()), reason="Prometheus and Alertmanager are not installed")
def test_every_fault_of_a_real_job_calls(repository: Path) -> None:
    shutil.copytree(Path(__file__).parents[1] / "params", repository / "params")
    told = calldrill.drill("here")
    assert told["missed"] == []
    letters = {letter["alert"]: letter for letter in told["letters"]}
    assert set(letters) == {*calldrill.CALLS, calldrill.LAST}
    assert {letters.pop("CheckpointStale")["receiver"]} == {"ticket"}
    assert {letter["receiver"] for letter in letters.values()} == {"page"}
    assert told["steps"] == calldrill.HANG - 1, "the step that hangs has no row"
    assert letters["TrainStalled"]["delay_seconds"] > 5, "called before the job had been silent for long enough"
    assert "the launch failed" in told["said"], told["said"]
    assert not [*(repository / "outbox").glob(".called*")]
