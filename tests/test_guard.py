import json
import math
from pathlib import Path

import pytest
import yaml

from stackpkg import params
from stackpkg.telemetry import guard
from stackpkg.telemetry.guard import Guard, load

P = params.validate({})
CALM = {
    "nonfinite": 0,
    "update_skipped": 0,
    "grad_norm": 1.0,
    "router_entropy": 0.6,
    "attention_entropy_median": 0.5,
    "data_wait_seconds": 0.01,
}


def rows(count: int, **changes: float) -> list[dict[str, float]]:
    """Rows of a run that goes well: a falling, slightly noisy loss."""
    return [CALM | {"loss": 8 - step / 40 + 0.05 * math.sin(step)} | changes for step in range(count)]


def fired(watch: Guard, many: list[dict[str, float]]) -> list[tuple[int, str]]:
    return [(index, alert["alert"]) for index, row in enumerate(many) for alert in watch.observe(row)]


def test_a_run_that_goes_well_raises_nothing() -> None:
    assert fired(Guard.production(P), rows(200)) == []
    assert fired(Guard(load(P), drill=True), rows(200)) == []


@pytest.mark.parametrize(
    ("alert", "change", "row"),
    [
        ("TrainNonFinite", {"nonfinite": 1, "loss": math.nan}, 0),
        ("TrainSkippedUpdates", {"update_skipped": 1}, 1),
        ("TrainLossSpike", {"loss": 11.0}, 0),
        ("TrainGradSpike", {"grad_norm": 10.5}, 0),
        ("TrainRouterEntropyLow", {"router_entropy": 0.19}, 999),
        ("TrainRouterEntropyHigh", {"router_entropy": 0.91}, 999),
        ("TrainAttentionEntropyCollapse", {"attention_entropy_median": 0.09}, 9),
        ("TrainLowPrecisionAtK", {"precision_at_k": 0.74}, 2),
        ("TrainDataWait", {"data_wait_seconds": 2.5}, 49),
    ],
)
def test_each_alert_fires_once_when_its_hold_is_reached(alert: str, change: dict[str, float], row: int) -> None:
    watch = Guard.production(P)
    assert fired(watch, rows(60)) == []
    assert fired(watch, rows(1_200, **change)) == [(row, alert)]


@pytest.mark.parametrize(
    "change",
    [
        {"grad_norm": 9.5},
        {"router_entropy": 0.2},
        {"router_entropy": 0.9},
        {"attention_entropy_median": 0.1},
        {"precision_at_k": 0.75},
        {"data_wait_seconds": 2.0},
    ],
)
def test_at_the_threshold_nothing_fires(change: dict[str, float]) -> None:
    watch = Guard.production(P)
    assert fired(watch, rows(60)) + fired(watch, rows(1_200, **change)) == []


def test_a_gap_starts_the_hold_again_and_a_cleared_alert_can_fire_again() -> None:
    watch = Guard.production(P)
    low, calm = rows(999, router_entropy=0.1, loss=4.0), rows(1, loss=4.0)
    assert fired(watch, low + calm + low) == []
    assert fired(watch, rows(1, router_entropy=0.1, loss=4.0)) == [(0, "TrainRouterEntropyLow")]
    assert fired(watch, rows(5, router_entropy=0.1, loss=4.0)) == []
    assert fired(watch, calm + low + rows(1, router_entropy=0.1, loss=4.0)) == [(1_000, "TrainRouterEntropyLow")]


def test_rows_without_a_measurement_neither_count_nor_clear() -> None:
    watch = Guard.production(P)
    epoch = [*rows(9), *rows(1, precision_at_k=0.1)]
    assert fired(watch, epoch * 2) == []
    assert fired(watch, epoch) == [(9, "TrainLowPrecisionAtK")]
    assert fired(Guard.production(P), rows(5, precision_at_k=None) + rows(2, router_entropy=math.nan)) == []


def test_the_loss_window_never_learns_from_what_it_rejected() -> None:
    watch = Guard.production(P)
    fired(watch, rows(60))
    before = watch.state_dict()["TrainLossSpike"]
    fired(watch, rows(40, loss=50.0) + rows(5, loss=math.inf) + rows(5, loss=math.nan))
    fired(watch, rows(5, loss=6.6, update_skipped=1))
    assert watch.state_dict()["TrainLossSpike"][1:] == before[1:]


