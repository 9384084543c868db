"""What a fault leaves behind: `python benchmarks/recovery.py [--json FILE]`, the same faults in four ways of training.

stock       `transformers.Trainer` as it comes: clip by global norm (accelerate), fused AdamW
nan_to_num  the same, but gradients go through `torch.nan_to_num(nan=0, posinf=1e5, neginf=-1e5)` first, as in
            NVlabs/edm, training/training_loop.py
times zero  the same, but AdamW multiplies what it adds by 0 where loss or norm are over 6 standard deviations from the
            mean of a window, by 1 elsewhere, as in allenai/OLMo-core, optim/adamw.py and skip_step_optimizer.py
stack       `stackpkg launch`: skip by selection against a robust window, then the recovery ladder

Same initial weights, rows, rates, clip and betas; language modelling alone; one process, and two for the fault in one
rank (DDP, and FSDP2 for `stack`). A fault is done by the same function to all, between backward and clip. The number
that counts is `above clean`: the held-out loss of the last weights less that of the same system without a fault. Steps
lost are those that left nothing in the last weights: skipped, or done again, or all since weights were not finite.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import report
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from stackpkg import model as models
from stackpkg import params, runs
from stackpkg.data.stream import Stream
from stackpkg.params import Params
from stackpkg.runs import RunFolder, read_json
from stackpkg.telemetry import rows as telemetry
from stackpkg.training import launch, snapshots, tiny
from stackpkg.training.faults import inject
from stackpkg.training.optim import training_arguments

STEPS, AT, SAVE, CONTEXT, TOKENS = 120, 81, 20, 64, 512
CONFIG = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "moe_intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, "block_size": 8,
}  # fmt: skip
TERMS = ("contrastive", "load_balance", "gate_entropy", "z_loss", "regret", "long_range", "preference", "conformance")
FAULTS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "one NaN": [{"kind": "nan_gradient", "step": AT}],
    "one infinity": [{"kind": "inf_gradient", "step": AT}],
    "spike x 10,000": [{"kind": "spike_gradient", "step": AT}],
    "six NaN in a row": [{"kind": "nan_gradient", "step": [*range(AT, AT + 6)], "attempt": 1}],
    "level x 10,000": [{"kind": "spike_gradient", "step": [*range(AT, STEPS + 1)]}],
    "none, two ranks": [],
    "NaN in one rank": [{"kind": "nan_gradient", "step": AT, "rank": 1}],
}
STOCK, NUMBERS, ZERO, STACK = "stock", "nan_to_num", "times zero", "stack"
SYSTEMS = (STOCK, NUMBERS, ZERO, STACK)


def ranks(fault: str) -> int:
    return 2 if "rank" in fault else 1


def clean(fault: str) -> str:
    return "none, two ranks" if ranks(fault) == 2 else "none"


def profile(processes: int) -> Params:
    p = tiny.profile("stackpkg", {"processes": processes, "fsdp": processes}).model_dump(mode="json")
    p["curriculum"] = [{"steps": STEPS, "context": CONTEXT, "long_range": 0.125, "retrieval": 0.0}]
    p["model"] = {"kind": "stack", "config": CONFIG}
    p["objectives"] = dict.fromkeys(TERMS, 0.0) | {"norms_every": 0}
    p["optimization"] |= {"learning_rate": 3e-3, "warmup_steps": 10, "floor": 3e-4}
    p["training"] |= {"batch_tokens": TOKENS, "accumulation": 1, "epoch_steps": STEPS}
    p["snapshots"] |= {"every_steps": SAVE}
    return params.validate(p)


class ZeroTimes(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2), each addend multiplied by `factor`."""

    def __init__(self, parameters: Any, lr: float, betas: tuple[float, float], eps: float, decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "decay": decay})
        self.losses: list[float] = []
        self.norms: list[float] = []

    def factor(self) -> float:
        """1 to go on, 0 to skip: within 6 standard deviations of the last 128, once there are 64."""
        if len(self.losses) < 64:
            return 1.0
        for seen in (self.losses, self.norms):
            before = torch.tensor(seen[-129:-1], dtype=torch.double)
            if not abs(seen[-1] - before.mean()) / before.std() <= 6:
                return 0.0
        return 1.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        f = self.factor()
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p] or self.state.setdefault(p, {})
                if not state:
                    state |= {"t": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                state["t"] += 1
                m, v, t = state["exp_avg"], state["exp_avg_sq"], state["t"]
                p.mul_(1 - f * lr * group["decay"])
                m.add_(f * (1 - b1) * (p.grad - m))
                v.mul_(1 - f * (1 - b2)).add_(f * (1 - b2) * p.grad.square())
                p.sub_(f * lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"]))


class Faulty(Trainer):
    """The stock loop, a fault done to it before the clip; what each step's loss was."""

    faults: tuple[dict[str, Any], ...] = ()
    system = STOCK

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        here = {"step": self.state.global_step + 1, "rank": self.args.process_index, "attempt": 1}
        for fault in self.faults:
            inject(fault, model, self.optimizer.optimizer, lambda: None, cursor=0, precision="fp32", **here)
        if self.system == NUMBERS:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        norm = super()._clip_grad_norm(model)
        if self.system == ZERO:
            self.optimizer.optimizer.norms.append(float(norm))
        return norm

    def training_step(self, *given: Any, **more: Any) -> Tensor:
        loss = super().training_step(*given, **more)
        if self.system == ZERO:
            self.create_optimizer()
            getattr(self.optimizer, "optimizer", self.optimizer).losses.append(float(loss))
        return loss


class Rows(torch.utils.data.Dataset):
    """The rows of all steps in order, ready; of every second one where ranks share a step."""

    def __init__(self, stream: Stream) -> None:
        self.batches = [stream.batch(list(stream.plan.rows_at(step))) for step in range(STEPS)]
        self.size = len(self.batches[0]["labels"])

    def __len__(self) -> int:
        return STEPS * self.size

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        batch, place = self.batches[row // self.size], row % self.size
        return {name: torch.from_numpy(batch[name][place]) for name in ("input_ids", "position_ids", "labels")}


def held_out(folder: Path, model: nn.Module) -> float:
    """Mean loss over held-out rows of every domain; of weights that are not finite, NaN."""
    stream, losses = Stream(folder / "data", profile(1)), []
    model.eval()
    with torch.no_grad():
        for domain in stream.domains:
            batch = {name: torch.from_numpy(value) for name, value in stream.validation(domain, 16).items()}
            given = {name: batch[name] for name in ("input_ids", "position_ids", "labels")}
            if len(batch["labels"]):  # a domain may have too little held-out text for a row
                losses.append(float(model(**given, use_cache=False).loss))
    return sum(losses) / len(losses)


def train(folder: Path, system: str, fault: str) -> dict[str, Any]:
    """Train in the stock loop; curve, held-out loss, whether weights and moments are finite, steps lost."""
    set_seed(17)
    p = profile(ranks(fault))
    dropped = ("eval_strategy", "eval_steps", "save_steps")
    given = {k: v for k, v in training_arguments(p, folder / "stock", STEPS).items() if k not in dropped}
    given |= {"save_strategy": "no", "train_sampling_strategy": "sequential"}
    model = AutoModelForCausalLM.from_pretrained(folder / "initial", dtype=torch.float32)
    arguments, o = TrainingArguments(**given, use_cpu=True), p.optimization
    made = Faulty(model=model, args=arguments, train_dataset=Rows(Stream(folder / "data", p)))
    made.remove_callback(PrinterCallback)
    made.faults, made.system = tuple(FAULTS[fault]), system
    if system == ZERO:
        decayed = set(made.get_decay_parameter_names(model))
        groups = [
            {"params": [p for name, p in model.named_parameters() if (name in decayed) == yes], "decay": decay}
            for yes, decay in ((True, o.weight_decay), (False, 0.0))
        ]
        made.optimizer = ZeroTimes(groups, o.learning_rate, o.betas, 1e-8, o.weight_decay)
    with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing):
        made.train()
    state = [t for each in made.optimizer.state.values() for t in each.values() if isinstance(t, Tensor)]
    curve = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    weights = finite(model.parameters())
    skipped = 0
    if system == ZERO:
        skipped = sum(each == 0 for each in refused(getattr(made.optimizer, "optimizer", made.optimizer)))
    return {
        "curve": curve, "held_out": held_out(folder, model), "weights": weights, "moments": finite(state),
        "lost": skipped if weights else STEPS - AT + 1,
    }  # fmt: skip


def refused(optimizer: ZeroTimes) -> list[float]:
    """The factor of every step, again."""
    losses, norms, found = optimizer.losses, optimizer.norms, []
    for step in range(1, len(norms) + 1):
        optimizer.losses, optimizer.norms = losses[:step], norms[:step]
        found.append(optimizer.factor())
    return found


def finite(tensors: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def child(rank: int, processes: int, port: int, folder: str, system: str, fault: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    found = train(Path(folder), system, fault)
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found), encoding="utf-8")
    os._exit(0)


def stock(folder: RunFolder, system: str, fault: str) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = (ranks(fault), port, str(folder.path), system, fault)
    mp.start_processes(child, given, ranks(fault), start_method="spawn")
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


def stack(folder: RunFolder, fault: str) -> dict[str, Any]:
    name = "job-" + "".join(c if c.isalnum() else "-" for c in fault)
    home = folder.path / "checkpoints" / name
    launch.launch(name, profile(ranks(fault)), folder, steps=STEPS, faults=FAULTS[fault], quiet=True)
    table = telemetry.read(folder.path / "telemetry" / name)
    table = table[table["rank"] == 0]
    kept = telemetry.effective(table).sort_values("step")
    (newest,) = [path for step, path in snapshots.listed(home).items() if step == STEPS]
    with tempfile.TemporaryDirectory() as place:
        dcp_to_torch_save(newest / "dcp", Path(place) / "state.pt")
        state = torch.load(Path(place) / "state.pt", weights_only=True)
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, Tensor)]
    model = AutoModelForCausalLM.from_pretrained(home / "final", dtype=torch.float32)
    return {
        "curve": kept["loss"].tolist(), "held_out": held_out(folder.path, model),
        "weights": finite(model.parameters()), "moments": finite(leaves),
        "lost": len(table) - len(kept) + int(kept["update_skipped"].sum()),
        "attempts": len(read_json(home / "attempts.json")),
    }  # fmt: skip


