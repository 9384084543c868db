"""Faults on purpose: what drills of the ladder and the tests do to a running job."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stackpkg.training.mesh import local

LOSSES = {"nan_loss": float("nan"), "inf_loss": float("inf")}
OVERFLOW = "overflow"
SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM}
KINDS = (
    *SIGNALS, "kill_saving", "hang", "slow", "disk_full", "clock_back", "hot_rate", "flip_byte", *LOSSES, OVERFLOW,
    "nan_gradient", "inf_gradient", "spike_gradient", "nan_parameter", "inf_parameter", "nan_moment", "inf_moment",
    "inf_second_moment",
)  # fmt: skip
ROOM = 1 << 16  # bytes that a file may have once the disk is full


def meant(fault: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether the fault names this place."""
    named = {key: value if isinstance(value, list) else [value] for key, value in fault.items() if key in here}
    return all(here[key] in values for key, values in named.items())


def spoilt(loss: Tensor, faults: Iterable[dict[str, Any]], here: dict[str, Any]) -> Tensor:
    """The loss of a micro-batch before its backward pass; not a number where a `nan_loss` or `inf_loss` is meant."""
    for fault in faults:
        if fault["kind"] in LOSSES and meant(fault, here):
            loss = loss * LOSSES[fault["kind"]]
    return loss


def overflow(like: Tensor) -> Tensor:
    """A sum of two products less itself: 0 in fp32, and in bf16, which holds every factor exactly, infinity less
    infinity, for the sum of 3.3996e38 is beyond all that rounds to a number there (3.3962e38) and not in fp32."""
    left, right = like.new_tensor([[255 / 128, 7 / 256]]), like.new_tensor([[255 / 128], [1.0]])
    total = (2.0**63 * left) @ (2.0**63 * right)
    return (total - total).sum()


def plant(model: PreTrainedModel, faults: Iterable[dict[str, Any]], here: Callable[[], dict[str, Any]]) -> None:
    """Where a fault is an `overflow`, each training step that it means has one in the head of the model: among its
    outputs and in the numbers that these are computed in."""

    def strike(head: nn.Module, _: Any, logits: Tensor) -> Tensor:
        struck = head.training and any(fault["kind"] == OVERFLOW and meant(fault, here()) for fault in faults)
        return logits + overflow(logits) if struck else logits

    if any(fault["kind"] == OVERFLOW for fault in faults) and (head := model.get_output_embeddings()) is not None:
        head.register_forward_hook(strike)


def flip(path: Path, offset: int | None = None) -> None:
    """Flip the lowest bit of a byte, by itself that in the middle, where it lies, as a failing disk would: who has the
    file mapped reads it so."""
    path.chmod(0o644)
    offset = path.stat().st_size // 2 if offset is None else offset
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0] ^ 1
        stream.seek(offset)
        stream.write(bytes([byte]))


@torch.no_grad()
def inject(
    fault: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settle: Callable[[], None],
    folder: Path = Path(),
    **here: Any,
) -> None:
    """Do the damage that `fault` asks for, between the backward pass and the update, if it names this place.

    `here` is step (from 1), rank, attempt and cursor (step of the data, from 0); a fault names any of them, by a value
    or a list of values. Kinds: `kill` and `terminate` (SIGKILL and SIGTERM, as the machine would,
    but after `settle`: a drill ends the same each time); `hang`, for ever; `slow`, `seconds` later; `disk_full`, from
    when on no file grows beyond `ROOM` bytes; `clock_back`, by a day; `flip_byte`, the one at `offset` of `file`
    below the run's `folder`; `hot_rate`, this update at `factor` times the learning rate; NaN or infinity in one
    number of a gradient, of a weight or of Adam's first moment, from which the next gradients are none; infinity in
    one of its second moment, by which an update is divided, so that the weight learns nothing any more; or a gradient
    10,000 times as large. Done elsewhere are `kill_saving`, while the checkpoint of a step is written, the losses
    of `spoilt`, and the `overflow` that `plant` makes.
    Raises `ValueError` for an unknown kind.
    """
    kind = fault["kind"]
    if kind not in KINDS:
        raise ValueError(f"unknown fault {kind!r}; known: {', '.join(KINDS)}")
    if kind in ("kill_saving", OVERFLOW, *LOSSES) or not meant(fault, here):
        return
    if kind in SIGNALS:
        settle()
        os.kill(os.getpid(), SIGNALS[kind])
        time.sleep(60)  # a signal that Python handles comes a little later
    elif kind == "hang":
        while True:
            time.sleep(60)
    elif kind == "slow":
        time.sleep(fault["seconds"])
    elif kind == "disk_full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))
    elif kind == "clock_back":
        real = time.time
        time.time = lambda: real() - 86_400
    elif kind == "flip_byte":
        flip(folder / fault["file"], fault["offset"])
    elif kind == "hot_rate":
        for group in optimizer.param_groups:  # the schedule sets it anew after the update
            group["lr"] *= fault["factor"]
    else:
        _damage(kind, model, optimizer)


def _damage(kind: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    learning = [(p, p.grad) for p in model.parameters() if p.grad is not None and local(p).numel()]
    if kind == "spike_gradient":
        for _, gradient in learning:
            local(gradient).mul_(1e4)
        return
    first, gradient = learning[0]
    value, _, place = kind.partition("_")
    moments = optimizer.state[first]
    places = {"gradient": gradient, "parameter": first, "moment": moments.get("exp_avg", first)}
    places["second_moment"] = moments.get("exp_avg_sq", first)
    local(places[place]).view(-1)[0] = float(value)
