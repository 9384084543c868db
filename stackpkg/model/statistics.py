"""What a layer's attention does, read from the kernel that it uses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stackpkg.model import kv_codec, linear
from stackpkg.model.configuration import StackConfig
from stackpkg.model.patterns import Layout

SAMPLED = 64  # queries of a row that `linear_statistics` looks at


@torch.no_grad()
def statistics(
    config: StackConfig, pattern: str, queries: list[Tensor], keys: list[Tensor], values: list[Tensor], layout: Layout,
    k: Tensor, v: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """From chunked queries, keys and values [n, heads, ., d] of each part of rows, and the plain k, v [b, L, heads, d].

    Per head: `entropy`, mean of H / log(visible keys) over queries that see more than one key (the null slot counts),
    `masked_edge_share`, probability on keys that causality or the pattern forbid, and `kernel_error`, how far the
    kernel's output lies from what these probabilities give, at most, as a share of the largest value. Then the KV
    codec's round trip, and what `kv_codec.replay` says of the first row: a chunk of queries reads, of the blocks behind
    its window, the one whose summary each head attends to most.
    The forbidden edges are derived from token positions, not from the mask that the kernel gets.
    """
    (batch, length), w, cut, levels = k.shape[:2], config.sliding_window, layout.cut, layout.pyramid
    token = torch.arange(length, device=k.device)[None]
    # of a summary the last token of its last block must lie in the past, not only its own last token
    last = (levels.last // config.block_size + 1)[levels.chosen] * config.block_size - 1
    places = zip(cut.split(token, length), cut.near(token, -1), last.split(cut.sizes(len(last))), strict=True)
    entropy = share = counted = apart = torch.zeros((), dtype=_wide(k.dtype), device=k.device)
    reads = dict[int, set[int]]()
    parts = zip(queries, keys, values, layout.masks, places, strict=True)
    for q, keys_of, values_of, mask, (query, seen_near, far) in parts:
        uncertain, p = softmax_entropy(q, keys_of, mask)
        apart = apart.maximum(kernel_error(q, keys_of, values_of, mask, p))
        query, near = query.flatten(0, 2)[..., None], torch.cat(seen_near, 3).flatten(0, 2)[:, None]
        back = query - near
        if pattern == "block":
            outside = near // (w // 2) < query // (w // 2) - 1
        else:
            outside = (back >= w * cut.dilation) | (back % cut.dilation != 0)
        ends = far.repeat(cut.dilation, 1)
        later = ends[:, None] > query
        hidden = torch.cat(((back < 0) | (near < 0) | outside, torch.zeros_like(outside[..., :1]), later), -1)[:, None]
        # of each row's queries [b, n / b, heads, chunk]
        uncertain, p = (t.unflatten(0, (batch, -1)) for t in (uncertain, p))
        seen = (mask == 0).sum(-1).unflatten(0, (batch, -1))
        rows = (query[..., 0] < length)[:, None] & (seen > 1)
        entropy, share = (
            total + (value * rows).sum((0, 1, 3))
            for total, value in ((entropy, uncertain / seen.clamp_min(2).log()), (share, (p * hidden).sum(-1)))
        )
        counted = counted + rows.sum()
        if ends.shape[1]:
            most = p[0, ..., -ends.shape[1] :].sum(2).max(-1)  # [n / b, heads]
            blocks = torch.where(most.values > 0, ends.gather(1, most.indices) // config.block_size, -1)
            at = query.flatten(1).amax(1).clamp_max(length - 1)
            for now, wanted in zip(at.tolist(), blocks.tolist(), strict=True):
                reads.setdefault(now, set()).update(block for block in wanted if block >= 0)
    codec = kv_codec.measure(k, v, keep=w) | kv_codec.replay(k[:1], v[:1], reads, config.block_size, w)
    found = {"entropy": entropy / counted, "masked_edge_share": share / counted, "kernel_error": apart}
    return found | codec


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float)


def softmax_entropy(queries: Tensor, keys: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [n, heads, chunk, d], keys [n, kv heads, keys, d] and a mask of 0 and -inf -> the entropy of each query's
    softmax [n, heads, chunk], in nats, and the probabilities [n, heads, chunk, keys]; at least fp32.
    """
    wide = _wide(queries.dtype)
    grouped = queries.to(wide).unflatten(1, (keys.shape[1], -1))
    scores = (grouped @ keys.to(wide)[:, :, None].mT).flatten(1, 2).mul_(queries.shape[-1] ** -0.5).add_(mask)
    # s - max_j s_j changes neither softmax nor entropy, and leaves nothing large to cancel below
    scores -= scores.amax(-1, keepdim=True)
    normaliser = scores.logsumexp(-1, keepdim=True)
    p = (scores - normaliser).exp_()
    # H = -sum_j p_j log p_j = log sum_j exp(s_j) - sum_j p_j s_j
    return normaliser[..., 0] - (p * scores.masked_fill_(mask == -torch.inf, 0)).sum(-1), p


def kernel_error(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, p: Tensor) -> Tensor:
    """Per head, the largest distance of the kernel's output from p v, over the largest value."""
    out = F.scaled_dot_product_attention(queries, keys, values, mask, enable_gqa=True)
    wanted = (p.unflatten(1, (values.shape[1], -1)) @ values.to(p.dtype)[:, :, None]).flatten(1, 2)
    return (out - wanted).abs().amax((0, 2, 3)) / values.abs().max().clamp_min(1e-12)


@torch.no_grad()
def linear_statistics(q: Tensor, k: Tensor, document: Tensor) -> dict[str, Tensor]:
    """Entropy and share for linear attention, from features q and k [b, L, heads, m], at `SAMPLED` even queries.

    `masked_edge_share` is read from the kernel, by values that are 1 after each of these queries.
    """
    length = k.shape[1]
    rows = torch.linspace(min(1, length - 1), length - 1, SAMPLED, device=k.device).long()
    token = torch.arange(length, device=k.device)
    seen = (token <= rows[:, None]) & (document[:, rows, None] == document[:, None])
    later = (token[:, None] > rows).to(k.dtype)[None, :, None].expand(len(k), -1, k.shape[2], -1)
    share = linear.attend(q, k, later, document)[:, rows].diagonal(dim1=1, dim2=3)  # [b, heads, SAMPLED]
    grouped = q[:, rows].unflatten(2, (k.shape[2], -1))
    p = torch.einsum("brhgm,bkhm->bhgrk", grouped, k).flatten(1, 2) * seen[:, None]
    p = p / p.sum(-1, keepdim=True).clamp_min(1e-6)
    count = seen.sum(-1)[:, None]
    entropy = torch.special.entr(p).sum(-1) / count.clamp_min(2).log()
    counted = count > 1
    return {
        "entropy": (entropy * counted).sum((0, 2)) / counted.sum().clamp_min(1),
        "masked_edge_share": share.mean((0, 2)),
    }