def draw(found: dict[tuple[str, str], dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    faults = [fault for fault in FAULTS if FAULTS[fault]]
    figure, panes = plt.subplots(2, 3, figsize=(15, 7.5), layout="constrained", sharex=True, sharey=True)
    styles = {
        STOCK: ("tab:red", "-"),
        NUMBERS: ("tab:orange", "--"),
        ZERO: ("tab:purple", ":"),
        STACK: ("tab:blue", "-"),
    }
    for pane, fault in zip(panes.flat, faults, strict=True):
        for system, (colour, line) in styles.items():
            curve = found[system, fault]["curve"]
            whole = next((k for k, loss in enumerate(curve) if not math.isfinite(loss)), len(curve))
            pane.plot(range(1, whole + 1), curve[:whole], line, color=colour, label=system, linewidth=1.6)
            if whole < len(curve):
                pane.plot(whole, curve[whole - 1], "x", color=colour, markersize=11, markeredgewidth=2.5)
        pane.axvline(AT, color="grey", linewidth=0.8, linestyle="--")
        pane.set(title=fault, xlim=(AT - 30, STEPS))
        pane.grid(alpha=0.3)
    for pane in panes[1]:
        pane.set_xlabel("optimiser step")
    for pane in panes[:, 0]:
        pane.set_ylabel("training loss, nats")
    panes[0, 0].legend(title="x: not finite from here on")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--system", choices=SYSTEMS, action="append", help="one alone, without a picture")
    parser.add_argument("--fault", choices=FAULTS, action="append", help="one alone, without a picture")
    given = parser.parse_args()
    os.environ |= report.quiet()
    found: dict[tuple[str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=runs.root() / "outbox", prefix=".recovery-") as place:
        folder = RunFolder(Path(place).name)
        tiny.prepare(folder.path, profile(1))
        stream = Stream(folder.path / "data", profile(1))
        models.build(profile(1).model, stream.vocab_size, stream.pad_id, 17).save_pretrained(folder.path / "initial")
        wanted = [*dict.fromkeys(each for fault in given.fault or FAULTS for each in (clean(fault), fault))]
        for system in given.system or SYSTEMS:
            for fault in wanted:
                found[system, fault] = stack(folder, fault) if system == STACK else stock(folder, system, fault)
                shown = {k: v[:2] if k == "curve" else v for k, v in found[system, fault].items()}
                print(system, fault, shown, file=sys.stderr, flush=True)
    rows = []
    for (system, fault), one in found.items():
        above = one["held_out"] - found[system, clean(fault)]["held_out"]
        rows += [
            report.row(f"{fault}: {system}", "held-out loss", one["held_out"], "nats"),
            report.row(f"{fault}: {system}", "above clean", above, "nats"),
            report.row(f"{fault}: {system}", "weights finite", one["weights"], "1 is yes"),
            report.row(f"{fault}: {system}", "optimiser finite", one["moments"], "1 is yes"),
            report.row(f"{fault}: {system}", "steps lost", one["lost"], f"of {STEPS}"),
        ]
    versions = report.machine("torch", "transformers", "accelerate")["versions"]
    report.write(rows, given.json, versions=versions, steps=STEPS, fault_at=AT, snapshot_every=SAVE)
    if given.json and not (given.system or given.fault):
        draw(found, given.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
