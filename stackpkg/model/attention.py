"""Attention in three tiers: causal window, summaries of finished blocks, retrieved records. No L x L tensor is made."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackpkg.model import kv_codec, linear
from stackpkg.model.configuration import StackConfig
from stackpkg.model.patterns import Layout
from stackpkg.model.rotary import rotate
from stackpkg.model.scopes import Scopes
from stackpkg.model.statistics import linear_statistics, statistics
from stackpkg.model.summaries import pool


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
        return [t.unflatten(-1, (t.shape[-1] // self.config.head_dim, -1)) for t in flat]


class SelfAttention(Projections):
    """Tiers A and B under one softmax: near keys, a null slot (zero key, zero value) and block summaries; past
    `linear_from` tokens linear attention over all of the document instead.
    """

    features: Tensor

    def __init__(self, config: StackConfig, layer: int) -> None:
        super().__init__(config)
        self.pattern, self.layer = config.pattern(layer), layer
        if config.summary_pooling == "attention":
            self.pool = nn.Linear(config.head_dim, 1, bias=False)
        if config.feature_map == "favor":
            self.register_buffer("features", self.draw(), persistent=False)

    def draw(self) -> Tensor:
        """The random features [4 * head_dim, head_dim] of this layer."""
        return linear.draw(4 * self.config.head_dim, self.config.head_dim, self.layer)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        document: Tensor,
        layouts: dict[str, Layout] | None,
        scopes: Scopes | None = None,
        measure: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor] | None, Tensor | None]:
        """x [b, L, hidden] -> output of the same shape, `statistics` if `measure`, and, with `scopes`, the probability
        [b, L, heads] on edges that they forbid. `layouts` by pattern; None asks for linear attention.
        """
        if layouts is not None:
            return self.windowed(x, rotation, layouts[self.pattern], measure)
        q, k, _, v = self.rotated(x, *rotation)
        out, mass, found = self.linearised(q, k, v, document, scopes, measure)
        return self.o_proj(out.flatten(2)), found, mass

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries and keys at their positions, keys before, and values, each [b, L, heads, head_dim]."""
        q, raw, v = self.project(x, x)
        return rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(raw), cos, sin), raw, v

    def windowed(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], layout: Layout, measure: bool
    ) -> tuple[Tensor, dict[str, Tensor] | None, Tensor | None]:
        """Part by part, from the projection in to the projection out: what is made on the way stays in the cache of a
        processor, so that a token costs much the same in a long row as in a short one.
        """
        cut, levels, (batch, length, _), d = layout.cut, layout.pyramid, x.shape, self.config.head_dim
        tokens = cut.tokens(length)
        made = [self.rotated(*part) for part in zip(*(t.split(tokens, 1) for t in (x, *rotation)), strict=True)]
        q, *whole = zip(*made, strict=True)
        k, raw, v = (torch.cat(parts, 1) for parts in whole)
        scores = raw.new_zeros(batch, length, 1) if self.config.summary_pooling == "mean" else None
        if self.config.summary_pooling == "attention":
            scores = self.pool(self.k_norm(raw))[..., 0]
        # A summary key is the normalised pool of raw keys, rotated to the middle of its tokens.
        far_k, far_v = (
            rotate(self.k_norm(pool(raw, scores, levels.mates)), *layout.rotation),
            pool(v, scores, levels.mates),
        )
        queries = [cut.chunks(part).flatten(0, 2).transpose(1, 2) for part in q]
        keys, values = cut.keys(k, far_k, levels.chosen), cut.keys(v, far_v, levels.chosen)
        found = statistics(self.config, self.pattern, queries, keys, values, layout, k, v) if measure else None
        if layout.classes is not None:
            classes = layout.classes[0].shape[-1]
            values = [
                torch.cat((part, more.expand(-1, part.shape[1], -1, -1)), -1)
                for part, more in zip(values, layout.classes, strict=True)
            ]
            queries, keys = ([F.pad(part, (0, classes)) for part in parts] for parts in (queries, keys))
        outputs, masses = [], []
        for part, count in zip(zip(queries, keys, values, layout.masks, strict=True), tokens, strict=True):
            out = cut.join(F.scaled_dot_product_attention(*part, scale=d**-0.5, enable_gqa=True), batch, count)
            masses.append(out[..., d:])
            outputs.append(self.o_proj(out[..., :d].flatten(2).contiguous()))  # DTensor needs it
        mass = None if layout.forbidden is None else (torch.cat(masses, 1) * layout.forbidden).sum(-1)
        return torch.cat(outputs, 1), found, mass

    def linearised(
        self, q: Tensor, k: Tensor, v: Tensor, document: Tensor, scopes: Scopes | None, measure: bool
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor] | None]:
        w, size = self.config.sliding_window, self.config.block_size
        codec = kv_codec.measure(k, v, keep=w) | kv_codec.replay(k[:1], v[:1], {}, size, w) if measure else {}
        dtype, (q, k, v) = v.dtype, (t.float() for t in (q, k, v))
        maps: linear.Maps = linear.elu, linear.elu
        if self.config.feature_map == "favor":
            favor = partial(linear.favor, omega=self.features)
            maps = partial(favor, query=True), partial(favor, query=False)
        if scopes is None and not measure:
            return linear.attend(q, k, v, document, maps).to(dtype), None, None
        q, k = maps[0](q), maps[1](k)
        found = {**linear_statistics(q, k, document), **codec} if measure else None
        if scopes is None:
            return linear.attend(q, k, v, document).to(dtype), None, found
        which, d = F.one_hot(scopes.of, scopes.allowed.shape[-1]).to(v.dtype)[:, :, None], v.shape[-1]
        if scopes.enforce:  # (phi(q) x allowed) (phi(k) x which) = phi(q) phi(k), or 0 where forbidden
            k = (k[..., None] * which[..., None, :]).flatten(-2)
            q = (q[..., None] * scopes.allowed[:, :, None, None]).flatten(-2)
        v = torch.cat((v, which.expand(*v.shape[:3], -1)), -1)
        out = linear.attend(q, k, v, document).to(dtype)
        return out[..., :d].contiguous(), (out[..., d:] * ~scopes.allowed[:, :, None]).sum(-1), found


class CrossAttention(Projections):
    """Tier C: every token attends to the tokens of the records retrieved for its row, and to a null slot (zero key,
    zero value), which is all there is where the guard let none pass. The key of a record's token is made of the token
    before it: a context and what followed it, as in kNN-LM (Khandelwal et al., arXiv 1911.00172, sec. 2), so that one
    layer can go on where a record goes on.
    """

    def forward(self, x: Tensor, memory: Tensor, seen: Tensor) -> Tensor:
        """x [b, L, hidden], memory [b, n, hidden] and bool `seen` [b, n], false for padding -> [b, L, hidden]."""
        q, k, v = self.project(x, memory)
        k, v = F.pad(k[:, :-1], (0, 0, 0, 0, 1, 1)), F.pad(v, (0, 0, 0, 0, 0, 1))  # a token back; the null slot
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        mask = F.pad(seen, (0, 1), value=True)[:, None, None]
        # softmax_j(q_i . k(m_(j-1)) / sqrt d) v(m_j), and exp 0 for the null slot
        out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2).contiguous())
