"""A distributed checkpoint of weights, moments and average, which any layout can load, and a few scalars beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers.distributed.checkpoint import _redistribute_state_dict

from stackpkg.training.ema import ShardedEMA

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer, ema: ShardedEMA) -> dict[str, Any]:
    moments = get_optimizer_state_dict(model, optimizer, options=FLAT)
    return {"model": get_model_state_dict(model), "optimizer": moments, "ema": ema.shadow}


def save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: ShardedEMA, scalars: dict[str, Any]
) -> None:
    """A collective: every rank writes its shards to `folder/dcp`, rank 0 the scalars to `folder/state.pt`."""
    dcp.save(_redistribute_state_dict(_tensors(model, optimizer, ema)), checkpoint_id=folder / "dcp")
    if dist.get_rank() == 0:
        torch.save(scalars, folder / "state.pt")


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: ShardedEMA) -> dict[str, Any]:
    """A collective: fill model, optimiser and average in place, resharding where the layout differs; the scalars."""
    reference = _tensors(model, optimizer, ema)
    state = _redistribute_state_dict(reference)
    dcp.load(state, checkpoint_id=folder / "dcp")
    state = _redistribute_state_dict(state, reference_state_dict=reference)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=FLAT)
    ema.load(state["ema"])
    return torch.load(folder / "state.pt", weights_only=True)


def restore(scheduler: Any, state: dict[str, Any]) -> None:
    """Fill a schedule. Trainer makes a parameter group per mesh (transformers 5.23), so their number changes with the
    layout; all of them have the same rate."""
    groups = len(scheduler.base_lrs)
    listed = {name: [value[0]] * groups for name, value in state.items() if isinstance(value, list)}
    scheduler.load_state_dict(state | listed)
