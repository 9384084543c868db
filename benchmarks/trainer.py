"""What the stack costs on top of the stock `Trainer`: `python benchmarks/trainer.py [--json FILE] [--blocks 7]`.

One process, the reference model at two sizes, the same initial weights, the same rows in the same order, fused AdamW,
clip and schedule. Two systems train at the same time and take turns step by step, a thread each of which one computes,
so that both meet the same machine:

bare       `transformers.Trainer`, its defaults; rows ready in memory; the model's own loss
stack      `StackTrainer`: rows packed by the stream as they are needed, the composer with language modelling alone,
           router statistics, row and alerts of every step, the spike guard and the recovery ladder, the norm of the
           weights, their average, a probe of attention every 32 steps, a snapshot written behind the training every
           16; not in it is the evaluation, which the other does not have
objectives the same with retrieval, long-range, load-balance, entropy and regret objectives, whose forwards and
           backwards are work that the other systems do not do

A step lasts until the next begins. The overhead is the ratio of sums over the steps without probe or snapshot, with
the 95 % interval of a bootstrap over blocks of 16 (the first is left out), `wall` of the clock and `cpu` of the thread.
What the steps of both systems around a snapshot take longer is what a snapshot costs; the same for a probe. They come
far more often here than in a job, so the sum is told for a snapshot every 10 minutes and a probe every 1,000 steps.
Then a run is timed part by part, in seconds of its thread; a part is not all overhead: the composer takes the place of
the model's own loss, norm and clip of the stock's.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import report
import torch
import torch.distributed as dist
from scipy.stats import bootstrap
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from stackpkg import model as models
from stackpkg import params, runs
from stackpkg.data.stream import Stream
from stackpkg.params import Params
from stackpkg.telemetry.guard import Guard
from stackpkg.training import measuring, mesh, saving, tiny
from stackpkg.training.optim import training_arguments
from stackpkg.training.trainer import StackTrainer

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "block_size": 16}
SIZES = {
    "small": HEADS | {"hidden_size": 128, "num_hidden_layers": 4, "head_dim": 32, "moe_intermediate_size": 256,
                      "num_experts": 8, "sliding_window": 32},
    "large": HEADS | {"hidden_size": 256, "num_hidden_layers": 6, "head_dim": 64, "moe_intermediate_size": 512,
                      "num_experts": 4, "sliding_window": 32},
}  # fmt: skip
BLOCK, TOKENS, CONTEXT = 16, 2048, 256  # steps of a block, each with a snapshot; every second has a probe
FEW = 3 * BLOCK  # for what needs no narrow interval
TERMS = ("contrastive", "load_balance", "gate_entropy", "z_loss", "regret", "long_range", "preference", "conformance")
BARE, STACK, OBJECTIVES = "bare", "stack", "objectives"


def profile(config: dict[str, Any], steps: int, objectives: bool) -> Params:
    p = tiny.profile("stackpkg", {}, batch_tokens=TOKENS, accumulation=1, epoch_steps=2 * BLOCK)
    p = p.model_dump(mode="json")
    p["curriculum"] = [{"steps": steps, "context": CONTEXT, "long_range": 0.125, "retrieval": float(objectives)}]
    p["auxiliary"] |= {"query_tokens": 16, "document_tokens": 48}
    p["data"] |= {"vocab_size": 2048, "longest_document": CONTEXT}
    p["model"] = {"kind": "stack", "config": config}
    p["objectives"] = {"norms_every": 50, "ramp_steps": {}} | ({} if objectives else dict.fromkeys(TERMS, 0.0))
    p["optimization"] |= {"learning_rate": 3e-4, "ema_decay": 0.999}
    p["snapshots"] |= {"every_steps": BLOCK, "keep_last": 1}
    return params.validate(p)


class Baton:
    """Held by the one of two systems that computes."""

    def __init__(self, systems: tuple[str, ...]) -> None:
        self.change, self.order = threading.Condition(), list(systems)

    def take(self, system: str) -> None:
        with self.change:
            self.change.wait_for(lambda: self.order[0] == system)

    def give(self, system: str, last: bool = False) -> None:
        with self.change:
            self.order.remove(system)
            self.order += [] if last else [system]
            self.change.notify_all()


class Clock(TrainerCallback):
    """Seconds of every step: the clock's, of the thread that computes, and of all other threads."""

    def __init__(self, system: str, baton: Baton) -> None:
        self.system, self.baton, self.steps = system, baton, []
        self.began: tuple[float, ...] = ()

    def stamp(self) -> None:
        if self.began:
            self.steps.append([end - start for end, start in zip(now(), self.began, strict=True)])

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.began:
            self.stamp()
            self.baton.give(self.system)
        self.baton.take(self.system)
        self.began = now()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stamp()


