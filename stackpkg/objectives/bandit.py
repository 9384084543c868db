"""Experts as arms of a bandit: what choosing each has paid, and the regret of a gate that does not choose the best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FLOOR = 0.1  # smallest propensity, as a share of an even gate's 1 / experts: no token weighs more than 10 experts
BUCKETS = 1024  # of labels by number modulo this: exact baselines for a vocabulary up to it, shared ones beyond


def reward(losses: Tensor, baseline: Tensor, spread: Tensor) -> Tensor:
    """Improvement of token losses on what such tokens usually cost, in [0, 1]; 1/2 is no improvement. Any one shape;
    `baseline` and `spread` (two standard deviations to either side are told apart) in nats.

    The scale is ours: EXP3 (Auer et al. 2002, sec. 2) asks for rewards in [0, 1] and losses have no bound. Taken from a
    baseline, as in REINFORCE (Williams 1992), so that an expert does not earn by getting the easy tokens.
    """
    # r = clip(1/2 + (b - l) / (4 sigma), 0, 1)
    return (0.5 + (baseline - losses) / (4 * spread)).clamp(0, 1)


def importance(gate: Tensor, chosen: Tensor) -> Tensor:
    """Weights [n, experts] of what was seen. gate [n, experts], chosen [n, k] -> 0 .. experts / FLOOR.

    Times the reward it is unbiased for every arm if arm e is in A with probability pi_e >= floor. A gate that takes
    its k largest draws no lots: there the *ratio* of sums in `Bandit` is a mean of the tokens an expert got, in which
    those count more that the gate was less sure about, and the plain sum would only measure usage.
    """
    mask = torch.zeros_like(gate).scatter_(-1, chosen, 1.0)
    # 1[e in A] / max(pi_e, floor)   (Horvitz and Thompson 1952; EXP3: Auer et al. 2002, sec. 3)
    return mask / gate.clamp_min(FLOOR / gate.shape[-1])


def regret(gate: Tensor, estimates: Tensor) -> Tensor:
    """Sum over positions of one layer's expected regret. gate [positions, experts], estimates [experts] in [0, 1],
    detached here. Each position's is in [0, 1]: 0 when the gate is on the best arm, or all arms pay the same.
    """
    value = estimates.detach()
    # sum_x [ max_e r_e - sum_e p_e(x) r_e ]   (expected regret of one round; Auer et al. 2002, sec. 2)
    return (value.max() - gate @ value.to(gate)).sum()


class Bandit:
    """Running sums over about `horizon` optimiser steps; must be checkpointed. Fixed within a step.

    The loss of a position rewards the experts that position chose, in every layer; what they did for later positions
    through attention is not credited. Per layer and expert, with r^_e = 1[e in A] r / pi_e:
    estimate = sum of r^_e / sum of 1[e in A] / pi_e (self-normalised: Swaminathan and Joachims 2015), so it lies in
    [0, 1] and depends neither on k nor on how often the expert is used.
    """

    def __init__(self, horizon: int = 1024) -> None:
        self.decay = 1 - 1 / horizon
        self.sums: dict[str, Tensor] = {}
        self.new: dict[str, Tensor] = {}  # since the last `after_step`, this rank

    @property
    def estimates(self) -> Tensor | None:
        """Mean reward of each expert, fp64 [layers, experts]; an expert not seen has its layer's; None before any."""
        if "paid" not in self.sums:
            return None
        paid, weight = self.sums["paid"], self.sums["weight"]
        return torch.where(weight > 0, paid / weight, paid.sum(-1, keepdim=True) / weight.sum(-1, keepdim=True))

    @torch.no_grad()
    def observe(self, losses: Tensor, labels: Tensor, gates: Sequence[Tensor], chosen: Sequence[Tensor]) -> None:
        """A micro-batch: the loss of each position [n] and the label it is of (negative: none), and the routing of the
        same positions, [n, experts] and [n, k] a layer. The first step has no baseline yet and pays nothing.
        """
        seen = labels >= 0
        losses, bucket = losses[seen].double(), labels[seen] % BUCKETS
        if "tokens" in self.sums:
            sums = {name: value.to(losses.device) for name, value in self.sums.items()}
            total = sums["tokens"].sum()
            mean = sums["losses"].sum() / total
            spread = (sums["squares"] / total - mean**2).clamp_min(1e-12).sqrt()
            # b_v = (sum of the bucket's losses + mean) / (its tokens + 1): a rare label leans on the mean of all
            baseline = (sums["losses"] + mean) / (sums["tokens"] + 1)
            earned = reward(losses, baseline[bucket], spread)
            self.credit(earned, [gate[seen] for gate in gates], [each[seen] for each in chosen])
        empty = losses.new_zeros(BUCKETS)
        self._add("tokens", empty.index_add(0, bucket, torch.ones_like(losses)))
        self._add("losses", empty.index_add(0, bucket, losses))
        self._add("squares", losses.square().sum())

    @torch.no_grad()
    def credit(self, rewards: Tensor, gates: Sequence[Tensor], chosen: Sequence[Tensor]) -> None:
        """Rewards in [0, 1] of n positions, [n] or [layers, n], to the experts they chose."""
        weights = [importance(gate.double(), each) for gate, each in zip(gates, chosen, strict=True)]
        rows = rewards.double().expand(len(weights), -1)
        self._add("paid", torch.stack([row @ weight for row, weight in zip(rows, weights, strict=True)]))
        self._add("weight", torch.stack([weight.sum(0) for weight in weights]))

    def _add(self, name: str, value: Tensor) -> None:
        self.new[name] = self.new[name] + value if name in self.new else value

    @torch.no_grad()
    def after_step(self, group: dist.ProcessGroup | None = None) -> None:
        """Once an optimiser step, on all ranks: s <- decay s + the step's sum over ranks and micro-batches."""
        for name, value in self.new.items():
            if dist.is_initialized():
                dist.all_reduce(value, group=group)
            old = self.sums.get(name, torch.zeros_like(value)).to(value.device)
            self.sums[name] = self.decay * old + value
        self.new = {}

    def drop(self) -> None:
        """Forget the step: its update was skipped."""
        self.new = {}

    def state_dict(self) -> dict[str, Any]:
        """State between two steps, on the CPU."""
        return {name: value.cpu() for name, value in self.sums.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums = dict(state)
