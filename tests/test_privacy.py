"""What telemetry writes holds no address, no number of an account and no secret, whatever was put into it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_data_scrub import FOUND

from stackpkg import params
from stackpkg.telemetry import guard, logbook, privacy, rules, store
from stackpkg.telemetry.rows import RowWriter, compact, read

HIDDEN = "Zx81-correct-horse"  # in the environment alone: no format gives it away
PLANTED = [text for kind in ("email", "access_token", "cloud_key", "jwt", "password") for text in FOUND[kind]]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKER_API_KEY", HIDDEN)
    monkeypatch.setenv("REGISTRY_TOKEN", "true")  # too short to be one
    monkeypatch.setenv("MONKEY", "nobody-hides-this")


words = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.sampled_from([*PLANTED, HIDDEN]), words, words)
def test_whatever_surrounds_it_a_secret_goes_and_its_absence_stays(planted: str, before: str, after: str) -> None:
    payload = {"note": [f"{before} {planted} {after}", {"deep": f"{planted}\n"}], f"{planted} ": 1, "loss": math.inf}
    told = privacy.clean(payload)
    assert planted not in json.dumps(told) and json.dumps(planted)[1:-1] not in json.dumps(told)
    assert privacy.clean(told) == told and told["loss"] == math.inf


def test_what_is_no_secret_stays() -> None:
    row = {"loss": 1.5, "nan": None, "ok": True, "shard": "4539148803436467", "names": ("train", "true"), "n": 3}
    assert privacy.clean(row) == row | {"names": ["train", "true"]}
    assert privacy.clean("nobody-hides-this") == "nobody-hides-this"
    assert math.isnan(privacy.clean(math.nan)) and privacy.known() == tuple(sorted(privacy.known(), key=len)[::-1])


PAYLOAD = f"asked by anna.smith@firm.de with {PLANTED[-1]} and {HIDDEN}"


def leaks(path: Path) -> list[str]:
    text = path.read_bytes()
    return [planted for planted in ("anna.smith", HIDDEN, PLANTED[-1]) if planted.encode() in text]


def test_rows_alerts_logbook_events_and_rules_are_cleaned(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    writer = RowWriter(run / "telemetry/train", "demo", 1, 0, 1)
    writer.write(1, loss=math.nan, note=PAYLOAD, notes=[PAYLOAD])
    writer.flush()
    compact(run / "telemetry/train")
    alert = {"alert": "TrainLossSpike", "series": "loss", "value": 9.0, "threshold": 4, "hold": 1, "action": "log",
             "severity": "warning", "summary": PAYLOAD, "runbook": "runbooks/TrainLossSpike.md"}  # fmt: skip
    privacy.append(run / "telemetry/train.alerts.jsonl", [{"step": 1, "attempt": 1, **alert}])
    logbook.fired(run, "train", 1, 1, [alert], "checkpoint-1")
    logbook.add(run, PAYLOAD, [PAYLOAD])
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) == 4 and not any(map(leaks, files))
    assert "<email>" in (run / "logbook.md").read_text() and "<secret>" in read(run / "telemetry/train").note[0]
    assert "<email>" in store.ask(run, "train", "SELECT said FROM events WHERE kind = 'alert'")[1][0][0]
    alerts = [each.model_copy(update={"summary": PAYLOAD}) for each in guard.load(params.validate({}))]
    text = rules.render(alerts, 1.0, 1.0)
    assert "anna.smith" not in text and HIDDEN not in text and "{{ $labels.run }}" in text


def test_a_name_is_hashed_with_a_salt_that_stays_outside(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    run.mkdir()
    first = privacy.hashed("pypi:numpy==2.4.6/a.py", run)
    assert len(first) == 32 and first == privacy.hashed("pypi:numpy==2.4.6/a.py", run) != privacy.hashed("b", run)
    assert not list(run.iterdir()) and (tmp_path / ".salts/demo").exists()


def test_the_commands_that_stop_a_job_keep_no_secret_of_their_reason(tmp_path: Path) -> None:
    from stackpkg.training import stop

    assert not leaks(stop.request(tmp_path, PAYLOAD)) and not leaks(stop.kill(tmp_path, PAYLOAD))
    assert "<email>" in stop.killed(tmp_path)


def test_cleaning_needs_no_torch() -> None:
    code = "import sys; import stackpkg.telemetry.privacy; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
