"""The objectives: properties of each term, and what the composer does with them."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import DEEPSEEK, MIXTRAL, OLMOE, QWEN, STACK

from stackpkg import params
from stackpkg.model import build
from stackpkg.objectives import Composer, StepCounts, Term, bandit, losses, norms, routing
from stackpkg.objectives.routing import Routed


# ---- language modelling and long range


def test_token_losses_are_cross_entropy_of_the_next_token() -> None:
    logits, labels = torch.randn(3, 7, 11), torch.randint(0, 11, (3, 7))
    labels[0, 3] = labels[2, 0] = -100
    found = losses.token_losses(logits, labels)
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1), reduction="sum")
    torch.testing.assert_close(found.sum(), expected)
    assert found[0, 2] == 0 and (found[:, -1] == 0).all() and found.shape == labels.shape
    answers = torch.zeros_like(labels, dtype=torch.bool)
    answers[1, 5] = True
    torch.testing.assert_close(losses.long_range(found, answers), -logits[1, 4].log_softmax(-1)[labels[1, 5]])


# ---- InfoNCE


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def test_info_nce_equals_its_formula_and_masks_the_same_document() -> None:
    q, d, n, keys = unit(3, 5), unit(3, 5), unit(3, 2, 5), torch.tensor([7, 8, 7])
    expected = 0.0
    for i in range(3):
        others = [j for j in range(3) if j == i or keys[j] != keys[i]]
        bottom = sum(math.exp(q[i] @ d[j] / 0.1) for j in others) + sum(math.exp(q[i] @ h / 0.1) for h in n[i])
        expected -= math.log(math.exp(q[i] @ d[i] / 0.1) / bottom)
    assert float(losses.info_nce(q, d, n, keys, 0.1, None)) == pytest.approx(expected, rel=1e-6)


def test_info_nce_limits_and_gradient() -> None:
    q, keys = torch.eye(4, 6, dtype=torch.float64), torch.arange(4)
    hard = torch.eye(6, dtype=torch.float64)[4:5].expand(4, 1, 6)
    assert losses.info_nce(q, q, hard, keys, 0.01, None) < 1e-6
    chance = losses.info_nce(q, q[:1].expand(4, -1), hard * 0 + q[0], keys, 1.0, None)
    assert float(chance) == pytest.approx(4 * math.log(5))
    inputs = [t.requires_grad_() for t in (unit(3, 4), unit(3, 4), unit(3, 1, 4))]
    assert torch.autograd.gradcheck(lambda *t: losses.info_nce(*t, torch.arange(3), 0.5, None), inputs)


# ---- router


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-8, 8), min_size=4, max_size=4), st.permutations(range(4)))
def test_balance_is_between_0_and_log_e_and_blind_to_names(logits: list[float], order: list[int]) -> None:
    usage = torch.tensor([logits], dtype=torch.float64).softmax(-1)
    value = losses.balance_divergence(usage)
    assert -1e-9 <= value <= math.log(4) + 1e-9
    torch.testing.assert_close(losses.balance_divergence(usage[:, order]), value)
    gate = torch.randn(6, 4, dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(
        losses.load_balance(gate[:, order], usage[0, order]), losses.load_balance(gate, usage[0])
    )


def test_layers_that_collapse_apart_do_not_score_as_balanced() -> None:
    usage = torch.eye(4)  # layer l sends everything to expert l: the mean over layers is uniform
    assert losses.balance_divergence(usage.mean(0, keepdim=True)).item() == pytest.approx(0.0, abs=1e-7)
    torch.testing.assert_close(losses.balance_divergence(usage), torch.full((4,), math.log(4)))


def test_load_balance_gradient() -> None:
    logits = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)

    def gradient(usage: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(losses.load_balance(logits.softmax(-1), usage), logits)[0]

    assert gradient(torch.full((4,), 0.25, dtype=torch.float64)).abs().max() < 1e-12
    skewed = gradient(torch.tensor([0.85, 0.05, 0.05, 0.05], dtype=torch.float64))
    assert (skewed[:, 0] > 0).all() and (skewed[:, 1:] < 0).all(), "descent takes mass from the overused expert"
    assert torch.isfinite(gradient(torch.tensor([1.0, 0, 0, 0], dtype=torch.float64))).all()
    # it is the gradient of KL through u = mean p, when u is the batch's own mean
    p = logits.softmax(-1)
    direct = torch.autograd.grad(losses.balance_divergence(p.mean(0, keepdim=True)).sum(), logits)[0]
    torch.testing.assert_close(gradient(p.mean(0).detach()) / 10, direct)
    usage = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: losses.load_balance(z.softmax(-1), usage), (logits,))


def test_gate_entropy_limits_and_gradient() -> None:
    uniform, sharp = torch.full((5, 8), 1 / 8, dtype=torch.float64), torch.eye(8, dtype=torch.float64)[:5]
    assert float(losses.gate_entropy(uniform, 1.0)) == pytest.approx(0.0, abs=1e-12)
    assert float(losses.gate_entropy(uniform, 0.6)) == pytest.approx(5 * 0.16)
    assert float(losses.gate_entropy(sharp, 0.6)) == pytest.approx(5 * 0.36, rel=1e-5)
    logits = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: losses.gate_entropy(z.softmax(-1), 0.6), (logits,))


# ---- composer


def one_step(composer: Composer, router_logits: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    labels = torch.zeros(2, 5, dtype=torch.long)
    counts = StepCounts(8, 0, 2, 1)
    nothing = (None, None, None, None)
    return composer.losses(torch.randn(2, 5, 3), labels, labels.bool(), router_logits, *nothing, counts)[1]


def test_usage_moves_once_a_step_and_survives_a_checkpoint() -> None:
    composer = Composer(params.Objectives(usage_decay=0.5), top_k=1)
    first, second = torch.zeros(10, 4), torch.zeros(10, 4)
    first[:, 0] = second[:, 1] = 5.0
    composer.after_step()
    assert composer.usage is None and composer.state_dict()["usage"].numel() == 0
    assert "load_balance" not in one_step(composer, [first])
    composer.after_step()
    assert composer.usage.tolist() == [[1.0, 0.0, 0.0, 0.0]]
    for _ in range(2):
        assert float(one_step(composer, [second])["load_balance"]) == pytest.approx(math.log(4))
    assert composer.usage.tolist() == [[1.0, 0.0, 0.0, 0.0]], "fixed within a step"
    composer.after_step()
    assert composer.usage.tolist() == [[0.5, 0.5, 0.0, 0.0]]
    again = Composer(composer.weights, top_k=1)
    again.load_state_dict(composer.state_dict())
    assert torch.equal(again.usage, composer.usage)


def test_terms_of_weight_0_and_models_without_a_router_are_left_out() -> None:
    quiet = params.Objectives(contrastive=0, load_balance=0, gate_entropy=0, long_range=0)
    assert set(one_step(Composer(quiet, 1), [torch.randn(10, 4)])) == {"language_modelling"}
    assert set(one_step(Composer(params.Objectives(), 1), None)) == {"language_modelling", "long_range"}
    dense = one_step(Composer(params.Objectives(), 1), [torch.randn(10, 1)])
    assert set(dense) == {"language_modelling", "long_range"}, "one expert is a dense layer"
