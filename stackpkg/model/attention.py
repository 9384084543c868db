"""Attention in three tiers: causal window, summaries of finished blocks, retrieved memory. No L x L tensor is made."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackpkg.model import kv_codec
from stackpkg.model.configuration import StackConfig


def rotary(config: StackConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [b, L, head_dim] for integer `positions` [b, L] (RoFormer, arXiv 2104.09864)."""
    d = config.head_dim
    # NTK-aware extension (YaRN, arXiv 2309.00071, sec. 3.1): theta' = theta * (1/alpha)^(d/(d-2)). The slowest
    # frequency is interpolated by alpha = trained length / served length, the fastest is left as it is.
    theta = config.rope_theta * (1 / config.rope_alpha) ** (d / (d - 2))
    frequencies = theta ** (-torch.arange(0, d, 2, device=positions.device, dtype=torch.float32) / d)
    angles = (positions[..., None].float() * frequencies).repeat(1, 1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [b, L, heads, head_dim] by angles [b, L, head_dim]."""
    first, second = x.chunk(2, -1)
    return x * cos[:, :, None] + torch.cat((-second, first), -1) * sin[:, :, None]


def documents(positions: Tensor) -> Tensor:
    """Number of the document each token is in, [b, L], of packed rows: positions restart at 0 with each document."""
    return (positions == 0).cumsum(-1)


def visible_keys(config: StackConfig, document: Tensor) -> Tensor:
    """Boolean [b * chunks, 1, window, keys]: which keys each query may see, for the `document` [b, L] of each token.

    The keys of a chunk are the previous chunk, the chunk itself, the null slot, then all summaries. A summary is seen
    if all its tokens are of the query's document. Padding on the right needs no mask: it lies in the future of every
    real token, and so does the end of a block that holds it.
    """
    w, size, (batch, length) = config.sliding_window, config.block_size, document.shape
    blocks, step = config.pooled(length), config.segment
    rows = torch.arange(-(-length // w) * w, device=document.device).view(-1, w, 1)
    keys = torch.arange(2 * w, device=document.device) + rows[:, :1] - w
    ends = (torch.arange(blocks // size, device=document.device) * size + size).repeat_interleave(size // step)
    local = (keys >= 0) & (keys <= rows) & (keys > rows - w)
    chunk = F.pad(document, (0, len(rows) * w - length), value=-1).view(batch, -1, w)
    near = torch.cat((F.pad(chunk, (0, 0, 1, 0))[:, :-1], chunk), -1)
    first, last = document[:, :blocks:step], document[:, step - 1 : blocks : step]
    far = torch.where(first == last, first, -2)[:, None, None]
    local = local & (near[:, :, None] == chunk[..., None])
    summaries = (ends <= rows) & (far == chunk[..., None])
    seen = torch.cat((local, local.new_ones(*local.shape[:3], 1), summaries), -1)
    return seen.flatten(0, 1)[:, None]


class Projections(nn.Module):
    """Grouped-query projections with RMS norms for queries and keys (Qwen3). Head counts are read from the tensors, so
    that a tensor-parallel rank works on its own heads.
    """

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        hidden, d = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, hidden, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(d, config.rms_norm_eps), nn.RMSNorm(d, config.rms_norm_eps)

    def project(self, x: Tensor, memory: Tensor) -> list[Tensor]:
        """Queries of x [b, L, hidden], raw keys and values of memory [b, n, hidden], each [b, ., heads, head_dim]."""
        flat = self.q_proj(x), self.k_proj(memory), self.v_proj(memory)
        return [t.view(*t.shape[:-1], -1, self.config.head_dim) for t in flat]


class SelfAttention(Projections):
    """Tiers A and B under one softmax: window keys, a null slot (zero key, zero value) and block summaries."""

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], visible: Tensor, measure: bool
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """x [b, L, hidden] -> output of the same shape, and `statistics` if `measure`."""
        length, chunks, w = x.shape[1], len(visible) // len(x), visible.shape[2]
        blocks, step = self.config.pooled(length), self.config.segment
        q, raw, v = self.project(x, x)
        q, k = rotate(self.q_norm(q), *rotation), rotate(self.k_norm(raw), *rotation)
        # A summary key is the normalised mean of raw keys, rotated to the middle of its segment.
        middle = [angle[:, step // 2 : blocks : step] for angle in rotation]
        far_k, far_v = (t[:, :blocks].unflatten(1, (-1, step)).mean(2) for t in (raw, v))
        far_k = rotate(self.k_norm(far_k), *middle)

        def chunked(t: Tensor) -> Tensor:
            return F.pad(t, (0, 0, 0, 0, 0, chunks * w - length)).unflatten(1, (chunks, w))

        def keys(near: Tensor, far: Tensor) -> Tensor:
            near, far = chunked(near), F.pad(far, (0, 0, 0, 0, 1, 0))[:, None].expand(-1, chunks, -1, -1, -1)
            previous = torch.cat((torch.zeros_like(near[:, :1]), near[:, :-1]), 1)
            return torch.cat((previous, near, far), 2).flatten(0, 1).transpose(1, 2)

        queries, near = chunked(q).flatten(0, 1).transpose(1, 2), keys(k, far_k)  # [b * chunks, heads, ., head_dim]
        out = F.scaled_dot_product_attention(queries, near, keys(v, far_v), visible, enable_gqa=True)
        out = out.transpose(1, 2).reshape(len(x), chunks * w, -1)[:, :length].contiguous()  # DTensor needs it
        found = statistics(self.config, queries, near, visible, k, v) if measure else None
        return self.o_proj(out), found


class CrossAttention(Projections):
    """Tier C: every token attends to all retrieved records; no positions, no mask."""

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x [b, L, hidden] and memory [b, n, hidden] -> [b, L, hidden]."""
        q, k, v = self.project(x, memory)
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2).contiguous())


