"""Does a layout compute what one process does? Real processes, the real `Trainer`, a few steps of tiny models.

`python -m stackpkg.training.parity` runs every case of `support` and writes the table that launches are held to.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PrinterCallback, TrainingArguments, set_seed
from transformers.utils import logging

from stackpkg import model as models
from stackpkg import params
from stackpkg.data.stream import Stream
from stackpkg.params import Params
from stackpkg.telemetry.guard import Guard
from stackpkg.training import layout, mesh, support, tiny
from stackpkg.training.optim import training_arguments
from stackpkg.training.trainer import StackTrainer

FLOORS = {"fp32": 1e-6, "bf16": 1e-2}  # of `compare`


def profile(model: str, sizes: dict[str, Any], precision: str, every_steps: int = tiny.STEPS) -> Params:
    """The job of a case; in bf16 on the fp32 weights, with every layer computed twice."""
    if precision == "fp32":
        return tiny.profile(model, sizes, every_steps)
    p = tiny.profile(model, sizes, every_steps, precision=precision, activation_checkpointing=1)
    wide = p.model.config | {"moe_intermediate_size": 32}  # so that half of it is what `support.check` asks for
    return p.model_copy(update={"model": p.model.model_copy(update={"config": wide})})


def initial(folder: Path, p: Params) -> Path:
    """Where the weights lie that cases of this model begin with."""
    kind = p.model.config.get("model_type", support.REFERENCE)
    return folder / "initial" / f"{kind}-{hashlib.sha256(p.model.model_dump_json().encode()).hexdigest()[:8]}"


class Watched(StackTrainer):
    """Keeps what is compared: the whole gradient of the first step, loss and norm of all, the last evaluation."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.gradients: dict[str, Tensor] = {}
        self.seen: list[list[float]] = []
        self.evaluated: dict[str, float] = {}

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        if not self.state.global_step:
            named = self.network.named_parameters()
            self.gradients = {name: full(p.grad) for name, p in named if p.grad is not None}
        return super()._clip_grad_norm(model)

    def _measure(self, loss: Tensor, grad_norm: float, learning_rate: float) -> dict[str, Any]:
        row = super()._measure(loss, grad_norm, learning_rate)
        self.seen.append([row["loss"], grad_norm, row["weight_norm"]])
        return row

    def evaluate(self, *given: Any, **more: Any) -> dict[str, float]:
        self.evaluated = super().evaluate(*given, **more)
        return self.evaluated


def full(tensor: Tensor) -> Tensor:
    """All of a tensor that may lie in pieces."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def case(folder: Path, p: Params, name: str, resume: str = "") -> Watched:
    """Train one case in the running process group; `resume` is the checkpoint of another case to begin from."""
    stream, spread = Stream(folder / "data", p), mesh.build(p.layout)
    first = initial(folder, p)
    if dist.get_rank() == 0 and not first.exists():
        models.build(p.model, stream.vocab_size, stream.pad_id, p.seed).save_pretrained(first)
    dist.barrier()
    set_seed(p.seed)
    given = training_arguments(p, folder / "runs" / name, tiny.STEPS)
    arguments = TrainingArguments(**given, use_cpu=not torch.cuda.is_available())
    trainer = Watched(
        model=layout.load_sharded(first, p), args=arguments, p=p, mesh=spread, stream=stream, folder=folder,
        name=name, attempt=1, guard=Guard.production(p), faults=[], rung=0,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(folder / "runs" / resume) if resume else None)
    return trainer


def results(done: Watched) -> dict[str, Any]:
    """What is compared of a case: this rank's stage, every tensor whole."""
    weights = {name: full(parameter) for name, parameter in done.network.named_parameters()}
    averages = {name: full(shadow) for name, shadow in done.ema.shadow.items()}
    seen = {"seen": done.seen, "evaluated": done.evaluated, "gradients": done.gradients}
    return seen | {"weights": weights, "averages": averages}


def same(whole: dict[str, Any], resumed: dict[str, Any]) -> bool:
    """Whether a resumed case took the last steps of the whole one to the last bit: losses, norms, weights, averages."""
    steps = resumed["seen"]
    return whole["seen"][-len(steps) :] == steps and whole["evaluated"] == resumed["evaluated"] and all(
        torch.equal(tensor, resumed[kind][name])
        for kind in ("weights", "averages") for name, tensor in whole[kind].items()
    )  # fmt: skip


def worker(rank: int, processes: int, port: int, folder: str, cases: list[dict[str, Any]]) -> None:
    """One rank of all cases that need so many processes, one after the other."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if processes > 1:  # as torchrun does; one process has none
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  the steps of all cases are of no interest
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", rank=rank, world_size=processes, timeout=timedelta(minutes=2))
    home = Path(folder)
    for each in cases:
        p, out = params.validate(each["params"]), home / "found" / f"{each['name']}.{rank}.pt"
        out.parent.mkdir(exist_ok=True)
        try:
            found = results(case(home, p, each["name"], each.get("resume", "")))
            if "again" in each:  # from a checkpoint of its own
                name, step = each["name"], each["again"]
                found["repeats"] = same(found, results(case(home, p, f"{name}-again", f"{name}/checkpoint-{step}")))
            torch.save(found, out)
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, AssertionError) as error:
            torch.save({"error": f"{type(error).__name__}: {error}"[:300]}, out)
            os._exit(0)  # the others may wait for this rank in a collective: no later case can be trusted
    layout.leave()


def start(folder: Path, cases: list[dict[str, Any]], processes: int) -> None:
    """Run cases that need the same number of processes; a case that breaks takes those after it with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(["torch", "stackpkg.training.trainer"])
    mp.start_processes(worker, (processes, port, str(folder), cases), processes, start_method="forkserver")


