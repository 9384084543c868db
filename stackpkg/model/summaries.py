"""Tier B: a pyramid of block summaries, of which a chunk of queries reads a number that grows with log L."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stackpkg.model.configuration import StackConfig


class Pyramid(NamedTuple):
    """Level 0 are the summaries of segments, level l stands for 2^l neighbouring segments; all levels in one row of S.

    A summary stands for those of its tokens that are of its last token's document: the others' documents ended inside
    it, so nobody who could read it may see them.
    """

    mates: tuple[Tensor, ...]  # a level: 0 or -inf [b, summaries, members, 1], is a member of the last one's document
    chosen: Tensor  # int64 [chunks, far], the summaries a chunk of queries reads
    read: Tensor  # bool [chunks, far], False where `chosen` is filler
    last: Tensor  # int64 [S], last token of each summary
    end: Tensor  # int64 [S], the first token that may see it: the first after its last block
    middle: Tensor  # int64 [b, S], position of its middle in its document


def pyramid(config: StackConfig, document: Tensor, positions: Tensor, chunks: int, span: int) -> Pyramid:
    """The pyramid for `document` and `positions` [b, L], read by `chunks` of `span` neighbouring tokens.

    A chunk reads the nearest `summaries_per_level` segments (and those that finish inside it), before them half as
    many summaries of each coarser level, each past segment once: like the levels of H-Transformer-1D (arXiv
    2107.11906), with the segment tree of Fenwick (1994) at `summaries_per_level = 1`.
    """
    segments, step, block, device = (
        config.pooled(document.shape[1]) // config.segment,
        config.segment,
        config.block_size,
        document.device,
    )
    start = torch.arange(chunks) * span
    low, high = ((t // block * config.summaries_per_block).clamp_max(segments) for t in (start, start + span - 1))
    indices, reads, lasts, offset, size = [], [], [], 0, 1
    while size == 1 or high.any():
        keep = config.summaries_per_level if size == 1 else config.summaries_per_level // 2 * size
        low = (low - keep).clamp_min(0) // (2 * size) * (2 * size)  # where the next level takes over
        number = low[:, None] // size + torch.arange(int((high - low).max()) // size)
        indices.append(number + offset)
        reads.append(number < high[:, None] // size)
        lasts.append(torch.arange(1, segments // size + 1) * size * step - 1)
        offset, high, size = offset + segments // size, low, 2 * size
    index, read, last = (torch.cat(t, -1).to(device) for t in (indices, reads, lasts))
    mates, members, document = [], step, document[:, : segments * step]
    for level in lasts:
        document = document[:, : len(level) * members].unflatten(1, (len(level), members))
        mates.append(torch.where(document == document[:, :, -1:], 0.0, -torch.inf)[..., None])
        document, members = document[:, :, -1], 2
    half = torch.cat([torch.full_like(level, (step << n) - 1 - (step << n) // 2) for n, level in enumerate(lasts)])
    middle = (positions[:, last] - half.to(device)).clamp_min(0)
    return Pyramid(tuple(mates), index.where(read, 0), read, last, (last // block + 1) * block, middle)


def pool(x: Tensor, scores: Tensor | None, mates: tuple[Tensor, ...]) -> Tensor:
    """All summaries [b, S, heads, d] of x [b, L, heads, d]: the maximum where `scores` is None, else the mean weighted
    by exp(scores [b, L, heads or 1]), so the plain mean for scores of 0.
    """
    levels = []
    for mate in mates:
        members = mate.shape[1] * mate.shape[2]
        x = x[:, :members].unflatten(1, mate.shape[1:3])
        if scores is None:
            x = (x + mate[..., None].to(x.dtype)).amax(2)
        else:
            # Attention pooling (Yang et al. 2016, N16-1174, eq. 6-7): s = sum_t softmax(u_t)_t x_t. A coarser level
            # pools the finer one with the scores log sum_t exp u_t, which gives the same as pooling its tokens.
            weighted = scores[:, :members].unflatten(1, mate.shape[1:3]) + mate
            x, scores = (weighted.softmax(2).to(x.dtype)[..., None] * x).sum(2), weighted.logsumexp(2)
        levels.append(x)
    return torch.cat(levels, 1)
