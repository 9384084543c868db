"""What each probe of the telemetry costs: `python benchmarks/telemetry.py [--json FILE] [--pairs 8]`.

One process, the reference model at the two sizes of `trainer.py`, all objectives. Steps come in pairs, one with a probe
and one without, in an order drawn by chance; pairs of all probes are shuffled, so that all meet the same machine. The
cost of a run is the mean difference within the pairs over the mean step without any probe, in seconds of the training
thread, with the 95 % interval of a bootstrap over pairs. A cheap probe runs many times in its step, and the difference
is divided by that. `at its cadence` is the cost over the steps between two runs that the parameters ship with, and
their sum is what `telemetry.budget` is about. `row` is what is told in every step (sums over ranks, norm of the
weights, row, alerts, print), timed by itself: the guard needs it, so it is no probe and has no cadence.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
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
from trainer import OBJECTIVES, SIZES, Lab
from transformers import TrainerCallback
from transformers.utils import logging

from stackpkg import params, runs
from stackpkg.params import Params
from stackpkg.telemetry.meter import Meter

TIMES = {"routing": 20, "retrieval": 20, "norms": 2, "update": 1, "attention": 1}  # runs of a probe in its step
WARM, ENDS = 4, ("", ", low", ", high")  # steps before the first pair


class Toggle(Meter):
    """A meter that runs the probe of a plan, as often as TIMES says, and no other."""

    def __init__(self, plan: list[str]) -> None:
        super().__init__(dict.fromkeys(TIMES, 1), 1.0)
        self.plan = plan

    def due(self, name: str) -> bool:
        return self.plan[self.step - 1] == name

    def run(self, name: str, measure: Callable[[], dict[str, Any]], extra: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(TIMES[name] if self.due(name) else 0):
            found = measure()
        return found


class Clock(TrainerCallback):
    """Seconds of the thread, of every step; a step lasts until the next begins."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stamps.append(time.thread_time())


def profile(p: Params) -> Params:
    """No snapshot and no evaluation between two steps."""
    values = p.model_dump(mode="json")
    values["training"]["epoch_steps"] = values["snapshots"]["every_steps"] = 10**6
    return params.validate(values)


def measured(lab: Lab, pairs: int) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Seconds of each step, the probe that ran in it, and seconds of its row."""
    order = np.random.default_rng(17)
    blocks = order.permutation([order.permutation([name, ""]) for name in TIMES for _ in range(pairs)])
    plan = [""] * WARM + blocks.flatten().tolist() + [""]
    lab.p[OBJECTIVES] = profile(lab.p[OBJECTIVES])
    made: Any = lab.make(OBJECTIVES, len(plan))
    toggle, clock, rows = Toggle(plan), Clock(), [0.0] * len(plan)
    made.measuring.meter = made.loss.meter = toggle
    made.composer.sometimes = lambda measure: toggle.run("norms", measure)

    def timed(method: str) -> None:
        original = getattr(made, method)

        def call(*given: Any) -> Any:
            began = time.thread_time()
            try:
                return original(*given)
            finally:
                rows[toggle.step - 1] += time.thread_time() - began

        setattr(made, method, call)

    timed("_measure")
    timed("_write_row")
    made.add_callback(clock)
    with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing):
        made.train()
    return np.diff(clock.stamps), plan, np.array(rows)


def resampled(cost: np.ndarray, step: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The share as measured, and after it as many as a bootstrap over pairs gives."""
    found = bootstrap((cost, step), share, paired=True, rng=rng, method="percentile").bootstrap_distribution
    return np.concatenate([[share(cost, step)], found])


def interval(shares: np.ndarray) -> tuple[float, float, float]:
    """The share as measured and its 95 % interval."""
    low, high = np.quantile(shares[1:], (0.025, 0.975))
    return float(shares[0]), float(low), float(high)


def share(cost: np.ndarray, step: np.ndarray, axis: int = -1) -> np.ndarray:
    return 100 * cost.mean(axis) / step.mean(axis)


def measure(name: str, lab: Lab, pairs: int) -> list[dict[str, Any]]:
    seconds, plan, told = measured(lab, pairs)
    title, p = f"{name}, {lab.parameters / 1e6:.1f}M parameters", params.Params()
    every = {**p.telemetry.every, "norms": p.objectives.norms_every}
    plain = np.array([not probe for probe in plan[:-1]])
    plain[:WARM] = False
    rows = [report.row(title, "step without probes", float(seconds[plain].mean()), "s")]
    total, rng = np.zeros(1), np.random.default_rng(17)
    for probe, times in TIMES.items():
        on = [step for step, ran in enumerate(plan) if ran == probe]
        off = [step + (1 if (step - WARM) % 2 == 0 else -1) for step in on]
        shares = resampled((seconds[on] - seconds[off]) / times, seconds[off], rng)
        total, costs = total + shares / every[probe], interval(shares)  # the probes' pairs are independent
        for which, value in zip(ENDS, costs, strict=True):
            rows.append(report.row(f"{title}: {probe}", f"a run{which}", value, "% of a step"))
        rows.append(report.row(f"{title}: {probe}", "every", every[probe], "steps"))
        for which, value in zip(ENDS, costs, strict=True):
            rows.append(
                report.row(f"{title}: {probe}", f"at its cadence{which}", value / every[probe], "% of the time")
            )
    for which, value in zip(ENDS, interval(total), strict=True):
        rows.append(report.row(f"{title}: all probes", f"at their cadence{which}", value, "% of the time"))
    for which, value in zip(ENDS, interval(resampled(told[:-1][plain], seconds[plain], rng)), strict=True):
        rows.append(report.row(f"{title}: row", f"every step{which}", value, "% of a step"))
    print(f"{title}: measured", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pairs", type=int, default=8, help="of steps with and without each probe")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rows = []
    with tempfile.TemporaryDirectory(dir=runs.root() / "outbox") as place:  # a disk, which /tmp need not be
        for name, config in SIZES.items():
            steps = WARM + 2 * len(TIMES) * given.pairs + 1
            rows += measure(name, Lab(Path(place), config, steps), given.pairs)
    versions = report.machine("torch", "transformers")["versions"]
    report.write(rows, given.json, versions=versions, sizes=SIZES, pairs=given.pairs, times=TIMES)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
