"""A job that is well, and then is not, in files alone: what the exporter of a drill follows."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stackpkg.runs import write_json
from stackpkg.telemetry import exporter
from stackpkg.telemetry.guard import Alert
from stackpkg.telemetry.live import Inbox
from stackpkg.telemetry.rows import RowWriter

CALM: dict[str, Any] = {  # a run that is well
    "loss": 2.0, "grad_norm": 1.0, "weight_norm": 5.0, "router_entropy": 0.6, "attention_entropy_median": 0.5,
    "precision_at_k": 1.0, "data_wait_seconds": 0.0, "tokens_per_second": 1000.0, "violations": 0.0, "nonfinite": 0,
    "update_skipped": 0, "recovery_rung": 0, "router_usage": [[0.4, 0.6], [0.5, 0.5]],
}  # fmt: skip
JOB, FILLER = "drill", 8 << 20  # bytes that are written each time that the disk is to fill


class Rehearsal:
    """Two ranks of the job `drill` below `place`, over a copy of a run's corpus. `exported` is a process of its own."""

    def __init__(self, place: Path, data: Path) -> None:
        shutil.rmtree(place, ignore_errors=True)
        self.place, self.step = place, 0
        shutil.copytree(data, place / "data", ignore=shutil.ignore_patterns("parts", "quarantine", "audit*"))
        self.home = place / "checkpoints" / JOB
        write_json(self.home / "job.json", {})
        self.ranks = [RowWriter(place / "telemetry" / JOB, place.name, 1, rank, 2) for rank in (0, 1)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", exporter.__name__, str(place), JOB]
        exporter.target(place, JOB).unlink(missing_ok=True)
        self.exported = subprocess.Popen(command, env=environment)
        while not exporter.target(place, JOB).exists() and self.exported.poll() is None:
            time.sleep(0.1)  # what is calm must be seen to be

    def rows(
        self, seconds: float, fault: dict[str, Any] | None = None, apart: bool = False, saves: bool = True
    ) -> None:
        """Four rows a second of each rank for `seconds`; with `apart` rank 1 has other weights."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.step += 1
            wobble = 0.02 * math.sin(self.step)
            row = CALM | {"loss": 2.0 + wobble} | (fault or {})
            for rank, writer in enumerate(self.ranks):
                writer.write(self.step, **(row | {"weight_norm": 5.0 + 2.0 * (apart and rank == 1)}))
                writer.flush()
            if saves:
                write_json(self.home / "checkpoint-1/complete.json", {"step": self.step})
            time.sleep(0.25)

    def corrupt(self) -> str:
        """Flip a byte in the middle of the largest shard; its name."""
        shard = max((self.place / "data/shards").glob("*.bin"), key=lambda path: path.stat().st_size)
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.chmod(0o644)
        shard.write_bytes(bytes(content))
        return shard.name

    def fill(self, times: int) -> None:
        """Write on the disk, so that it would be full one day."""
        with (self.place / "filler").open("ab") as stream:
            for _ in range(times):
                stream.write(os.urandom(FILLER))
                stream.flush()
                os.fsync(stream.fileno())

    def faults(self, alerts: Iterable[Alert]) -> dict[str, Any]:
        """The values that the drills of `alerts` write into rows."""
        inside = [alert for alert in alerts if alert.seen == "job"]
        found = {alert.series: alert.drill.fault for alert in inside if alert.name != "TrainRouterEntropyHigh"}
        return {name: int(value) if isinstance(CALM.get(name), int) else value for name, value in found.items()}

    def go_wrong(self, alerts: list[Alert], inbox: Inbox) -> dict[str, float]:
        """Everything at once, then what needs that to be over; when each fault was put in, in unix seconds. Ends early
        once `inbox` has a letter about each.
        """
        late = ("TrainRouterEntropyHigh", "TrainStalled", "TrainTargetAbsent")
        at_once = [alert.name for alert in alerts if alert.name not in (*late, "Watchdog")]
        found = dict.fromkeys([*at_once, "Watchdog"], began := time.time())
        self.corrupt()
        for _ in range(20):
            self.rows(2, self.faults(alerts), apart=True, saves=False)
            self.fill(3)
            if not inbox.wait(at_once, began, 0):
                break
        found["TrainRouterEntropyHigh"] = time.time()
        self.rows(4, {"router_entropy": 1.0})
        found["TrainStalled"] = time.time()  # no row comes any more
        inbox.wait([*late[:2]], found["TrainRouterEntropyHigh"], 30)
        found["TrainTargetAbsent"] = time.time()
        self.exported.kill()
        inbox.wait(["TrainTargetAbsent"], found["TrainTargetAbsent"], 30)
        return found

    def close(self) -> None:
        """End the exporter and remove everything."""
        self.exported.kill()
        self.exported.wait()
        exporter.target(self.place, JOB).unlink(missing_ok=True)
        shutil.rmtree(self.place, ignore_errors=True)
