"""The drill of a call: real faults in a real job, whose exporter a real Prometheus follows, until the letters came."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil

from stackpkg import params, runs
from stackpkg.params import Params
from stackpkg.runs import RunFolder
from stackpkg.telemetry import exporter, guard, live, rows, rules
from stackpkg.training import drills, stop, tiny

JOB = "job"
NAN, HANG = 5, 11  # steps, from 1
# A weight becomes NaN, and the ladder rolls back; then rank 1 hangs, while a byte of a shard flips under rank 0.
CALLS = ("TrainNonFinite", "TrainRolledBack", "TrainStalled", "CheckpointStale", "DataShardCorrupt")
LAST = "TrainTargetAbsent"  # of the exporter, which is killed when these letters are there


def faults(data: Path) -> list[dict[str, Any]]:
    """What is done to the job over the corpus in `data`."""
    shard = max((data / "shards").glob("*.bin"), key=lambda path: path.stat().st_size)
    flipped = {"file": f"data/shards/{shard.name}", "offset": shard.stat().st_size // 2}
    return [
        {"kind": "nan_parameter", "step": NAN, "rank": 1, "attempt": 1},
        {"kind": "hang", "step": HANG, "rank": 1},
        {"kind": "flip_byte", "step": HANG, "rank": 0, **flipped},
    ]


def kill_exporter(folder: Path) -> float:
    """End the process that tells of the job, as a machine short of memory would; when, in unix seconds."""
    for process in psutil.process_iter(["cmdline"]):
        if {exporter.__name__, str(folder)} <= {*(process.info["cmdline"] or ())}:
            process.kill()
    return time.time()


def profile() -> Params:
    """The job of the fault drills on two processes, with an exporter; rows come to the disk with each checkpoint."""
    p = drills.profile(drills.Drill("", (), layout={"restarts": 0, "hang_minutes": 2.0}), 2)
    return params.validate(p.model_dump(mode="json") | {"telemetry": {"export": True, "budget": 1.0}})


def drill(run: str, seconds: float = 90.0) -> dict[str, Any]:
    """Launch the job below `outbox/.called-<run>`, which is removed, follow it with servers of our own, and kill it
    when every letter is there. Of each letter its receiver, its page and `delay_seconds`: from the row of the NaN, the
    first after the roll back, the last row, or the kill of the exporter.

    Waits at most twice `seconds`. Raises `ValueError` where the servers are not installed.
    """
    folder, p = RunFolder(f".called-{run}/drill"), profile()
    shutil.rmtree(folder.path)
    place, home = folder.path.parent, folder.path / "checkpoints" / JOB
    told = folder.path / f"telemetry/{JOB}/rank-00000.jsonl"
    text = rules.render([alert.drilled() for alert in guard.load(p)], 0.25, 0.25)
    try:
        tiny.prepare(folder.path, p)
        with ThreadPoolExecutor(1) as pool, closing(live.Inbox()) as inbox, closing(live.clerk(folder.path)) as clerk:
            job = pool.submit(drills.attempt, folder, p, faults(folder.path / "data"))
            while not (told.exists() and told.stat().st_size) and not job.done():
                time.sleep(0.1)
            with live.servers(place / "servers", text, place / ".targets", inbox.hooks, clerk.at):
                missed = inbox.wait([*CALLS], 0, seconds, JOB)
                killed = kill_exporter(folder.path)
                missed += inbox.wait([LAST], killed, seconds, JOB)
                stop.kill(home, "the drill is over")
                said = job.result().partition("\n")[0]
        table = rows.read(told.parent)
        of_faults = {"TrainNonFinite": table.time[table.step == NAN].min(), LAST: killed,
                     "TrainRolledBack": table.time[table.attempt == 2].min()}  # fmt: skip
        letters = [letter for name in (*CALLS, LAST) if (letter := inbox.first(name, job=JOB))]
        for letter in letters:
            fault = of_faults.get(letter["alert"], table.time.max())
            letter["delay_seconds"] = round(letter.pop("received") - float(fault), 1)
        return {"at": runs.now(), "run": run, "letters": letters, "missed": missed, "said": runs.portable(said),
                "steps": int(table.step.max())}  # fmt: skip
    finally:
        shutil.rmtree(place)
