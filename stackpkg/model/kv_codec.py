"""Compression of the key/value cache: the newest chunk stays fp16, older tokens become int8 in blocks of 64.

Both versions of the format decode. Version 1 stored the step absmax / 127, which falls into fp16's subnormal range
for small activations. Version 2 stores 127 steps, and chooses the step that keeps the norm of the block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

UNITS = {1: 1.0, 2: 127.0}  # version: stored scale over quantisation step


class Encoded(NamedTuple):
    version: int
    shape: tuple[int, ...]  # b, L, heads, d
    codes: Tensor  # int8 [blocks, 64], the old tokens
    scales: Tensor  # fp16 [blocks, 1]
    recent: Tensor  # fp16 [b, keep, heads, d]


def encode(cache: Tensor, keep: int, version: int = 2) -> Encoded:
    """Compress all but the last `keep` tokens of a cache [b, L, heads, d]."""
    keep = min(keep, cache.shape[1])
    old, recent = cache.float().split((cache.shape[1] - keep, keep), 1)
    blocks = F.pad(old.flatten(), (0, -old.numel() % 64)).view(-1, 64)
    step = blocks.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    codes = (blocks / step).round()
    if version == 2:
        # s = ||x|| / ||q||: the decoded block has the norm of x, up to the rounding of s to fp16 (2^-11)
        step = blocks.norm(dim=1, keepdim=True) / codes.norm(dim=1, keepdim=True).clamp_min(1)
    return Encoded(version, tuple(cache.shape), codes.to(torch.int8), (step * UNITS[version]).half(), recent.half())


def decode(encoded: Encoded) -> Tensor:
    """The cache in fp32. Raises `ValueError` for a version this code does not know."""
    if encoded.version not in UNITS:
        raise ValueError(f"KV codec version {encoded.version} is unknown; this code reads {sorted(UNITS)}")
    (batch, length, heads, d), keep = encoded.shape, encoded.recent.shape[1]
    flat = (encoded.codes * (encoded.scales.float() / UNITS[encoded.version])).flatten()
    old = flat[: batch * (length - keep) * heads * d].view(batch, length - keep, heads, d)
    return torch.cat((old, encoded.recent.float()), 1)


@torch.no_grad()
def measure(k: Tensor, v: Tensor, keep: int) -> dict[str, Tensor]:
    """Round trip of keys and values. `kv_ratio` is bytes kept, scales included, over bytes in fp16; `kv_error` the mean
    over tokens and heads of | ||x'|| - ||x|| | / ||x||; `kv_distortion` ||x' - x|| / ||x||, the plain, larger number.
    """
    old = torch.stack((k, v)).float().flatten(0, 1)
    coded = encode(old, keep)
    new, norms = decode(coded), old.norm(dim=-1).clamp_min(1e-12)
    kept = sum(t.numel() * t.element_size() for t in (coded.codes, coded.scales, coded.recent))
    error, distortion = ((new.norm(dim=-1) - norms).abs() / norms).mean(), (new - old).norm() / norms.norm()
    return {"kv_ratio": old.new_tensor(kept / (2 * old.numel())), "kv_error": error, "kv_distortion": distortion}
