"""The reference model, small, with and without summaries, trained alike on long-range tasks: what does the window miss?

Everything is fixed but seeds and steps, so that the claim is about the construction and not about a tuned run.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stackpkg import params
from stackpkg.data import longrange, mixing
from stackpkg.data.tokenizer import SPECIALS
from stackpkg.evaluation.construction import Rows
from stackpkg.model import StackForCausalLM, build
from stackpkg.runs import read_json, write_json

NAMED = {token: number for number, token in enumerate(SPECIALS)}
TASKS = params.Auxiliary(long_range_names=16, long_range_values=16, long_range_records=8)
VALUES = longrange.symbols(TASKS)[1]
KINDS, CONTEXT, ROWS, FILLERS, RATE, WARMUP, POINTS = (*3 * ["recall"], "needle"), 128, 32, 16, 3e-3, 20, 10
MODEL: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
    "moe_intermediate_size": 128, "num_experts": 1, "num_experts_per_tok": 1, "sliding_window": 16,
    "block_size": longrange.PIECE,  # one summary a record: a mean over two would mix their names
    "summaries_per_block": 1, "rope_alpha": 1.0, "initializer_range": 0.1,
}  # fmt: skip
REACH = longrange.reach_of(params.Params(model=params.Model(config=MODEL)))


def draw(name: str, n: int) -> Rows:
    """n rows, a function of `name`; kinds take turns. The filler is drawn too, from tokens that no task uses."""
    filler = (mixing.hashed(n * CONTEXT, name) % np.uint64(FILLERS)).astype(np.int64).reshape(n, CONTEXT) + VALUES.stop
    made = []
    for k in range(n):
        kind, own = KINDS[k % len(KINDS)], f"{name}-{k}"
        task = longrange.draw(kind, own, TASKS.long_range_records, TASKS) | {"task_id": own, "reach": REACH}
        made.append(longrange.row(task, filler[k], NAMED))
    return Rows(*(np.stack(part) for part in zip(*made, strict=True)))


def scores(model: PreTrainedModel, rows: Rows) -> tuple[Tensor, Tensor]:
    """Log-probability of each answer [answers], with gradient, and the token predicted in its place [answers]."""
    ids, answers = torch.as_tensor(rows.ids), torch.as_tensor(rows.answers)[:, 1:]
    logits = model(input_ids=ids).logits[:, :-1][answers].float()
    return logits.log_softmax(-1).gather(1, ids[:, 1:][answers][:, None])[:, 0], logits.argmax(-1)


@torch.no_grad()
def accuracy(model: PreTrainedModel, rows: Rows) -> float:
    return float((scores(model, rows)[1].numpy() == rows.ids[rows.answers]).mean())


def name_of(full: bool, seed: int) -> str:
    return f"{'full' if full else 'window'}-{seed}"


def describe(full: bool, seed: int, steps: int) -> dict[str, Any]:
    """Everything that decides what a model learns; its digest tells whether one is there already."""
    config = MODEL | {"summaries_per_block": MODEL["summaries_per_block"] if full else 0}
    spec = {"model": config, "tasks": TASKS.model_dump(mode="json"), "seed": seed, "steps": steps, "kinds": KINDS}
    spec |= {"context": CONTEXT, "rows": ROWS, "fillers": FILLERS, "rate": RATE, "warmup": WARMUP}
    return spec | {"digest": hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()}


def found(folder: Path, full: bool, seed: int, steps: int) -> dict[str, Any] | None:
    """What `train` made of the same description, if it is there whole."""
    name = name_of(full, seed)
    if (folder / f"{name}.json").exists() and (folder / name).is_dir():
        made = read_json(folder / f"{name}.json")
        return made if made["digest"] == describe(full, seed, steps)["digest"] else None
    return None


def train(folder: Path, full: bool, seed: int, steps: int) -> dict[str, Any]:
    """Train one model on fresh rows each step; its weights and its learning curve are kept below `folder`. Full model
    and control of a seed read the same rows.
    """
    name, spec = name_of(full, seed), describe(full, seed, steps)
    (folder / f"{name}.json").unlink(missing_ok=True)  # it belongs to the weights that are about to be replaced
    torch.set_num_threads(1)
    began, curve, watched = time.process_time(), [], draw("watched", 4 * ROWS)
    model = build(params.Model(config=spec["model"]), VALUES.stop + FILLERS, NAMED["<pad>"], seed)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.0)
    # lr_t = lr min(t / warm-up, (1 + cos(pi t / T)) / 2)        (SGDR, arXiv 1608.03983, eq. 5)
    plan = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / WARMUP, (1 + math.cos(math.pi * t / steps)) / 2)
    )
    for step in range(steps):
        loss = -scores(model, draw(f"train-{seed}-{step}", ROWS))[0].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        plan.step()
        if (step + 1) % max(1, steps // POINTS) == 0 or step + 1 == steps:
            curve.append({"step": step + 1, "loss": loss.item(), "accuracy": accuracy(model, watched)})
            print(f"{name}: step {step + 1}/{steps}, loss {curve[-1]['loss']:.3f}, {curve[-1]['accuracy']:.1%} right",
                  flush=True)  # fmt: skip
    model.save_pretrained(folder / name)
    made = {"name": name, "full": full, "seed": seed, "steps": steps, "digest": spec["digest"], "curve": curve}
    return read_json(write_json(folder / f"{name}.json", made | {"cpu_seconds": time.process_time() - began}))


def run(folder: Path, seeds: Iterable[int], steps: int) -> list[dict[str, Any]]:
    """Full model and control of every seed, each in a process of its own; what an earlier call made is not repeated."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(folder, full, seed, steps) for seed in seeds for full in (True, False)]
    if missing := [job for job in jobs if not found(*job)]:
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            list(pool.map(train, *zip(*missing, strict=True)))
    return [made for job in jobs if (made := found(*job))]


def load(folder: Path, full: bool, seed: int) -> StackForCausalLM:
    return StackForCausalLM.from_pretrained(folder / name_of(full, seed)).eval()
