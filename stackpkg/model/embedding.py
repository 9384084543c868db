"""Embeddings of texts, for any causal language model of transformers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TextEmbedding(nn.Module):
    """A text as the sum of vectors of its words, each as heavy as its hidden state and its place say: what a text is
    about is in its words, which of them matter is in their context (DeepCT: Dai, Callan, arXiv 1910.10687; uniCOIL:
    Lin, Ma, arXiv 2106.14807, which keep a dimension for each word).
    """

    def __init__(self, vocab_size: int, hidden_size: int, size: int, pad_id: int) -> None:
        super().__init__()
        self.pad_id, self.words = pad_id, nn.Embedding(vocab_size, size, pad_id)
        self.weight = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Last hidden states [n, L, hidden] and `ids` [n, L], padded on the right -> float32 [n, size], norm 1."""
        told = F.linear((hidden + sinusoids(hidden)).float(), self.weight.weight.float())
        heavy = told.masked_fill((ids == self.pad_id)[..., None], -torch.inf).softmax(1)
        # e = sum_t softmax_t(u . (h_t + p_t)) v(x_t), over its norm
        return F.normalize((heavy * self.words(ids).float()).sum(1), dim=-1)

    @torch.no_grad()
    def begin(self, word: Tensor, rarity: Tensor, seed: int) -> None:
        """Vectors before training: one at random for each `word` int64 [vocab], as long as it is rare, so that cosines
        are those of weighted counts of words, nearly (feature hashing: Weinberger et al., arXiv 0902.2206). `rarity`
        [vocab] is 0 for a token that says nothing.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(int(word.max()) + 1, self.words.embedding_dim, generator=generator)
        self.words.weight.copy_(drawn[word] * (rarity / rarity.max() / 10)[:, None])
        self.words.weight[self.pad_id] = 0
        self.weight.weight.zero_()


def sinusoids(hidden: Tensor) -> Tensor:
    """Codes of the places 0, 1, ... [L, hidden], of the size of hidden states [n, L, hidden] (Vaswani et al. 2017)."""
    length, width = hidden.shape[1:]
    rates = torch.exp(torch.arange(width // 2, device=hidden.device) * (-2 * math.log(10_000.0) / width))
    angles = torch.arange(length, device=hidden.device)[:, None] * rates
    # p_(t, 2i) = sin(t / 10000^(2i / d)), p_(t, 2i + 1) = cos(same)   (section 3.5), times sqrt(2)
    return F.pad(torch.cat((angles.sin(), angles.cos()), 1) * math.sqrt(2), (0, width % 2)).to(hidden.dtype)


def embed(model: nn.Module, ids: Tensor, pad_id: int) -> Tensor:
    """What the model's `TextEmbedding` makes of texts; of a model without, the mean of the last hidden states over the
    tokens that are not padding, L2-normalised.

    `ids` [n, L], padded on the right -> float32 [n, size]. One call of the model, so it works under FSDP and for
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
    if (made := out.get("text_embedding")) is not None:
        return made
    mask = ids != pad_id
    return F.normalize((out.hidden_states[-1].float() * mask[..., None]).sum(1), dim=-1)
