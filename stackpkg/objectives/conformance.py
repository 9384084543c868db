"""Safety conformance: attention on forbidden scope edges, and probability of forbidden tokens in a protected scope.

As in `losses`, each term is a sum over its units; the composer divides by the units of the whole optimiser step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackpkg.model import StackForCausalLM, scopes

FLOOR = 0.01  # of the allowed share; bf16 can't tell apart shares above 1 - 2^-8, and noise is amplified by 1 / FLOOR


class Conversations(NamedTuple):
    """What a model said and read in conversations of a micro-batch."""

    logits: Tensor  # [b, L, vocab]
    mass: tuple[Tensor, ...]  # of each layer [b, L, heads]; none of a model that knows no scopes
    real: Tensor  # bool [b, L], false for padding
    inside: Tensor  # bool [b, L], tokens of a protected scope
    forbidden: Tensor  # int64 [n], tokens that may not be said there


def read(
    model: nn.Module, batch: Mapping[str, Tensor], rules: scopes.Rules, forbidden: Tensor, pad_id: int
) -> Conversations:
    """One forward over conversation_ids, conversation_roles [n, L] and conversation_spans [n, L, 4]. Forbidden edges
    stay open and are measured; only the reference model can tell of them.
    """
    given = request(batch, rules if isinstance(model, StackForCausalLM) else None, pad_id)
    return said(model(**given), batch, forbidden, pad_id)


def request(batch: Mapping[str, Tensor], rules: scopes.Rules | None, pad_id: int) -> dict[str, Any]:
    """What `read` asks of a model; `rules` are None for one that knows no scopes."""
    ids = batch["conversation_ids"]
    given = {"input_ids": ids, "attention_mask": (ids != pad_id).long(), "use_cache": False}
    if rules is None:
        return given
    of = scopes.compile(rules, batch["conversation_roles"], batch["conversation_spans"], enforce=False)
    return given | {"scopes": of, "output_forbidden_mass": True}


def said(out: Any, batch: Mapping[str, Tensor], forbidden: Tensor, pad_id: int) -> Conversations:
    """What `read` makes of the answer."""
    mass = getattr(out, "forbidden_mass", None) or ()
    inside = batch["conversation_spans"][..., scopes.PROTECTED] >= 0
    return Conversations(out.logits, mass, batch["conversation_ids"] != pad_id, inside, forbidden)


def _exact(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def forbidden_attention(mass: Sequence[Tensor]) -> Tensor:
    """Sum over queries of -log(1 - m), mean of layers and heads; m is the attention a head spends on forbidden edges.

    `mass`: one [b, L, heads] per layer, entries in [0, 1], as the model records it. The unit is the position. 0 exactly
    when no forbidden edge is read, at most 5.6 a position. This is the semantic loss (Xu et al., arXiv 1711.11157) of
    "this query reads an allowed key". m itself has the gradient m (1 - m) along the margin between forbidden and
    allowed keys, so a head that has settled on a forbidden key never leaves it; this one has m. Below `FLOOR` the
    logarithm goes on as its tangent. Raises `ValueError` without a layer.
    """
    if not mass:
        raise ValueError("no layer gave forbidden mass; give the model `scopes` with enforce=False")
    allowed = [1 - _exact(layer) for layer in mass]
    # m(l,h,q) = sum_k A(l,h,q,k) 1[edge (q,k) forbidden], a = 1 - m ;  sum_q 1/(layers heads) sum_(l,h) -log a(l,h,q),
    # where -log a = -log f + (f - a) / f for a below f = FLOOR
    penalties = [(FLOOR - a).clamp_min(0) / FLOOR - a.clamp_min(FLOOR).log() for a in allowed]
    return torch.stack([layer.mean(-1).sum() for layer in penalties]).mean()


def conformance(said: Conversations, positions: int, protected: int) -> Tensor:
    """Both penalties, each a mean over the whole step, which has `positions` tokens, no padding among them, and
    `protected` ones in a protected scope. Without `said.mass` it is that of the tokens alone.
    """
    # A / positions + T / protected
    value = forbidden_tokens(said.logits, said.inside, said.forbidden) / max(protected, 1)
    if said.mass:
        value = value + forbidden_attention([layer * said.real[..., None] for layer in said.mass]) / max(positions, 1)
    return value


@torch.no_grad()
def forbidden_share(mass: Sequence[Tensor]) -> Tensor:
    """Sum over queries of m, mean of layers and heads: what is reported, in [0, 1] a position."""
    return torch.stack([_exact(layer).mean(-1).sum() for layer in mass]).mean()


def _protected(logits: Tensor, inside: Tensor, forbidden: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [n, vocab] of the n positions whose next token lies inside, and bool [vocab] of the forbidden tokens."""
    vocab = logits.shape[-1]
    if inside.shape != logits.shape[:2] or inside.dtype != torch.bool:
        raise ValueError(f"inside is {inside.dtype} {list(inside.shape)}; allowed: bool {list(logits.shape[:2])}")
    if forbidden.numel() and not 0 <= int(forbidden.min()) <= int(forbidden.max()) < vocab:
        raise ValueError(f"forbidden ids {forbidden.tolist()[:8]}; allowed: 0 to {vocab - 1}")
    banned = torch.zeros(vocab, dtype=torch.bool, device=logits.device)
    banned[forbidden.to(logits.device)] = True
    if banned.all():
        raise ValueError(f"all {vocab} tokens are forbidden; at least one must stay allowed")
    return _exact(logits[:, :-1][inside[:, 1:]]), banned


