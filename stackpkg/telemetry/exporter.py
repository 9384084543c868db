"""What a job's files say, for Prometheus, on loopback: a process that follows them, so it outlives what it tells of.

`python -m stackpkg.telemetry.exporter outbox/<run> <job>` serves until it ends, at a free port that it writes into
`outbox/.targets/<run>.<job>.json`, for Prometheus' file-based discovery. A job that hangs has an old heartbeat; when
this process is gone before its target file is, the target is absent.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from stackpkg.data import manifest
from stackpkg.runs import write_json
from stackpkg.telemetry.rows import KEY

HOST = "127.0.0.1"
WORST = 60.0  # seconds of rows whose extremes are told, so that no step slips through between two scrapes
TAIL = 1 << 20  # bytes of a row file that are read of what was there before
LISTS = {
    "router_usage": ("layer", "expert"),
    "router_entropy_layers": ("layer",),
    "router_regret_layers": ("layer",),
    "attention_entropy_heads": ("layer", "head"),
}  # series of many values -> the label of each index
SHARED = ("loss", "grad_norm", "weight_norm")  # sums over all ranks, told by each of them
BLOCKS = manifest.OPENING >> 4  # of the corpus that a pass over it reads again, or one of each shard
REST, SHARE = 5.0, 100  # seconds between two passes at least, and as many times what the last one took


class Rows:
    """The whole lines that were added to the row files of a job since it was asked last; at first the last `tail`
    bytes of each, or all."""

    def __init__(self, folder: Path, tail: int | None = TAIL) -> None:
        self.folder, self.tail, self._read = folder, tail, dict[Path, int]()

    def added(self) -> list[dict[str, Any]]:
        found = []
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            size = path.stat().st_size
            start = self._read.get(path, 0 if self.tail is None else max(0, size - self.tail))
            start = start if start <= size else 0  # another job of this name began
            with path.open("rb") as stream:
                stream.seek(start)
                text = stream.read()
            lines = text[: text.rfind(b"\n") + 1]
            self._read[path] = start + len(lines)
            for line in lines.splitlines():
                try:
                    found.append(json.loads(line))
                except ValueError:  # torn by a crash, or cut at the start of the tail
                    continue
        return found


class Job(Collector):
    """Gauges `train_<name>{run, job}`: of rank 0's last row every number, and its extremes of a minute as
    `max_<series>` and `min_<series>` (finite values alone); `attempt`, `step`; `heartbeat_time` and `checkpoint_time`
    (unix seconds; of the launch, where there is none newer); `disk_free_bytes`; `shards_corrupt`; and
    `rank_divergence`, the largest (max - min) / |max| over ranks of what all of them must report alike. And of
    rank 0's last row that has one, each series of `LISTS`, its values apart by the labels there, from 0.
    """

    def __init__(self, folder: Path, job: str) -> None:
        self.folder, self.home, self.labels = folder, folder / "checkpoints" / job, (folder.name, job)
        self._rows, self._last, self._corrupt = Rows(folder / "telemetry" / job), dict[str, float](), 0
        self._lists = dict[str, Any]()
        self._recent, self._steps = deque[dict[str, float]](), dict[tuple[int, int], dict[int, dict[str, Any]]]()
        self._apart, self._lock = 0.0, threading.Lock()

    def look(self) -> float:
        """Read a sample of the corpus again; returns the seconds to rest before the next time."""
        began, data = time.monotonic(), self.folder / "data"
        try:
            share = -(-BLOCKS // max(1, len(manifest.read(data)["shards"])))
            self._corrupt = len(manifest.verify(data, sample=share))
        except (OSError, ValueError):  # the manifest itself
            self._corrupt = 1
        return max(REST, SHARE * (time.monotonic() - began))

    def _told(self) -> dict[str, float]:
        now, launched = time.time(), _time(self.home / "job.json")
        for row in self._rows.added():
            self._compare(row)
            if row["rank"] == 0:
                self._recent.append(numbers(row))
                self._last |= self._recent[-1]
                self._lists |= {name: value for name in LISTS if (value := row.get(name))}
        while self._recent and self._recent[0]["time"] < now - WORST:
            self._recent.popleft()
        told = {name: value for name, value in self._last.items() if name != "time"}
        for name in [*told]:
            seen = [row[name] for row in self._recent if math.isfinite(row.get(name, math.nan))]
            told |= {f"max_{name}": max(seen), f"min_{name}": min(seen)} if seen else {}
        saved = map(_time, self.home.glob("checkpoint-*/complete.json"))
        told |= {
            "heartbeat_time": max(launched, self._last.get("time", 0.0)),
            "checkpoint_time": max([launched, *saved]),
        }
        told |= {"disk_free_bytes": shutil.disk_usage(self.folder).free, "shards_corrupt": self._corrupt}
        return told | {"rank_divergence": self._apart}

    def _compare(self, row: dict[str, Any]) -> None:
        """Keep the row until those of all ranks are there: files are flushed in blocks, each rank's in its own time."""
        key = row["attempt"], row["step"]
        self._steps.setdefault(key, {})[row["rank"]] = row
        if len(self._steps[key]) == row["ranks"]:
            self._apart = divergence(list(self._steps[key].values()))
            self._steps = {later: ranks for later, ranks in self._steps.items() if later > key}

    def collect(self) -> Iterator[GaugeMetricFamily]:
        with self._lock:
            told, lists = self._told(), {**self._lists}
        for name, value in told.items():
            gauge = GaugeMetricFamily(f"train_{name}", "", labels=("run", "job"))
            gauge.add_metric(self.labels, value)
            yield gauge
        for name, value in lists.items():
            gauge = GaugeMetricFamily(f"train_{name}", "", labels=("run", "job", *LISTS[name]))
            for place, number in entries(value):
                gauge.add_metric((*self.labels, *place), number)
            yield gauge