@torch.no_grad()
def statistics(
    config: StackConfig, queries: Tensor, keys: Tensor, mask: Tensor, k: Tensor, v: Tensor
) -> dict[str, Tensor]:
    """What a layer's attention does, from its chunked queries, keys and mask and the plain k and v [b, L, heads, d].

    Per head: `entropy`, mean of H / log(visible keys) over rows that see more than one key (the null slot counts),
    and `masked_edge_share`, probability on keys that causality or the window forbid. Then the KV codec's round trip.
    The probabilities are those of the kernel itself, read by giving it the identity as values; the forbidden edges
    are derived from token positions, not from the mask.
    """
    w, size, count, width = config.sliding_window, config.block_size, keys.shape[2], queries.shape[-1]
    identity = F.pad(torch.eye(count, dtype=keys.dtype, device=keys.device), (0, -count % width))
    parts = [part.expand(*keys.shape[:2], -1, -1) for part in identity.split(width, 1)]
    read = [F.scaled_dot_product_attention(queries, keys, part, mask, enable_gqa=True) for part in parts]
    p = torch.cat(read, -1)[..., :count].float().unflatten(0, (len(k), -1))  # [b, chunks, heads, window, keys]

    token = torch.arange(p.shape[1] * w, device=p.device).view(-1, 1, w, 1)
    near = torch.arange(2 * w, device=p.device) + token[:, :, :1] - w
    far = torch.arange(count - 2 * w - 1, device=p.device) * config.segment // size * size + size - 1
    last = torch.cat((near, near[..., :1] * 0 - 1, far.expand(*near.shape[:3], -1)), -1)  # last token of a key; null -1
    forbidden = last > token
    forbidden[..., : 2 * w] |= (token - near >= w) | (near < 0)
    seen = mask.view(len(k), -1, 1, w, count).sum(-1)
    rows = (token[..., 0] < k.shape[1]) & (seen > 1)  # [b, chunks, 1, window]
    # H / log n, with H = -sum_j p_j log p_j over the n visible keys
    entropy = torch.special.entr(p).sum(-1) / seen.clamp_min(2).log()
    mean = [(value * rows).sum((0, 1, 3)) / rows.sum() for value in (entropy, (p * forbidden).sum(-1))]
    return {"entropy": mean[0], "masked_edge_share": mean[1], **kv_codec.measure(k, v, keep=w)}
