"""A bad step leaves no trace: weights and Adam's moments are the same bits after it."""

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stackpkg import params
from stackpkg.data import curriculum
from stackpkg.runs import read_json
from stackpkg.telemetry.guard import Guard, score
from stackpkg.training.faults import inject, overflow
from stackpkg.training.optim import Adafactor
from stackpkg.training.recovery import MAX_CONSECUTIVE_SKIPS, RollBack, Skips, climb, finite, history


def trained(**options: bool) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    """A network that Adam has moved twice, with fresh gradients."""
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **options)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        if _ < 2:
            optimizer.step()
    return model, optimizer


def norm(model: torch.nn.Module) -> torch.Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def state(model: torch.nn.Module, optimizer: torch.optim.AdamW) -> list[torch.Tensor]:
    moments = [value for entry in optimizer.state_dict()["state"].values() for value in entry.values()]
    return copy.deepcopy([*model.state_dict().values(), *moments])


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


SPIKE = Guard.production(params.validate({})).named("TrainGradSpike")
MEASURED = {"loss": 2.5, "weight_norm": 1.0}


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_skipped_step_changes_no_bit(options: dict[str, bool], value: float) -> None:
    model, optimizer = trained(**options)
    before = state(model, optimizer)
    next(model.parameters()).grad.view(-1)[3] = value
    skips = Skips(SPIKE)
    assert skips.check(model, norm(model)) is True
    optimizer.step()
    assert same(state(model, optimizer), before)
    assert (skips.total, skips.consecutive) == (1, 1)


def test_a_finite_step_is_taken() -> None:
    model, optimizer = trained(fused=True)
    before, skips = state(model, optimizer), Skips(SPIKE)
    assert skips.check(model, norm(model)) is False
    optimizer.step()
    assert not same(state(model, optimizer), before) and skips.total == 0


def test_four_in_a_row_are_a_fault_and_a_good_step_starts_the_count_again() -> None:
    model, _ = trained()
    skips, bad, good, step = Skips(SPIKE), torch.tensor(float("nan")), torch.tensor(1.0), 0
    for _ in range(2):
        for _ in range(MAX_CONSECUTIVE_SKIPS - 1):
            step += 1
            assert skips.check(model, bad)
            skips.judge(MEASURED, step)
        step += 1
        assert not skips.check(model, good) and skips.consecutive == 0
    assert skips.total == 6
    assert all(skips.check(model, bad) for _ in range(4))
    with pytest.raises(RollBack, match="from step 9 to 12") as raised:
        skips.judge(MEASURED, step + 4)
    assert (raised.value.first, raised.value.last, raised.value.row) == (9, 12, MEASURED)


def test_weights_that_are_not_finite_are_a_fault_at_once() -> None:
    with pytest.raises(RollBack, match="from step 3 to 3") as raised:
        Skips(SPIKE).judge(MEASURED | {"weight_norm": float("inf")}, 3)
    assert raised.value.row["loss"] == 2.5, "what was measured is kept"


def told(norms: list[float], skips: Skips | None = None) -> tuple[list[bool], Skips]:
    model, _ = trained()
    skips = skips or Skips(SPIKE)
    return [skips.check(model, torch.tensor(value)) for value in norms], skips


def test_a_spike_is_dropped_and_the_window_learns_nothing_from_it() -> None:
    calm = [1.0 + 0.01 * k for k in range(12)]
    skipped, skips = told([*calm, 500.0, 1.1, 40.0, 1.0])
    assert skipped == [False] * 12 + [True, False, True, False] and skips.total == 2
    assert max(skips.window) < 2
    resumed = Skips(SPIKE)
    resumed.load_state_dict(skips.state_dict())
    assert told([500.0], resumed)[0] == [True], "a window that was saved judges at once"
    assert told([500.0])[0] == [False], "a new one has nothing to judge by"


def test_a_level_shift_costs_four_updates_and_no_more() -> None:
    skipped, skips = told([1.0] * 12 + [30.0] * 12)
    assert skipped == [False] * 12 + [True] * 4 + [False] * 8 and min(skips.window) == 30.0


