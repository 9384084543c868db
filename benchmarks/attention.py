"""Cost of attention over context: `python benchmarks/attention.py [--json FILE]`, one core, forward and backward.

Each measurement is a fork of its own, so that its peak memory is its own. Part one: the self-attention module of
the reference model (shipped window, blocks and summaries) in each pattern and in linear mode, against the same module
around dense causal `scaled_dot_product_attention`. Part two: the whole model against the Qwen3-MoE of transformers of
the same sizes (SDPA, grouped experts), loss included. Times are CPU seconds of the fastest of 4 to 24 passes, as many
as fit into 4 s, or of the only one where that takes over 30 s; memory is the peak over what the process held before;
freed memory is kept, as in a launched job. With `--json` the curves are drawn beside it.

A key of the dilated pattern lies up to 2,048 tokens back, so a short row has fewer keys a token than a long one by
definition: its exponent is also given from 4,096 tokens on, where half of the queries see a full window. A quarter of
the window gives it the reach of the other patterns, 512 tokens, and with it their even work a token.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import report

SIZES = {
    "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
    "moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
OURS = {
    "sliding": {}, "block": {"attention_pattern": "block"}, "dilated": {"attention_pattern": "dilated"},
    "dilated, reach 512": {"attention_pattern": "dilated", "sliding_window": 128},
    "linear, elu": {"linear_from": 0}, "linear, favor": {"linear_from": 0, "feature_map": "favor"},
}  # fmt: skip
DENSE, STACK, QWEN, VOCAB = "dense SDPA", "reference model", "Qwen3-MoE", 1024
LENGTHS = [1024 << n for n in range(6)]
FULL = {"dilated": 4096}  # tokens from which half of the queries see a full window
WEIGHTS = []  # parameters of the whole model that this process measures
AT_MOST = {QWEN: 8_192}  # the square of more would not fit into the minutes


def module(system: str, length: int) -> Callable[[], None]:
    import torch
    import torch.nn.functional as F

    from stackpkg.model import StackConfig
    from stackpkg.model.attention import SelfAttention
    from stackpkg.model.patterns import documents, layout
    from stackpkg.model.rotary import rotary, rotate

    config = StackConfig(**SIZES, **OURS.get(system, {}))
    attention, positions = SelfAttention(config, 0), torch.arange(length)[None]
    x = torch.randn(1, length, config.hidden_size, requires_grad=True)

    def dense() -> torch.Tensor:
        rotation, (q, k, v) = rotary(config, positions, x.dtype), attention.project(x, x)
        q, k = rotate(attention.q_norm(q), *rotation), rotate(attention.k_norm(k), *rotation)
        heads = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return attention.o_proj(out.transpose(1, 2).flatten(2))

    def ours() -> torch.Tensor:
        name = attention.pattern
        layouts = {name: layout(config, name, positions, x.dtype)} if length <= config.linear_from else None
        return attention(x, rotary(config, positions, x.dtype), documents(positions), layouts)[0]

    return lambda: (dense if system == DENSE else ours)().sum().backward()


def model(system: str, length: int) -> Callable[[], None]:
    import torch

    from stackpkg import params
    from stackpkg.model import build

    qwen = {"model_type": "qwen3_moe", "mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": True}
    kind = params.Model(kind="auto", config=SIZES | qwen) if system == QWEN else params.Model(config=SIZES)
    found, ids = build(kind, VOCAB, 0, 1).train(), torch.randint(1, VOCAB, (1, length))
    if system == QWEN:
        found.set_experts_implementation("grouped_mm")
    WEIGHTS.append(found.num_parameters())
    return lambda: found(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def held(name: str) -> float:
    """MiB the process holds now (VmRSS) or held at most (VmHWM)."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


def cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(system: str, length: int) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    make = model if system in (STACK, QWEN) else module
    make(system, 64)()  # what is set up at the first use
    WEIGHTS.clear()
    step = make(system, length)
    before, seconds = held("VmRSS"), []
    while sum(seconds) < 30 and (len(seconds) < 4 or (sum(seconds) < 4 and len(seconds) < 24)):
        start = cpu()
        step()
        seconds.append(cpu() - start)
    return {"cpu": min(seconds), "peak": held("VmHWM") - before, "parameters": sum(WEIGHTS)}


def exponent(seconds: dict[int, float]) -> float:
    """Slope of log seconds over log tokens, by least squares."""
    xs, ys = [math.log(n) for n in seconds], [math.log(s) for s in seconds.values()]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)


def draw(found: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    labels = {"cpu": "CPU seconds, forward and backward", "peak": "peak memory, MiB"}
    for system, points in found.items():
        whole = system in (STACK, QWEN)
        for pane, name in ((panes[2], "cpu"),) if whole else ((panes[0], "cpu"), (panes[1], "peak")):
            style = "--" if system in (DENSE, QWEN) else "-"
            pane.loglog(list(points), [p[name] for p in points.values()], style, marker="o", label=system, base=2)
            pane.set(xlabel="tokens", ylabel=labels[name], title="whole model" if whole else "self-attention")
    for pane in panes:
        pane.legend()
        pane.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    import stackpkg.model  # noqa: F401  (once, before the forks)
    from stackpkg.training.clusters import KEPT

    if not os.environ.keys() >= KEPT.keys():  # read when a process starts
        sys.exit(subprocess.call([sys.executable, *sys.argv], env=report.quiet() | KEPT))

    start, found = time.monotonic(), defaultdict(dict)
    for length in LENGTHS:
        for system in (*OURS, DENSE, STACK, QWEN):
            if length <= AT_MOST.get(system, LENGTHS[-1]):
                with multiprocessing.get_context("fork").Pool(1) as pool:
                    found[system][length] = pool.apply(measure, (system, length))
    rows = []
    for system, points in found.items():
        for length, point in points.items():
            rows += [
                report.row(system, f"{length} cpu", point["cpu"], "s"),
                report.row(system, f"{length} peak", point["peak"], "MiB"),
            ]
        for first in (0, FULL[system]) if system in FULL else (0,):
            times = {length: point["cpu"] for length, point in points.items() if length >= first}
            name = f"exponent from {first}" if first else "exponent"
            rows.append(report.row(system, name, exponent(times), "log s / log tokens"))
        if system in (STACK, QWEN):
            rows.append(report.row(system, "parameters", points[LENGTHS[0]]["parameters"], "numbers"))
        rival = found[QWEN] if system == STACK else found[DENSE]
        for length in sorted(points.keys() & rival.keys()) if system not in (DENSE, QWEN) else ():
            ratio = rival[length]["cpu"] / points[length]["cpu"]
            rows.append(
                report.row(system, f"{length} tokens/s ratio", ratio, f"times {QWEN if system == STACK else DENSE}")
            )
    versions = report.machine("torch", "transformers")["versions"]
    report.write(
        rows, arguments.json, sizes=SIZES, versions=versions, minutes=round((time.monotonic() - start) / 60, 1)
    )
    if arguments.json:
        draw(found, arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
