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

    def split(self, t: Tensor, fill: int = 0) -> Tensor:
        """[b, L, ...] -> [b, dilation, chunks, chunk, ...]."""
        span = self.chunk * self.dilation
        padded = F.pad(t, (0, 0) * (t.dim() - 2) + (0, -t.shape[1] % span), value=fill)
        return padded.unflatten(1, (-1, self.chunk, self.dilation)).movedim(3, 1)

    def near(self, t: Tensor, fill: int = 0) -> Tensor:
        """[b, L, ...] -> [b, dilation, chunks, (before + 1) * chunk, ...]: each chunk behind those before it."""
        t = self.split(t, fill)
        chunks, first = t.shape[2], t.new_full((*t.shape[:2], self.before, *t.shape[3:]), fill)
        t = torch.cat((first, t), 2)
        return torch.cat([t[:, :, i : i + chunks] for i in range(self.before + 1)], 3)

    def keys(self, near: Tensor, far: Tensor, index: Tensor) -> Tensor:
        """Keys or values: near [b, L, heads, d] and summaries [b, S, heads, d] -> [n, heads, keys, d]. The keys are the
        near ones, the null slot (zeros), and the summaries at `index` [chunks, far]. n = b * dilation * chunks.
        """
        local, far = self.near(near), far[:, index.flatten()].unflatten(1, index.shape)
        far = F.pad(far, (0, 0, 0, 0, 1, 0))[:, None].expand(-1, self.dilation, -1, -1, -1, -1)
        return torch.cat((local, far), 3).flatten(0, 2).transpose(1, 2)

    def join(self, out: Tensor, batch: int, length: int) -> Tensor:
        """[n, heads, chunk, d] -> [b, L, heads, d], contiguous."""
        out = out.transpose(1, 2).unflatten(0, (batch, self.dilation, -1))
        return out.movedim(1, 3).flatten(1, 3)[:, :length].contiguous()


class Layout(NamedTuple):
    """What the layers of one pattern share."""

    cut: Cut
    mask: Tensor  # 0 or -inf [n, 1, chunk, keys]
    pyramid: Pyramid
    rotation: tuple[Tensor, Tensor]  # of the summaries, [b, S, head_dim]
    classes: (
        Tensor | None
    )  # [n, 1, keys, scope classes]: 1 for the class of a key; of a summary, the mean of its tokens
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
    query, key = cut.split(token, length)[..., None], cut.near(token, -1)[..., None, :]
    levels = pyramid(config, document, positions, query.shape[2], cut.chunk * cut.dilation)
    far_document, end = document[:, levels.last][:, levels.chosen], levels.end[levels.chosen]
    own = cut.split(document)[..., None]
    near = (key >= 0) & (key <= query) & (cut.near(document)[..., None, :] == own)
    if pattern != "block":
        near &= key > query - config.sliding_window * cut.dilation
    far = levels.read[:, None] & (end[:, None] <= query) & (far_document[:, None, :, None] == own)
    classes = forbidden = None
    if scopes is not None:
        which = F.one_hot(scopes.of, scopes.allowed.shape[-1]).to(dtype)[:, :, None]
        pooled = pool(which, which.new_zeros(batch, length, 1), levels.mates)
        classes, forbidden = cut.keys(which, pooled, levels.chosen), ~scopes.allowed[:, :, None]
        if scopes.enforce:
            barred = cut.split(~scopes.allowed).to(dtype)  # [b, dilation, chunks, chunk, classes]
            edges = barred @ classes[:, 0].unflatten(0, barred.shape[:3]).transpose(-1, -2) > 0
            count = key.shape[-1]
            near, far = near & ~edges[..., :count], far & ~edges[..., count + 1 :]
    seen = torch.cat((near, near.new_ones(1).expand(*near.shape[:-1], 1), far), -1).flatten(0, 2)[:, None]
    mask = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)
    return Layout(cut, mask, levels, rotary(config, levels.middle, dtype), classes, forbidden)
