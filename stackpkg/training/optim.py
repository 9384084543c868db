"""Optimiser, schedule and clipping as `TrainingArguments`, and the Robbins-Monro check of the schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from stackpkg.params import Optimization, Params


class Adafactor(transformers.Adafactor):
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235, algorithm 4) whose second moments lie in the pieces of their
    parameter. That of transformers makes them plain tensors, and fails at the first sharded one (5.23).
    """

    def step(self, closure: Any = None) -> Any:
        for parameter in (each for group in self.param_groups for each in group["params"]):
            if parameter.grad is not None and not self.state[parameter]:
                self.state[parameter] = {"step": 0, "RMS": 0, **_second_moments(parameter.detach())}
        return super().step(closure)


def _second_moments(parameter: Tensor) -> dict[str, Tensor]:
    """Zeros: of rows [..., n] and columns [..., m] of a parameter [..., n, m], of each number of a vector. Laid out as
    the parameter and not as its first gradient, which may lie otherwise, so that a resume adds up in the same order."""
    if parameter.dim() < 2:
        return {"exp_avg_sq": torch.zeros_like(parameter)}
    return {
        "exp_avg_sq_row": torch.zeros_like(_whole(parameter.mean(-1))),
        "exp_avg_sq_col": torch.zeros_like(_whole(parameter.mean(-2))),
    }


def _whole(mean: Tensor) -> Tensor:
    """Means of the pieces of a dimension that is cut become that of the whole dimension, on every rank."""
    if not isinstance(mean, DTensor):
        return mean
    return mean.redistribute(placements=[Replicate() if each.is_partial() else each for each in mean.placements])


def optimizer(o: Optimization) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """Class and arguments for `Trainer(optimizer_cls_and_kwargs=...)`; none where transformers' own choice will do."""
    if o.optimizer == "adamw":
        return None
    return Adafactor, {"lr": o.learning_rate, "scale_parameter": False, "relative_step": False}


def training_arguments(p: Params, output: Path, steps: int) -> dict[str, Any]:
    """Keyword arguments of `transformers.TrainingArguments` for `steps` optimiser steps of this profile."""
    o, t = p.optimization, p.training
    return {
        "output_dir": str(output),
        "max_steps": steps,
        # of the first stage; the stream decides, and keeps the tokens of a step the same when the context grows
        "per_device_train_batch_size": p.rows(p.curriculum[0]) // (p.layout.data_parallel * t.accumulation),
        "ignore_data_skip": True,  # the stream begins where it is told to: no batch is drawn and thrown away
        "gradient_accumulation_steps": t.accumulation,
        "optim": {"adamw": "adamw_torch_fused", "adafactor": "adafactor"}[o.optimizer],
        "learning_rate": o.learning_rate,
        "adam_beta1": o.betas[0],
        "adam_beta2": o.betas[1],
        "weight_decay": o.weight_decay,
        **_schedule(o, steps),
        "warmup_steps": o.warmup_steps,
        "max_grad_norm": o.clip,
        # FSDP2 has its own policy, with fp32 reduction; autocast keeps fp32 weights and gradients where there is none
        "bf16": t.precision == "bf16" and p.layout.data_parallel == 1,
        "activation_checkpointing": bool(t.activation_checkpointing),
        # reentrant recomputation loses the routers' gradients (transformers 5.23); this one repeats dropout as well
        "activation_checkpointing_kwargs": {
            "use_reentrant": False,
            "every_n_layers": max(1, t.activation_checkpointing),
        },
        "eval_strategy": "steps",
        "eval_steps": t.epoch_steps,
        "save_strategy": "steps",
        "save_steps": p.snapshots.every_steps,
        "logging_steps": 1,
        # The default hides a NaN: it logs the running average in its place (transformers 5.23).
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": list(p.telemetry.report_to) or "none",
        "run_name": f"{p.run}: {output.name}",
        "seed": p.seed,
    }


