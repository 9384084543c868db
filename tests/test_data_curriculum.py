import numpy as np
import pytest
from data_corpus import profile

from stackpkg.data.curriculum import BLOCK, Plan

MIXTURE = {"code": 0.6, "docs": 0.3, "licences": 0.1}


def test_each_step_has_the_context_of_its_stage():
    p = profile()
    plan = Plan(p, MIXTURE)
    assert len(plan) == p.max_steps * p.training.batch_rows
    contexts = [plan[i].context for i in range(len(plan))]
    assert contexts == [64] * 9 * 8 + [128] * 11 * 8
    assert plan.at(8).context == 64 and plan.at(9).context == 128


def test_rows_of_each_lane_are_the_planned_ones():
    plan = Plan(profile(), MIXTURE)
    rows = [plan[i] for i in range(len(plan))]
    counted = np.zeros_like(plan.counts)
    for row in rows:
        counted[row.stage, row.lane] += 1
    assert (counted == plan.counts).all() and counted[:, -1].tolist() == [18, 9]
    assert [stage["rows"]["long_range"] for stage in plan.planned()] == [18, 9]


def test_a_lane_is_read_without_gap_or_overlap():
    plan = Plan(profile(), MIXTURE)
    for lane in range(len(plan.lanes)):
        rows = [row for row in (plan[i] for i in range(len(plan))) if row.lane == lane]
        assert [row.ordinal for row in rows] == list(range(len(rows)))
        assert [row.start for row in rows] == np.cumsum([0, *(row.context for row in rows)])[:-1].tolist()


def test_a_stage_of_many_blocks_stays_exact_and_seekable():
    p = profile(curriculum=[{"steps": 400, "context": 32, "long_range": 0.125}, {"steps": 3, "context": 64}])
    plan = Plan(p, MIXTURE)
    rows = [plan[i] for i in range(len(plan))]
    assert plan.counts[0].sum() == 3200 > 3 * BLOCK
    share = np.bincount([row.lane for row in rows[:3200]]) / 3200
    assert np.abs(share - [0.525, 0.2625, 0.0875, 0.125]).max() < 4 / 3200
    for lane in range(4):
        ordinals = [row.ordinal for row in rows if row.lane == lane]
        assert ordinals == list(range(len(ordinals)))


def test_a_later_stage_moves_no_earlier_row():
    short = profile()
    longer = short.model_copy(update={"curriculum": [*short.curriculum, short.curriculum[0]]})
    a, b = Plan(short, MIXTURE), Plan(longer, MIXTURE)
    assert all(a[i] == b[i] for i in range(len(a))) and len(b) > len(a)


def test_seed_changes_the_order_and_not_the_counts():
    a, b = Plan(profile(), MIXTURE), Plan(profile(seed=18), MIXTURE)
    assert (a.counts == b.counts).all() and any(a[i] != b[i] for i in range(len(a)))


@pytest.mark.parametrize("i", [-1, 160])
def test_a_row_outside_the_run_is_refused(i):
    with pytest.raises(IndexError, match=r"0\.\.159"):
        Plan(profile(), MIXTURE)[i]