def forbidden_tokens(logits: Tensor, inside: Tensor, forbidden: Tensor) -> Tensor:
    """Sum over protected positions of -log(1 - p), p the probability of the token ids `forbidden` [n], nats.

    `logits` [b, L, vocab]; `inside` bool [b, L], aligned with the labels: true where the token is in a protected scope,
    so position t - 1 is judged for it. The unit is the protected token but for those at t = 0, which nothing predicts;
    0 without such tokens, or without forbidden ids. Grows without bound as p nears 1. This is the unlikelihood of
    Welleck et al., arXiv 1908.04319, eq. 4, of a set. p itself would have the gradient p (1 - p) along the margin,
    which vanishes where the violation is worst; here it is p. Where labels themselves are forbidden it only bargains:
    at weight w against cross-entropy's 1 the optimum is p = 1 / (1 + w); `allowed_labels` removes them.
    Raises `ValueError` for ids outside the vocabulary and when all are forbidden.
    """
    z, banned = _protected(logits, inside, forbidden)
    if not banned.any():
        return z.sum() * 0
    # -log(1 - p) = logsumexp_all z - logsumexp_allowed z = softplus(logsumexp_forbidden z - logsumexp_allowed z)
    return F.softplus(z[:, banned].logsumexp(-1) - z[:, ~banned].logsumexp(-1)).sum()


def allowed_labels(labels: Tensor, inside: Tensor, forbidden: Tensor) -> Tensor:
    """`labels` [b, L] with -100 where a token in a protected scope is forbidden: nothing teaches what is penalised."""
    return labels.masked_fill(inside & torch.isin(labels, forbidden.to(labels.device)), -100)


@torch.no_grad()
def forbidden_probability(logits: Tensor, inside: Tensor, forbidden: Tensor) -> Tensor:
    """Sum over protected positions of p, the probability of `forbidden`: what is reported. Same arguments."""
    z, banned = _protected(logits, inside, forbidden)
    return z.softmax(-1)[:, banned].sum()


@torch.no_grad()
def violations(logits: Tensor, inside: Tensor, forbidden: Tensor) -> Tensor:
    """Protected positions whose most probable token is forbidden: what greedy decoding would say. Same arguments."""
    z, banned = _protected(logits, inside, forbidden)
    return banned[z.argmax(-1)].sum()


@torch.no_grad()
def measure(said: Conversations) -> dict[str, float]:
    """What is reported of conversations, in [0, 1]: `violations` and `forbidden_probability`, means over the positions
    before a protected token, and `forbidden_attention`, mean over positions, of a model that tells of it.
    """
    judged = said.logits, said.inside, said.forbidden
    protected = max(1, int(said.inside[:, 1:].sum()))
    found = {"violations": violations(*judged), "forbidden_probability": forbidden_probability(*judged)}
    made = {name: float(value) / protected for name, value in found.items()}
    if said.mass:
        share = forbidden_share([layer * said.real[..., None] for layer in said.mass])
        made["forbidden_attention"] = float(share) / max(1, int(said.real.sum()))
    return made
