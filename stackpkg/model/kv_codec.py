"""Compression of the key/value cache: the newest chunk stays fp16, older tokens become int8 in blocks of 64.

Both versions of the format decode. Version 1 stored the step absmax / 127, which falls into fp16's subnormal range
for small activations. Version 2 stores 127 steps, and chooses the step that keeps the norm of the block.

What it costs: 66 bytes for 64 numbers, 0.516 of fp16 and not 0.5. Norms of whole blocks keep 2^-11; that is every
vector whose size is a multiple of 64, such as the default head_dim 128, and holds for blocks whose largest number is in
6.2e-5..65,000, the normal range of fp16. Shorter vectors share a block and a step, so only their mean error is that
small. The plain distortion is several times larger: `measure` reports both.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
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

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.recent))


def encode(cache: Tensor, keep: int, version: int = 2) -> Encoded:
    """Compress all but the last `keep` tokens of a cache [b, L, heads, d] of any floating-point type.

    Raises `ValueError` for another shape, for NaN or infinity, and for numbers that fp16 can't hold.
    """
    if cache.ndim != 4 or not cache.is_floating_point():
        raise ValueError(f"cache is {cache.dtype} {list(cache.shape)}; allowed: floating point [b, L, heads, d]")
    encoded = _encode(cache, keep, version)
    if not (encoded.scales.isfinite().all() and encoded.recent.isfinite().all()):
        what = f"{float(cache.abs().max()):g}" if cache.isfinite().all() else "NaN or infinity"
        raise ValueError(
            f"the cache holds {what}; allowed: what fp16 holds, below 65,000; look for an overflow before it"
        )
    return encoded


def _encode(cache: Tensor, keep: int, version: int = 2) -> Encoded:
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
    A cache that holds NaN, or more than fp16 can, reports NaN: it is called where training must go on.
    """
    old = torch.stack((k, v)).float().flatten(0, 1)
    coded = _encode(old, keep)
    found = _sums(old, decode(coded))
    error, distortion = found[0] / found[1], (found[2] / found[3].clamp_min(1e-24)).sqrt()
    return {"kv_ratio": old.new_tensor(coded.bytes / (2 * old.numel())), "kv_error": error, "kv_distortion": distortion}


def _sums(old: Tensor, new: Tensor) -> Tensor:
    """Sum of relative norm errors, their count, squared error and squared size of a cache [., L, heads, d]."""
    norms = old.norm(dim=-1)
    error = ((new.norm(dim=-1) - norms).abs() / norms.clamp_min(1e-12)).sum()
    count = error.new_tensor(norms.numel())
    return torch.stack((error, count, (new - old).square().sum(), old.square().sum()))


class Cache:
    """Chunks of keys and values within a budget of bytes, compressed when written and decoded when read.

    When full, the chunk that was read or written least recently goes (LRU). Reads are the only evidence of use that a
    kernel without an attention matrix leaves; a chunk that every query reads, such as the first, stays. A scan over
    more chunks than fit hits nothing: the hit rate says so, and the mend is a larger budget.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.used = budget, 0
        self._chunks: OrderedDict[Hashable, Encoded] = OrderedDict()
        self._hits = self._reads = self._evictions = self._written = self._numbers = 0
        self._sums = torch.zeros(4, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self._chunks)

    @torch.no_grad()
    def write(self, key: Hashable, k: Tensor, v: Tensor) -> None:
        """Keep k and v [b, n, heads, d] as `key`, such as (layer, chunk), in place of what it held. Raises `ValueError`
        for what `encode` refuses, and for a chunk larger than the budget.
        """
        both = torch.cat((k, v))
        encoded = encode(both, keep=0)
        if encoded.bytes > self.budget:
            raise ValueError(
                f"chunk {key!r} takes {encoded.bytes} bytes, the budget is {self.budget}; give a larger one"
            )
        self._drop(key)
        while self.used + encoded.bytes > self.budget:
            self._drop(next(iter(self._chunks)))
            self._evictions += 1
        self._chunks[key], self.used = encoded, self.used + encoded.bytes
        self._written, self._numbers = self._written + encoded.bytes, self._numbers + both.numel()
        self._sums += _sums(both.float(), decode(encoded)).cpu()

    def read(self, key: Hashable) -> tuple[Tensor, Tensor] | None:
        """k and v in fp32, or None where the chunk is not here (any more)."""
        self._reads += 1
        if key not in self._chunks:
            return None
        self._hits += 1
        self._chunks.move_to_end(key)
        k, v = decode(self._chunks[key]).chunk(2)
        return k, v

    def _drop(self, key: Hashable) -> None:
        if key in self._chunks:
            self.used -= self._chunks.pop(key).bytes

    def report(self) -> dict[str, float]:
        """Over everything written and read so far: as `measure`, `kv_hit_rate` and `kv_evictions`; NaN for none."""
        error, count, wrong, size = self._sums.tolist()
        nothing = float("nan")
        return {
            "kv_ratio": self._written / (2 * self._numbers) if self._numbers else nothing,
            "kv_error": error / count if count else nothing,
            "kv_distortion": (wrong / max(size, 1e-24)) ** 0.5 if count else nothing,
            "kv_hit_rate": self._hits / self._reads if self._reads else nothing,
            "kv_evictions": self._evictions,
        }


@torch.no_grad()
def replay(k: Tensor, v: Tensor, reads: Mapping[int, Iterable[int]], chunk: int, window: int) -> dict[str, Tensor]:
    """`kv_hit_rate` and `kv_evictions` of a `Cache` with room for half of a row's chunks; k and v [1, L, heads, d].

    A chunk of tokens is written when it leaves the window; `reads` tells at which token which chunks are read. Those
    still in the window are no matter of the cache. The rate is NaN when nothing is read.
    """
    nothing, total = {"kv_hit_rate": k.new_tensor(float("nan")), "kv_evictions": k.new_zeros(())}, k.shape[1] // chunk
    if total < 2 or not _encode(torch.cat((k, v)), keep=0).scales.isfinite().all():
        return nothing  # NaN, or more than fp16 can hold: this is called where training must go on
    cache, written = Cache(total // 2 * _encode(torch.cat((k, v))[:, :chunk], keep=0).bytes), 0
    for token in sorted(reads):
        while (written + 1) * chunk <= token + 1 - window:
            part = slice(written * chunk, (written + 1) * chunk)
            cache.write(written, k[:, part], v[:, part])
            written += 1
        for number in sorted(reads[token]):
            if number < written:
                cache.read(number)
    told = cache.report()
    return {name: k.new_tensor(told[name]) for name in nothing}
