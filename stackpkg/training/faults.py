"""Faults on purpose: what drills the ladder and the tests do to a running job."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stackpkg.training.mesh import local

KINDS = ("kill", "kill_saving", "nan_gradient", "inf_gradient", "spike_gradient", "nan_parameter", "nan_moment")


def meant(fault: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether the fault names this place."""
    named = {key: value if isinstance(value, list) else [value] for key, value in fault.items() if key in here}
    return all(here[key] in values for key, values in named.items())


@torch.no_grad()
def inject(
    fault: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, settle: Callable[[], None], **here: Any
) -> None:
    """Do the damage that `fault` asks for, between the backward pass and the update, if it names this place.

    `here` is step (from 1), rank, attempt, cursor (step of the data, from 0) and precision; a fault names any of them,
    by a value or a list of values. Kinds: `kill` (SIGKILL, as the machine would, but after `settle`: a drill ends the
    same each time); NaN or infinity in one number of a gradient, or a gradient 10,000 times as large; NaN in one number
    of a weight or of Adam's first moment, from which the next gradients are none. `kill_saving`, a kill while the
    checkpoint of a step is written, is done there. Raises `ValueError` for an unknown kind.
    """
    if fault["kind"] not in KINDS:
        raise ValueError(f"unknown fault {fault['kind']!r}; known: {', '.join(KINDS)}")
    if fault["kind"] == "kill_saving" or not meant(fault, here):
        return
    if fault["kind"] == "kill":
        settle()
        os.kill(os.getpid(), signal.SIGKILL)
    learning = [(p, p.grad) for p in model.parameters() if p.grad is not None and local(p).numel()]
    if fault["kind"] == "spike_gradient":
        for _, gradient in learning:
            local(gradient).mul_(1e4)
        return
    first, gradient = learning[0]
    places = {"nan_parameter": first, "nan_moment": optimizer.state[first].get("exp_avg", first)}
    value = float("inf" if fault["kind"] == "inf_gradient" else "nan")
    local(places.get(fault["kind"], gradient)).view(-1)[0] = value