def read(folder: Path, name: str, processes: int) -> dict[str, Any]:
    """What rank 0 of a case found, and the tensors of all stages; or the error of the rank that broke."""
    ranks = [torch.load(folder / "found" / f"{name}.{rank}.pt", weights_only=True) for rank in range(processes)]
    if broken := [rank for rank in ranks if "error" in rank]:
        return broken[0]
    kinds = "gradients", "weights", "averages"
    whole = {kind: {n: w for rank in ranks for n, w in rank[kind].items()} for kind in kinds}
    return ranks[0] | whole | {"repeats": all(rank.get("repeats", False) for rank in ranks)}


def compare(one: dict[str, Any], many: dict[str, Any], floor: float = 1e-6) -> dict[str, float]:
    """Largest relative differences: `loss` and `norm` over the steps, `gradient` over the parameters (L2 of each, first
    step), `weights` of the update that all steps together made, `average` of that of the averaged weights, `evaluation`
    of the validation loss. A parameter with less than `floor` of the whole gradient is compared with that much of it.
    """
    before = torch.tensor(one["seen"], dtype=torch.double)
    off = ((torch.tensor(many["seen"], dtype=torch.double) - before) / before).abs().amax(0).tolist()
    if one["gradients"].keys() != many["gradients"].keys():
        missing = sorted(one["gradients"].keys() ^ many["gradients"].keys())
        raise AssertionError(f"gradients of {missing} exist in one of the two only")
    scale = torch.stack([g.norm() for g in one["gradients"].values()]).norm()
    each = [
        (many["gradients"][name] - g).norm() / g.norm().clamp_min(floor * scale) for name, g in one["gradients"].items()
    ]
    moves = list[float]()
    for kind in ("weights", "averages"):
        moved = torch.cat([(w - one["initial"][name]).flatten() for name, w in one[kind].items()]).norm()
        apart = torch.cat([(many[kind][name] - w).flatten() for name, w in one[kind].items()]).norm()
        moves.append(float(apart / moved))
    held = [found["evaluated"]["eval_loss"] for found in (one, many)]
    return {
        "loss": off[0], "norm": off[1], "gradient": float(torch.stack(each).max()), "weights": moves[0],
        "average": moves[1], "evaluation": abs(held[1] / held[0] - 1),
    }  # fmt: skip


def plan(wanted: Iterable[support.Case]) -> dict[int, list[dict[str, Any]]]:
    """Cases by number of processes, each with the one-process case it is compared with, and resumed before its end."""
    groups: dict[int, dict[str, dict[str, Any]]] = {}
    for name, model, precision in wanted:
        p, alone = profile(model, support.LAYOUTS[name], precision, tiny.STEPS - 1), f"one-{model}-{precision}"
        one = {"name": alone, "params": profile(model, {}, precision).model_dump(mode="json")}
        groups.setdefault(1, {})[alone] = one
        label = f"{name.replace(' ', '')}-{model}-{precision}"
        many: dict[str, Any] = {"name": label, "params": p.model_dump(mode="json"), "again": tiny.STEPS - 1}
        many |= {"alone": alone, "about": {"layout": name, "model": model, "precision": precision}}
        groups.setdefault(p.layout.processes, {})[label] = many
    return {processes: list(cases.values()) for processes, cases in sorted(groups.items())}


def measure(folder: Path, wanted: Iterable[support.Case]) -> Iterator[dict[str, Any]]:
    """A row for each case, as soon as it is known: its processes and either its differences, and whether a
    resume repeats it to the last bit, or its error.
    """
    tiny.prepare(folder, tiny.profile("stackpkg", {}))
    for processes, cases in plan(wanted).items():
        for each in cases:  # new processes for each: gloo keeps the threads of every group there ever was (torch 2.13)
            start(folder, [each], processes)
            if processes > 1:
                yield _row(folder, each, processes)
            elif "error" in (found := read(folder, each["name"], 1)):
                raise RuntimeError(f"one process fails at {each['name']}: {found['error']}")


def _row(folder: Path, each: dict[str, Any], processes: int) -> dict[str, Any]:
    about = each["about"] | {"processes": processes}
    found, one = read(folder, each["name"], processes), read(folder, each["alone"], 1)
    if "error" in found:
        return about | {"error": found["error"]}
    first = initial(folder, params.validate(each["params"]))
    one["initial"] = dict(AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32).named_parameters())
    with torch.no_grad():
        differences = compare(one, found, FLOORS[about["precision"]])
    apart = {name: float(f"{value:.2e}") for name, value in differences.items()}
    return about | apart | {"repeats": found["repeats"]}


def main(*only: str) -> None:
    """Run the whole matrix, or the layouts, models and precisions that are named, and put each row into the table at
    once."""
    known = support.LAYOUTS, tiny.MODELS, support.LIMITS
    if unknown := {*only} - {name for names in known for name in names}:
        there = "; ".join(", ".join(names) for names in known)
        raise SystemExit(f"no case is of {', '.join(sorted(unknown))}; there are {there}")
    chosen = [{*only} & {*names} or {*names} for names in known]
    every = support.cases(tiny.MODELS, tiny.DENSE)
    wanted = [case for case in every if all(part in names for part, names in zip(case, chosen, strict=True))]
    folder = Path(tempfile.mkdtemp(prefix="parity-"))
    try:
        for done, row in enumerate(measure(folder, wanted), 1):
            support.write([row])
            print(f"{done}/{len(wanted)}", json.dumps(row), flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
