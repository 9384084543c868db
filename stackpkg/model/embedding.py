"""Embeddings of texts from hidden states, for any causal language model of transformers."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def embed(model: nn.Module, ids: Tensor, pad_id: int) -> Tensor:
    """Mean of the last hidden states over the tokens that are not padding, L2-normalised.

    `ids` [n, L], padded on the right -> float32 [n, hidden]. One call of the model, so it works under FSDP and for
    any causal language model of transformers. In training call it after the language-model forward, not before: with
    FSDP2 of torch 2.13 the backward crashes when the first of two forwards leaves its logits unused.
    """
    return pooled(model(**request(ids, pad_id)), ids, pad_id)


def request(ids: Tensor, pad_id: int) -> dict[str, Any]:
    """What `embed` asks of a model."""
    mask = (ids != pad_id).long()
    return {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True, "logits_to_keep": 1}


def pooled(out: Any, ids: Tensor, pad_id: int) -> Tensor:
    """What `embed` makes of the answer."""
    mask = ids != pad_id
    return F.normalize((out.hidden_states[-1].float() * mask[..., None]).sum(1), dim=-1)
