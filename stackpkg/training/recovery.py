"""What happens when a step goes wrong, and the faults that drill it.

First rung of the ladder: an update whose global gradient norm is not finite is dropped. The gradients are
taken away (select), never multiplied by zero (0 x NaN is NaN), so weights, moments and average stay bit-identical.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stackpkg.training import stop

MAX_CONSECUTIVE_SKIPS = 4


class SkipNonFinite:
    """Counts skipped updates; state that spans steps, so it goes into the checkpoint."""

    def __init__(self) -> None:
        self.total = self.consecutive = 0

    def check(self, model: nn.Module, norm: Tensor) -> bool:
        """True if this update must be skipped. The norm is global, so all ranks agree without another message.

        Raises `FloatingPointError` after four skips in a row: the fault is not a single bad batch.
        """
        if bool(torch.isfinite(norm)):
            self.consecutive = 0
            return False
        self.total += 1
        self.consecutive += 1
        for parameter in model.parameters():
            parameter.grad = None
        if self.consecutive >= MAX_CONSECUTIVE_SKIPS:
            raise FloatingPointError(
                f"the gradient norm was not finite for {self.consecutive} steps in a row: the data or the weights are "
                "damaged. Look at the last rows of the telemetry, then resume from an earlier checkpoint"
            )
        return True


class StopFile(TrainerCallback):
    """Looks for the stop file once a step, on rank 0 alone: one that appears between two looks must not split ranks."""

    def __init__(self, home: Path) -> None:
        self.path, self.seen = home / stop.FILE, False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        flag = torch.tensor(dist.get_rank() == 0 and self.path.exists(), device=args.device)
        dist.broadcast(flag, 0)
        if flag and state.global_step < state.max_steps:
            self.seen = control.should_save = control.should_training_stop = True
        return control


def inject(fault: dict[str, Any], *, step: int, rank: int, attempt: int, model: nn.Module) -> None:
    """Do the damage that `fault` asks for if this is its step, rank and attempt.

    Kinds: `nan_gradient` (one number of one parameter of one rank), `kill` (SIGKILL, as the machine would).
    """
    if (fault["step"], fault["rank"], fault.get("attempt", attempt)) != (step, rank, attempt):
        return
    if fault["kind"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault["kind"] == "nan_gradient":
        gradient = next(p.grad for p in model.parameters() if p.grad is not None)
        shard = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        shard.view(-1)[0] = float("nan")
    else:
        raise ValueError(f"unknown fault {fault['kind']!r}; known: nan_gradient, kill")
