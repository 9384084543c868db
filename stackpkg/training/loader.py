"""The stream as micro-batches of one rank: which rows, by arithmetic alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from stackpkg.data.stream import Stream


class StreamDataset(Dataset):
    """Row i of the stream as tensors."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: torch.as_tensor(value) for name, value in self.stream[row].items()}


class RankBatches(Sampler[list[int]]):
    """This rank's micro-batches: optimiser step t is rows [t B, (t+1) B) on any number of ranks, in the same order."""

    def __init__(self, steps: int, batch_rows: int, accumulation: int, rank: int, ranks: int) -> None:
        self.steps, self.batch_rows, self.accumulation, self.rank, self.ranks = (
            steps, batch_rows, accumulation, rank, ranks,
        )  # fmt: skip

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        size = self.batch_rows // (self.accumulation * self.ranks)
        for micro in range(len(self)):
            start = (micro * self.ranks + self.rank) * size
            yield list(range(start, start + size))


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
