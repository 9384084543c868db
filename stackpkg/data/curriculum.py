"""The curriculum: which context, domains and tasks each optimiser step sees, and what was decided under way.

A decision is a dict with a kind and the first optimiser step (from 0) that it holds for: `stage_end` of a `stage`,
`stage_kept`, which changes nothing, `skip` of a number of `steps` of data, `withdraw` of a `record_id`.
"""

import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stackpkg.data import mixing
from stackpkg.params import Params, Until

BLOCK = 1024  # rows after which the order of a long stage repeats; shares are exact to 1 / BLOCK
Decision = dict[str, Any]


class Row(NamedTuple):
    """Where a row comes from: the last lane is long-range tasks, the others are domains."""

    stage: int
    context: int  # tokens
    lane: int
    ordinal: int  # rows of this lane before this one, in this stage
    before: int  # rows of this lane in earlier stages


class Plan:
    """Pure schedule of every row: `plan[i]` is two look-ups, whatever `i`. A later stage never moves an earlier row.

    `mixtures` holds for each stage the share of each domain among text rows; long-range tasks take their share first.
    A stage has `rows` rows a step; `counts` [stages, lanes] are the rows of each lane.
    """

    def __init__(self, p: Params, mixtures: Sequence[Mapping[str, float]], decisions: Iterable[Decision] = ()) -> None:
        self.stages, self.lanes = p.curriculum, [*mixtures[0], "long_range"]
        self.skips = sorted((d["step"], d["steps"]) for d in decisions if d["kind"] == "skip")
        self.steps = self._realised([d for d in decisions if d["kind"] == "stage_end"])
        self.rows, self.contexts = np.array([p.rows(s) for s in self.stages]), [s.context for s in self.stages]
        self.first_step = np.cumsum([0, *self.steps])
        self.first = np.cumsum([0, *(np.array(self.steps) * self.rows)])
        self.order, self.counts = [], np.zeros((len(self.stages), len(self.lanes)), np.int64)
        for index, (stage, shares) in enumerate(zip(self.stages, mixtures, strict=True)):
            parts = [share * (1 - stage.long_range) for share in shares.values()] + [stage.long_range]
            planned = stage.steps * int(self.rows[index])
            self.order.append(mixing.interleave(parts, min(BLOCK, planned), p.seed, "rows", index))
            lanes, size = self.order[-1][0], len(parts)
            blocks, rest = divmod(int(self.first[index + 1] - self.first[index]), len(lanes))
            self.counts[index] = blocks * np.bincount(lanes, minlength=size) + np.bincount(lanes[:rest], minlength=size)
        # the same as plain lists, which one look-up at a time is faster in
        sizes = [np.bincount(lanes, minlength=len(self.lanes)).tolist() for lanes, _ in self.order]
        both = zip(self.order, sizes, strict=True)
        self._order = [(lanes.tolist(), ordinals.tolist(), size) for (lanes, ordinals), size in both]
        self._first, self._before = self.first.tolist(), (np.cumsum(self.counts, 0) - self.counts).tolist()

    def _realised(self, ends: Sequence[Decision]) -> list[int]:
        """Steps of data in each stage: the last takes what an early end saved, and makes up for what was skipped."""
        steps = [stage.steps for stage in self.stages]
        for end in sorted(ends, key=lambda d: int(d["stage"])):
            passed = sum(n for at, n in self.skips if at < end["step"])  # what is skipped at the end itself comes after
            steps[end["stage"]] = end["step"] + passed - sum(steps[: end["stage"]])
        steps[-1] += sum(stage.steps for stage in self.stages) + sum(n for _, n in self.skips) - sum(steps)
        return steps

    def position(self, step: int) -> int:
        """Steps of data before optimiser step `step`: more than `step` once a range of data was skipped."""
        return step + sum(n for at, n in self.skips if at <= step)

    def step_at(self, position: int) -> int | None:
        """Inverse of `position`; None for data that was skipped."""
        for at, n in self.skips:
            if at <= position < at + n:
                return None
            position -= n if position >= at else 0
        return position

    def rows_at(self, position: int) -> range:
        """Row numbers of step `position` of the data."""
        stage = self.stage_at(position)
        start = int(self.first[stage] + (position - self.first_step[stage]) * self.rows[stage])
        return range(start, start + int(self.rows[stage]))

    def position_of(self, i: int) -> int:
        """Step of the data that row i is in."""
        stage = bisect_right(self._first, i) - 1
        return int(self.first_step[stage] + (i - self.first[stage]) // self.rows[stage])

    def stage_at(self, position: int) -> int:
        """Number of the stage that step `position` of the data is in."""
        return min(int(np.searchsorted(self.first_step, position, side="right")), len(self.stages)) - 1

    def carries(self, position: int, rate: float) -> bool:
        """Whether this step carries what is injected at `rate` (share of steps), evenly spread over its stage."""
        inside = position - int(self.first_step[self.stage_at(position)])
        return int((inside + 1) * rate + 1e-9) > int(inside * rate + 1e-9)

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, i: int) -> Row:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} is outside 0..{len(self) - 1}, the rows of the curriculum")
        stage = bisect_right(self._first, i) - 1
        lanes, ordinals, sizes = self._order[stage]
        block, place = divmod(i - self._first[stage], len(lanes))
        lane = lanes[place]
        return Row(stage, self.contexts[stage], lane, ordinals[place] + block * sizes[lane], self._before[stage][lane])

    def row_number(self, stage: int, lane: int, ordinal: int) -> int:
        """Inverse of `plan[i]`: the number of row `ordinal` of a lane in a stage."""
        places = np.flatnonzero(self.order[stage][0] == lane)
        block, inside = divmod(ordinal, len(places))
        return int(self.first[stage]) + block * len(self.order[stage][0]) + int(places[inside])

    def planned(self) -> list[dict[str, Any]]:
        """One dict a stage: its parameters, the steps it really has, and the rows each lane has in it."""
        rows = [dict(zip(self.lanes, counts, strict=True)) for counts in self.counts.tolist()]
        parts = zip(self.stages, self.steps, rows, strict=True)
        return [stage.model_dump() | {"realised_steps": steps, "rows": lanes} for stage, steps, lanes in parts]


