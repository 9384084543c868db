"""What rides in a batch beside its text: retrieval pairs and preferences, each one forward of the model for all of it.

Every rank calls the model equally often, as FSDP needs: whether a step carries a set is decided for the whole step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackpkg.model.embedding import embed
from stackpkg.objectives import Pairs
from stackpkg.objectives.preference import Answers, Preferences, answers


def carried(inputs: Mapping[str, Tensor], key: str) -> bool:
    """Whether the step carries a set: the keys of one that it does not carry are -1."""
    return key in inputs and int(inputs[key][0]) >= 0


def pairs(model: nn.Module, inputs: Mapping[str, Tensor], pad_id: int) -> Pairs:
    """Embeddings of query_ids [n, Lq], positive_ids [n, Ld] and negative_ids [n, H, Ld]."""
    parts = [inputs["query_ids"], inputs["positive_ids"], inputs["negative_ids"].flatten(0, 1)]
    width = max(ids.shape[1] for ids in parts)
    stacked = torch.cat([F.pad(ids, (0, width - ids.shape[1]), value=pad_id) for ids in parts])
    query, positive, negatives = embed(model, stacked, pad_id).split([len(ids) for ids in parts])
    return Pairs(query, positive, negatives.view(len(query), -1, query.shape[-1]), inputs["pair_key"])


def preferences(model: nn.Module, inputs: Mapping[str, Tensor], pad_id: int) -> Preferences:
    """Log-probabilities of the answers in chosen_ids and rejected_ids [n, L], from answer_start [n] on."""
    ids = torch.cat([inputs["chosen_ids"], inputs["rejected_ids"]])
    logits = model(input_ids=ids, attention_mask=(ids != pad_id).long(), use_cache=False).logits
    found = answers(logits, ids, inputs["answer_start"].repeat(2), pad_id)
    chosen, rejected = (Answers(*half) for half in zip(*(part.chunk(2) for part in found), strict=True))
    return Preferences(chosen, rejected, inputs["preference_key"])
