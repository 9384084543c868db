"""Processes: the group, the model spread through transformers' own distributed configuration, digests."""

from __future__ import annotations

import hashlib
import os
import sys
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from stackpkg.params import Params
from stackpkg.training import staged


def start(silent: float = 10.0) -> tuple[int, int]:
    """Join the process group that torchrun describes in the environment; (rank, ranks). Alone: a group of one. A rank
    that leaves the others waiting for more than `silent` minutes is taken for dead."""
    cuda, told = torch.cuda.is_available(), os.environ
    if cuda:
        torch.cuda.set_device(int(told.get("LOCAL_RANK", 0)))
    rank, ranks = int(told.get("RANK", 0)), int(told.get("WORLD_SIZE", 1))
    store: dist.Store = dist.HashStore()
    if "RANK" in told:
        # torchrun keeps its store across restarts (torch 2.13); without a prefix of its own a restarted
        # rank would connect to the addresses its dead predecessor left there.
        kept = dist.TCPStore(told["MASTER_ADDR"], int(told["MASTER_PORT"]), ranks, is_master=False)
        store = dist.PrefixStore(_together(kept, rank, ranks, silent), kept)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=silent))
    return rank, ranks


def _together(store: dist.Store, rank: int, ranks: int, minutes: float) -> str:
    """A name for the ranks that start together, which none had that started before: rank 0 gives it to whoever asks,
    until all have thanked. The restart count is none: each agent of torchrun counts for itself (pytorch #108158).
    Raises `TimeoutError` where a rank does not come for `minutes`.
    """
    mine, end = uuid.uuid4().hex, time.monotonic() + 60 * minutes
    if rank:
        store.set(f"asks-{rank}", mine)
        store.wait([f"told-{mine}"], timedelta(minutes=minutes))
        name = store.get(f"told-{mine}").decode()
        store.set(f"thanks-{name}-{rank}", "")
        return name
    for other in range(1, ranks):
        while not store.check([f"thanks-{mine}-{other}"]):
            if store.check([f"asks-{other}"]):  # perhaps that of a dead predecessor, which harms nobody
                store.set(f"told-{store.get(f'asks-{other}').decode()}", mine)
            if time.monotonic() > end:
                raise TimeoutError(f"rank {other} of {ranks} did not come within {minutes:g} minutes")
            time.sleep(0.01)
    return mine


def patient(minutes: float) -> Callable[[], None]:
    """A barrier for after what one rank does alone, such as to make or to write a whole model: the others wait for it
    for up to `minutes`, not for as long as a collective may take, and see at once when it died. A collective."""
    group = dist.new_group(backend="gloo", timeout=timedelta(minutes=minutes))
    return lambda: dist.barrier(group)


def leave() -> NoReturn:
    """End this rank once all have come here. Without the teardown of the group, in which gloo can wait for ever for a
    thread of its own when there were several groups (torch 2.13)."""
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def load_sharded(folder: Path, p: Params) -> PreTrainedModel:
    """Load a snapshot; with more than one rank every parameter arrives as this rank's part (FSDP2, HSDP, TP, EP), and
    in a pipeline only the layers of this rank.

    The stock route, `TrainingArguments(fsdp=True)`, silently trains DDP on CPU (accelerate 1.15); this one does not.
    Raises `ValueError` when the model has no plan for a kind of parallelism that the layout asks for.
    """
    size = p.layout
    if size.processes == 1:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if size.pp > 1:
        return staged.load(folder, size, p.training.precision == "bf16")
    config = DistributedConfig(
        fsdp_size=size.fsdp,
        dp_replicate_size=size.replicas,
        tp_size=size.tp,
        ep_size=size.ep,
        fsdp_mixed_precision=p.training.precision == "bf16",
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=config)


def sharded_share(model: nn.Module) -> float:
    """Share of the parameters (by count of numbers) that this rank does not hold whole. A collective in a pipeline."""
    sizes = [(p.numel(), isinstance(p, DTensor) and p.to_local().numel() < p.numel()) for p in model.parameters()]
    return 1 - sum(size for size, split in sizes if not split) / parameters(model)


def parameters(model: nn.Module) -> int:
    """Numbers in the whole model. A collective in a pipeline."""
    count = torch.tensor(sum(p.numel() for p in model.parameters()))
    if pipeline := getattr(model, "pipeline", None):
        count = count.to(pipeline.device)
        dist.all_reduce(count, group=pipeline.group)
    return int(count)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the names and full values of all parameters; a collective, equal on every rank."""
    pipeline: Any = getattr(model, "pipeline", None)
    found = {}
    for name, parameter in sorted(model.named_parameters()):
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        found[name] = hashlib.sha256(full.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    if pipeline:
        told: list[dict[str, str]] = [{}] * dist.get_world_size(pipeline.group)
        dist.all_gather_object(told, found, group=pipeline.group)
        found = dict(sorted(item for each in told for item in each.items()))
    return hashlib.sha256("".join(name + sha for name, sha in found.items()).encode()).hexdigest()
