"""The curriculum: which context, which domains and how many long-range tasks each optimiser step sees."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from stackpkg.data import mixing
from stackpkg.params import Params, Stage

BLOCK = 1024  # rows after which the order of a long stage repeats; shares are exact to 1 / BLOCK


class Row(NamedTuple):
    """Where a row comes from: the last lane is long-range tasks, the others are domains."""

    stage: int
    context: int  # tokens
    lane: int
    ordinal: int  # rows of this lane before this one
    start: int  # tokens of this lane before this one


class Plan:
    """Pure schedule of every row: `plan[i]` is two look-ups, whatever `i`. A later stage never moves an earlier row.

    `mixture` maps each domain to its share of text rows; long-range tasks take their share of a stage first.
    `counts` [stages, lanes] are the rows of each lane.
    """

    def __init__(self, p: Params, mixture: Mapping[str, float]) -> None:
        self.stages, self.batch_rows, self.lanes = p.curriculum, p.training.batch_rows, [*mixture, "long_range"]
        rows = [stage.steps * self.batch_rows for stage in self.stages]
        self.first, self.contexts = np.cumsum([0, *rows]), np.array([stage.context for stage in self.stages])
        self.order, self.counts = [], np.zeros((len(rows), len(self.lanes)), np.int64)
        for index, (stage, count) in enumerate(zip(self.stages, rows, strict=True)):
            parts = [share * (1 - stage.long_range) for share in mixture.values()] + [stage.long_range]
            self.order.append(mixing.interleave(parts, min(BLOCK, count), p.seed, "rows", index))
            self.counts[index] = np.bincount(np.resize(self.order[-1][0], count), minlength=len(parts))

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, i: int) -> Row:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} is outside 0..{len(self) - 1}, the rows of the curriculum")
        stage = int(np.searchsorted(self.first, i, side="right")) - 1
        lanes, ordinals = self.order[stage]
        block, place = divmod(i - int(self.first[stage]), len(lanes))
        lane, context, before = int(lanes[place]), int(self.contexts[stage]), self.counts[:stage, lanes[place]]
        inside = int(ordinals[place]) + block * int(np.count_nonzero(lanes == lane))
        start = int(before @ self.contexts[:stage]) + inside * context
        return Row(stage, context, lane, int(before.sum()) + inside, start)

    def at(self, step: int) -> Stage:
        """The stage that optimiser step `step` (from 0) is in."""
        return self.stages[self[step * self.batch_rows].stage]

    def planned(self) -> list[dict[str, Any]]:
        """One dict a stage: its parameters, and the rows each lane has in it."""
        rows = [dict(zip(self.lanes, counts, strict=True)) for counts in self.counts.tolist()]
        return [stage.model_dump() | {"rows": lanes} for stage, lanes in zip(self.stages, rows, strict=True)]
