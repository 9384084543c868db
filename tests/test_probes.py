"""Numbers read off a model: what they mean at their limits, and that reading them changes nothing."""

import math

import pytest
import torch
from tiny_models import QWEN, STACK

from stackpkg import params
from stackpkg.model import build
from stackpkg.objectives import Pairs
from stackpkg.objectives.routing import Routed
from stackpkg.telemetry import probes
from stackpkg.telemetry.probes import (
    model_statistics,
    normalised_entropy,
    retrieval_statistics,
    router_statistics,
)

ATTENTION = {f"attention_entropy_{name}" for name in ("mean", "std", "median", "heads")}
ATTENTION |= {"masked_edge_share", "attention_kernel_error"}
ATTENTION |= {"kv_ratio", "kv_error", "kv_distortion", "kv_hit_rate", "kv_evictions"}


def routed(*logits: torch.Tensor, sigmoid: bool = False) -> list[Routed]:
    return [Routed(each, each.topk(1, -1).indices, sigmoid) for each in logits]


def numbers(found: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in found.items() if not value.dim()}


def ids(rows: int = 2, length: int = 48) -> torch.Tensor:
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("choices", [2, 4, 64])
def test_normalised_entropy_spans_zero_to_one(choices: int) -> None:
    uniform, certain = torch.full((3, choices), 1 / choices), torch.eye(choices)[:1].expand(3, -1)
    torch.testing.assert_close(normalised_entropy(uniform), torch.ones(3))
    assert normalised_entropy(certain).tolist() == [0.0] * 3
    half = torch.zeros(2, 5, choices)
    half[..., :2] = 0.5
    assert normalised_entropy(half).shape == (2, 5)
    torch.testing.assert_close(normalised_entropy(half), torch.full((2, 5), math.log(2) / math.log(choices)))


def test_one_collapsed_layer_shows_in_the_minimum() -> None:
    healthy, collapsed = torch.zeros(50, 8), torch.zeros(50, 8)
    collapsed[:, 3] = 30.0
    told = router_statistics(routed(*[healthy] * 9, collapsed))
    found = numbers(told)
    assert told["router_entropy_layers"].tolist() == pytest.approx([1.0] * 9 + [0.0], abs=1e-3)
    assert found["router_usage_min"] == pytest.approx(0.0, abs=1e-3)
    assert found["router_entropy"] == pytest.approx(0.9, abs=1e-3)  # the mean looks well
    assert found["router_entropy_min"] == pytest.approx(0.0, abs=1e-3)
    assert found["router_usage_max"] == pytest.approx(1.0, abs=1e-3)
    # sharp gates that share the work are no collapse of usage
    sharp = 30 * torch.eye(8).repeat(4, 1)
    found = numbers(router_statistics(routed(sharp)))
    assert found["router_entropy_min"] == pytest.approx(0.0, abs=1e-3)
    assert found["router_usage_max"] == pytest.approx(1 / 8, abs=1e-3)


def test_router_statistics_take_logits_with_or_without_a_batch_dimension() -> None:
    logits = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1))
    assert numbers(router_statistics(routed(logits.flatten(0, 1)))) == numbers(router_statistics(routed(logits)))
    assert router_statistics(routed(torch.randn(5, 1))) == {}, "a dense layer has no choice"


def test_sigmoid_gates_are_measured_as_they_choose() -> None:
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    scores = logits.sigmoid()
    expected = normalised_entropy(scores / scores.sum(-1, keepdim=True)).mean()
    torch.testing.assert_close(router_statistics(routed(logits, sigmoid=True))["router_entropy"], expected)


def test_regret_is_what_a_gate_leaves_on_the_table() -> None:
    even, best = torch.zeros(10, 4), 40 * torch.tensor([0.0, 0.0, 0.0, 1.0]).repeat(10, 1)
    paid = torch.tensor([[0.1, 0.2, 0.3, 0.8]] * 2, dtype=torch.double)
    found = router_statistics(routed(even, best), paid)
    assert found["router_regret_layers"].tolist() == pytest.approx([0.8 - 0.35, 0.0], abs=1e-6)
    assert float(found["router_regret_max"]) == pytest.approx(0.45) and float(found["router_regret"]) < 0.23


def test_retrieval_statistics_of_pairs_that_match_and_of_pairs_that_do_not() -> None:
    axes = torch.eye(8)
    match = Pairs(axes[:4], axes[:4], axes[4:, None], torch.arange(4))
    found = retrieval_statistics(match)
    assert numbers(found) == {"batch_precision_at_1": 1.0, "similarity_positive": 1.0, "similarity_negative": 0.0}
    assert found["similarity_histogram"].shape == (2, probes.BINS)
    assert found["similarity_histogram"].sum(1).tolist() == pytest.approx([1.0, 1.0])
    assert found["similarity_histogram"][0, -1] == 1 and found["similarity_histogram"][1, probes.BINS // 2] == 1
    turned = match._replace(positive=axes[:4].roll(1, 0))
    assert numbers(retrieval_statistics(turned))["batch_precision_at_1"] == 0.0
    one = match._replace(positive=axes[:4].roll(1, 0), key=torch.zeros(4, dtype=torch.long))  # all are one document
    assert numbers(retrieval_statistics(one))["batch_precision_at_1"] == 1.0


def test_a_stack_model_has_every_series_and_no_masked_edge() -> None:
    model = build(params.Model(config=STACK), 64, 0, 3)
    series = model_statistics(model, ids())
    assert set(series) == ATTENTION | {"activation_outlier_rate"}
    assert all(value.isfinite().all() for value in series.values()), series
    assert series["attention_entropy_heads"].shape == (2, 4)
    assert series["attention_entropy_heads"].mean() == series["attention_entropy_mean"]
    assert series["masked_edge_share"] == 0.0 and series["attention_kernel_error"] < 1e-5
    assert 0 < series["attention_entropy_mean"] <= 1 and 0 < series["attention_entropy_median"] <= 1
    assert 0.5 < series["kv_ratio"] < 1 and 0 < series["kv_error"] < 0.05
    assert all(parameter.grad is None for parameter in model.parameters())
    again = model_statistics(model, ids())
    assert all(torch.equal(value, again[name]) for name, value in series.items())


def test_any_other_model_has_the_activation_series_only() -> None:
    model = build(params.Model(kind="auto", config=QWEN), 64, 0, 3)
    assert model_statistics(model, ids()) == {"activation_outlier_rate": 0.0}
    with torch.no_grad():
        model.model.norm.weight[5] = 1_000.0  # one loud channel of 64
    rate = float(model_statistics(model, ids())["activation_outlier_rate"])
    assert 0 < rate <= 1 / 64
