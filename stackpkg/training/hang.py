"""A rank that makes no progress: the stacks of all ranks on the disk, then an end that torch elastic restarts from.

A beat is a forward pass, of training or of an evaluation, and the end of a step; to wait for the disk is none of its
business, the saver has a limit of its own. Ranks that wait in a collective for
one that hangs have no beats either, so all of them tell, and the one that does not wait is the one to look at. A rank
that holds the interpreter's lock in C cannot tell; then it is the one that is missing.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stackpkg.runs import read_json, write_json
from stackpkg.training.stop import KILL

FOLDER = "hang"  # in the job's folder: rank<k>.json and the stacks, rank<k>.txt
GRACE = 5.0  # seconds between the stacks of one rank and its end: the others are to write theirs
STATUS = 70  # of a rank that ends itself
WAITING = ("torch/distributed/", "_collectives")  # in what a thread does that waits for other ranks
NEAR = 8  # frames from the innermost one that tell what a thread does


class Watch(TrainerCallback):
    """Ends this rank when `minutes` go by without a beat, or a `kill` file is there. A thread looks; nothing waits for
    it."""

    def __init__(self, home: Path, rank: int, minutes: float) -> None:
        self.folder, self.rank, self.limit = home / FOLDER, rank, 60 * minutes
        self.step, self.last, self.awake = 0, time.monotonic(), False
        self.saving: Callable[[], bool] = lambda: False
        threading.Thread(target=self._look, name="hang watch", daemon=True).start()

    def listen(self, model: nn.Module, saving: Callable[[], bool] = lambda: False) -> None:
        """Take each forward pass of `model` for a beat, and look away while `saving()`: it waits for the disk."""
        self.saving = saving
        model.register_forward_pre_hook(lambda *_: self.beat())

    def beat(self) -> None:
        self.last = time.monotonic()

    def rest(self) -> None:
        """Between attempts and after the last: to load or to gather a model takes its time."""
        self.awake = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step, self.last, self.awake = state.global_step, time.monotonic(), True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step = state.global_step
        self.beat()

    def _look(self) -> None:
        while True:
            time.sleep(min(2.0, self.limit / 4))
            if (self.folder.parent / KILL).exists():
                os._exit(STATUS)
            if self.saving():
                self.beat()
            if self.awake and (silent := time.monotonic() - self.last) > self.limit:
                self.folder.mkdir(exist_ok=True)
                with (self.folder / f"rank{self.rank}.txt").open("w") as stacks:
                    faulthandler.dump_traceback(stacks, all_threads=True)
                write_json(self.folder / f"rank{self.rank}.json", {"step": self.step + 1, "silent": round(silent, 1)})
                time.sleep(GRACE)
                os._exit(STATUS)


def waits(stacks: str) -> bool:
    """Whether a thread, in what `faulthandler` wrote of all threads of a rank, waits for other ranks."""
    threads = [part.splitlines()[:NEAR] for part in stacks.split("\n\n") if "hang watch" not in part]
    return any(word in line for lines in threads for line in lines for word in WAITING)


def found(home: Path, ranks: int, attempt: int) -> dict[str, Any] | None:
    """What the ranks of an attempt that hung left, put aside as `hang-<attempt>`: the `step`, and `ranks` that did not
    wait for others, or told nothing; all of them where none stands out. For rank 0, before another attempt.
    """
    folder = home / FOLDER
    if not folder.exists():
        return None
    told = {int(path.stem[4:]): read_json(path) for path in folder.glob("rank*.json")}
    waiting = {rank for rank in told if waits((folder / f"rank{rank}.txt").read_text())}
    kept = folder.rename(home / f"{FOLDER}-{attempt}")
    behind = sorted(set(range(ranks)) - waiting) or sorted(told)
    step = min((about["step"] for about in told.values()), default=0)
    return {"ranks": behind, "step": step, "stacks": kept.name}
