"""Scopes: which classes of tokens a token may read from."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scopes(NamedTuple):
    of: Tensor  # int64 [b, L], scope class of each token, 0..S-1
    allowed: Tensor  # bool [b, L, S], classes the token may read
    enforce: bool  # mask the forbidden edges; otherwise only measure the attention on them
