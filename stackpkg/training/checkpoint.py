"""What a checkpoint holds: weights, moments and average as one distributed checkpoint, which any layout can load, and
small files beside it: of the run's progress, of the routers and of the retriever, the last two with versions of theirs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers.distributed.checkpoint import _redistribute_state_dict

from stackpkg.evaluation.retrieval import Retriever
from stackpkg.objectives import Composer, routing
from stackpkg.runs import read_json
from stackpkg.telemetry.guard import Guard
from stackpkg.training.ema import ShardedEMA
from stackpkg.training.measuring import Measuring
from stackpkg.training.recovery import Skips
from stackpkg.training.versions import RETRIEVER, RETRIEVER_FILE, ROUTER, ROUTER_FILE, compatible

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer, ema: ShardedEMA) -> dict[str, Any]:
    moments = get_optimizer_state_dict(model, optimizer, options=FLAT)
    return {"model": get_model_state_dict(model), "optimizer": moments, "ema": ema.shadow}


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer, ema: ShardedEMA) -> dict[str, Any]:
    """A collective: this rank's parts of all that is large, as `dcp` saves them; not copied."""
    return _redistribute_state_dict(_tensors(model, optimizer, ema))


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: ShardedEMA) -> None:
    """A collective: fill model, optimiser and average in place, resharding where the layout differs."""
    reference = _tensors(model, optimizer, ema)
    state = _redistribute_state_dict(reference)
    dcp.load(state, checkpoint_id=folder / "dcp")
    state = _redistribute_state_dict(state, reference_state_dict=reference)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=FLAT)
    ema.load(state["ema"])


def biases(composer: Composer, pipeline: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """`bias.<layer>` and `center.<layer>`: choice biases and centers of the routers that have them. A collective over
    the stages of a pipeline, each of which has the routers of its own layers."""
    held = ((name, *item) for name in routing.STATE for item in enumerate(composer.routers))
    found = ((f"{name}.{number}", getattr(router, routing.STATE[name], None)) for name, number, router in held)
    mine = {key: state.detach().cpu() for key, state in found if isinstance(state, Tensor)}
    if pipeline is None or dist.get_world_size(pipeline) == 1:
        return mine
    told: list[Any] = [None] * dist.get_world_size(pipeline)
    dist.all_gather_object(told, mine, group=pipeline)
    return {name: bias for stage in told for name, bias in stage.items()}


def write_router(folder: Path, composer: Composer, choice: Mapping[str, Tensor]) -> None:
    """`router.safetensors`: running usage [layers, experts], the sums of the bandit, `biases` and centers; fp64
    where summed. For rank 0, which has what all ranks have."""
    state = composer.state_dict()
    found = {f"bandit.{name}": value for name, value in state["bandit"].items()} | {"usage": state["usage"]}
    found |= choice
    about = {"version": ROUTER, "steps": str(state["steps"])}
    save_file({name: value.contiguous() for name, value in found.items()}, folder / ROUTER_FILE, about)


def read_router(folder: Path, composer: Composer) -> None:
    """Take over what `write_router` wrote. Raises `ValueError` for another major version, for another number of layers
    or experts, and where the choice bias of a router is missing."""
    with safe_open(folder / ROUTER_FILE, "pt") as file:
        about = file.metadata()
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    compatible(folder / ROUTER_FILE, about["version"], ROUTER)
    sums = {name.removeprefix("bandit."): value for name, value in found.items() if name.startswith("bandit.")}
    composer.load_state_dict({"steps": int(about["steps"]), "usage": found["usage"], "bandit": sums})
    for number, router in enumerate(composer.routers):
        if isinstance(bias := getattr(router, routing.BIAS, None), Tensor):  # without one: dense, or in another stage
            if f"bias.{number}" not in found:
                raise ValueError(
                    f"{folder.name}/{ROUTER_FILE} has no choice bias of layer {number}: take the file from a snapshot "
                    "of this architecture"
                )
            bias.copy_(found[f"bias.{number}"])
        if isinstance(center := getattr(router, routing.CENTER, None), Tensor):
            center.copy_(found.get(f"center.{number}", torch.zeros_like(center)))  # a file of version 1.0 has none


def write_retriever(folder: Path, retriever: Retriever) -> None:
    """`retriever.json`: the switch and the threshold sigma_min that it was last calibrated to."""
    about = {"version": RETRIEVER, **retriever.switch.state_dict()}
    (folder / RETRIEVER_FILE).write_text(json.dumps(about) + "\n", encoding="utf-8")


def read_retriever(folder: Path, retriever: Retriever) -> None:
    """Take over what `write_retriever` wrote. Raises `ValueError` for another major version."""
    about = read_json(folder / RETRIEVER_FILE)
    compatible(folder / RETRIEVER_FILE, about.pop("version"), RETRIEVER)
    retriever.switch.load_state_dict(about)


class Kept(Protocol):
    """What spans steps, beside what is large."""

    lr_scheduler: Any
    composer: Composer
    ema: ShardedEMA
    skips: Skips
    guard: Guard
    measuring: Measuring
    retriever: Retriever


def write(folder: Path, kept: Kept, choice: Mapping[str, Tensor]) -> None:
    """The small files, for rank 0; what each rank must flush itself it writes itself."""
    folder.mkdir(parents=True, exist_ok=True)
    scalars = {
        "scheduler": kept.lr_scheduler.state_dict(),
        "ema_updates": kept.ema.updates,
        "skips": kept.skips.state_dict(),
        "guard": json.dumps(kept.guard.state_dict()),
        "measuring": json.dumps(kept.measuring.state_dict()),
        "recent": kept.composer.recent.state_dict(),
    }
    torch.save(scalars, folder / "state.pt")
    write_router(folder, kept.composer, choice)
    write_retriever(folder, kept.retriever)


def read(folder: Path, kept: Kept) -> None:
    """Take over what `write` wrote, on every rank."""
    scalars = torch.load(folder / "state.pt", weights_only=True)
    restore(kept.lr_scheduler, scalars["scheduler"])
    kept.ema.resume(scalars["ema_updates"])
    kept.skips.load_state_dict(scalars["skips"])
    kept.guard.load_state_dict(json.loads(scalars["guard"]))
    kept.measuring.load_state_dict(json.loads(scalars.get("measuring", "{}")))
    kept.composer.recent.load_state_dict(scalars["recent"])
    read_router(folder, kept.composer)
    read_retriever(folder, kept.retriever)


def restore(scheduler: Any, state: dict[str, Any]) -> None:
    """Fill a schedule. Trainer makes a parameter group per mesh (transformers 5.23), so their number changes with the
    layout; all of them have the same rate."""
    groups = len(scheduler.base_lrs)
    listed = {name: [value[0]] * groups for name, value in state.items() if isinstance(value, list)}
    scheduler.load_state_dict(state | listed)
