"""Weights, schedules and scales the objectives; keeps the routers' running usage and rewards, and recent documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from stackpkg import params
from stackpkg.objectives import bandit, losses, routing
from stackpkg.objectives.conformance import Conversations, conformance
from stackpkg.objectives.mining import Recent
from stackpkg.objectives.preference import Preferences, preference
from stackpkg.objectives.reading import Reading, reading
from stackpkg.objectives.routing import Routed


@dataclass(frozen=True)
class StepCounts:
    """Units of one whole optimiser step, over all ranks and micro-batches."""

    tokens: int  # label tokens after the shift
    answers: int  # of which answers of long-range tasks
    rows: int
    ranks: int  # data-parallel ranks
    preferences: int = 0  # pairs whose key is not negative
    turns: int = 0  # tokens of conversations, without padding
    protected: int = 0  # of which in a protected scope, after the shift
    read: int = 0  # tokens of documents beside retrieved records, after the shift


class Pairs(NamedTuple):
    """Embeddings of a micro-batch, L2-normalised: query, positive [rows, hidden], negatives [rows, H, hidden]."""

    query: Tensor
    positive: Tensor
    negatives: Tensor
    key: Tensor  # [rows]; equal keys are one document


class Term(NamedTuple):
    """One objective on one micro-batch. `value` / `units` is its part of the step; `at` are the tensors its gradient
    norm is taken at (views, `tap`, of what the model returned), `shown` what is logged if not `value`.
    """

    value: Tensor
    units: float = 1.0
    at: tuple[Tensor, ...] = ()
    shown: Tensor | None = None


class Step(NamedTuple):
    """What one micro-batch gives. All of it adds up over micro-batches and ranks to the value of the step."""

    total: Tensor
    raw: dict[str, Tensor]
    weighted: dict[str, Tensor]  # as in `total`, weight and ramp applied
    squares: dict[str, Tensor]  # squared gradient norms of the weighted terms, at the cadence; see `norms`


def tap(tensor: Tensor) -> Tensor:
    """A view of a tensor the model returned. FSDP2 hooks what a model returns; a gradient taken at the view sets off no
    hook, gathers no parameter and touches no `.grad`.
    """
    return tensor.view_as(tensor)


def norms(squares: Mapping[str, Any]) -> dict[str, Any]:
    """`Step.squares`, summed over micro-batches and ranks -> norm of each term's gradient with respect to what the
    model returned (logits, router logits, embeddings) in the whole step, however it was split, and the cosine in
    [-1, 1] between regret's and load balance's.

    Norms with respect to outputs need no second pass through the network. They tell which term pulls harder than
    before; between terms on different outputs they are not in one unit.
    """
    found = {name: value**0.5 for name, value in squares.items() if name != "regret_load_balance"}
    if "regret_load_balance" in squares:
        scale = found["regret"] * found["load_balance"]
        found["cosine_regret_load_balance"] = squares["regret_load_balance"] / (scale + (scale == 0))
    return found


class Composer:
    """The training loss. What it learns between steps (`state_dict`) is fixed within a step and must be checkpointed.

    `routers` are those of the model (`routing.routers`), needed only where `bias_rate` or `center_rate` is set.
    """

    def __init__(self, weights: params.Objectives, routers: Sequence[nn.Module | None] = ()) -> None:
        self.weights, self.routers = weights, routers
        self.steps = 0  # optimiser steps applied so far
        self.usage: Tensor | None = None  # [layers, experts]
        self.bandit, self.recent = bandit.Bandit(weights.reward_horizon), Recent()
        self._chosen: Tensor | None = None  # choices per expert since the last `after_step`, this rank
        self._logits: Tensor | None = None  # of all experts, summed over these choices
        # whether gradient norms are taken in a step: runs what takes them, or not
        self.sometimes: Callable[[Callable[[], dict[str, Tensor]]], dict[str, Tensor]] = self._at_cadence

    def _at_cadence(self, measure: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        every = self.weights.norms_every
        return measure() if every and self.steps % every == 0 else {}

    def weight(self, name: str) -> float:
        """The weight of a term in the step at hand: step s of a ramp over n steps has s / n of it."""
        share = min(1.0, (self.steps + 1) / self.weights.ramp_steps.get(name, 1))  # type: ignore[call-overload]
        return float(getattr(self.weights, name)) * share

    def losses(
        self, logits: Tensor, labels: Tensor, answer_mask: Tensor, routed: Sequence[Routed], pairs: Pairs | None,
        counts: StepCounts, *, preferences: Preferences | None = None, conversations: Conversations | None = None,
        read: Reading | None = None, group: dist.ProcessGroup | None = None,
    ) -> Step:  # fmt: skip
        """One micro-batch's loss and its terms; call it once a micro-batch (it counts choices and rewards).

        A raw term is this micro-batch's sum over the units of the whole step, so raw terms add up over micro-batches
        and ranks to the value of the step. `total` is `ranks` times their weighted sum: summed over micro-batches and
        averaged over ranks, as FSDP does, its gradient is that of the whole step; only `losses.info_nce` depends on
        the micro-batch. All rows of a step must have one length. `group` holds the data-parallel ranks, by default
        all. A term of weight 0 is not computed. Raw load balance is the divergence it lowers; what is added to `total`
        is its linearisation (`losses.load_balance`).
        """
        w, logits = self.weights, tap(logits)
        tokens = losses.token_losses(logits, labels)
        terms = {"language_modelling": Term(tokens.sum(), counts.tokens, (logits,))}
        if w.long_range:
            terms["long_range"] = Term(losses.long_range(tokens, answer_mask), counts.answers, (logits,))
        if w.contrastive and pairs is not None:
            query, positive, negatives = at = tap(pairs.query), tap(pairs.positive), tap(pairs.negatives)
            if w.mined_negatives:
                negatives = torch.cat((negatives, self.recent.hardest(query, pairs.key, w.mined_negatives)), 1)
                self.recent.observe(positive, pairs.key)
            margin = w.false_negative_margin
            value = losses.info_nce(query, positive, negatives, pairs.key, w.tau, group, margin)
            terms["contrastive"] = Term(value, counts.rows, at)
        if w.preference and preferences is not None:
            chosen, rejected = (a._replace(log_probs=tap(a.log_probs)) for a in preferences[:2])
            pulled = preferences._replace(chosen=chosen, rejected=rejected)
            value = preference(pulled, w.preference_loss, w.preference_beta, w.preference_gamma)
            terms["preference"] = Term(value, counts.preferences, (chosen.log_probs, rejected.log_probs))
        if w.conformance and conversations is not None:
            said = conversations._replace(
                logits=tap(conversations.logits), mass=tuple(tap(layer) for layer in conversations.mass)
            )
            value = conformance(said, counts.turns, counts.protected)
            terms["conformance"] = Term(value, at=(said.logits, *said.mass))
        if w.reading and read is not None:
            told = read._replace(logits=tap(read.logits))
            terms["reading"] = Term(reading(told), counts.read, (told.logits,))
        if routed and routed[0].logits.shape[-1] > 1:
            following = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
            terms |= self._router(routed, tokens.flatten(), following, len(labels) / counts.rows)
        scaled = {name: self.weight(name) * term.value / max(term.units, 1) for name, term in terms.items()}
        shown = {n: term.value / max(term.units, 1) if term.shown is None else term.shown for n, term in terms.items()}
        return Step(
            counts.ranks * torch.stack(list(scaled.values())).sum(),
            {name: value.detach() for name, value in shown.items()},
            {name: value.detach() for name, value in scaled.items()},
            self.sometimes(lambda: self._squares(scaled, terms)),
        )

    def _squares(self, scaled: Mapping[str, Tensor], terms: Mapping[str, Term]) -> dict[str, Tensor]:
        """Outputs of different positions are different variables, so squares add up over micro-batches and ranks."""
        flat = {}
        for name, term in terms.items():
            if term.at:
                grads = torch.autograd.grad(scaled[name], term.at, retain_graph=True)
                flat[name] = torch.cat([g.detach().double().flatten() for g in grads])
        squares = {name: vector.square().sum() for name, vector in flat.items()}
        if {"regret", "load_balance"} <= flat.keys():
            squares["regret_load_balance"] = flat["regret"] @ flat["load_balance"]
        return squares

    def _router(self, routed: Sequence[Routed], tokens: Tensor, labels: Tensor, share: float) -> dict[str, Term]:
        """Means over layers and positions, times this micro-batch's share of the step's positions."""
        w, gates, at = self.weights, [layer.gate() for layer in routed], tuple(layer.logits for layer in routed)
        self._count(routed)
        scale = share / (len(gates) * len(gates[0]))
        terms = {}
        if w.load_balance and self.usage is not None:
            usage = self.usage.to(gates[0].device)
            value = torch.stack([losses.load_balance(gate, u) for gate, u in zip(gates, usage, strict=True)]).sum()
            shown = losses.balance_divergence(usage).mean() * share
            terms["load_balance"] = Term(scale * value, at=at, shown=shown)
        if w.gate_entropy:
            value = torch.stack([losses.gate_entropy(gate, w.target_entropy) for gate in gates]).sum()
            terms["gate_entropy"] = Term(scale * value, at=at)
        if w.z_loss:
            terms["z_loss"] = Term(scale * torch.stack([losses.z_loss(logits) for logits in at]).sum(), at=at)
        if w.regret:
            estimates = self.bandit.estimates
            if estimates is not None:
                value = torch.stack([bandit.regret(g, r) for g, r in zip(gates, estimates, strict=True)]).sum()
                terms["regret"] = Term(scale * value, at=at)
            self.bandit.observe(tokens.detach(), labels, gates, [layer.chosen for layer in routed])
        return terms

    @torch.no_grad()
    def _count(self, routed: Sequence[Routed]) -> None:
        experts = routed[0].logits.shape[-1]
        chosen = torch.stack([torch.bincount(layer.chosen.flatten(), minlength=experts) for layer in routed])
        self._chosen = chosen if self._chosen is None else self._chosen + chosen
        if self.weights.center_rate:
            logits = torch.stack([layer.logits.double().sum(0) * layer.chosen.shape[-1] for layer in routed])
            self._logits = logits if self._logits is None else self._logits + logits

    @torch.no_grad()
    def after_step(self, applied: bool = True, group: dist.ProcessGroup | None = None) -> None:
        """Once an optimiser step, on all ranks: reduce the counts, u <- decay u + (1 - decay) share, start anew.

        A step whose update was skipped teaches nothing: its counts are dropped.
        """
        if not applied:
            self._chosen = self._logits = None
            self.bandit.drop()
            self.recent.drop()
            return
        self.steps += 1
        self.bandit.after_step(group)
        self.recent.after_step(group)
        if self._chosen is None:
            return
        if dist.is_initialized():
            dist.all_reduce(self._chosen, group=group)
        if self.weights.bias_rate:
            routing.move_biases(self.routers, self._chosen, self.weights.bias_rate)
        if self._logits is not None:
            if dist.is_initialized():
                dist.all_reduce(self._logits, group=group)
            mean = self._logits / self._chosen.sum(-1, keepdim=True)
            routing.move_centers(self.routers, mean, self.weights.center_rate)
        share = self._chosen / self._chosen.sum(-1, keepdim=True)
        old = share if self.usage is None else self.usage.to(share.device)
        self.usage = old + (1 - self.weights.usage_decay) * (share - old)
        self._chosen = self._logits = None

    @property
    def observed(self) -> dict[str, Any]:
        """What the micro-batches of a step have taught so far, on the CPU: for processes that did not see them."""
        chosen, logits = (None if seen is None else seen.cpu() for seen in (self._chosen, self._logits))
        documents = [(embeddings.cpu(), keys.cpu()) for embeddings, keys in self.recent.new]
        rewards = {name: value.cpu() for name, value in self.bandit.new.items()}
        return {"chosen": chosen, "logits": logits, "bandit": rewards, "documents": documents}

    def observe(self, seen: Mapping[str, Any], device: torch.device) -> None:
        """Take over what another process `observed` in this step."""
        moved = (None if seen[name] is None else seen[name].to(device) for name in ("chosen", "logits"))
        self._chosen, self._logits = moved
        self.bandit.new = {name: value.to(device) for name, value in seen["bandit"].items()}
        self.recent.new = [(embeddings.to(device), keys.to(device)) for embeddings, keys in seen["documents"]]

    def state_dict(self) -> dict[str, Any]:
        """State between two steps. `usage` is an empty tensor before the first."""
        usage = torch.empty(0) if self.usage is None else self.usage.cpu()
        return {"steps": self.steps, "usage": usage, "bandit": self.bandit.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.usage = state["steps"], state["usage"] if state["usage"].numel() else None
        self.bandit.load_state_dict(state["bandit"])
