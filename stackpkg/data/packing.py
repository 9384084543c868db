"""Whole documents into rows of a fixed number of tokens, with little waste and none of them cut."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from stackpkg.data.mixing import CACHE


class Pack(NamedTuple):
    """Row r holds documents order[ends[r-1]:ends[r]]."""

    order: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def row(self, r: int) -> np.ndarray:
        """Numbers of the documents of row r."""
        return self.order[self.ends[r - 1] if r else 0 : self.ends[r]]

    def documents(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of the documents of several rows."""
        taken = np.zeros(len(self), bool)
        taken[rows] = True
        return self.order[np.repeat(taken, np.diff(self.ends, prepend=0))]

    def rows_of(self, document: int) -> np.ndarray:
        """Rows that hold a document: one, or none."""
        return np.searchsorted(self.ends, np.flatnonzero(self.order == document), side="right")


@njit(cache=CACHE)
def _best_fit(lengths: np.ndarray, context: int) -> np.ndarray:
    """Row of each document, for `lengths` in falling order. A tree over free space finds the tightest row: O(log L)."""
    size = 1
    while size <= context:
        size *= 2
    tree, head = np.zeros(2 * size, np.bool_), np.full(context + 1, -1)  # head[c]: last row with c tokens free
    below, rows, count = np.full(len(lengths), -1), np.empty(len(lengths), np.int64), 0
    for d in range(len(lengths)):
        node, free = size + lengths[d], -1
        if tree[node]:
            free = lengths[d]
        else:
            while node > 1 and (node & 1 or not tree[node + 1]):  # up, until something lies to the right
                node >>= 1
            if node > 1:
                node += 1
                while node < size:
                    node = 2 * node if tree[2 * node] else 2 * node + 1
                free = node - size
        if free < 0:
            row, free, count = count, context, count + 1
        else:
            row = head[free]
            head[free] = below[row]
            if head[free] < 0:
                node = size + free
                tree[node] = False
                while node > 1:
                    node >>= 1
                    tree[node] = tree[2 * node] or tree[2 * node + 1]
        rows[d], left = row, free - lengths[d]
        if left:
            below[row], head[left], node = head[left], row, size + left
            while node and not tree[node]:
                tree[node] = True
                node >>= 1
    return rows


def pack(documents: np.ndarray, lengths: np.ndarray, context: int) -> Pack:
    """Best-fit decreasing (Ding et al. 2024, Fewer Truncations Improve Language Modeling, algorithm 1).

    documents int64[n], their lengths int64[n] in tokens, each at most `context`: ValueError otherwise. Depends on the
    set of documents alone, not on its order.
    """
    if len(lengths) and int(lengths.max()) > context:
        raise ValueError(f"a document of {int(lengths.max())} tokens does not fit a row of {context}: admit it later")
    known = np.argsort(documents, kind="stable")  # they come sorted, which costs nothing then
    short = (context - lengths[known]).astype(np.min_scalar_type(context))  # numpy sorts 16 bits by radix
    falling = known[np.argsort(short, kind="stable")]
    rows = _best_fit(lengths[falling].astype(np.int64), context)
    return Pack(documents[falling][np.argsort(rows, kind="stable")], np.cumsum(np.bincount(rows)))
