"""Preference losses on log-probabilities of two answers to one prompt; equal to TRL's values on the same logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Answers(NamedTuple):
    """Summed log-probabilities [n] of n answers, nats, and their lengths [n] in tokens."""

    log_probs: Tensor
    tokens: Tensor

    def mean(self) -> Tensor:
        return self.log_probs / self.tokens.clamp_min(1)


class Preferences(NamedTuple):
    """n pairs; a pair of negative `key` [n] counts for nothing. DPO also needs both answers' log-probabilities [n]
    under the reference model.
    """

    chosen: Answers
    rejected: Answers
    key: Tensor
    reference: tuple[Tensor, Tensor] | None = None


def stacked(batch: Mapping[str, Tensor], pad_id: int) -> dict[str, Any]:
    """What is asked of a model: chosen_ids, then rejected_ids [n, L]."""
    ids = torch.cat([batch["chosen_ids"], batch["rejected_ids"]])
    return {"input_ids": ids, "attention_mask": (ids != pad_id).long(), "use_cache": False}


def answers(logits: Tensor, ids: Tensor, answer_start: Tensor, pad_id: int) -> Answers:
    """logits [n, L, vocab] over prompt and answer; ids [n, L], padded on the right; the answer is what is not padding
    from `answer_start` [n] on.
    """
    places = torch.arange(ids.shape[1], device=ids.device)
    answer = ((places >= answer_start[:, None]) & (ids != pad_id))[:, 1:]
    # log p(y | x) = sum_t log softmax(z_(t-1))[y_t]
    flat = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return Answers(-(flat.view_as(answer) * answer).sum(1), answer.sum(1))


def dpo(chosen: Tensor, rejected: Tensor, reference: tuple[Tensor, Tensor], beta: float) -> Tensor:
    """Rafailov et al., arXiv 2305.18290. Summed log-probabilities [n] -> [n], each >= 0; log 2 at the reference."""
    margin = (chosen - reference[0]) - (rejected - reference[1])
    # -log sigma( beta [ log pi_w / pi_ref,w - log pi_l / pi_ref,l ] )   (eq. 7)
    return -F.logsigmoid(beta * margin)


def simpo(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """Meng et al., arXiv 2405.14734. Log-probabilities per token [n] -> [n], each >= 0."""
    # -log sigma( beta / |w| log pi_w - beta / |l| log pi_l - gamma )   (eq. 6)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def orpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Hong et al., arXiv 2403.07691. Log-probabilities per token [n] -> [n], each >= 0."""
    # L = -log p_w - beta log sigma( log odds_w - log odds_l ),  odds = p / (1 - p)   (eqs. 4, 6, 7)
    odds_ratio = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen - beta * F.logsigmoid(odds_ratio)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0; x is held below -1e-6, for a certain answer has infinite odds."""
    x = x.clamp_max(-1e-6)
    # Maechler 2012, eq. 7; either branch gets arguments that keep its gradient finite
    near = x > -0.6931
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -0.5))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )


def preference(pairs: Preferences, kind: str, beta: float, gamma: float) -> Tensor:
    """Sum over the pairs that count of the loss `kind`: dpo, simpo or orpo. Raises `ValueError` for dpo without a
    reference.
    """
    chosen, rejected = pairs.chosen, pairs.rejected
    if kind == "dpo":
        if pairs.reference is None:
            raise ValueError("dpo needs the reference model's log-probabilities; give them, or use simpo or orpo")
        value = dpo(chosen.log_probs, rejected.log_probs, pairs.reference, beta)
    elif kind == "simpo":
        value = simpo(chosen.mean(), rejected.mean(), beta, gamma)
    else:
        value = orpo(chosen.mean(), rejected.mean(), beta)
    return torch.where(pairs.key >= 0, value, 0.0).sum()