def now() -> tuple[float, ...]:
    thread = time.thread_time()
    return time.perf_counter(), thread, time.process_time() - thread


class Ours(StackTrainer):
    """Without its evaluation."""

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        return {"eval_loss": 0.0}


class Rows(torch.utils.data.Dataset):
    """The rows of all steps, in order, ready."""

    def __init__(self, stream: Stream) -> None:
        steps = (stream.batch(list(stream.plan.rows_at(step))) for step in range(sum(stream.plan.steps)))
        kept = ("input_ids", "position_ids", "labels")
        self.rows = [
            {name: torch.from_numpy(batch[name][row]) for name in kept}
            for batch in steps
            for row in range(len(batch["labels"]))
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return self.rows[row]


class Lab:
    """A model of one size, its data, and the three systems."""

    def __init__(self, folder: Path, config: dict[str, Any], steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.p = {STACK: profile(config, steps, False), OBJECTIVES: profile(config, steps, True)}
        if not (folder / "data").exists():
            tiny.prepare(folder, self.p[OBJECTIVES])
        self.stream = Stream(folder / "data", self.p[STACK])
        self.initial = folder / f"initial-{config['hidden_size']}"
        built = models.build(self.p[STACK].model, self.stream.vocab_size, self.stream.pad_id, 17)
        built.save_pretrained(self.initial)
        self.parameters, self.rows = built.num_parameters(), Rows(self.stream)
        self.mesh, self.made = mesh.build(self.p[STACK].layout), 0

    def make(self, system: str, steps: int) -> Trainer:
        set_seed(17)
        self.made += 1
        model = AutoModelForCausalLM.from_pretrained(self.initial, dtype=torch.float32)
        p = self.p[STACK if system == BARE else system]
        given = training_arguments(p, self.folder / f"checkpoints/job-{self.made}", steps)
        if system == BARE:
            ours = ("eval_strategy", "eval_steps", "save_steps", "logging_steps", "logging_nan_inf_filter")
            given = {name: value for name, value in given.items() if name not in ours}
            given |= {"save_strategy": "no", "train_sampling_strategy": "sequential"}
            made = Trainer(model=model, args=TrainingArguments(**given, use_cpu=True), train_dataset=self.rows)
        else:
            made = Ours(
                model=model, args=TrainingArguments(**given, use_cpu=True), p=p, mesh=self.mesh,
                stream=Stream(self.folder / "data", p), folder=self.folder, name=f"job-{self.made}", attempt=1,
                guard=Guard.production(p), faults=[], rung=0,
            )  # fmt: skip
        made.remove_callback(PrinterCallback)
        return made

    def pair(self, other: str, steps: int) -> dict[str, np.ndarray]:
        """Train `bare` and another, step by step in turn: of each, [steps, 3] seconds as `Clock` takes them."""
        baton = Baton((BARE, other))
        clocks = {system: Clock(system, baton) for system in (BARE, other)}

        def run(system: str, made: Trainer) -> None:
            try:
                made.train()
            finally:
                baton.give(system, last=True)

        threads = []
        for system, clock in clocks.items():
            made = self.make(system, steps)
            made.add_callback(clock)  # last: the others' ends are inside
            threads.append(threading.Thread(target=run, args=(system, made)))
        with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return {system: np.array(clock.steps) for system, clock in clocks.items()}


def parts(lab: Lab) -> dict[str, float]:
    """Seconds a step of each part of `stack`, from one block in which every part is timed."""
    spent: dict[str, float] = defaultdict(float)
    depth: list[float] = []  # what parts inside the part that runs have taken

    def timed(name: str, of: Any, method: str) -> Callable[[], None]:
        original = getattr(of, method)

        def call(*given: Any, **more: Any) -> Any:
            depth.append(0.0)
            began = time.thread_time()
            try:
                return original(*given, **more)
            finally:
                took = time.thread_time() - began
                spent[name] += took - depth.pop()
                if depth:
                    depth[-1] += took

        setattr(of, method, call)
        return lambda: setattr(of, method, original)

    made: Any = lab.make(STACK, FEW)
    undo = [
        timed("probe of attention", measuring, "model_statistics"),
        timed("snapshot: stock and hand-over", saving.Saver, "begin"),
        timed("snapshot: wait for the copy", saving.Saver, "staged"),
        timed("snapshot: wait for the end", saving.Saver, "wait"),
        timed("average of the weights", made.ema, "update"),
        timed("clip of the gradients", mesh.Mesh, "clip"),
        timed("norms of gradients and weights", mesh.Mesh, "norm"),
        timed("spike guard", made.skips, "check"),
        timed("router usage", made.composer, "after_step"),
        timed("row: sums and series", made, "_measure"),
        timed("row: write, alerts, print", made, "_write_row"),
        timed("stop and save files, cadence", saving.Cadence, "agree"),
        timed("stream: rows of the step", made.stream, "batch"),
        timed("counts of the step", made, "_get_num_items_in_batch"),
        timed("composer and router statistics", made.loss, "value"),
    ]
    made.add_callback(Warm(spent))
    try:
        with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing):
            made.train()
    finally:
        for each in undo:
            each()
    return {name: seconds / (FEW - 1) for name, seconds in spent.items()}


class Warm(TrainerCallback):
    """Forgets what was spent in the first step."""

    def __init__(self, spent: dict[str, float]) -> None:
        self.spent = spent

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self.spent.clear()


def compare(bare: np.ndarray, ours: np.ndarray) -> list[tuple[str, float, str]]:
    """Overhead and its interval, the cost of a snapshot and of a probe, from steps [steps, 3] of both, whole blocks.

    A snapshot begins in the last step of a block, of every second with a probe, and is written during the next few.
    """
    bare, ours = (t[BLOCK:].reshape(-1, BLOCK, 3) for t in (bare, ours))
    plain, found = slice(3, BLOCK - 1), []

    def overhead(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        return 100 * (x.sum(axis) / y.sum(axis) - 1)

    for place, kind in enumerate(("wall", "cpu")):
        pair = tuple(t[:, plain, place].sum(1) for t in (ours, bare))
        low, high = bootstrap(pair, overhead, paired=True, rng=17, method="percentile").confidence_interval
        values = {"": overhead(*pair), ", low": low, ", high": high}
        found += [(f"overhead {kind}{which}", float(value), "%") for which, value in values.items()]
    more = sum(t[..., 0].sum(1) - BLOCK * t[:, plain, 0].mean(1) for t in (bare, ours))
    snapshot = float(more[1::2].mean())  # the first block that counts ends with a probe
    probe, step = float(more[::2].mean()) - snapshot, float(bare[:, plain, 0].mean())
    every = found[0][1] + 100 * (snapshot / 600 + probe / (1000 * step))
    return [*found, ("a snapshot", snapshot, "s"), ("a probe", probe, "s"), ("overhead with both", every, "%")]


def measure(name: str, lab: Lab) -> list[dict[str, Any]]:
    title, rows, step = f"{name}, {lab.parameters / 1e6:.1f}M parameters", [], 0.0
    for other, steps in ((STACK, lab.steps), (OBJECTIVES, FEW)):
        seconds = lab.pair(other, steps)
        for system, taken in seconds.items():
            middle = float(np.median(taken[BLOCK:, 0]))
            rows.append(
                report.row(f"{title}: {system}", f"step beside {other if system == BARE else BARE}", middle, "s")
            )
        rows += [report.row(f"{title}: {other}", *told) for told in compare(seconds[BARE], seconds[other])]
        step = float(seconds[BARE][BLOCK:, 1].mean())
        print(f"{title}, {other}: measured", file=sys.stderr, flush=True)
    for part, spent in sorted(parts(lab).items(), key=lambda item: -item[1]):
        rows.append(report.row(f"{title}: part", part, 100 * spent / step, "% of a bare step"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--blocks", type=int, default=7, help="of 16 steps, after the first")
    parser.add_argument("--size", choices=SIZES, action="append", help="one size alone")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rows, sizes = [], {name: SIZES[name] for name in given.size or SIZES}
    with tempfile.TemporaryDirectory(dir=runs.root() / "outbox") as place:  # a disk, which /tmp need not be
        for name, config in sizes.items():
            rows += measure(name, Lab(Path(place), config, (given.blocks + 1) * BLOCK))
    versions = report.machine("torch", "transformers", "accelerate")["versions"]
    about = {"steps_of_a_block": BLOCK, "tokens_of_a_step": TOKENS, "context": CONTEXT, "blocks": given.blocks}
    report.write(rows, given.json, versions=versions, sizes=sizes, **about)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
