"""A Prometheus and an Alertmanager of one's own, on loopback, and an inbox for what they send."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import yaml

from stackpkg.runs import write_text
from stackpkg.telemetry import logbook, rules
from stackpkg.telemetry.privacy import clean

HOST = "127.0.0.1"
PROGRAMS = {"prometheus": ("prometheus",), "alertmanager": ("prometheus-alertmanager", "alertmanager")}
PATIENCE = 60.0  # seconds that a server may take to begin


def program(name: str) -> str | None:
    """Where a server is installed; Debian calls Alertmanager prometheus-alertmanager."""
    return next((found for called in PROGRAMS[name] if (found := shutil.which(called))), None)


def missing() -> list[str]:
    """Servers that are not installed here."""
    return [name for name in PROGRAMS if not program(name)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Inbox:
    """Receives Alertmanager's webhooks. `letters`: receiver, alert, status, severity, action, run, job, runbook,
    `since` when it fires, `received` in unix seconds; one for each alert, in the order in which they came. Each letter
    is given to `heard`, one after the other, before Alertmanager is answered: what raises there is sent again.
    """

    def __init__(self, port: int = 0, heard: Callable[[dict[str, Any]], object] = lambda letter: None) -> None:
        self.letters: list[dict[str, Any]] = []
        inbox, turn = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                if self.headers["Content-Type"] != "application/json":  # a page in a browser may not send that
                    self.send_error(415, "application/json is taken, as Alertmanager sends it")
                    return
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with turn:
                    for alert in body["alerts"]:
                        labels, notes = alert["labels"], alert["annotations"]
                        letter = clean({
                            "receiver": self.path.strip("/"), "alert": labels["alertname"], "status": alert["status"],
                            "severity": labels["severity"], "action": labels["action"], "run": labels.get("run", ""),
                            "job": labels.get("job", ""), "runbook": notes["runbook_url"], "summary": notes["summary"],
                            "received": time.time(),
                        })  # fmt: skip
                        letter["since"] = alert["startsAt"]
                        heard(letter)
                        inbox.letters.append(letter)
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer((HOST, port), Handler)
        self.at = f"http://{HOST}:{self.server.server_port}"
        self.hooks = {name: f"{self.at}/{name}" for name in sorted({*rules.RECEIVERS.values()})}
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def first(self, alert: str, since: float = 0.0, job: str = "") -> dict[str, Any] | None:
        """The first letter about `alert` that fires, after `since`."""
        return next(
            (
                letter for letter in [*self.letters]
                if letter["alert"] == alert and letter["status"] == "firing" and letter["received"] >= since
                and job in ("", letter["job"])
            ),
            None,
        )  # fmt: skip

    def wait(self, alerts: list[str], since: float, seconds: float, job: str = "") -> list[str]:
        """Alerts of which nothing came within `seconds`."""
        end = time.monotonic() + seconds
        while left := [name for name in alerts if not self.first(name, since, job)]:
            if time.monotonic() > end:
                return left
            time.sleep(0.2)
        return []

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def clerk(run: Path, port: int = 0) -> Inbox:
    """An inbox that writes what it gets about jobs of the run in the folder `run` into that run's logbook."""

    def note(letter: dict[str, Any]) -> None:
        if letter["run"] == run.name:
            whole = (run / "checkpoints" / letter["job"]).glob("checkpoint-*/complete.json")
            steps = [int(step) for path in whole if (step := path.parent.name.partition("-")[2]).isdigit()]
            logbook.received(run, letter, f"checkpoint-{max(steps)}" if steps else "")

    return Inbox(port, note)


@contextmanager
def servers(place: Path, rules_text: str, targets: Path, hooks: dict[str, str], clerk: str) -> Iterator[str]:
    """Both servers with their files in the folder `place`, which is emptied, scraping once a second what the JSON files
    in `targets` name, and telling `hooks`, and `clerk` what is for the logbook. Gives Prometheus' address; both are
    ended at the end. Raises `RuntimeError` with the end of its log where one does not begin, `ValueError` where one is
    not installed.
    """
    if absent := missing():
        raise ValueError(f"{', '.join(absent)} is not installed; on Debian: prometheus, prometheus-alertmanager")
    shutil.rmtree(place, ignore_errors=True)  # Alertmanager would not tell again what it told from there before
    place.mkdir(parents=True)
    ports = {name: free_port() for name in PROGRAMS}
    at = {name: f"http://{HOST}:{port}" for name, port in ports.items()}
    write_text(place / "rules.yml", rules_text)
    write_text(place / "alertmanager.yml", rules.routes(hooks, wait="1s", logbook=clerk))
    scrape = {
        "job_name": "stackpkg", "honor_labels": True,
        "file_sd_configs": [{"files": [f"{targets}/*.json"], "refresh_interval": "1s"}],
    }  # fmt: skip
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yml"],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [f"{HOST}:{ports['alertmanager']}"]}]}]},
        "scrape_configs": [scrape],
    }
    write_text(place / "prometheus.yml", yaml.safe_dump(config, sort_keys=False))
    commands = {
        "alertmanager": ["--config.file=alertmanager.yml", "--storage.path=alertmanager", "--cluster.listen-address="],
        # what fires before it has found Alertmanager is told again
        "prometheus": [
            "--config.file=prometheus.yml",
            "--storage.tsdb.path=prometheus",
            "--rules.alert.resend-delay=5s",
        ],
    }
    with ExitStack() as running:
        for name, options in commands.items():
            said = running.enter_context((place / f"{name}.log").open("w"))
            listen = f"--web.listen-address={HOST}:{ports[name]}"
            child = subprocess.Popen([str(program(name)), *options, listen], cwd=place, stdout=said, stderr=said)
            running.callback(_end, child)
            _ready(at[name], child, place / f"{name}.log")
        yield at["prometheus"]


def _ready(address: str, child: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and child.poll() is None:
        try:
            with urlopen(f"{address}/-/ready", timeout=2):  # noqa: S310  http on loopback
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"a server did not begin:\n{log.read_text(errors='replace')[-800:]}")


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
