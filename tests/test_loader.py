"""Which rows a rank reads: any number of ranks and micro-batches reads every row once, in the same order."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from stackpkg.training.loader import RankBatches, collate


@given(
    ranks=st.sampled_from([1, 2, 4]),
    accumulation=st.sampled_from([1, 2]),
    size=st.integers(1, 5),
    steps=st.integers(1, 7),
)
def test_a_step_is_its_rows_in_order_on_any_layout(ranks: int, accumulation: int, size: int, steps: int) -> None:
    rows = size * accumulation * ranks
    readers = [RankBatches(steps, rows, accumulation, rank, ranks) for rank in range(ranks)]
    assert all(len(list(reader)) == len(reader) == steps * accumulation for reader in readers)
    lists = [list(reader) for reader in readers]
    for step in range(steps):
        micros = range(step * accumulation, (step + 1) * accumulation)
        # over micro-batches, then over ranks: the rows of the step, none twice, none left out
        read = [row for micro in micros for reader in lists for row in reader[micro]]
        assert read == list(range(step * rows, (step + 1) * rows))
        assert all(len(reader[micro]) == size for micro in micros for reader in lists)


def test_micro_batches_see_the_same_rows_on_any_number_of_ranks() -> None:
    """In-batch negatives depend on what is in one micro-batch over all ranks, so that may not depend on the ranks."""
    alone = list(RankBatches(3, 8, 2, 0, 1))
    spread = [list(RankBatches(3, 8, 2, rank, 4)) for rank in range(4)]
    assert alone == [[row for reader in spread for row in reader[micro]] for micro in range(6)]


class Numbers(Dataset):
    def __len__(self) -> int:
        return 100

    def __getitem__(self, row: int) -> dict:
        return {"row": torch.tensor(row), "ids": torch.full((3,), row)}


def test_a_loader_gives_them_as_stacked_tensors() -> None:
    loader = DataLoader(Numbers(), batch_sampler=RankBatches(2, 8, 2, 1, 2), collate_fn=collate)
    batches = list(loader)
    assert [batch["row"].tolist() for batch in batches] == [[2, 3], [6, 7], [10, 11], [14, 15]]
    assert batches[0]["ids"].tolist() == [[2, 2, 2], [3, 3, 3]]
