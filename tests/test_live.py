"""Real servers on loopback: a letter arrives at the receiver of its severity, and nothing is left running."""

import json
import re
import socket
import subprocess
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest

from stackpkg import params
from stackpkg.runs import write_json
from stackpkg.telemetry import guard, live, rehearsal, rules

needs_servers = pytest.mark.skipif(bool(live.missing()), reason="prometheus and prometheus-alertmanager are needed")
DRILLED = [alert.drilled() for alert in guard.load(params.validate({}))]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((live.HOST, port)) == 0


@needs_servers
def test_what_is_loud_reaches_its_receiver_and_the_servers_end(tmp_path: Path) -> None:
    inbox, data, run = live.Inbox(), tmp_path / "data", tmp_path / "outbox/run"
    clerk = live.clerk(run)
    (data / "shards").mkdir(parents=True)
    write_json(data / "manifest.json", {})  # no corpus: that alone must be told
    job = rehearsal.Rehearsal(run, data)
    try:
        text = rules.render(DRILLED, 0.25, 0.25)
        with live.servers(tmp_path / "servers", text, tmp_path / "outbox/.targets", inbox.hooks, clerk.at) as address:
            since = time.time()
            job.rows(6)
            job.rows(6, {"nonfinite": 1, "data_wait_seconds": 30.0})
            late = inbox.wait(["TrainNonFinite", "TrainDataWait", "DataShardCorrupt", "Watchdog"], since, 40)
            late += clerk.wait(["DataShardCorrupt"], since, 10)
        assert not late, late
        noted = re.findall(r"^## \S+ (\w+)", (run / "logbook.md").read_text(), re.MULTILINE)
        firings = {(letter["alert"], letter["since"]) for letter in clerk.letters if letter["status"] == "firing"}
        assert sorted(noted) == sorted(name for name, _ in firings) and "DataShardCorrupt" in noted
        outside = {alert.name for alert in DRILLED if alert.seen == "outside"} - {"Watchdog"}
        assert {*noted} <= outside, "what a guard notes down, or is calm, has a stub"
        port = urlsplit(address).port
        assert port and not listens(port), "Prometheus goes on after the drill"
        found = {name: inbox.first(name) for name in ("TrainNonFinite", "TrainDataWait", "Watchdog")}
        assert [letter["receiver"] for letter in found.values() if letter] == ["page", "ticket", "deadman"]
        assert found["TrainNonFinite"]["run"] == "run" and found["TrainNonFinite"]["job"] == rehearsal.JOB
        assert found["TrainNonFinite"]["runbook"] == "runbooks/TrainNonFinite.html"
        assert not inbox.first("TrainLossSpike"), "an alert without its fault"
    finally:
        job.close()
        inbox.close()
        clerk.close()
    assert job.exported.poll() is not None and not (tmp_path / "outbox/run").exists()


@needs_servers
def test_a_server_that_does_not_begin_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    inbox = live.Inbox()
    try:
        with (
            pytest.raises(RuntimeError, match="a server did not begin"),
            live.servers(tmp_path, "groups: [{name: x, rules: [{alert: A, expr: '('}]}]", tmp_path, inbox.hooks, ""),
        ):
            pass
    finally:
        inbox.close()
    assert "alertmanager" not in subprocess.run(["pgrep", "-af", str(tmp_path)], capture_output=True, text=True).stdout


def test_a_server_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live.shutil, "which", lambda name: None)
    assert live.missing() == ["prometheus", "alertmanager"]
    with (
        pytest.raises(ValueError, match="prometheus, alertmanager is not installed"),
        live.servers(tmp_path, "", tmp_path, {}, ""),
    ):
        pass


def posted(inbox: live.Inbox, since: str, kind: str = "application/json", **change: str) -> int:
    """Send what Alertmanager sends."""
    labels = {"alertname": "TrainStalled", "severity": "critical", "action": "log", "seen": "outside",
              "run": "run", "job": "train"}  # fmt: skip
    notes = {"summary": "run: no step for ten minutes", "runbook_url": "runbooks/TrainStalled.html"}
    alert = {"status": "firing", "labels": labels | change, "annotations": notes, "startsAt": since}
    body = json.dumps({"alerts": [alert]}).encode()
    return urlopen(Request(f"{inbox.at}/logbook", body, {"Content-Type": kind}), timeout=5).status


def test_a_letter_leaves_one_stub_a_firing_in_the_logbook_of_its_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("checkpoint-4", "checkpoint-12", "checkpoint-16.aside-now"):
        write_json(run / f"checkpoints/train/{name}/complete.json", {})
    (run / "checkpoints/train/checkpoint-20").mkdir()  # not whole
    first, later = "2026-11-29T12:00:00.123456789Z", "2026-11-29T15:00:00.5Z"
    for since in (first, first):  # told again, also by an inbox that began anew
        clerk = live.clerk(run)
        assert [posted(clerk, since), posted(clerk, since), posted(clerk, since, run="other")] == [204] * 3
        clerk.close()
    text = (run / "logbook.md").read_text()
    assert text.count("## ") == 1 and text.count("TrainStalled (critical)") == 1
    assert f"TrainStalled of train, firing since {first}: run: no step for ten minutes." in text
    assert "Last checkpoint before it: checkpoint-12. Action: log. Page: runbooks/TrainStalled.md." in text
    assert "- Found:" in text
    clerk = live.clerk(run)
    posted(clerk, later)
    with pytest.raises(HTTPError, match="415"):
        posted(clerk, "2026-11-29T18:00:00Z", kind="text/plain")  # what a page in a browser could send
    clerk.close()
    text = (run / "logbook.md").read_text()
    assert text.count("TrainStalled (critical)") == 2 and later in text and "18:00" not in text


def test_a_letter_that_could_not_be_noted_is_refused_so_that_it_comes_again(tmp_path: Path) -> None:
    clerk = live.clerk(tmp_path / "run")  # a folder that is not there
    with pytest.raises(OSError):
        posted(clerk, "2026-11-29T12:00:00Z")
    clerk.close()
    assert not clerk.letters
