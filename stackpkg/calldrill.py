"""The drill of a call: real faults in a real job, whose exporter a real Prometheus follows, until the letters came."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

from stackpkg import params, runs
from stackpkg.params import Params
from stackpkg.runs import RunFolder
from stackpkg.telemetry import guard, live, rows, rules
from stackpkg.training import drills, parity, stop

JOB = "job"
NAN, HANG = 5, 9  # steps, from 1
FAULTS = [{"kind": "nan_gradient", "step": NAN, "rank": 1}, {"kind": "hang", "step": HANG, "rank": 1}]
CALLS = {"TrainNonFinite": NAN, "TrainStalled": HANG}  # alert -> the step of its fault


def profile() -> Params:
    """The job of the fault drills on two processes, with an exporter; rows come to the disk with each checkpoint."""
    p = drills.profile(drills.Drill("", (), layout={"restarts": 0, "hang_minutes": 2.0}), 2)
    return params.validate(p.model_dump(mode="json") | {"telemetry": {"export": True, "budget": 1.0}})


def drill(run: str, seconds: float = 90.0) -> dict[str, Any]:
    """Launch the job below `outbox/.called-<run>`, which is removed, follow it with servers of our own, and kill it
    when every letter is there. Of each letter its receiver, its page and `delay_seconds`, from the fault's row, or from
    the last one.

    Waits at most `seconds`. Raises `ValueError` where the servers are not installed.
    """
    folder, p = RunFolder(f".called-{run}/drill"), profile()
    shutil.rmtree(folder.path)
    place, home = folder.path.parent, folder.path / "checkpoints" / JOB
    told = folder.path / f"telemetry/{JOB}/rank-00000.jsonl"
    text = rules.render([alert.drilled() for alert in guard.load(p)], 0.25, 0.25)
    try:
        parity.prepare(folder.path, p)
        with ThreadPoolExecutor(1) as pool, closing(live.Inbox()) as inbox, closing(live.clerk(folder.path)) as clerk:
            job = pool.submit(drills.attempt, folder, p, FAULTS)
            while not (told.exists() and told.stat().st_size) and not job.done():
                time.sleep(0.1)
            with live.servers(place / "servers", text, place / ".targets", inbox.hooks, clerk.at):
                missed = inbox.wait([*CALLS], 0, seconds, JOB)
                stop.kill(home, "the drill is over")
                said = job.result().partition("\n")[0]
        table = rows.read(told.parent)
        ended = table.groupby("step").time.max()
        letters = [letter for name in CALLS if (letter := inbox.first(name, job=JOB))]
        for letter in letters:
            fault = ended.get(CALLS[letter["alert"]], ended.max())
            letter["delay_seconds"] = round(letter.pop("received") - float(fault), 1)
        return {"at": runs.now(), "run": run, "letters": letters, "missed": missed, "said": runs.portable(said),
                "steps": int(ended.index.max())}  # fmt: skip
    finally:
        shutil.rmtree(place)
