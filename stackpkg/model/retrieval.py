"""Embeddings from hidden states, an exact cosine index, and the guard every retrieved record must pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def embed(model: nn.Module, ids: Tensor, pad_id: int) -> Tensor:
    """Mean of the last hidden states over the tokens that are not padding, L2-normalised.

    `ids` [n, L], padded on the right -> float32 [n, hidden]. One call of the model, so it works under FSDP and for
    any causal language model of transformers. In training call it after the language-model forward, not before: with
    FSDP2 of torch 2.13 the backward crashes when the first of two forwards leaves its logits unused.
    """
    mask = ids != pad_id
    out = model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True, logits_to_keep=1)
    return F.normalize((out.hidden_states[-1].float() * mask[..., None]).sum(1), dim=-1)


@dataclass(frozen=True)
class Record:
    """What the guard must know of a retrieved record. `timestamp` in unix seconds, `trust` in [0, 1]."""

    name: str
    source: str
    timestamp: float
    trust: float


Found = list[tuple[Record, float]]  # records with their cosine similarity


def guard(
    found: Found,
    now: float,
    sources: set[str],
    sigma_min: float = 0.45,
    t_max: float = 604_800.0,
    min_trust: float = 0.6,
) -> tuple[Found, dict[str, int]]:
    """The records that are similar, at most `t_max` seconds old at unix time `now`, from an allowed source and trusted;
    and how many each filter rejected. A rejection counts for the first filter that made it.
    """
    accepted, rejected = [], dict.fromkeys(("similarity", "age", "source", "trust"), 0)
    for record, cosine in found:
        fresh = 0 <= now - record.timestamp <= t_max  # a timestamp in the future is not believed
        passed = (cosine >= sigma_min, fresh, record.source in sources, record.trust >= min_trust)
        if all(passed):
            accepted.append((record, cosine))
        else:
            rejected[list(rejected)[passed.index(False)]] += 1
    return accepted, rejected


@torch.no_grad()
def search(vectors: Tensor, records: Sequence[Record], query: Tensor, k: int = 8) -> Found:
    """Exact cosine search: the k records whose `vectors` [n, hidden] are nearest to `query` [hidden], best first."""
    if len(vectors) != len(records):
        raise ValueError(f"{len(vectors)} vectors for {len(records)} records; give one vector a record")
    best, index = F.cosine_similarity(vectors.float(), query.float(), dim=-1).topk(min(k, len(records)))
    return [(records[i], cosine) for i, cosine in zip(index.tolist(), best.tolist(), strict=True)]
