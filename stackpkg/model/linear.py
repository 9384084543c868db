"""Linear attention: a kernel of feature maps in place of exp, its sums carried from chunk to chunk."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 128


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
    # phi(x) = exp(omega x - |x|^2 / 2) / sqrt(m) (FAVOR+, arXiv 2009.14794, eq. 5)
    exponent = x @ omega.T - x.square().sum(-1, keepdim=True) / 2
    if query:
        exponent = exponent - exponent.detach().amax(-1, keepdim=True)
    return exponent.exp() / math.sqrt(len(omega))


def attend(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
    """Causal attention within documents from features q [b, L, heads, m] and k [b, L, kv heads, m], values v [b, L, kv
    heads, e] and `document` [b, L] -> [b, L, heads, e]. Time and memory grow as L.
    """
    length, (kv, e) = q.shape[1], v.shape[2:]
    q = q.unflatten(2, (kv, -1))
    v = torch.cat((v, torch.ones_like(v[..., :1])), -1)

    def chunked(t: Tensor, fill: int = 0) -> Tensor:
        padding = (0, 0) * (t.dim() - 2) + (0, -length % CHUNK)
        return F.pad(t, padding, value=fill).unflatten(1, (-1, CHUNK))

    q, k, v, document = chunked(q), chunked(k), chunked(v), chunked(document, -1)
    # out_t = phi(q_t) S_t / phi(q_t) z_t, S_t = sum_{s <= t} phi(k_s) v_s, z_t = sum_{s <= t} phi(k_s) (Katharopoulos,
    # eq. 9-12); v has a column of ones, so z is the last column of S. Within a chunk the sums are taken pair by pair.
    pairs = torch.einsum("bnqhgm,bnkhm->bnhgqk", q, k)
    seen = (document[..., :, None] == document[..., None, :]).tril()[:, :, None, None]
    out = torch.einsum("bnhgqk,bnkhe->bnqhge", pairs * seen, v)
    last = document[:, :, -1:]  # what a chunk hands on are the sums of its last token's document
    added = torch.einsum("bnkhm,bnkhe->bnhme", k * (document == last)[..., None, None], v)
    state, states = torch.zeros_like(added[:, 0]), []
    for n in range(added.shape[1]):
        states.append(state)
        kept = last[:, n] == last[:, max(0, n - 1)]
        state = state * kept[..., None, None] + added[:, n]
    own = document == F.pad(last[:, :-1], (0, 0, 1, 0), value=-2)
    out = out + torch.einsum("bnqhgm,bnhme->bnqhge", q * own[..., None, None, None], torch.stack(states, 1))
    out = out.flatten(1, 2)[:, :length].flatten(2, 3)
    return out[..., :e] / out[..., e:].clamp_min(1e-6)
