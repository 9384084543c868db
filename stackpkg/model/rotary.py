"""Rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor

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
