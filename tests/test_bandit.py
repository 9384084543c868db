"""Router regret: what the estimates estimate, where the penalty points, and that a gate trained on it learns."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stackpkg.objectives import bandit
from stackpkg.objectives.bandit import Bandit


def lots(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- penalty


@settings(max_examples=40)
@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.permutations(range(4)), st.integers(0, 99))
def test_regret_is_between_0_and_1_a_position_and_blind_to_names(
    paid: list[float], order: list[int], seed: int
) -> None:
    gate, estimates = torch.randn(6, 4, generator=lots(seed)).double().softmax(-1), torch.tensor(paid).double()
    value = bandit.regret(gate, estimates)
    assert -1e-9 <= value <= 6
    torch.testing.assert_close(bandit.regret(gate[:, order], estimates[order]), value)


def test_regret_is_zero_on_the_best_arm_and_when_all_pay_the_same() -> None:
    estimates = torch.tensor([0.2, 0.9, 0.4, 0.1])
    assert bandit.regret(torch.eye(4)[1].expand(5, 4), estimates) == 0
    assert float(bandit.regret(torch.eye(4)[3].expand(5, 4), estimates)) == pytest.approx(5 * 0.8)
    assert bandit.regret(torch.full((5, 4), 0.25), torch.full((4,), 0.25)) == 0


def test_regret_moves_mass_to_the_best_arm_and_leaves_the_estimates_alone() -> None:
    logits = torch.randn(7, 4, generator=lots(1), dtype=torch.float64, requires_grad=True)
    estimates = torch.tensor([0.2, 0.9, 0.4, 0.1], dtype=torch.float64, requires_grad=True)
    bandit.regret(logits.softmax(-1), estimates).backward()
    assert estimates.grad is None
    assert (logits.grad[:, 1] < 0).all() and (logits.grad[:, 3] > 0).all()
    moved = (logits - 0.5 * logits.grad).detach().softmax(-1)
    assert (moved[:, 1] > logits.softmax(-1)[:, 1]).all()
    assert torch.autograd.gradcheck(lambda z: bandit.regret(z.softmax(-1), estimates.detach()), (logits,))


# ---- reward


@settings(max_examples=40)
@given(st.floats(0, 50), st.floats(0, 50), st.floats(0.01, 5))
def test_reward_is_half_at_the_baseline_and_falls_with_the_loss(loss: float, baseline: float, spread: float) -> None:
    terms = [torch.tensor(x, dtype=torch.float64) for x in (loss, baseline, spread)]
    value = float(bandit.reward(*terms))
    assert 0 <= value <= 1 and (value >= 0.5) == (loss <= baseline or value == 0.5)
    assert float(bandit.reward(terms[1], terms[1], terms[2])) == 0.5
    assert float(bandit.reward(terms[1] - 2 * terms[2], terms[1], terms[2])) == pytest.approx(1.0)


def test_reward_is_against_what_the_label_usually_costs() -> None:
    """Expert 0 gets the rare, dear label, expert 1 the cheap one; each as good at it as usual: neither is better."""
    arms, labels = Bandit(), torch.tensor([1, 2]).repeat(50)
    gates, chosen = [torch.full((100, 2), 0.5)], [torch.tensor([[0], [1]]).repeat(50, 1)]
    for step in range(6):
        noise = 0.01 * torch.randn(100, generator=lots(step))
        arms.observe(torch.tensor([8.0, 1.0]).repeat(50) + noise, labels, gates, chosen)
        assert (arms.estimates is None) == (step < 2), "the first step knows no usual loss"
        arms.after_step()
    assert (arms.estimates - 0.5).abs().max() < 0.02
    labels[0] = -100
    arms.observe(torch.full((100,), 1e6) * (labels < 0), labels.where(labels < 0, 2), gates, chosen)
    arms.after_step()
    assert arms.sums["losses"].sum() < 1e6, "a position without a label says nothing"


# ---- estimator


def drawn(gate: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.multinomial(gate, n, replacement=True, generator=generator)[:, None]


def test_importance_weighted_reward_is_unbiased_when_arms_are_drawn() -> None:
    gate, truth, n = torch.tensor([0.55, 0.3, 0.1, 0.05]).double(), torch.tensor([0.3, 0.8, 0.5, 0.9]).double(), 200_000
    chosen = drawn(gate, n, lots(5))
    rewards = torch.bernoulli(truth[chosen[:, 0]], generator=lots(6))
    found = bandit.importance(gate.expand(n, 4), chosen) * rewards[:, None]
    assert ((found > 0).sum(1) <= 1).all() and found.max() <= 4 / bandit.FLOOR
    half_width = 4 * found.std(0) / math.sqrt(n)  # 4 sigma: 6e-5 a side and arm
    assert ((found.mean(0) - truth).abs() < half_width).all() and half_width.max() < 0.05
    naive = torch.zeros(n, 4).double().scatter_(1, chosen, rewards[:, None]).mean(0)
    assert ((naive - truth).abs() > 10 * half_width).any(), "without the weights it is not"


def test_estimates_are_unbiased_when_drawn_and_do_not_measure_usage_when_the_largest_are_taken() -> None:
    truth, n = torch.tensor([0.3, 0.8, 0.5, 0.9]).double(), 100_000
    gate = (torch.randn(n, 4, generator=lots(7)) + torch.tensor([2.0, 0.5, 0.0, -0.5])).double().softmax(-1)
    for chosen in (torch.multinomial(gate, 1, generator=lots(8)), gate.argmax(-1, keepdim=True)):
        arms = Bandit()
        arms.credit(torch.bernoulli(truth[chosen[:, 0]], generator=lots(9)), [gate], [chosen])
        arms.after_step()
        weights = bandit.importance(gate, chosen)
        error = (weights.square().sum(0).sqrt() / weights.sum(0) / 2).clamp_min(1e-9)  # of a weighted mean of coins
        assert ((arms.estimates[0] - truth).abs() < 4 * error).all() and error.max() < 0.02
    plain = arms.sums["paid"][0] / n  # the largest were taken: the plain sum sees who is used, not who is good
    assert plain.argmax() == 0 and arms.estimates[0].argmax() == 3


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(0, 99))
def test_estimates_are_bounded_and_follow_names_and_not_k(k: int, seed: int) -> None:
    gate = torch.randn(30, 4, generator=lots(seed)).double().softmax(-1)
    rewards, order = torch.rand(30, generator=lots(seed + 1)).double(), torch.randperm(4, generator=lots(seed))
    one, other = Bandit(), Bandit()
    chosen = gate.topk(k, -1).indices
    one.credit(rewards, [gate], [chosen])
    other.credit(rewards, [gate[:, order]], [torch.argsort(order)[chosen]])
    for arms in (one, other):
        arms.after_step()
    assert ((one.estimates >= 0) & (one.estimates <= 1)).all()
    torch.testing.assert_close(other.estimates, one.estimates[:, order])
    same = Bandit()
    same.credit(torch.full((30,), 0.7), [gate], [chosen])
    same.after_step()
    torch.testing.assert_close(same.estimates, torch.full((1, 4), 0.7).double())


def test_estimates_look_back_over_the_horizon_and_survive_a_checkpoint() -> None:
    arms, gate, chosen = Bandit(horizon=8), [torch.full((1, 2), 0.5)], [torch.tensor([[0]])]
    for step in range(64):
        arms.credit(torch.tensor([float(step >= 56)]), gate, chosen)
        arms.after_step()
        again = Bandit(horizon=8)
        again.load_state_dict(arms.state_dict())
        torch.testing.assert_close(again.estimates, arms.estimates, rtol=0, atol=0)
        arms = again
    # the last n steps weigh 1 - (1 - 1/n)^n, near 1 - 1/e
    assert float(arms.estimates[0, 0]) == pytest.approx(1 - (7 / 8) ** 8, rel=1e-2)
    assert arms.estimates[0, 1] == arms.estimates[0, 0], "an expert not seen is held to be like the others"
    before = arms.estimates
    arms.credit(torch.ones(1), gate, chosen)
    assert torch.equal(arms.estimates, before), "fixed within a step"
    arms.drop()
    arms.after_step()
    assert torch.equal(arms.estimates, before), "a skipped step teaches nothing"


def test_a_gate_trained_on_the_penalty_stays_below_the_exp3_bound() -> None:
    """2 sqrt((e - 1) K T ln K), Auer et al. 2002, theorem 3.1, for the expected regret; here the mean of 16 runs, and
    the worst of them. An even gate would be beyond it.
    """
    arms_of, rounds, runs, g = 4, 1_024, 16, lots(11)
    truth = torch.tensor([0.3, 0.4, 0.5, 0.9]).double()
    logits = torch.zeros(runs, 1, arms_of, dtype=torch.float64)
    arms, suffered = Bandit(horizon=rounds), torch.zeros(runs).double()
    for _ in range(rounds):
        logits.requires_grad_()
        gate = logits.softmax(-1)
        with torch.no_grad():
            chosen = torch.multinomial(gate[:, 0], 1, generator=g)
            suffered += truth.max() - truth[chosen[:, 0]]
            rewards = torch.bernoulli(truth[chosen], generator=g)
        if arms.estimates is not None:
            penalty = sum(bandit.regret(gate[run], arms.estimates[run]) for run in range(runs))
            (slope,) = torch.autograd.grad(penalty, logits)
            logits = (logits - 0.2 * slope).detach()
        arms.credit(rewards, list(gate.detach()), list(chosen[:, None]))
        arms.after_step()
    bound = 2 * math.sqrt((math.e - 1) * arms_of * rounds * math.log(arms_of))
    even = rounds * float(truth.max() - truth.mean())
    assert float(suffered.mean()) < bound < even and float(suffered.max()) < even
    assert float(suffered.mean() + 3 * suffered.std() / math.sqrt(runs)) < bound