def test_a_ratio_drops_fewer_sound_updates_than_a_robust_z() -> None:
    """On norms of a real job that alternate with what its batches carry; what is 100 times as large both drop."""
    recorded = read_json(Path(__file__).parent / "golden_losses/one-process.json")["grad_norm"]
    norms = [norm for norm in map(float.fromhex, recorded) if math.isfinite(norm)]
    robust = SPIKE.model_copy(update={"comparison": "robust_z_above", "threshold": 6.0})
    dropped = [sum(told(norms, Skips(rule))[0]) for rule in (SPIKE, robust)]
    assert 3 * dropped[0] < dropped[1] and dropped[0] < 5, dropped
    for rule in (SPIKE, robust):
        for at in range(10, len(norms), 9):
            hundredfold = [norm * (100 if step == at else 1) for step, norm in enumerate(norms)]
            assert told(hundredfold, Skips(rule))[0][at]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_ladder_is_climbed_rung_by_rung_at_one_place(tmp_path: Path, precision: str) -> None:
    for number in (2, 4, 6):
        (tmp_path / f"checkpoint-{number}").mkdir()
    fault, rungs = RollBack(5, 8), ["roll_back", "skip_data"] + ["fp32"] * (precision == "bf16")
    assert [climb(tmp_path, attempt, fault, precision) for attempt, _ in enumerate(rungs, 1)] == rungs
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-2", "checkpoint-4", "checkpoint-6.aside-1",
    ]  # fmt: skip
    assert curriculum.decisions(tmp_path / "decisions.jsonl") == [{"kind": "skip", "step": 4, "steps": 4}]
    assert climb(tmp_path, 4, fault, precision) == "stop"
    told = read_json(tmp_path / "diagnosis.json")
    assert told["tried"] == rungs and f"again after {', '.join(rungs)}" in told["message"]
    assert [event["rung"] for event in history(tmp_path)] == [*rungs, "stop"]
    assert climb(tmp_path, 5, fault, precision) == "roll_back", "who launches after a diagnosis begins anew"


def test_another_place_is_one_behind_a_newer_checkpoint(tmp_path: Path) -> None:
    for number in (2, 4, 6, 8, 10):
        (tmp_path / f"checkpoint-{number}").mkdir()
    assert climb(tmp_path, 1, RollBack(5, 5), "fp32") == "roll_back"
    (tmp_path / "checkpoint-6").mkdir()
    assert climb(tmp_path, 2, RollBack(8, 8), "fp32") == "roll_back", "6 is newer than 4"
    assert climb(tmp_path, 3, RollBack(7, 7), "fp32") == "skip_data", "a fault that moves is not rolled back for ever"
    assert climb(tmp_path, 4, RollBack(3, 3), "fp32") == "stop"


def test_a_rank_that_died_while_climbing_skips_no_data_twice(tmp_path: Path) -> None:
    fault = RollBack(5, 8)
    climb(tmp_path, 1, fault, "fp32")
    kept = (tmp_path / "ladder.jsonl").read_bytes()
    assert climb(tmp_path, 2, fault, "fp32") == "skip_data"
    (tmp_path / "ladder.jsonl").write_bytes(kept + b'{"rung": "ski')  # it died before it had told
    assert climb(tmp_path, 2, fault, "fp32") == "skip_data"
    assert len(curriculum.decisions(tmp_path / "decisions.jsonl")) == 1
    assert [event["rung"] for event in history(tmp_path)] == ["roll_back", "skip_data"]


def test_spikes_and_a_number_that_is_none_are_counted_apart() -> None:
    skipped, skips = told([1.0] * 12 + [500.0] * 2 + [float("nan")])
    assert skipped == [False] * 12 + [True] * 3 and (skips.consecutive, skips.broken) == (3, 1)
    skips.judge(MEASURED, 15)
    assert told([1.0], skips)[0] == [False] and (skips.consecutive, skips.broken) == (0, 0)


NAN = math.nan


@pytest.mark.parametrize(
    "mixed", [[NAN, NAN, 500.0, NAN, 500.0], [500.0, 500.0, 500.0, NAN], [NAN, 500.0, 500.0, 500.0]]
)
def test_spikes_among_numbers_that_are_none_are_no_level_and_a_fault(mixed: list[float]) -> None:
    skipped, skips = told([1.0] * 12 + mixed)
    assert all(skipped[12:]) and 500.0 not in skips.window
    with pytest.raises(RollBack, match=f"from step {9 + len(mixed)} to {12 + len(mixed)}"):
        skips.judge(MEASURED, 12 + len(mixed))


def test_a_checkpoint_of_an_earlier_version_goes_on() -> None:
    """There `broken` began again at a spike; its form is the same."""
    skips = Skips(SPIKE)
    skips.load_state_dict({"total": 3, "consecutive": 3, "broken": 1, "window": [1.0] * 12})
    assert told([500.0], skips)[0] == [True]
    with pytest.raises(RollBack, match="from step 13 to 16"):
        skips.judge(MEASURED, 16)


