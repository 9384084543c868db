"""Weights and scales the objectives; keeps the experts' running usage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stackpkg import params
from stackpkg.objectives import losses


@dataclass(frozen=True)
class StepCounts:
    """Units of one whole optimiser step, over all ranks and micro-batches."""

    tokens: int  # label tokens after the shift
    answers: int  # of which answers of long-range tasks
    rows: int
    ranks: int  # data-parallel ranks


class Composer:
    """The training loss. Its `usage` [layers, experts] is fixed within a step and must be checkpointed."""

    def __init__(self, weights: params.Objectives, top_k: int) -> None:
        self.weights, self.top_k = weights, top_k
        self.usage: Tensor | None = None
        self._chosen: Tensor | None = None  # choices per expert since the last `after_step`, this rank

    def losses(
        self, logits: Tensor, labels: Tensor, answer_mask: Tensor, router_logits: Sequence[Tensor] | None,
        query: Tensor | None, positive: Tensor | None, negatives: Tensor | None, pair_key: Tensor | None,
        counts: StepCounts, group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """One micro-batch's loss and its raw, unweighted terms; call it once a micro-batch (it counts choices).

        A raw term is this micro-batch's sum over the units of the whole step, so raw terms add up over micro-batches
        and ranks to the value of the step. `total` is `ranks` times their weighted sum: summed over micro-batches and
        averaged over ranks, as FSDP does, its gradient is that of the whole step; only `losses.info_nce` depends on
        the micro-batch. All rows of a step must have one length. `group` holds the data-parallel ranks, by default
        all. A term of weight 0 is not computed. Raw load balance is the divergence it lowers; what is added to
        `total` is its linearisation (`losses.load_balance`), so `total` is not the weighted sum of the raw terms.
        """
        w = self.weights
        raw: dict[str, Tensor] = {}
        tokens = losses.token_losses(logits, labels)
        raw["language_modelling"] = tokens.sum() / max(counts.tokens, 1)
        if w.long_range:
            raw["long_range"] = losses.long_range(tokens, answer_mask) / max(counts.answers, 1)
        if w.contrastive and query is not None:
            assert positive is not None and negatives is not None and pair_key is not None
            raw["contrastive"] = losses.info_nce(query, positive, negatives, pair_key, w.tau, group) / counts.rows
        total = torch.stack([getattr(w, name) * value for name, value in raw.items()]).sum()
        if router_logits and router_logits[0].shape[-1] > 1:
            total = total + self._router(router_logits, len(labels) / counts.rows, raw)
        return counts.ranks * total, {name: value.detach() for name, value in raw.items()}

    def _router(self, router_logits: Sequence[Tensor], share: float, raw: dict[str, Tensor]) -> Tensor:
        """Means over layers and positions, times this micro-batch's share of the step's positions."""
        gates = [logits.flatten(0, -2).float().softmax(-1) for logits in router_logits]
        self._count(gates)
        scale = share / (len(gates) * len(gates[0]))
        total = gates[0].new_zeros(())
        if self.weights.load_balance and self.usage is not None:
            usage = self.usage.to(total.device)
            raw["load_balance"] = losses.balance_divergence(usage).mean() * share
            penalty = sum(losses.load_balance(gate, u) for gate, u in zip(gates, usage, strict=True))
            total = total + self.weights.load_balance * scale * penalty
        if self.weights.gate_entropy:
            value = torch.stack([losses.gate_entropy(gate, self.weights.target_entropy) for gate in gates]).sum()
            raw["gate_entropy"] = scale * value
            total = total + self.weights.gate_entropy * scale * value
        return total

    @torch.no_grad()
    def _count(self, gates: list[Tensor]) -> None:
        top = [gate.topk(self.top_k, -1).indices.flatten() for gate in gates]
        chosen = torch.stack([torch.bincount(t, minlength=gates[0].shape[-1]) for t in top])
        self._chosen = chosen if self._chosen is None else self._chosen + chosen

    @torch.no_grad()
    def after_step(self, applied: bool = True, group: dist.ProcessGroup | None = None) -> None:
        """Once an optimiser step, on all ranks: reduce the counts, u <- decay u + (1 - decay) share, start anew.

        A step whose update was skipped teaches nothing: its counts are dropped.
        """
        if self._chosen is None or not applied:
            self._chosen = None
            return
        if dist.is_initialized():
            dist.all_reduce(self._chosen, group=group)
        share = self._chosen / self._chosen.sum(-1, keepdim=True)
        old = share if self.usage is None else self.usage.to(share.device)
        self.usage, self._chosen = old + (1 - self.weights.usage_decay) * (share - old), None

    def state_dict(self) -> dict[str, Any]:
        """State between two steps. `usage` is an empty tensor before the first."""
        return {"usage": torch.empty(0) if self.usage is None else self.usage.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.usage = state["usage"] if state["usage"].numel() else None
