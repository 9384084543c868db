"""Tier A: how a row is cut into chunks of queries with the keys near them, and which of their keys each may see."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stackpkg.model.configuration import StackConfig
from stackpkg.model.rotary import rotary
from stackpkg.model.scopes import Scopes
from stackpkg.model.summaries import Pyramid, pool, pyramid

PART = 2048  # tokens


def documents(positions: Tensor) -> Tensor:
    """Number of the document each token is in, [b, L], of packed rows: positions restart at 0 with each document."""
    return (positions == 0).cumsum(-1)


class Cut(NamedTuple):
    """Chunks of `chunk` queries, every `dilation`-th token each, that read themselves and `before` earlier chunks."""

    chunk: int
    before: int
    dilation: int

    @classmethod
    def of(cls, config: StackConfig, pattern: str) -> Cut:
        """The cut of a pattern. Quarters of a window read 1.25 windows of keys for the one they see, where chunks of a
        whole window read 2 (4,096 tokens, 8 heads of 64, window 512: 328 ms forward and backward against 489); but at
        least 64 queries share the copy of their keys.
        """
        w = config.sliding_window
        if pattern == "block":
            return cls(w // 2, 1, 1)
        chunk = min(w, max(64, -(-w // 4)))
        return cls(chunk, -(-(w - 1) // chunk), config.dilation if pattern == "dilated" else 1)

    def sizes(self, chunks: int) -> list[int]:
        """Chunks of each part of a row: one for those at its start, that have fewer than `before` earlier ones to read
        and are spared the padding; then as many as make PART tokens, so that what a part holds is small.
        """
        alone, many = min(self.before, chunks), max(1, PART // (self.chunk * self.dilation))
        return [1] * alone + [min(many, chunks - first) for first in range(alone, chunks, many)]

    def tokens(self, length: int) -> list[int]:
        """Tokens of each part of a row."""
        span = self.chunk * self.dilation
        *whole, last = (span * size for size in self.sizes(-(-length // span)))
        return [*whole, last - -length % span]

    def chunks(self, part: Tensor, fill: int = 0) -> Tensor:
        """[b, tokens, ...] of a part, padded at its end -> [b, dilation, chunks, chunk, ...]."""
        missing = -part.shape[1] % (self.chunk * self.dilation)
        padded = F.pad(part, (0, 0) * (part.dim() - 2) + (0, missing), value=fill) if missing else part
        return padded.unflatten(1, (-1, self.chunk, self.dilation)).movedim(3, 1)

    def split(self, t: Tensor, fill: int = 0) -> list[Tensor]:
        """[b, L, ...] -> `chunks` of each part."""
        return [self.chunks(part, fill) for part in t.split(self.tokens(t.shape[1]), 1)]

    def near(self, t: Tensor, fill: int = 0) -> list[list[Tensor]]:
        """As `split`, but each part is what its chunks read, a list of up to `before` + 1: before, and themselves."""
        read, earlier = [], None
        for part in self.split(t, fill):
            count = part.shape[2]
            part = part if earlier is None else torch.cat((earlier, part), 2)
            reach = part.shape[2] - count
            read.append([part[:, :, i : i + count] for i in range(reach + 1)])
            earlier = part[:, :, max(0, part.shape[2] - self.before) :]
        return read

    def keys(self, near: Tensor, far: Tensor, index: Tensor) -> list[Tensor]:
        """Keys or values of each part: near [b, L, heads, d] and summaries [b, S, heads, d] -> [n, heads, keys, d]. The
        keys are the near ones, the null slot (zeros), and the summaries at `index` [chunks, far]. n = b * dilation *
        the chunks of the part.
        """
        far = F.pad(far[:, index.flatten()].unflatten(1, index.shape), (0, 0, 0, 0, 1, 0))[:, None]
        parts = far.expand(-1, self.dilation, -1, -1, -1, -1).split(self.sizes(len(index)), 2)
        joined = (torch.cat((*local, part), 3) for local, part in zip(self.near(near), parts, strict=True))
        return [part.flatten(0, 2).transpose(1, 2) for part in joined]

    def join(self, part: Tensor, batch: int, tokens: int) -> Tensor:
        """[n, heads, chunk, d] of a part -> [b, tokens, heads, d]."""
        out = part.transpose(1, 2).unflatten(0, (batch, self.dilation, -1))
        return out.movedim(1, 3).flatten(1, 3)[:, :tokens]


class Layout(NamedTuple):
    """What the layers of one pattern share; tuples have an item for each part of a row."""

    cut: Cut
    masks: tuple[Tensor, ...]  # 0 or -inf [n, 1, chunk, keys]
    pyramid: Pyramid
    rotation: tuple[Tensor, Tensor]  # of the summaries, [b, S, head_dim]
    # [n, 1, keys, scope classes]: 1 for the class of a key; of a summary, the mean of its tokens
    classes: list[Tensor] | None
    forbidden: Tensor | None  # bool [b, L, 1, scope classes]


def layout(
    config: StackConfig, pattern: str, positions: Tensor, dtype: torch.dtype, scopes: Scopes | None = None
) -> Layout:
    """The chunks of a row with `positions` [b, L] under a pattern of `StackConfig.attention_pattern`, hybrid excepted.

    A key is seen if it is of the query's document and not later; a summary, once its last block has finished.
    Padding on the right needs no mask: it lies in the future of every real token, as does a block that holds it.
    """
    cut, document, (batch, length) = Cut.of(config, pattern), documents(positions), positions.shape
    token = torch.arange(length, device=positions.device)[None]
    chunks = -(-length // (cut.chunk * cut.dilation))
    levels = pyramid(config, document, positions, chunks, cut.chunk * cut.dilation)
    classes = forbidden = barred = None
    if scopes is not None:
        which = F.one_hot(scopes.of, scopes.allowed.shape[-1]).to(dtype)[:, :, None]
        pooled = pool(which, which.new_zeros(batch, length, 1), levels.mates)
        classes, forbidden = cut.keys(which, pooled, levels.chosen), ~scopes.allowed[:, :, None]
        barred = cut.split(~scopes.allowed) if scopes.enforce else None
    sizes, masks = cut.sizes(chunks), []
    reads, ends = (t.split(sizes) for t in (levels.read, levels.end[levels.chosen]))
    far_documents = document[:, levels.last][:, levels.chosen].split(sizes, 1)
    parts = zip(cut.split(token, length), cut.near(token, -1), cut.split(document), cut.near(document), strict=True)
    for i, (query, keys, own, documents_near) in enumerate(parts):
        query, own, key = query[..., None], own[..., None], torch.cat(keys, 3)[..., None, :]
        near = (key >= 0) & (key <= query) & (torch.cat(documents_near, 3)[..., None, :] == own)
        if pattern != "block":
            near &= key > query - config.sliding_window * cut.dilation
        far = reads[i][:, None] & (ends[i][:, None] <= query) & (far_documents[i][:, None, :, None] == own)
        if barred is not None and classes is not None:
            lacking = barred[i].to(dtype)  # [b, dilation, chunks, chunk, classes]
            edges = lacking @ classes[i][:, 0].unflatten(0, lacking.shape[:3]).transpose(-1, -2) > 0
            near, far = near & ~edges[..., : key.shape[-1]], far & ~edges[..., key.shape[-1] + 1 :]
        seen = torch.cat((near, near.new_ones(1).expand(*near.shape[:-1], 1), far), -1).flatten(0, 2)[:, None]
        masks.append(torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf))
    return Layout(cut, tuple(masks), levels, rotary(config, levels.middle, dtype), classes, forbidden)
