"""Linear attention: a kernel of feature maps in place of exp, its sums carried from piece to piece of a row."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK, PIECE = 64, 512  # tokens; a piece is whole chunks
Maps = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # of queries and of keys, on the last dimension


def draw(count: int, d: int, seed: int) -> Tensor:
    """Orthogonal random features [count, d], float32: rows as of N(0, I), orthogonal within each d of them (FAVOR+,
    arXiv 2009.14794, sec. 2.4). The same for the same seed.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(-(-count // d), d, d, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(blocks)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]  # else not uniform over rotations (Mezzadri, math-ph/0609050)
    norms = torch.randn(count, d, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    return (q.transpose(1, 2).flatten(0, 1)[:count] * norms).float()


def elu(x: Tensor) -> Tensor:
    """x [..., d] -> positive features [..., d]."""
    # phi(x) = elu(x) + 1 (Katharopoulos et al., arXiv 2006.16236, eq. 7)
    return F.elu(x) + 1


def favor(x: Tensor, omega: Tensor, query: bool) -> Tensor:
    """x [..., d] and omega [m, d] -> positive features [..., m], with E[phi(q) phi(k)] = exp(q k / sqrt(d)), for
    queries up to a factor of each, which attention cancels. An exponent is at most |omega|^2 / 2: keys need no factor.
    """
    x = x * x.shape[-1] ** -0.25
    exponent = x @ omega.T
    # phi(x) = exp(omega x - |x|^2 / 2) / sqrt(m) (FAVOR+, arXiv 2009.14794, eq. 5); a query's |x|^2 is such a factor
    shift = exponent.detach().amax(-1, keepdim=True) if query else x.square().sum(-1, keepdim=True) / 2
    return exponent.sub_(shift + math.log(len(omega)) / 2).exp_()


def same(x: Tensor) -> Tensor:
    return x


def attend(q: Tensor, k: Tensor, v: Tensor, document: Tensor, maps: Maps = (same, same)) -> Tensor:
    """Causal attention within documents of q [b, L, heads, d] and k [b, L, kv heads, d], from whose last dimension the
    `maps` make features, values v [b, L, kv heads, e] and `document` [b, L] -> [b, L, heads, e]. Time and memory grow
    as L; features are made piece by piece, and again for the gradient, so that no more than a piece's are ever held.
    """
    length, outputs = q.shape[1], []
    v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    last, state = document[:, :1], None
    pieces = (F.pad(t, (0, 0) * (t.dim() - 2) + (0, -length % CHUNK)).split(PIECE, 1) for t in (q, k, v))
    documents = F.pad(document, (0, -length % CHUNK), value=-1).split(PIECE, 1)
    for piece in zip(*pieces, documents, strict=True):
        run = partial(_piece, maps=maps)
        out, state = checkpoint(run, *piece, last, state, use_reentrant=False, preserve_rng_state=False)
        last = piece[-1][:, -1:]
        outputs.append(out)
    return torch.cat(outputs, 1)[:, :length]


def _piece(
    q: Tensor, k: Tensor, v: Tensor, document: Tensor, last: Tensor, state: Tensor | None, maps: Maps
) -> tuple[Tensor, Tensor]:
    """The output of whole chunks, and the sums they hand on, from `state` [b, kv heads, m, e + 1] of what came before,
    whose last token is of document `last` [b, 1].
    """
    kv, group = k.shape[2], q.shape[2] // k.shape[2]
    q, k, v = (t.unflatten(1, (-1, CHUNK)).unflatten(3, (kv, -1)).permute(0, 1, 3, 4, 2, 5) for t in (q, k, v))
    q, k, v = maps[0](q.flatten(3, 4)), maps[1](k[:, :, :, 0]), v[:, :, :, 0].contiguous()
    document = document.unflatten(1, (-1, CHUNK))
    # out_t = phi(q_t) S_t / phi(q_t) z_t, S_t = sum_{s <= t} phi(k_s) v_s, z_t = sum_{s <= t} phi(k_s) (Katharopoulos,
    # eq. 9-12); v has a column of ones, so z is the last column of S. Within a chunk the sums are taken pair by pair.
    seen = (document[..., :, None] == document[..., None, :]).tril().to(q.dtype)
    pairs = (q @ k.transpose(-1, -2)).unflatten(3, (group, -1)) * seen[:, :, None, None]
    out = pairs.flatten(3, 4) @ v
    ends = torch.cat((last, document[:, :, -1]), 1)  # what a chunk hands on are the sums of its last token's document
    mine = (document == ends[:, 1:, None]).to(q.dtype)[:, :, None, :, None]
    added = k.transpose(-1, -2) @ (v * mine)
    state = torch.zeros_like(added[:, 0]) if state is None else state
    kept = (ends[:, :, None] == ends[:, None]).tril().to(q.dtype)
    states = (kept @ torch.cat((state[:, None], added), 1).flatten(2)).unflatten(2, state.shape[1:])
    own = (document == ends[:, :-1, None]).to(q.dtype)[:, :, None, None, :, None]
    out = out.unflatten(3, (group, -1)) + (q @ states[:, :-1]).unflatten(3, (group, -1)) * own
    out = out[..., :-1] / out[..., -1:].clamp_min(1e-6)
    return out.permute(0, 1, 4, 2, 3, 5).flatten(1, 2).flatten(2, 3), states[:, -1]
