"""Does a layout compute what one process does? Real processes, the real `Trainer`, a few steps of tiny models.

`python -m stackpkg.training.parity` runs every case of `support` and writes the table that launches are held to.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PrinterCallback, TrainingArguments, set_seed
from transformers.utils import logging

from stackpkg import model as models
from stackpkg import params
from stackpkg.data import conversations, labelled, longrange, preferences, provenance, shards, sources, tokenizer
from stackpkg.data.corpus import Corpus
from stackpkg.data.stream import Stream
from stackpkg.params import Params
from stackpkg.telemetry.guard import Guard
from stackpkg.training import layout, mesh, support
from stackpkg.training.optim import training_arguments
from stackpkg.training.trainer import StackTrainer

STEPS = 3
_COMMON = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
_MOE = _COMMON | {"num_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, dict[str, Any]] = {
    "stackpkg": _MOE | {
        "head_dim": 8, "moe_intermediate_size": 24, "sliding_window": 8, "block_size": 8, "retrieval": True,
    },
    "llama": _COMMON | {"intermediate_size": 48},
    "qwen3": _COMMON | {"intermediate_size": 48, "head_dim": 8},
    "mixtral": _COMMON | {"head_dim": 8, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _MOE | {"head_dim": 8, "intermediate_size": 48, "moe_intermediate_size": 24},
    "olmoe": _MOE | {"intermediate_size": 24},
    "deepseek_v3": _COMMON | {
        "num_key_value_heads": 4, "intermediate_size": 48, "moe_intermediate_size": 24, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
    "gpt_oss": _COMMON | {"head_dim": 8, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2,
                          "sliding_window": 16},
}  # fmt: skip
DENSE = ("llama", "qwen3")


def profile(model: str, sizes: dict[str, Any], every_steps: int = STEPS, **training: Any) -> Params:
    """All objectives of the default profile from the first step on, in two micro-batches."""
    config = MODELS[model]
    stack = {"kind": "stack", "config": config}
    auto = {"kind": "auto", "config": {"model_type": model, **config}}
    ramps: dict[str, Any] = {"ramp_steps": {}, "norms_every": 0, "z_loss": 0.001, "preference": 0.1}
    values: dict[str, Any] = {
        "data": {
            "sources": [{"kind": "folder", "path": str(support.TABLE.parents[1] / path), "domain": domain}
                        for path, domain in (("stackpkg", ""), ("book/runbooks", "documentation"))],
            "vocab_size": 512, "shard_tokens": 50_000, "validation_share": 0.1, "longest_document": 128,
            "max_epochs": 100, "workers": 1,
        },
        "curriculum": [{"steps": STEPS, "context": 64, "long_range": 0.25, "preferences": 1.0, "conversations": 1.0}],
        "auxiliary": {"pairs": 80, "query_tokens": 8, "document_tokens": 16, "long_range_tasks": 32,
                      "conversations": 32, "conversation_tokens": 192},
        "model": stack if model == "stackpkg" else auto,
        "objectives": ramps,
        "optimization": {"learning_rate": 1e-3, "warmup_steps": 1, "floor": 1e-4, "ema_decay": 0.9},
        "training": {"batch_tokens": 1024, "accumulation": 2, "epoch_steps": STEPS} | training,
        "snapshots": {"every_steps": every_steps},
        "layout": {"processes": 1, "fsdp": 1} | sizes,
        "evaluation": {"rows": 2, "pairs": 8},
    }  # fmt: skip
    return params.validate(values)


def prepare(folder: Path, p: Params) -> None:
    """A small corpus from the package's own text, with pairs, preferences, conversations and long-range tasks."""
    audit = list[dict[str, Any]]()
    data = folder / "data"
    parts = sources.write_parts(p.data.sources, data / "parts", p.data.part_mb, audit)
    found = pa.concat_tables([pq.read_table(part) for part in parts])
    keep = pa.table({"record_id": found["record_id"], "trust": pa.repeat(1.0, len(found))})
    words = tokenizer.train_tokenizer(found["text"].to_pylist(), p.data.vocab_size)
    manifest = shards.build(data, shards.partition(parts, keep, data, p.data), words, p.data)
    stamp, corpus = {tokenizer.STAMP: manifest[tokenizer.STAMP]}, Corpus(data)
    held = {str(record) for record in corpus.records[corpus.split == "validation"]}
    mined = labelled.mine(found, held, p.auxiliary, p.evaluation.pairs)
    provenance.write(data / "pairs.parquet", labelled.encode(mined, words, p.auxiliary), **stamp)
    chosen = preferences.encode(labelled.load(p.auxiliary, mined).preferences, words, 8, 16)
    provenance.write(data / "preferences.parquet", chosen, **stamp)
    provenance.write(data / "conversations.parquet", conversations.generate(p, corpus, words), **stamp)
    shutil.copy(support.TABLE.parents[1] / "params/scopes.yaml", data)
    provenance.write(data / "long_range.parquet", longrange.generate(p), **stamp)


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
    initial = folder / "initial" / p.model.config.get("model_type", "stackpkg")
    if dist.get_rank() == 0 and not initial.exists():
        models.build(p.model, stream.vocab_size, stream.pad_id, p.seed).save_pretrained(initial)
    dist.barrier()
    set_seed(p.seed)
    given = training_arguments(p, folder / "runs" / name, STEPS)
    arguments = TrainingArguments(**given, use_cpu=not torch.cuda.is_available())
    trainer = Watched(
        model=layout.load_sharded(initial, p), args=arguments, p=p, mesh=spread, stream=stream, folder=folder,
        name=name, attempt=1, guard=Guard.production(p), faults=[], rung=0,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(folder / "runs" / resume) if resume else None)
    return trainer


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
            done = case(home, p, each["name"], each.get("resume", ""))
            stage = {name: full(parameter) for name, parameter in done.network.named_parameters()}
            found = {"seen": done.seen, "evaluated": done.evaluated, "gradients": done.gradients, "weights": stage}
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
    """What rank 0 of a case found, and the weights of all stages; or the error of the rank that broke."""
    ranks = [torch.load(folder / "found" / f"{name}.{rank}.pt", weights_only=True) for rank in range(processes)]
    if broken := [rank for rank in ranks if "error" in rank]:
        return broken[0]
    whole = {kind: {n: w for rank in ranks for n, w in rank[kind].items()} for kind in ("gradients", "weights")}
    return ranks[0] | whole


