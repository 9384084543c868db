"""Real servers on loopback: a letter arrives at the receiver of its severity, and nothing is left running."""

import socket
import subprocess
import time
from pathlib import Path
from urllib.parse import urlsplit

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
    inbox, data = live.Inbox(), tmp_path / "data"
    (data / "shards").mkdir(parents=True)
    write_json(data / "manifest.json", {})  # no corpus: that alone must be told
    job = rehearsal.Rehearsal(tmp_path / "outbox/run", data)
    try:
        text = rules.render(DRILLED, 0.25, 0.25)
        with live.servers(tmp_path / "servers", text, tmp_path / "outbox/.targets", inbox.hooks) as address:
            since = time.time()
            job.rows(6)
            job.rows(6, {"nonfinite": 1, "data_wait_seconds": 30.0})
            late = inbox.wait(["TrainNonFinite", "TrainDataWait", "DataShardCorrupt", "Watchdog"], since, 40)
        assert not late, late
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
    assert job.exported.poll() is not None and not (tmp_path / "outbox/run").exists()


@needs_servers
def test_a_server_that_does_not_begin_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    inbox = live.Inbox()
    try:
        with (
            pytest.raises(RuntimeError, match="a server did not begin"),
            live.servers(tmp_path, "groups: [{name: x, rules: [{alert: A, expr: '('}]}]", tmp_path, inbox.hooks),
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
        live.servers(tmp_path, "", tmp_path, {}),
    ):
        pass
