"""What the stack costs on top of the stock `Trainer`: `python benchmarks/trainer.py [--json FILE] [--rounds 7]`.

One process, one thread, the reference model at two sizes, the same initial weights, the same rows in the same order,
fused AdamW, clip and schedule. Systems take turns, a block of steps each, in an order that turns round each time:

bare       `transformers.Trainer`, its defaults; rows ready in memory; the model's own loss
stack      `StackTrainer`: rows packed by the stream as they are needed, the composer with language modelling alone,
           router statistics, row and alerts of every step, the spike guard and the recovery ladder, the norm of the
           weights, their average, a probe of attention and a snapshot written behind the training once in a block;
           not in it is the evaluation, which the other does not have
objectives the same with retrieval, long-range, load-balance, entropy and regret objectives, whose forwards and
           backwards are work that the other systems do not do

A block is timed from its second step to the end of training, a snapshot still under way included. The
overhead is the median over rounds of the ratio of neighbours, with the order statistics that hold the median with at
least 90 % (exact, of the binomial). `wall` is the clock's, `cpu` of all threads, `thread` of the one that
computes, and least disturbed by what else the machine does. Then one block is timed part by part, in seconds of that
thread; a part is not all overhead: the composer takes the place of the model's own loss, norm and clip of the stock's.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import report
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from stackpkg import model as models
from stackpkg import params, runs
from stackpkg.data.stream import Stream
from stackpkg.params import Params
from stackpkg.telemetry.guard import Guard
from stackpkg.training import mesh, parity, recovery, saving, trainer
from stackpkg.training.optim import training_arguments
from stackpkg.training.trainer import StackTrainer

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "block_size": 16}
SIZES = {
    "small": HEADS | {"hidden_size": 128, "num_hidden_layers": 4, "head_dim": 32, "moe_intermediate_size": 256,
                      "num_experts": 8, "sliding_window": 32},
    "large": HEADS | {"hidden_size": 256, "num_hidden_layers": 6, "head_dim": 64, "moe_intermediate_size": 512,
                      "num_experts": 4, "sliding_window": 32},
}  # fmt: skip
STEPS, SAVE, TOKENS, CONTEXT = 32, 16, 2048, 256
TERMS = ("contrastive", "load_balance", "gate_entropy", "z_loss", "regret", "long_range", "preference", "conformance")
BARE, STACK, OBJECTIVES = "bare", "stack", "objectives"


def profile(config: dict[str, Any], objectives: bool) -> Params:
    p = parity.profile("stackpkg", {}, batch_tokens=TOKENS, accumulation=1, epoch_steps=STEPS).model_dump(mode="json")
    p["curriculum"] = [{"steps": STEPS, "context": CONTEXT, "long_range": 0.125, "retrieval": float(objectives)}]
    p["auxiliary"] |= {"query_tokens": 16, "document_tokens": 48}
    p["data"] |= {"vocab_size": 2048, "longest_document": CONTEXT}
    p["model"] = {"kind": "stack", "config": config}
    p["objectives"] = {"norms_every": 50, "ramp_steps": {}} | ({} if objectives else dict.fromkeys(TERMS, 0.0))
    p["optimization"] |= {"learning_rate": 3e-4, "ema_decay": 0.999}
    p["snapshots"] |= {"every_steps": SAVE, "keep_last": 1}
    return params.validate(p)


KINDS = ("wall", "cpu", "thread")


def now() -> tuple[float, ...]:
    return time.perf_counter(), time.process_time(), time.thread_time()


class Clock(TrainerCallback):
    """Seconds a step, from the second to the end of training: `wall`, `cpu` of all threads, `thread` of this one, which
    computes; the others write snapshots."""

    def __init__(self, spent: dict[str, float] | None = None) -> None:
        self.spent = spent

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self.began = now()
            if self.spent:
                self.spent.clear()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        took = ((end - start) / (STEPS - 1) for end, start in zip(now(), self.began, strict=True))
        self.wall, self.cpu, self.thread = took


class Ours(StackTrainer):
    """Without what a block would do too often: an evaluation, and a second snapshot, at its end."""

    def _save_checkpoint(self, *given: Any) -> None:
        if self.state.global_step < STEPS:
            super()._save_checkpoint(*given)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        return {"eval_loss": 0.0}


class Rows(torch.utils.data.Dataset):
    """The rows of all steps, in order, ready."""

    def __init__(self, stream: Stream) -> None:
        steps = (stream.batch(list(stream.plan.rows_at(step))) for step in range(STEPS))
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
    """A model of one size, its data, and a block of training of each system."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder, self.p = folder, {STACK: profile(config, False), OBJECTIVES: profile(config, True)}
        if not (folder / "data").exists():
            parity.prepare(folder, self.p[OBJECTIVES])
        self.stream = Stream(folder / "data", self.p[STACK])
        self.initial = folder / f"initial-{config['hidden_size']}"
        built = models.build(self.p[STACK].model, self.stream.vocab_size, self.stream.pad_id, 17)
        built.save_pretrained(self.initial)
        self.parameters, self.rows = built.num_parameters(), Rows(self.stream)
        self.mesh, self.blocks = mesh.build(self.p[STACK].layout), 0

    def make(self, system: str) -> Trainer:
        set_seed(17)
        self.blocks += 1
        model = AutoModelForCausalLM.from_pretrained(self.initial, dtype=torch.float32)
        p = self.p[STACK if system == BARE else system]
        given = training_arguments(p, self.folder / f"checkpoints/block-{self.blocks}", STEPS)
        if system == BARE:
            ours = ("eval_strategy", "eval_steps", "save_steps", "logging_steps", "logging_nan_inf_filter")
            given = {name: value for name, value in given.items() if name not in ours}
            given |= {"save_strategy": "no", "train_sampling_strategy": "sequential"}
            made = Trainer(model=model, args=TrainingArguments(**given, use_cpu=True), train_dataset=self.rows)
        else:
            made = Ours(
                model=model, args=TrainingArguments(**given, use_cpu=True), p=p, mesh=self.mesh,
                stream=Stream(self.folder / "data", p), folder=self.folder, name=f"block-{self.blocks}", attempt=1,
                guard=Guard.production(p), faults=[], rung=0,
            )  # fmt: skip
            made.add_callback(recovery.StopFile(self.folder / f"checkpoints/block-{self.blocks}"))
        made.remove_callback(PrinterCallback)
        return made

    def block(self, system: str) -> Clock:
        """Train a block; what is printed goes nowhere."""
        made, clock = self.make(system), Clock()
        made.add_callback(clock)  # last: the others' ends are inside
        with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing):
            made.train()
        return clock


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

    made: Any = lab.make(STACK)
    undo = [
        timed("probe of attention", trainer, "model_statistics"),
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
        timed("stop file", recovery.StopFile, "on_step_end"),
        timed("snapshot: cadence", saving.Cadence, "on_step_end"),
        timed("stream: rows of the step", made.stream, "batch"),
        timed("counts of the step", made, "_get_num_items_in_batch"),
        timed("composer and router statistics", made.loss, "value"),
    ]
    made.add_callback(Clock(spent))
    try:
        with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing):
            made.train()
    finally:
        for each in undo:
            each()
    return {name: seconds / (STEPS - 1) for name, seconds in spent.items()}


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median, and the order statistics around it that hold the median of the distribution with at least 90 %."""
    ordered, n = sorted(values), len(values)
    # P(x_(k) <= median <= x_(n+1-k)) = 1 - 2 P(Binomial(n, 1/2) < k)   (David and Nagaraja 2003, section 7.1)
    below = [2 * sum(math.comb(n, j) for j in range(k)) / 2**n for k in range(1, n // 2 + 1)]
    k = max([k for k, outside in enumerate(below, 1) if outside <= 0.1], default=1)
    return statistics.median(ordered), ordered[k - 1], ordered[n - k]


def measure(name: str, lab: Lab, rounds: int) -> list[dict[str, Any]]:
    systems, found = [BARE, STACK, OBJECTIVES], defaultdict(list)
    for turn in range(rounds + 1):
        for system in systems if turn % 2 else systems[::-1]:
            clock = lab.block(system)
            shown = ", ".join(f"{kind} {getattr(clock, kind):.3f} s" for kind in KINDS)
            print(f"{name} {turn} {system}: {shown}", file=sys.stderr, flush=True)
            if turn:  # the first warms up
                found[system].append(clock)
    title = f"{name}, {lab.parameters / 1e6:.1f}M parameters"
    rows = []
    for system in systems:
        for kind in KINDS:
            middle = statistics.median(getattr(clock, kind) for clock in found[system])
            rows.append(report.row(f"{title}: {system}", f"step, {kind}", middle, "s"))
    for system in (STACK, OBJECTIVES):
        for kind in KINDS:
            pairs = zip(found[system], found[BARE], strict=True)
            ratios = [100 * (getattr(ours, kind) / getattr(bare, kind) - 1) for ours, bare in pairs]
            for which, value in zip(("median", "low", "high"), interval(ratios), strict=True):
                rows.append(report.row(f"{title}: {system}", f"overhead {kind}, {which}", value, "%"))
    step = statistics.median(clock.thread for clock in found[BARE])
    for part, seconds in sorted(parts(lab).items(), key=lambda item: -item[1]):
        rows.append(report.row(f"{title}: part", part, 100 * seconds / step, "% of a bare step"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", choices=SIZES, action="append", help="one size alone")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rows, sizes = [], {name: SIZES[name] for name in given.size or SIZES}
    with tempfile.TemporaryDirectory(dir=runs.root() / "outbox") as place:  # a disk, which /tmp need not be
        for name, config in sizes.items():
            rows += measure(name, Lab(Path(place), config), given.rounds)
    versions = report.machine("torch", "transformers", "accelerate")["versions"]
    about = {"steps_of_a_block": STEPS, "tokens_of_a_step": TOKENS, "context": CONTEXT, "rounds": given.rounds}
    report.write(rows, given.json, versions=versions, sizes=sizes, **about)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