def test_the_robust_z_is_the_textbook_one() -> None:
    alert = next(alert for alert in load(P) if alert.name == "TrainLossSpike")
    window = guard.deque([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    assert guard.score(alert, 11.0, window) == pytest.approx(6 / (1.4826 * 2))
    assert guard.score(alert, 11.0, guard.deque([1.0] * 7)) == 0  # too few to judge by
    assert guard.score(alert, 2.06, guard.deque([2.0] * 9)) == pytest.approx(3.0)  # a flat window is 1% wide


def test_a_steep_fall_of_the_loss_is_not_a_spike() -> None:
    watch = Guard.production(P)
    assert fired(watch, rows(60)) + fired(watch, rows(60, loss=0.5)) == []


def test_state_goes_through_json_and_a_resumed_guard_goes_on_where_it_stopped() -> None:
    whole, first = Guard.production(P), Guard.production(P)
    many = rows(60) + rows(999, router_entropy=0.1)
    fired(whole, many)
    fired(first, many[:500])
    second = Guard.production(P)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    fired(second, many[500:])
    assert second.state_dict() == whole.state_dict()
    end = rows(1, router_entropy=0.1, loss=50.0)
    assert fired(second, end) == fired(whole, end) == [(0, "TrainLossSpike"), (0, "TrainRouterEntropyLow")]


def test_an_alert_tells_what_to_do() -> None:
    watch = Guard.production(P)
    (alert,) = watch.observe(CALM | {"loss": math.nan, "nonfinite": 1})
    assert alert["runbook"] == "runbooks/TrainNonFinite.md" and alert["severity"] == "critical" and alert["value"] == 1
    json.dumps(alert, allow_nan=False)


def test_a_threshold_can_be_a_parameter() -> None:
    p = params.validate({"evaluation": {"min_precision_at_k": 0.05}})
    watch = Guard.production(p)
    assert fired(watch, rows(10, precision_at_k=0.06)) == []
    assert fired(watch, rows(10, precision_at_k=0.04)) == [(2, "TrainLowPrecisionAtK")]


def judged(*violations: float) -> list[int]:
    """Evaluations, from 0, at which a violation of a protected scope fires; four rows an evaluation."""
    watch = Guard.production(P)
    many = [row for value in violations for row in (*rows(3), *rows(1, violations=value))]
    found = fired(watch, many)
    assert {name for _, name in found} <= {"TrainSafetyViolation"}
    return [index // 4 for index, _ in found]


def test_a_run_that_violates_at_every_evaluation_stops_when_its_grace_is_over() -> None:
    grace = next(alert.grace for alert in load(P) if alert.name == "TrainSafetyViolation")
    assert grace is not None
    assert judged(*[0.1] * grace) == [] and judged(*[0.1] * 3 * grace) == [grace]
    assert judged(*[0.1] * (grace - 1), 0.0, *[0.1] * 5) == [grace], "met once, the next violation is one too many"
    assert judged(0.144, 0.02, 0.0, 0.0, 0.0) == judged(*[0.1] * 4) == [], "the dry run, and a short trial"


def test_a_count_of_evaluations_goes_on_after_a_resume() -> None:
    first, second = Guard.production(P), Guard.production(P)
    assert fired(first, rows(8, violations=0.1)) == []
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert fired(second, rows(8, violations=0.1)) == [(2, "TrainSafetyViolation")]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("comparison", "exceeds", "above"),
        ("threshold", "evaluation.min_precison", "names no parameter"),
        ("hold", 0, "greater than or equal to 1"),
        ("severity", "fatal", "critical"),
        ("seriess", "loss", "seriess"),
        ("name", "lossSpike", "name"),
        ("comparison", "returns_above", "needs `grace`"),
        ("grace", 3, "no other comparison has it"),
    ],
)
def test_a_bad_definition_is_refused_with_its_field(tmp_path: Path, field: str, value: object, message: str) -> None:
    definitions = yaml.safe_load((Path(__file__).parents[1] / "params/alerts.yaml").read_text())
    definitions[2][field] = value
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(definitions))
    with pytest.raises(ValueError, match=message):
        load(P, tmp_path / "alerts.yaml")
