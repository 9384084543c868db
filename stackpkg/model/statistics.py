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
    config: StackConfig, pattern: str, queries: Tensor, keys: Tensor, layout: Layout, k: Tensor, v: Tensor
) -> dict[str, Tensor]:
    """From chunked queries and keys [n, heads, ., d] of a pattern, and the plain k and v [b, L, heads, d].

    Per head: `entropy`, mean of H / log(visible keys) over rows that see more than one key (the null slot counts),
    and `masked_edge_share`, probability on keys that causality or the pattern forbid. Then the KV codec's round trip.
    The probabilities are those of the kernel itself, read by giving it the identity as values; the forbidden edges
    are derived from token positions, not from the mask.
    """
    count, width, cut, levels = keys.shape[2], queries.shape[-1], layout.cut, layout.pyramid
    identity = F.pad(torch.eye(count, dtype=keys.dtype, device=keys.device), (0, -count % width))
    parts = [part.expand(*keys.shape[:2], -1, -1) for part in identity.split(width, 1)]
    read = [F.scaled_dot_product_attention(queries, keys, part, layout.mask, enable_gqa=True) for part in parts]
    p = torch.cat(read, -1)[..., :count].float().unflatten(0, (len(k), -1))  # [b, n / b, heads, chunk, keys]

    (batch, length), w = k.shape[:2], config.sliding_window
    token = torch.arange(length, device=p.device)[None]
    query, near = cut.split(token, length).flatten(0, 2)[..., None], cut.near(token, -1).flatten(0, 2)[:, None]
    back = query - near
    if pattern == "block":
        outside = near // (w // 2) < query // (w // 2) - 1
    else:
        outside = (back >= w * cut.dilation) | (back % cut.dilation != 0)
    # of a summary the last token of its last block must lie in the past, not only its own last token
    last = (levels.last // config.block_size + 1)[levels.chosen] * config.block_size - 1
    far = last.repeat(cut.dilation, 1)[:, None] > query
    forbidden = torch.cat(((back < 0) | (near < 0) | outside, torch.zeros_like(outside[..., :1]), far), -1)[:, None]
    seen = (layout.mask == 0).sum(-1).unflatten(0, (batch, -1))
    rows = (query[..., 0] < length)[:, None] & (seen > 1)  # [b, n / b, 1, chunk]
    # H / log n, with H = -sum_j p_j log p_j over the n visible keys
    entropy = torch.special.entr(p).sum(-1) / seen.clamp_min(2).log()
    mean = [(value * rows).sum((0, 1, 3)) / rows.sum() for value in (entropy, (p * forbidden).sum(-1))]
    return {"entropy": mean[0], "masked_edge_share": mean[1], **kv_codec.measure(k, v, keep=w)}


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
