"""A page's last drill comes from receipts: the newest, loud where there is none, yellow where it is old."""

import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from stackpkg import runs
from stackpkg.telemetry import guard
from stackpkg.training import drills

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "book")]

import drilled  # noqa: E402

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
NOTHING: dict[str, Any] = {"at": NOW.isoformat(), "rows": []}


def ago(days: float) -> str:
    return (NOW - timedelta(days=days)).isoformat(timespec="seconds")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The receipts that a run leaves: alerts through the servers and by the guard, faults, the shard, a withdrawal."""
    letters = [{"alert": "TrainStalled", "delay_seconds": 3.04}, {"alert": "Watchdog", "delay_seconds": -2.0}]
    runs.write_json(tmp_path / "telemetry/receipts.json", {"at": ago(1), "letters": letters})
    guards = [{"alert": "TrainLossSpike", "fired": True}, {"alert": "TrainGradSpike", "fired": False}]
    runs.write_json(tmp_path / "telemetry/drill.json", {"at": ago(1), "receipts": guards})
    killed = {"page": "FailureRecoveryProcess", "at": ago(2), "recover_seconds": 9.0}
    runs.write_json(tmp_path / "telemetry/faults.json", {"receipts": [killed]})
    shard = {"pages": ["CorruptedShardRollback"], "at": ago(3), "detect_seconds": 4.0, "recover_seconds": 21.5}
    runs.write_json(tmp_path / "data/shard_drill.json", shard)
    lost = {"page": "KeyLoss", "at": ago(1), "detect_seconds": 0.1, "recover_seconds": 0.2}
    runs.write_json(tmp_path / "runbooks/drills.json", {"receipts": [lost]})
    runs.write_json(tmp_path / "data/drills.json", {"at": ago(3), "withdrawn": ["ab"]})
    return tmp_path


def test_every_receipt_of_a_run_reaches_its_page(run: Path) -> None:
    found = drilled.receipts(run, NOTHING)
    took = {page: (each[0].detect, each[0].recover) for page, each in found.items()}
    assert took == {
        "TrainStalled": (3.04, None), "Watchdog": (0.0, None), "TrainLossSpike": (None, None),
        "FailureRecoveryProcess": (None, 9.0), "CorruptedShardRollback": (4.0, 21.5), "DataWithdrawal": (None, None),
        "KeyLoss": (0.1, 0.2),
    }  # fmt: skip
    line = drilled.line(found["CorruptedShardRollback"], NOW)
    assert (
        "{span .badge .ok}`2026-11-26` detected after 4\\.0 s, recovered after 21\\.5 s" in line
        and drilled.text(run.name) in line
    )


def test_a_run_without_receipts_leaves_the_fault_drills_alone(tmp_path: Path) -> None:
    table = runs.read_json(drills.TABLE)
    found = drilled.receipts(tmp_path, table)
    assert set(drilled.FAULTS) <= {row["drill"] for row in table["rows"]}, "a drill that is not in the table"
    assert set(found) == {page for pages in drilled.FAULTS.values() for page in pages}
    assert {one.file for each in found.values() for one in each} == {"book/faults.json"}
    pages = {path.stem for path in (ROOT / "book/runbooks").glob("*.md")}
    assert (
        set(found) <= pages and {alert.name for alert in guard.load(drills.profile(drills.DRILLS["spike"], 1))} <= pages
    )


def test_the_newest_counts_and_both_times_are_told(run: Path) -> None:
    faults = {"at": ago(50), "rows": [{"drill": "kill_rank", "seconds": 30.0}, {"drill": "hang", "seconds": 15.0}]}
    found = drilled.receipts(run, faults)
    assert [one.recover for one in found["FailureRecoveryProcess"]] == [9.0, 30.0]
    runs.write_json(run / "telemetry/receipts.json", {"at": ago(1), "letters": [
        {"alert": "HangDiagnosis", "delay_seconds": 3.0}
    ]})  # fmt: skip
    line = drilled.line(drilled.receipts(run, faults)["HangDiagnosis"], NOW)
    assert re.search("2026-11-28` detected after 3.*2026-10-10` recovered after 15", line)


@pytest.mark.parametrize(("days", "state"), [(0, "ok"), (90, "ok"), (91.1, "amber"), (400, "amber")])
def test_an_old_drill_is_yellow_when_the_book_is_built(run: Path, days: float, state: str) -> None:
    letters = [{"alert": "TrainStalled", "delay_seconds": 3.0}]
    runs.write_json(run / "telemetry/receipts.json", {"at": ago(days), "letters": letters})
    line = drilled.line(drilled.receipts(run, NOTHING)["TrainStalled"], NOW)
    assert f".badge .{state}}}" in line and ("drill it again" in line) == (state == "amber")


def test_no_drill_at_all_is_loud(tmp_path: Path) -> None:
    page = runs.write_text(tmp_path / "SlowRank.md", "# SlowRank\n\nOne rank.\n\n## Signal\n\nNone.\n")
    drilled.stamp(tmp_path, {}, NOW)
    head, _, rest = page.read_text().partition("## Signal")
    assert head.startswith("# SlowRank\n\nOne rank.") and ":class: drilled never" in head and "Never drilled" in head
    assert rest == "\n\nNone.\n"
    assert "{span .badge .red}`never`" in drilled.overview(tmp_path, {}, NOW)


def test_a_logbook_that_is_not_there_is_said(tmp_path: Path) -> None:
    assert "there is no `logbook.md`" in drilled.entries(tmp_path, tmp_path)


def test_false_alarms_are_told_from_the_evidence(tmp_path: Path) -> None:
    assert "Not measured" in drilled.false_alarms(tmp_path)
    jobs = [{"job": "train", "steps": 100, "alarms": {"TrainLossSpike": 2}, "earned": {}}]
    rates = {"false_alarm_rate": 20.0, "false_alarm_rate_at_most": 62.9579}
    runs.write_json(
        tmp_path / "evidence/51_drill_alerts.json", {"clean_jobs": jobs, "clean_steps": 100, "clean_alarms": 2} | rates
    )
    told = drilled.false_alarms(tmp_path).replace("\\", "")
    assert "2 false alarms in 100 steps: 20 per 1,000 steps, with 95 % confidence at most 63" in told
    assert "` train `" in told and "TrainLossSpike (2)" in told
