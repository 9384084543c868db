"""The live page, asked over HTTP while rows come in: it follows, escapes, and answers this machine alone."""

import http.client
import json
import math
import re
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest

from stackpkg import runs
from stackpkg.telemetry import page, privacy
from stackpkg.telemetry.rows import RowWriter

NAUGHTY = '<img src=x onerror=alert(1)>"</script>'


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "demo"
    run.mkdir()
    return run


@pytest.fixture
def server(run: Path) -> Iterator[ThreadingHTTPServer]:
    made = page.serve(run, "train<b>", "127.0.0.1:0")
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def get(server: ThreadingHTTPServer, path: str, **headers: str) -> tuple[int, dict[str, str], str]:
    link = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    link.request("GET", path, headers=headers)
    answer = link.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read().decode()


def told(server: ThreadingHTTPServer) -> dict:
    status, _, body = get(server, "/data")
    assert status == 200
    return json.loads(body, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_it_follows_a_job_from_before_its_first_row_over_a_restart(server: ThreadingHTTPServer, run: Path) -> None:
    assert told(server) == {"state": "no rows yet", "step": 0, "panels": [], "events": []}
    runs.write_json(run / "checkpoints/train<b>/job.json", {"params": {}})
    writer = RowWriter(run / "telemetry/train<b>", "demo", 1, 0, 1)
    for step in range(1, 6):
        writer.write(step, loss=math.nan if step == 4 else float(step), grad_norm=1.0)
    writer.flush()
    seen = told(server)
    loss = next(panel for panel in seen["panels"] if panel["title"] == "Loss, total and held-out")
    assert seen["step"] == 5 and "step 5, attempt 1, last row" in seen["state"]
    assert loss["lines"]["loss"] == [[1, 1], [2, 2], [3, 3], [5, 5]] and loss["broken"] == [4]
    runs.write_json(run / "checkpoints/train<b>/job.json", {"params": {}})  # launched again
    again = RowWriter(run / "telemetry/train<b>", "demo", 2, 0, 1)
    again.write(4, loss=40.0)
    again.write(6, loss=60.0)
    again.flush()
    privacy.append(run / "telemetry/train<b>.alerts.jsonl", [{"step": 6, "attempt": 2, "alert": NAUGHTY}])
    seen = told(server)
    loss = next(panel for panel in seen["panels"] if panel["title"] == "Loss, total and held-out")
    assert loss["lines"]["loss"] == [[1, 1], [2, 2], [3, 3], [4, 40], [5, 5], [6, 60]] and not loss["broken"]
    assert "attempt 2" in seen["state"] and seen["events"][0].startswith("step 6: alert")
    runs.write_json(run / "checkpoints/train<b>/done.json", {})
    assert told(server)["state"].endswith("last row done")


def test_the_page_loads_nothing_and_runs_nothing_of_what_it_shows(server: ThreadingHTTPServer) -> None:
    status, headers, body = get(server, "/")
    assert status == 200 and "<title>demo: train&lt;b&gt;</title>" in body and "<b>" not in body
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?://(?!www\.w3\.org/2000/svg)", body)
    assert "innerHTML" not in body and "eval(" not in body
    nonce = re.search(r'<script nonce="([\w-]+)">', body)[1]
    policy = headers["Content-Security-Policy"]
    assert policy == (f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'")
    assert nonce not in get(server, "/")[2], "a new one for each page"
    assert (headers["Cache-Control"], headers["X-Content-Type-Options"]) == ("no-store", "nosniff")


def test_it_answers_nobody_else(server: ThreadingHTTPServer, run: Path) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert get(server, "/data", Host="evil.example:80")[0] == 403
    for path in ("/../demo", "/telemetry/train/rank-00000.jsonl", "/data/x"):
        assert get(server, path)[0] == 404
    for address in ("0.0.0.0:0", "192.168.1.7:80", ":8000", "8000", "example.org:80", "127.0.0.1:x"):
        with pytest.raises(ValueError, match=r"is no address of this machine alone; give 127\.0\.0\.1:PORT"):
            page.serve(run, "train", address)


def test_a_long_series_loses_no_spike() -> None:
    values = pd.Series(range(10_000), dtype=float)
    values[1234], values[777] = 1e9, math.nan
    points = page.thin(values)
    assert len(points) <= 2 * page.MOST and [1234, 1e9] in points and points == sorted(points)
    assert points[0] == [0, 0.0] and points[-1] == [9999, 9999.0]


@pytest.mark.book
def test_a_browser_draws_it_and_runs_no_script_of_the_data(server: ThreadingHTTPServer, run: Path) -> None:
    import shutil

    from playwright.sync_api import sync_playwright

    browser = shutil.which("chromium")
    if not browser:
        pytest.skip("chromium is not installed")
    writer = RowWriter(run / "telemetry/train<b>", "demo", 1, 0, 1)
    for step in range(1, 4):
        writer.write(step, loss=float(step))
    writer.flush()
    privacy.append(run / "telemetry/train<b>.alerts.jsonl", [{"step": 3, "attempt": 1, "alert": NAUGHTY}])
    with sync_playwright() as play:
        chrome = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        shown, asked, wrong = chrome.new_page(), [], []
        shown.on("request", lambda request: asked.append(request.url))
        shown.on("console", lambda line: wrong.append(line.text))
        shown.on("dialog", lambda dialog: wrong.append(dialog.message))
        shown.goto(f"http://127.0.0.1:{server.server_port}/")
        shown.wait_for_selector("body[data-step='3']")
        assert shown.locator("figure polyline").count() and NAUGHTY.split('"')[0] in shown.inner_text("#events")
        writer.write(4, loss=9.0)
        writer.flush()
        shown.wait_for_selector("body[data-step='4']")
        assert not wrong and not shown.locator("img").count()
        assert {url.split("/")[2] for url in asked} == {f"127.0.0.1:{server.server_port}"}
        chrome.close()
