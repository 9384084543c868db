"""The schedule: exact shares, constant tokens a step, and decisions that move nothing that was read before them."""

from pathlib import Path

import numpy as np
import pytest
from data_corpus import profile
from hypothesis import given, settings
from hypothesis import strategies as st

from stackpkg.data import curriculum
from stackpkg.data.curriculum import BLOCK, Plan
from stackpkg.params import Params, Until

MIXTURE = {"code": 0.6, "docs": 0.3, "licences": 0.1}


def plan_of(p: Params, decisions: list[curriculum.Decision] | None = None) -> Plan:
    return Plan(p, [MIXTURE] * len(p.curriculum), decisions or [])


def three(steps: tuple[int, int, int] = (10, 10, 10)) -> Params:
    stages = [{"steps": n, "context": 32 * 2**k, "long_range": 0.125} for k, n in enumerate(steps)]
    return profile(curriculum=stages)


def test_a_step_has_the_same_tokens_in_every_stage() -> None:
    p = profile()
    plan = plan_of(p)
    for step in range(p.max_steps):
        rows = [plan[i] for i in plan.rows_at(step)]
        assert sum(row.context for row in rows) == p.training.batch_tokens
        assert {row.context for row in rows} == {64 if step < 9 else 128}
    assert len(plan) == 9 * 16 + 11 * 8


def test_rows_of_each_lane_are_the_planned_ones() -> None:
    plan = plan_of(profile())
    counted = np.zeros_like(plan.counts)
    for row in (plan[i] for i in range(len(plan))):
        counted[row.stage, row.lane] += 1
    assert (counted == plan.counts).all() and counted[:, -1].tolist() == [36, 9]
    assert [stage["rows"]["long_range"] for stage in plan.planned()] == [36, 9]
    assert [stage["realised_steps"] for stage in plan.planned()] == [9, 11]


def test_a_lane_is_read_without_gap_or_overlap() -> None:
    plan = plan_of(profile())
    for lane in range(len(plan.lanes)):
        rows = [row for row in (plan[i] for i in range(len(plan))) if row.lane == lane]
        assert [row.before + row.ordinal for row in rows] == list(range(len(rows)))


def test_a_stage_of_many_blocks_stays_exact_and_seekable() -> None:
    p = profile(curriculum=[{"steps": 400, "context": 64, "long_range": 0.125}, {"steps": 3, "context": 128}])
    plan = plan_of(p)
    rows = [plan[i] for i in range(len(plan))]
    count = int(plan.counts[0].sum())
    assert count > 3 * BLOCK
    share = np.bincount([row.lane for row in rows[:count]]) / count
    assert np.abs(share - [0.525, 0.2625, 0.0875, 0.125]).max() < 7 / count


def test_every_row_is_found_again_by_its_lane_and_ordinal() -> None:
    plan = plan_of(profile(curriculum=[{"steps": 80, "context": 64, "long_range": 0.2}, {"steps": 9, "context": 128}]))
    for i in range(len(plan)):
        row = plan[i]
        assert plan.row_number(row.stage, row.lane, row.ordinal) == i
        assert i in plan.rows_at(plan.position_of(i))


def test_a_later_stage_moves_no_earlier_row() -> None:
    short = profile()
    longer = short.model_copy(update={"curriculum": [*short.curriculum, short.curriculum[0]]})
    a, b = plan_of(short), plan_of(longer)
    assert all(a[i] == b[i] for i in range(len(a))) and len(b) > len(a)


def test_seed_changes_the_order_and_not_the_counts() -> None:
    a, b = plan_of(profile()), plan_of(profile(seed=18))
    assert (a.counts == b.counts).all() and any(a[i] != b[i] for i in range(len(a)))


@pytest.mark.parametrize("i", [-1, 232])
def test_a_row_outside_the_run_is_refused(i: int) -> None:
    with pytest.raises(IndexError, match=r"0\.\.231"):
        plan_of(profile())[i]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_injection_keeps_its_rate_in_every_prefix_of_a_stage(rate: float) -> None:
    plan = plan_of(three((40, 40, 40)))
    for stage in range(3):
        carried = np.cumsum([plan.carries(40 * stage + k, rate) for k in range(40)])
        assert np.abs(carried - rate * np.arange(1, 41)).max() < 1 + 1e-9
        assert carried[-1] == round(40 * rate)


