"""The budget of telemetry: what is dear runs less often, on all ranks alike, and stays so after a resume."""

import json
import math
import time

import pytest

from stackpkg import params
from stackpkg.telemetry.meter import COSTS, FEWEST, Meter

EVERY = {"cheap": 1, "dear": 10, "off": 0}


def settled(meter: Meter, times: int, cheap: float = 0.001, dear: float = 0.5, step: float = 1.0) -> list[dict]:
    events = [meter.settle([cheap, dear, math.nan], [step] * 8) for _ in range(times)]
    return [event for event in events if event]


def test_probes_run_at_the_first_step_and_every_nth_after() -> None:
    meter, seen = Meter(EVERY, 1.0), dict[str, list[int]]()
    for meter.step in range(1, 32):
        for name in EVERY:
            if meter.run(name, lambda: {"found": 1}):
                seen.setdefault(name, []).append(meter.step)
    assert seen == {"cheap": list(range(1, 32)), "dear": [1, 11, 21, 31]}


def test_an_evaluation_may_ask_for_a_probe_that_is_not_due_unless_it_is_off() -> None:
    meter = Meter(EVERY, 1.0)
    meter.step = 5
    assert meter.run("dear", lambda: {"found": 1}, extra=True) == {"found": 1}
    assert meter.run("off", lambda: {"found": 1}, extra=True) == {}
    assert all(math.isnan(cost) for cost in meter.spent()), "its time is the evaluation's"


def test_the_first_run_warms_up_and_parts_of_a_step_add_up() -> None:
    meter = Meter(EVERY, 1.0)
    for meter.step, seconds in ((1, 0.2), (11, 0.02), (21, 0.04)):
        for _ in range(2):  # two micro-batches
            meter.run("dear", lambda seconds=seconds: {"found": time.sleep(seconds)})
    cheap, dear, off = meter.spent()
    assert 0.06 <= dear < 0.3 and math.isnan(cheap) and math.isnan(off)
    assert all(math.isnan(cost) for cost in meter.spent()), "told once"


def test_what_fits_the_budget_is_left_alone() -> None:
    meter = Meter(EVERY, 0.06)
    assert settled(meter, 50) == [] and meter.every == EVERY
    assert meter.shares == pytest.approx({"cheap": 0.001, "dear": 0.05})


def test_the_dearest_is_thinned_until_all_together_fit() -> None:
    meter = Meter(EVERY, 0.01)
    events = settled(meter, 20)
    assert [(event["probe"], event["was"], event["every"]) for event in events] == [
        ("dear", 10, 20), ("dear", 20, 40), ("dear", 40, 80),
    ]  # fmt: skip
    assert events[0]["share"] == pytest.approx(0.05) and events[0]["share_of_all"] == pytest.approx(0.051)
    assert sum(meter.shares.values()) <= 0.01 and meter.every["cheap"] == 1
    json.dumps(events, allow_nan=False)


def test_one_cost_alone_condemns_nobody_and_one_slow_moment_does_not_either() -> None:
    meter = Meter(EVERY, 0.01)
    assert settled(meter, FEWEST - 1) == []
    meter = Meter(EVERY, 0.06)
    settled(meter, 5)
    assert settled(meter, 1, dear=50.0) == [] and meter.every == EVERY


def test_ranks_that_hear_the_same_numbers_decide_the_same_and_a_resume_goes_on() -> None:
    one, other = Meter(EVERY, 0.01), Meter(EVERY, 0.01)
    assert settled(one, 4) == settled(other, 4)
    resumed = Meter(EVERY, 0.01)
    resumed.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert settled(resumed, 6) == settled(one, 6) and resumed.every == one.every
    assert len(one.state_dict()["costs"]["dear"]) == COSTS


def test_a_probe_that_the_parameters_switch_off_stays_off_after_a_resume() -> None:
    meter = Meter(EVERY, 0.01)
    settled(meter, 9)
    off = Meter(EVERY | {"dear": 0, "new": 7}, 0.01)
    off.load_state_dict(meter.state_dict())
    assert off.every == {"cheap": 1, "dear": 0, "off": 0, "new": 7}
    off.load_state_dict({})  # of a checkpoint that knows no meter


def test_cadences_are_laid_over_the_default() -> None:
    every = params.validate({"telemetry": {"every": {"attention": 7}}}).telemetry.every
    assert every["attention"] == 7 and every.keys() == params.Params().telemetry.every.keys() and every["update"]
    with pytest.raises(ValueError, match="routing"):
        params.validate({"telemetry": {"every": {"rooting": 7}}})