@given(st.lists(st.sampled_from([1.0, 1.1, 30.0, 500.0, NAN, math.inf]), max_size=60))
def test_any_sequence_of_norms_is_skipped_accepted_or_rolled_back(norms: list[float]) -> None:
    """No number that is none is ever accepted, no spike but the fifth of five in a row, and no fifth update is lost
    without a fault, though the job is resumed at every step."""
    model = torch.nn.Linear(1, 1)
    skips, run = Skips(SPIKE), list[float]()
    for step, value in enumerate([1.0] * 12 + norms, 1):
        spike = math.isfinite(value) and score(SPIKE, value, skips.window) > SPIKE.threshold
        level = len(run) == MAX_CONSECUTIVE_SKIPS and all(map(math.isfinite, run))
        if skips.check(model, torch.tensor(value)):
            run.append(value)
            assert not math.isfinite(value) or (spike and not level)
        else:
            assert math.isfinite(value) and (level or not spike)
            run.clear()
        assert skips.consecutive == len(run) and all(map(math.isfinite, skips.window))
        saved, skips = skips.state_dict(), Skips(SPIKE)
        skips.load_state_dict(saved)
        assert skips.state_dict() == saved
        if len(run) >= MAX_CONSECUTIVE_SKIPS and not all(map(math.isfinite, run)):
            with pytest.raises(RollBack) as raised:
                skips.judge(MEASURED, step)
            assert (raised.value.first, raised.value.last) == (step - 3, step)
            return
        skips.judge(MEASURED, step)
        assert len(run) <= MAX_CONSECUTIVE_SKIPS


def settle() -> None:
    """No save is under way."""


def test_faults_strike_where_they_are_told_to() -> None:
    model, optimizer = trained()
    clean = [parameter.grad.clone() for parameter in model.parameters()]
    at = {"step": 3, "rank": 1, "attempt": 2, "cursor": 7}
    fault = {"kind": "nan_gradient", "step": [3, 4], "rank": 1, "attempt": 2, "cursor": 7}
    for key, other in {"step": 5, "rank": 0, "attempt": 1, "cursor": 6}.items():
        inject(fault, model, optimizer, settle, **at | {key: other})
    assert same([parameter.grad for parameter in model.parameters()], clean)
    inject(fault, model, optimizer, settle, **at)
    assert sum(int(parameter.grad.isnan().sum()) for parameter in model.parameters()) == 1
    with pytest.raises(ValueError, match="unknown fault 'bit_flip'; known: kill, terminate, kill_saving, hang"):
        inject({"kind": "bit_flip", "step": 1}, model, optimizer, settle, **at)


def test_an_overflow_is_one_in_the_arithmetic_of_bf16_alone() -> None:
    assert overflow(torch.zeros(2)) == 0 and overflow(torch.zeros(2, dtype=torch.bfloat16)).isnan()
    with torch.autocast("cpu", torch.bfloat16):
        assert overflow(torch.zeros(2)).isnan()


@pytest.mark.parametrize(
    ("kind", "damaged"),
    [(f"{value}_{part}", damaged)
     for value in ("nan", "inf") for part, damaged in (("parameter", "weights"), ("moment", "exp_avg"))]
    + [("inf_second_moment", "exp_avg_sq")],
)  # fmt: skip
def test_damage_to_the_state_is_one_number(kind: str, damaged: str) -> None:
    model, optimizer = trained()
    inject({"kind": kind}, model, optimizer, settle, step=1)
    test = {"nan": torch.isnan, "inf": torch.isinf}[kind[:3]]
    moments = {name: [state[name] for state in optimizer.state.values()] for name in ("exp_avg", "exp_avg_sq")}
    held = {"weights": [*model.parameters()], **moments}
    bad = {name: sum(int(test(each).sum()) for each in tensors) for name, tensors in held.items()}
    assert bad == dict.fromkeys(held, 0) | {damaged: 1}


def verdict(optimizer: torch.optim.Optimizer) -> bool:
    return finite(value for state in optimizer.state.values() for value in state.values())


def test_an_infinite_second_moment_is_seen_in_no_weight_and_in_the_state() -> None:
    model, optimizer = trained(fused=True)
    assert verdict(optimizer)
    inject({"kind": "inf_second_moment"}, model, optimizer, settle, step=1)
    first = next(model.parameters())
    before = first.view(-1)[0].item()
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert first.view(-1)[0].item() == pytest.approx(before * (1 - 1e-2 * 0.1)), "it decays, and learns nothing"
    assert not verdict(optimizer)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_state_of_an_optimiser_hides_a_number_that_is_none(bad: float) -> None:
    model, adam = trained()
    factored = Adafactor(model.parameters(), lr=1e-2, scale_parameter=False, relative_step=False)
    factored.step()
    for optimizer in (adam, factored):
        held = [value for state in optimizer.state.values() for value in state.values()]
        tensors = [value for value in held if isinstance(value, torch.Tensor)]
        assert len({name for state in optimizer.state.values() for name in state}) >= 3 and verdict(optimizer)
        for tensor in tensors:
            kept = tensor.flatten()[-1].clone()
            tensor.view(-1)[-1] = bad
            assert not verdict(optimizer)
            tensor.view(-1)[-1] = kept
        assert verdict(optimizer)
    huge = torch.full((3,), torch.finfo(torch.float32).max)
    assert finite([huge, torch.empty(0), 7, -huge]), "large is not infinite"
    assert finite([]), "before the first update"
