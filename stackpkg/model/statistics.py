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
    config: StackConfig, pattern: str, queries: list[Tensor], keys: list[Tensor], layout: Layout, k: Tensor, v: Tensor
) -> dict[str, Tensor]:
    """From chunked queries and keys [n, heads, ., d] of each part of rows, and the plain k and v [b, L, heads, d].

    Per head: `entropy`, mean of H / log(visible keys) over rows that see more than one key (the null slot counts),
    and `masked_edge_share`, probability on keys that causality or the pattern forbid. Then the KV codec's round trip,
    and what `kv_codec.replay` says of the first row: a chunk of queries reads, of the blocks behind its window, the one
    whose summary each head attends to most.
    The probabilities are those of the kernel itself, read by giving it the identity as values; the forbidden edges
    are derived from token positions, not from the mask.
    """
    (batch, length), w, cut, levels = k.shape[:2], config.sliding_window, layout.cut, layout.pyramid
    token = torch.arange(length, device=k.device)[None]
    # of a summary the last token of its last block must lie in the past, not only its own last token
    last = (levels.last // config.block_size + 1)[levels.chosen] * config.block_size - 1
    places = zip(cut.split(token, length), cut.near(token, -1), last.split(cut.sizes(len(last))), strict=True)
    entropy = share = counted = k.new_zeros((), dtype=torch.float32)
    reads = dict[int, set[int]]()
    for q, keys_of, mask, (query, seen_near, far) in zip(queries, keys, layout.masks, places, strict=True):
        p = probabilities(q, keys_of, mask).unflatten(0, (batch, -1))  # [b, n / b, heads, chunk, keys]
        query, near = query.flatten(0, 2)[..., None], torch.cat(seen_near, 3).flatten(0, 2)[:, None]
        back = query - near
        if pattern == "block":
            outside = near // (w // 2) < query // (w // 2) - 1
        else:
            outside = (back >= w * cut.dilation) | (back % cut.dilation != 0)
        ends = far.repeat(cut.dilation, 1)
        later = ends[:, None] > query
        hidden = torch.cat(((back < 0) | (near < 0) | outside, torch.zeros_like(outside[..., :1]), later), -1)[:, None]
        seen = (mask == 0).sum(-1).unflatten(0, (batch, -1))
        rows = (query[..., 0] < length)[:, None] & (seen > 1)  # [b, n / b, 1, chunk]
        # H / log n, with H = -sum_j p_j log p_j over the n visible keys
        certainty = torch.special.entr(p).sum(-1) / seen.clamp_min(2).log()
        entropy, share = (
            total + (value * rows).sum((0, 1, 3))
            for total, value in ((entropy, certainty), (share, (p * hidden).sum(-1)))
        )
        counted = counted + rows.sum()
        if ends.shape[1]:
            most = p[0, ..., -ends.shape[1] :].sum(2).max(-1)  # [n / b, heads]
            blocks = torch.where(most.values > 0, ends.gather(1, most.indices) // config.block_size, -1)
            at = query.flatten(1).amax(1).clamp_max(length - 1)
            for now, wanted in zip(at.tolist(), blocks.tolist(), strict=True):
                reads.setdefault(now, set()).update(block for block in wanted if block >= 0)
    codec = kv_codec.measure(k, v, keep=w) | kv_codec.replay(k[:1], v[:1], reads, config.block_size, w)
    return {"entropy": entropy / counted, "masked_edge_share": share / counted, **codec}


def probabilities(queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """What the kernel gives each key, fp32 [n, heads, chunk, keys]: the output for the identity as values."""
    count, width = keys.shape[2], queries.shape[-1]
    identity = F.pad(torch.eye(count, dtype=keys.dtype, device=keys.device), (0, -count % width))
    parts = [part.expand(*keys.shape[:2], -1, -1) for part in identity.split(width, 1)]
    read = [F.scaled_dot_product_attention(queries, keys, part, mask, enable_gqa=True) for part in parts]
    return torch.cat(read, -1)[..., :count].float()


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
