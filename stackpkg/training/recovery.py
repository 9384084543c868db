"""What happens when a step goes wrong: a ladder of rungs, each tried only when the one before did not help.

1 skip        an update whose global gradient norm is not finite, or a spike, is dropped within its step
2 roll_back   after four in a row of which one is not finite, or weights, moments or an average that are not: the
              newest good checkpoint
3 skip_data   it came back at the same place: from the checkpoint again, without the data of those steps
4 fp32        it came back, in bf16: from the checkpoint again, in fp32 from there to the end
5 stop        it came back: the job ends with a diagnosis

Rungs 2 to 5 begin a new attempt in the same processes and are lines of `ladder.jsonl` in the job's folder.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stackpkg.data import curriculum
from stackpkg.runs import now, write_json
from stackpkg.telemetry.guard import WINDOW, Alert, score
from stackpkg.training.launch import DIAGNOSIS
from stackpkg.training.mesh import local

MAX_CONSECUTIVE_SKIPS = 4
RUNGS = ("skip", "roll_back", "skip_data", "fp32", "stop")
HISTORY = "ladder.jsonl"


class RollBack(FloatingPointError):
    """Gradients, weights, moments or an average were not finite from step `first` to step `last` (from 1), of which
    `row` is what was measured. Raised on all ranks at once."""

    def __init__(self, first: int, last: int, row: dict[str, Any] | None = None) -> None:
        super().__init__(f"numbers were not finite from step {first} to {last}")
        self.first, self.last, self.row = first, last, row or {}


class Skips:
    """Drops updates. The gradients are taken away (select), never multiplied by zero (0 x NaN is NaN), so weights,
    moments and average stay bit-identical. The state spans steps, so it goes into the checkpoint.

    What a spike is, `spike` says (alerts.yaml): so many times the median of a window that learns from accepted steps
    alone. The median absolute deviation is not asked: norms alternate with what a batch carries, so that it is between
    0.01 and 1.8 medians in one sound job. A robust z above 6 drops 14 of 652 sound updates where this rule drops 1, and
    beside a least ratio of 5 or more it decided nothing in ten recorded jobs (`book/log.md`, 29 November 2026).
    Four spikes in a row, and nothing else among them, are a new level: it is accepted, and the window learns anew. Four
    dropped updates in a row of which any was not finite (`broken` counts those) are a fault: a norm that is no number
    says nothing of a level, and a spike between two of them doesn't make them sound. So no job drops more than four
    in a row, or five where a number that is none follows on four spikes.
    """

    def __init__(self, spike: Alert) -> None:
        self.spike, self.total, self.consecutive, self.broken = spike, 0, 0, 0
        self.window: deque[float] = deque(maxlen=WINDOW)

    def check(self, model: nn.Module, norm: Tensor) -> bool:
        """True if the update must be skipped. The norm is global, so all ranks agree without a message."""
        value, capped = float(norm), self.consecutive >= MAX_CONSECUTIVE_SKIPS and not self.broken
        bad = not math.isfinite(value)
        if not bad and (capped or score(self.spike, value, self.window) <= float(self.spike.threshold)):
            if capped:
                self.window.clear()
            self.consecutive = self.broken = 0
            self.window.append(value)
            return False
        self.total, self.consecutive = self.total + 1, self.consecutive + 1
        self.broken += bad
        for parameter in model.parameters():
            parameter.grad = None
        return True

    def judge(self, row: dict[str, Any], step: int) -> None:
        """Raises `RollBack` for what was measured of `step`: weights that are not finite, for where is not seen in a
        gradient until that number is used; the fourth dropped update in a row, unless all of them are spikes, for then
        it is no single bad batch. The fault is these four.
        """
        if not math.isfinite(row["weight_norm"]):
            raise RollBack(step, step, row)
        if self.broken and self.consecutive >= MAX_CONSECUTIVE_SKIPS:
            raise RollBack(step - MAX_CONSECUTIVE_SKIPS + 1, step, row)

    def state_dict(self) -> dict[str, Any]:
        counts = {"total": self.total, "consecutive": self.consecutive, "broken": self.broken}
        return counts | {"window": list(self.window)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.consecutive, self.broken = state["total"], state["consecutive"], state["broken"]
        self.window = deque(state["window"], maxlen=WINDOW)


def finite(held: Iterable[Any]) -> bool:
    """Whether every number that this rank holds of these tensors is finite. Each is read once and none is copied: where
    one number is NaN or infinite, the least or the largest of all is."""
    parts = (part.detach() for each in held if isinstance(each, Tensor) and (part := local(each)).numel())
    return all(bool(end.isfinite()) for part in parts for end in torch.aminmax(part))


def history(home: Path) -> list[dict[str, Any]]:
    """The rungs that the job in `home` has climbed, in order: rung, first, last, good, attempt, at."""
    return curriculum.decisions(home / HISTORY)


def climb(home: Path, attempt: int, fault: RollBack, precision: str) -> str:
    """The next rung at the place of `fault`, prepared on disk and recorded: for rank 0, between two attempts. It is the
    same place until a checkpoint is reached that is newer than the one gone back to.

    Checkpoints from the fault on are set aside, not deleted. When nothing is left to try it is "stop", and
    `diagnosis.json` says what was tried; a launch after that begins the ladder anew.
    """
    steps = {int(path.name[11:]): path for path in home.glob("checkpoint-*") if path.name[11:].isdigit()}
    good, events = max((step for step in steps if step < fault.first), default=0), history(home)
    ends = [number for number, event in enumerate(events) if event["rung"] == "stop"]
    tried = [event["rung"] for event in events[max(ends, default=-1) + 1 :] if event["good"] >= good]
    rung = next(r for r in RUNGS[1:] if r == "stop" or (r not in tried and (r != "fp32" or precision == "bf16")))
    event = {"rung": rung, "first": fault.first, "last": fault.last, "good": good, "attempt": attempt, "at": now()}
    for step, checkpoint in steps.items():
        if step >= fault.first:
            checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.aside-{attempt}"))
    # what is decided counts steps from 0; a rank that died right here has decided it already
    passed = {"kind": "skip", "step": fault.first - 1, "steps": fault.last - fault.first + 1}
    if rung == "skip_data" and passed not in curriculum.decisions(home / "decisions.jsonl"):
        curriculum.record(home / "decisions.jsonl", [passed])
    if rung == "stop":
        message = (
            f"{fault}, and again after {', '.join(tried)}: the fault is in the weights, the code or the machine. Look "
            "at the last rows of the telemetry and at diagnosis.json, then resume from an earlier checkpoint"
        )
        write_json(home / DIAGNOSIS, event | {"tried": tried, "message": message})
    curriculum.record(home / HISTORY, [event])
    return rung