# --- decisions

SKIPS = st.lists(st.tuples(st.integers(0, 25), st.integers(1, 6)), max_size=3, unique_by=lambda skip: skip[0])


@settings(max_examples=50, deadline=None)
@given(SKIPS)
def test_a_skip_passes_over_exactly_its_range(skips: list[tuple[int, int]]) -> None:
    p = three()
    plan = plan_of(p, [{"kind": "skip", "step": at, "steps": n} for at, n in skips])
    positions = [plan.position(step) for step in range(p.max_steps)]
    assert positions == sorted(set(positions)), "no step of the data is read twice"
    assert [plan.step_at(position) for position in positions] == list(range(p.max_steps))
    passed = set(range(positions[-1])) - set(positions)
    assert all(plan.step_at(position) is None for position in passed)
    assert sum(plan.steps) == p.max_steps + sum(n for _, n in skips)
    for at, _ in sorted(skips):
        assert positions[:at] == [plan_of(p, [
            {"kind": "skip", "step": s, "steps": n} for s, n in skips if s < at
        ]).position(step) for step in range(at)]  # fmt: skip


def test_a_stage_that_ends_early_moves_no_row_before_and_gives_its_steps_to_the_last() -> None:
    p = three()
    planned, ended = plan_of(p), plan_of(p, [{"kind": "stage_end", "step": 6, "stage": 0}])
    assert ended.steps == [6, 10, 14] and sum(ended.steps) == p.max_steps
    assert all(planned[i] == ended[i] for i in range(ended.rows_at(6).start))
    assert ended[ended.rows_at(6).start].stage == 1
    both = plan_of(p, [{"kind": "stage_end", "step": 6, "stage": 0}, {"kind": "stage_end", "step": 9, "stage": 1}])
    assert both.steps == [6, 3, 21]
    assert all(both[i] == ended[i] for i in range(both.rows_at(9).start))


def test_a_condition_is_judged_once_for_each_step() -> None:
    until = {"metric": "long_range_accuracy", "at_least": 0.9}
    stages = [{"steps": 10, "context": 64, "until": until}, {"steps": 10, "context": 64}]
    plan = plan_of(profile(curriculum=stages))
    assert curriculum.judge(plan, 4, {"long_range_accuracy": 0.95}, [])[0]["kind"] == "stage_end"
    (kept,) = curriculum.judge(plan, 4, {"long_range_accuracy": 0.2}, [])
    assert kept == {"kind": "stage_kept", "step": 4, "stage": 0, "metric": "long_range_accuracy", "value": 0.2}
    assert curriculum.judge(plan, 4, {"long_range_accuracy": 0.95}, [kept]) == [], "a resume repeats what was decided"
    assert curriculum.judge(plan, 10, {"long_range_accuracy": 0.95}, []) == [], "the stage is over as it is"
    assert curriculum.judge(plan, 15, {"long_range_accuracy": 0.95}, []) == [], "the last stage has no end"
    with pytest.raises(ValueError, match="'long_range_accuracy' is no number of the report; allowed: \\['loss'\\]"):
        curriculum.judge(plan, 4, {"loss": 1.0, "long_range_accuracy": {"code": 1.0}}, [])


def test_bounds_hold_at_their_edge() -> None:
    assert curriculum.holds(Until(metric="x", at_least=0.5), {"x": 0.5})
    assert curriculum.holds(Until(metric="x", at_most=0.5), {"x": 0.5})
    assert not curriculum.holds(Until(metric="x", at_most=0.5), {"x": 0.6})
    assert curriculum.holds(Until(metric="x", at_most=0.0), {"x": -1})


def test_decisions_survive_a_line_that_a_crash_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "job" / "decisions.jsonl"
    assert curriculum.decisions(file) == []
    first, second = {"kind": "skip", "step": 3, "steps": 2}, {"kind": "stage_end", "step": 5, "stage": 0}
    curriculum.record(file, [first])
    with file.open("a") as torn:
        torn.write('{"kind": "ski')
    assert curriculum.decisions(file) == [first]
    curriculum.record(file, [second])
    assert curriculum.decisions(file) == [first, second]
