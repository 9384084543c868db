"""The stream as micro-batches of one rank: which rows, by arithmetic alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from stackpkg.data.stream import Stream


class StreamDataset(Dataset):
    """Rows of the stream by number; a loader asks for those of a micro-batch together."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return len(self.stream.plan)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(value) for name, value in self.stream.batch(rows).items()}


class RankBatches(Sampler[list[int]]):
    """This rank's micro-batches: step t is the same rows, in the same order, on any number of ranks.

    Begins at `start()`, the optimiser steps already done, without looking at the rows before. `next_step` is the first
    step whose rows were not asked for yet: a decision about the data can hold from there.
    """

    def __init__(
        self, stream: Stream, steps: int, accumulation: int, rank: int, ranks: int, start: Callable[[], int]
    ) -> None:
        self.stream, self.steps, self.accumulation = stream, steps, accumulation
        self.rank, self.ranks, self.start, self.next_step = rank, ranks, start, 0

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start(), self.steps):
            self.next_step = step + 1
            yield from self.of(step)

    def of(self, step: int) -> list[list[int]]:
        """The rows of each micro-batch of optimiser step `step`, from 0."""
        rows = self.stream.plan.rows_at(self.stream.plan.position(step))
        size = len(rows) // (self.accumulation * self.ranks)
        starts = [(micro * self.ranks + self.rank) * size for micro in range(self.accumulation)]
        return [list(rows[first : first + size]) for first in starts]


class Timed(Iterator[Any]):
    """An iterator that counts the `seconds` its caller waited for it."""

    def __init__(self, items: Iterator[Any]) -> None:
        self.items, self.seconds = items, 0.0

    def __next__(self) -> Any:
        start = time.perf_counter()
        try:
            return next(self.items)
        finally:
            self.seconds += time.perf_counter() - start


def collate(batch: Any) -> dict[str, Tensor]:
    """The rows of a micro-batch come stacked already."""
    return batch
