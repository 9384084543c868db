"""A bad step leaves no trace: weights and Adam's moments are the same bits after it."""

import copy

import pytest
import torch

from stackpkg.training.recovery import MAX_CONSECUTIVE_SKIPS, SkipNonFinite, inject


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


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_skipped_step_changes_no_bit(options: dict[str, bool], value: float) -> None:
    model, optimizer = trained(**options)
    before = state(model, optimizer)
    next(model.parameters()).grad.view(-1)[3] = value
    skips = SkipNonFinite()
    assert skips.check(model, norm(model)) is True
    optimizer.step()
    assert same(state(model, optimizer), before)
    assert (skips.total, skips.consecutive) == (1, 1)


def test_a_finite_step_is_taken() -> None:
    model, optimizer = trained(fused=True)
    before, skips = state(model, optimizer), SkipNonFinite()
    assert skips.check(model, norm(model)) is False
    optimizer.step()
    assert not same(state(model, optimizer), before) and skips.total == 0


def test_four_in_a_row_are_a_fault_and_a_good_step_starts_the_count_again() -> None:
    model, _ = trained()
    skips, bad, good = SkipNonFinite(), torch.tensor(float("nan")), torch.tensor(1.0)
    for _ in range(2):
        assert all(skips.check(model, bad) for _ in range(MAX_CONSECUTIVE_SKIPS - 1))
        assert not skips.check(model, good) and skips.consecutive == 0
    assert skips.total == 6
    for _ in range(3):
        skips.check(model, bad)
    with pytest.raises(FloatingPointError, match="4 steps in a row"):
        skips.check(model, bad)


def test_faults_strike_where_they_are_told_to() -> None:
    model, _ = trained()
    clean = [parameter.grad.clone() for parameter in model.parameters()]
    fault = {"kind": "nan_gradient", "step": 3, "rank": 1, "attempt": 2}
    for step, rank, attempt in [(2, 1, 2), (3, 0, 2), (3, 1, 1)]:
        inject(fault, step=step, rank=rank, attempt=attempt, model=model)
    assert same([parameter.grad for parameter in model.parameters()], clean)
    inject(fault, step=3, rank=1, attempt=2, model=model)
    assert sum(int(parameter.grad.isnan().sum()) for parameter in model.parameters()) == 1
    with pytest.raises(ValueError, match="unknown fault 'bit_flip'; known: nan_gradient, kill"):
        inject({"kind": "bit_flip", "step": 1, "rank": 0}, step=1, rank=0, attempt=1, model=model)
