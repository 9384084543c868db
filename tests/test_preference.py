"""Preference losses: equal to TRL's on the same logits, their limits, and what does not count."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stackpkg import runs
from stackpkg.objectives import preference
from stackpkg.objectives.preference import Answers, Preferences

sys.path.insert(0, str(runs.root() / "benchmarks"))
import preference_golden as golden

KINDS = ("dpo", "simpo", "orpo")


def by_pair(kind: str) -> torch.Tensor:
    """Our loss of each pair of the example, from logits."""
    data, n = golden.example(), golden.N
    sides = []
    for name in ("policy", "reference"):
        both = preference.answers(data[name], data["ids"], data["start"], 0)
        sides += [Answers(both.log_probs[part], both.tokens[part]) for part in (slice(n), slice(n, 2 * n))]
    reference = (sides[2].log_probs, sides[3].log_probs)
    values = []
    for pair in range(n):
        key = torch.where(torch.arange(n) == pair, 1, -1)
        pairs = Preferences(sides[0], sides[1], key, reference)
        values.append(preference.preference(pairs, kind, golden.BETA[kind], golden.GAMMA))
    return torch.stack(values)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_that_trl_gave(kind: str) -> None:
    written = json.loads((Path(__file__).parent / "golden_preference.json").read_text())
    assert written["trl"] and len(set(written["values"][kind])) == golden.N
    torch.testing.assert_close(by_pair(kind), torch.tensor(written["values"][kind]), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_that_trl_gives(kind: str) -> None:
    pytest.importorskip("trl")
    torch.testing.assert_close(by_pair(kind), torch.tensor(golden.by_trl(golden.example())[kind]), rtol=2e-6, atol=1e-7)


def test_an_answer_begins_where_it_says_and_ends_at_padding() -> None:
    logits = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[3, 4, 5, 6, 7, 8], [3, 4, 5, 6, 0, 0]])
    found = preference.answers(logits, ids, torch.tensor([4, 2]), 0)
    p = logits.log_softmax(-1)
    torch.testing.assert_close(found.log_probs, torch.stack([p[0, 3, 7] + p[0, 4, 8], p[1, 1, 5] + p[1, 2, 6]]))
    assert found.tokens.tolist() == [2, 2]
    changed = logits.clone()
    changed[:, 5] = changed[1, 3:] = 100.0  # beyond the end
    torch.testing.assert_close(preference.answers(changed, ids, torch.tensor([4, 2]), 0).log_probs, found.log_probs)
    empty = preference.answers(logits, ids, torch.tensor([6, 6]), 0)
    assert empty.mean().tolist() == [0.0, 0.0]


def pairs(w: torch.Tensor, l: torch.Tensor, key: torch.Tensor) -> Preferences:  # noqa: E741  the papers' letters
    count = torch.full_like(w, 3)
    return Preferences(Answers(w, count), Answers(l, count), key, (torch.full_like(w, -2), torch.full_like(l, -3)))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(st.integers(0, 999), st.floats(0.05, 5), st.permutations(range(4)))
def test_losses_are_not_negative_blind_to_order_and_fall_as_the_chosen_gains(
    kind: str, seed: int, beta: float, order: list[int]
) -> None:
    g = torch.Generator().manual_seed(seed)
    w, other = (-0.01 - 9 * torch.rand(4, generator=g, dtype=torch.float64) for _ in range(2))
    key = torch.tensor([0, -1, 2, 3])
    value = preference.preference(pairs(w, other, key), kind, beta, 0.5)
    assert value >= 0
    shuffled = pairs(w[order], other[order], key[order])
    torch.testing.assert_close(preference.preference(shuffled, kind, beta, 0.5), value)
    assert preference.preference(pairs(w / 2, other, key), kind, beta, 0.5) < value
    assert preference.preference(pairs(w, 2 * other, key), kind, beta, 0.5) <= value
    nothing = preference.preference(pairs(w, other, torch.full((4,), -1)), kind, beta, 0.5)
    assert nothing == 0, "a pair of negative key counts for nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    g = torch.Generator().manual_seed(3)
    given = [(-0.1 - 4 * torch.rand(4, generator=g, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    key = torch.tensor([0, -1, 2, 3])
    assert torch.autograd.gradcheck(lambda *t: preference.preference(pairs(*t, key), kind, 0.7, 0.5), given)
    slopes = torch.autograd.grad(preference.preference(pairs(*given, key), kind, 0.7, 0.5), given)
    assert all(slope[1] == 0 for slope in slopes) and (slopes[0][[0, 2, 3]] < 0).all()


def test_limits() -> None:
    same, zero = torch.full((1,), -2.0), torch.zeros(1)
    assert float(preference.dpo(same, same - 1, (same, same - 1), 0.3)) == pytest.approx(math.log(2))
    assert float(preference.simpo(same, same, 2.0, 0.0)) == pytest.approx(math.log(2))
    assert float(preference.orpo(same, same, 0.1)) == pytest.approx(2 + 0.1 * math.log(2))
    assert float(preference.dpo(zero, -1e4 * (zero + 1), (same, same), 0.1)) == pytest.approx(0.0)
    certain = zero.clone().requires_grad_()
    value = preference.orpo(certain, same, 0.1)
    assert value.isfinite() and torch.autograd.grad(value, certain)[0].isfinite()


def test_dpo_without_a_reference_is_refused() -> None:
    given = pairs(-torch.ones(1), -torch.ones(1), torch.zeros(1, dtype=torch.long))._replace(reference=None)
    with pytest.raises(ValueError, match="simpo or orpo"):
        preference.preference(given, "dpo", 0.1, 0.0)