def entries(value: Any) -> Iterator[tuple[tuple[str, ...], float]]:
    """Every number of nested lists with the indices that lead to it."""
    if not isinstance(value, list):
        yield (), value
        return
    for index, part in enumerate(value):
        for place, number in entries(part):
            yield (str(index), *place), number


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The series of a row, with `attempt`, `step` and `time`; lists, names and what was not measured are left out."""
    kept = {name: value for name, value in row.items() if isinstance(value, int | float)}
    return {name: value for name, value in kept.items() if name not in KEY or name in ("attempt", "step")}


def divergence(rows: list[dict[str, Any]]) -> float:
    """Largest (max - min) / |max| of `SHARED` over the rows of one step, one row a rank; values that are not finite are
    left out."""
    told = [[value for row in rows if math.isfinite(value := row.get(name, math.nan))] for name in SHARED]
    return max(((max(v) - min(v)) / max(abs(max(v)), 1e-12) for v in told if v), default=0.0)


def _time(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def target(folder: Path, job: str) -> Path:
    """Where Prometheus finds the exporter of a job, for as long as the job is to run."""
    return folder.parent / ".targets" / f"{folder.name}.{job}.json"


def serve(folder: Path, job: str) -> WSGIServer:
    """Answer on a free port of this machine, which the target file tells."""
    registry, collector = CollectorRegistry(), Job(folder, job)
    registry.register(collector)
    server, _ = start_http_server(0, HOST, registry)

    def look() -> None:
        while True:
            time.sleep(collector.look())

    threading.Thread(target=look, daemon=True).start()
    labels = {"run": folder.name, "job": job}
    write_json(target(folder, job), [{"targets": [f"{HOST}:{server.server_port}"], "labels": labels}])
    return server


if __name__ == "__main__":
    serve(Path(sys.argv[1]).resolve(), sys.argv[2])
    threading.Event().wait()