def _decay(o: Optimization, steps: int) -> int:
    return max(1, min(o.decay_steps, steps - o.warmup_steps))


def _schedule(o: Optimization, steps: int) -> dict[str, Any]:
    if o.schedule == "cosine":
        return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": o.floor}}
    shape = {"min_lr_ratio": o.floor / o.learning_rate, "num_decay_steps": _decay(o, steps), "decay_type": "linear"}
    return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": shape}


def learning_rates(o: Optimization, steps: int) -> np.ndarray:
    """Learning rate of steps 0 .. steps-1, float64 [steps]: linear warm-up, then down to the floor by half a cosine
    (Loshchilov and Hutter 2017, arXiv 1608.03983, equation 5 with T_0 = steps - warmup and no restart), or stable and
    then a linear decay (`wsd`: MiniCPM, arXiv 2404.06395, section 4; its warm-up begins at the floor).
    """
    t = np.arange(steps, dtype=np.float64)
    if o.schedule == "wsd":
        up, decay = t / max(1, o.warmup_steps), _decay(o, steps)
        down = (steps - t) / decay
        # eta = floor + (peak - floor) min(t / warmup, 1, (T - t) / decay)
        share = np.where(t < o.warmup_steps, up, np.minimum(1.0, down))
        return o.floor + (o.learning_rate - o.floor) * share
    progress = np.clip((t - o.warmup_steps) / max(1, steps - o.warmup_steps), 0, 1)
    # eta = floor + (peak - floor) (1 + cos(pi progress)) / 2
    cosine = o.floor + (o.learning_rate - o.floor) * 0.5 * (1 + np.cos(np.pi * progress))
    return np.where(t < o.warmup_steps, o.learning_rate * t / max(1, o.warmup_steps), cosine)


def robbins_monro(rates: np.ndarray, warmup_steps: int) -> dict[str, float | bool]:
    """The Robbins-Monro conditions (1951, equation 6) in a piecewise sense, on the rates [steps] of a finite run.

    A finite sum can't diverge, and under a floor the sum of squares would. So, after warm-up: the sum keeps growing
    (`diverges`: no rate is zero, so held on it reaches any point), and the noise dies out (`bounded`: the rate never
    rises; it falls for at least a tenth of the steps, which MiniCPM, section 4.3, found to be enough; and the second
    half of that fall adds less than half as much to the sum of squares as the first).
    """
    after = np.asarray(rates)[warmup_steps:]
    fall = after[np.flatnonzero(after == after.max())[-1] :] if after.size else after  # without a stable stretch
    first, second = (float((part**2).sum()) for part in np.array_split(fall, 2))
    falls = fall.size > 1 and 10 * fall.size >= after.size
    return {
        "sum": float(np.sum(rates)),
        "sum_of_squares": float(np.square(rates).sum()),
        "diverges": bool(after.size and after.min() > 0),
        "bounded": bool(falls and np.all(np.diff(after) <= 0) and second < 0.5 * first),
    }


def effective_beta(beta: float, updates: int) -> float:
    """Weight of the past in the bias-corrected moment after `updates` updates: beta (1 - beta^(t-1)) / (1 - beta^t).

    Kingma and Ba 2015 (arXiv 1412.6980), algorithm 1: with bias correction the first update sees no past at all.
    """
    return beta * (1 - beta ** (updates - 1)) / (1 - beta**updates) if updates > 0 and beta > 0 else 0.0


def effective_betas(o: Optimization, updates: int) -> tuple[float, float]:
    """Weight of the past in the first and the second moment after `updates` updates. Adafactor has no first moment, and
    for its second beta2_t = 1 - t^-0.8 (arXiv 1804.04235, section 7.2).
    """
    if o.optimizer == "adafactor":
        return 0.0, 1 - max(1, updates) ** -0.8
    return effective_beta(o.betas[0], updates), effective_beta(o.betas[1], updates)
