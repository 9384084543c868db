"""Reading: the next-token loss of a document beside retrieved records, which trains the cross-attention over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackpkg.model import StackForCausalLM
from stackpkg.objectives.losses import token_losses


class Reading(NamedTuple):
    """What a model said of documents of a micro-batch while it could read records."""

    logits: Tensor  # [b, L, vocab]
    labels: Tensor  # [b, L], -100 for padding


def reads(model: nn.Module) -> bool:
    """Whether a model can read records: the reference model, configured with `retrieval`."""
    return isinstance(model, StackForCausalLM) and model.config.retrieval


def memory(records: Tensor, pad_id: int) -> Tensor:
    """Records [b, n, L], padded on the right, as a model reads them [b, n (L + 1)]: in a row, padding after each."""
    return F.pad(records, (0, 1), value=pad_id).flatten(1)


def request(ids: Tensor, records: Tensor, pad_id: int) -> dict[str, Any]:
    """What is asked of a model: documents `ids` [b, L] beside `records` [b, n, L]."""
    mask = (ids != pad_id).long()
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False, "memory_ids": memory(records, pad_id)}


def asked(batch: Mapping[str, Tensor], pad_id: int) -> dict[str, Any]:
    """In training: the document of each pair, beside itself and its hard negatives, which lexical search found for the
    same query. Memory has no order, so what is read must be told from its words.
    """
    records = torch.cat([batch["positive_ids"][:, None], batch["negative_ids"]], 1)
    return request(batch["positive_ids"], records, pad_id)


def said(logits: Tensor, batch: Mapping[str, Tensor], pad_id: int) -> Reading:
    """What is made of the answer."""
    ids = batch["positive_ids"]
    return Reading(logits, ids.masked_fill(ids == pad_id, -100))


def reading(said: Reading) -> Tensor:
    """Sum over the tokens of the documents, nats (retrieval-augmented modelling: RETRO, arXiv 2112.04426, eq. 1). Each
    token's is >= 0 and has no upper bound, as in `token_losses`; 0 without tokens.
    """
    # sum_t -log p(x_t | x_(<t), retrieved records)
    return token_losses(said.logits, said.labels).sum()