def compare(one: dict[str, Any], many: dict[str, Any]) -> dict[str, float]:
    """Largest relative differences: `loss` and `norm` over the steps, `gradient` over the parameters (L2 of each, first
    step), `weights` of the update that all steps together made, `evaluation` of the validation loss.
    """
    before = torch.tensor(one["seen"], dtype=torch.double)
    off = ((torch.tensor(many["seen"], dtype=torch.double) - before) / before).abs().amax(0).tolist()
    if one["gradients"].keys() != many["gradients"].keys():
        missing = sorted(one["gradients"].keys() ^ many["gradients"].keys())
        raise AssertionError(f"gradients of {missing} exist in one of the two only")
    scale = torch.stack([g.norm() for g in one["gradients"].values()]).norm()
    worst = max(
        float((many["gradients"][name] - g).norm() / g.norm().clamp_min(1e-6 * scale))
        for name, g in one["gradients"].items()
    )
    moved = torch.cat([(w - one["initial"][name]).flatten() for name, w in one["weights"].items()]).norm()
    apart = torch.cat([(many["weights"][name] - w).flatten() for name, w in one["weights"].items()]).norm()
    held = [found["evaluated"]["eval_loss"] for found in (one, many)]
    return {
        "loss": off[0], "norm": off[1], "gradient": worst, "weights": float(apart / moved),
        "evaluation": abs(held[1] / held[0] - 1),
    }  # fmt: skip


def plan(wanted: Iterable[tuple[str, str]]) -> dict[int, list[dict[str, Any]]]:
    """Cases by number of processes, each with the one-process case it is compared with."""
    groups: dict[int, dict[str, dict[str, Any]]] = {}
    for name, model in wanted:
        sizes = support.LAYOUTS[name]
        p, alone = profile(model, sizes), f"one-{model}"
        one = {"name": alone, "params": profile(model, {}).model_dump(mode="json")}
        groups.setdefault(1, {})[alone] = one
        label = f"{name.replace(' ', '')}-{model}"
        many = {"name": label, "params": p.model_dump(mode="json"), "alone": alone, "layout": name, "model": model}
        groups.setdefault(p.layout.processes, {})[label] = many
    return {processes: list(cases.values()) for processes, cases in sorted(groups.items())}


def measure(folder: Path, wanted: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """A row for each (layout, model): its processes and either its differences or its error."""
    prepare(folder, profile("stackpkg", {}))
    rows, groups = [], plan(wanted)
    for processes, cases in groups.items():
        for each in cases:  # new processes for each: gloo keeps the threads of every group there ever was (torch 2.13)
            start(folder, [each], processes)
        for each in cases:
            if processes == 1 and "error" in (found := read(folder, each["name"], 1)):
                raise RuntimeError(f"one process fails at {each['name']}: {found['error']}")
            if processes > 1:
                rows.append(_row(folder, each, processes))
    return rows


def _row(folder: Path, each: dict[str, Any], processes: int) -> dict[str, Any]:
    about = {"layout": each["layout"], "model": each["model"], "processes": processes}
    found, one = read(folder, each["name"], processes), read(folder, each["alone"], 1)
    if "error" in found:
        return about | {"error": found["error"]}
    initial = AutoModelForCausalLM.from_pretrained(folder / "initial" / each["model"], dtype=torch.float32)
    one["initial"] = dict(initial.named_parameters())
    with torch.no_grad():
        return about | {name: float(f"{value:.2e}") for name, value in compare(one, found).items()}


def main(*only: str) -> None:
    """Run the whole matrix, or the layouts and models that are named, and put the rows into the table."""
    every = support.cases(MODELS, DENSE)
    layouts, chosen = ([name for name in only if name in known] or known for known in (support.LAYOUTS, MODELS))
    wanted = [(name, model) for name, model in every if name in layouts and model in chosen]
    folder = Path(tempfile.mkdtemp(prefix="parity-"))
    try:
        rows = measure(folder, wanted)
    finally:
        shutil.rmtree(folder)
    for row in rows:
        print(json.dumps(row), flush=True)
    support.write(rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