def holds(until: Until, report: Mapping[str, Any]) -> bool:
    """Whether an epoch report meets the condition. Raises `ValueError` for a metric that it does not have."""
    numbers = [name for name, value in report.items() if isinstance(value, int | float)]
    if until.metric not in numbers:
        raise ValueError(f"curriculum until.metric {until.metric!r} is no number of the report; allowed: {numbers}")
    value = float(report[until.metric])
    return value >= until.at_least if until.at_least is not None else value <= float(until.at_most or 0)


def judge(plan: Plan, step: int, report: Mapping[str, Any], decided: Iterable[Decision]) -> list[Decision]:
    """The decision, if one is due, whether optimiser step `step`, the next to be read, still is in its stage.

    Looked at once for each step: a resume that comes by again finds it in `decided`. The last stage has no end.
    """
    number = plan.stage_at(plan.position(step - 1))
    until, last = plan.stages[number].until, len(plan.stages) - 1
    if until is None or number == last or plan.stage_at(plan.position(step)) != number:
        return []
    if any(d["step"] == step for d in decided if d["kind"].startswith("stage_")):
        return []
    kind, value = "stage_end" if holds(until, report) else "stage_kept", float(report[until.metric])
    return [{"kind": kind, "step": step, "stage": number, "metric": until.metric, "value": value}]


def record(path: Path, decisions: Iterable[Decision]) -> None:
    """Append decisions to a file, on disk before they are acted on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # what a crash cut short was never acted on
        file.write("".join(json.dumps(decision) + "\n" for decision in decisions).encode())
        file.flush()
        os.fsync(file.fileno())


def decisions(path: Path) -> list[Decision]:
    """The recorded decisions, in the order they were taken; a last line that a crash cut short is none."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]
