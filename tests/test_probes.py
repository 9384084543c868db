"""Numbers read off a model: what they mean at their limits, and that reading them changes nothing."""

import math

import pytest
import torch
from tiny_models import QWEN, STACK

from stackpkg import params
from stackpkg.model import build
from stackpkg.telemetry.probes import model_statistics, normalised_entropy, router_statistics

ATTENTION = {f"attention_entropy_{name}" for name in ("mean", "std", "median")}
ATTENTION |= {"masked_edge_share", "kv_ratio", "kv_error", "kv_hit_rate", "kv_evictions"}


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
    found = {name: float(value) for name, value in router_statistics((healthy,) * 9 + (collapsed,)).items()}
    assert found["router_entropy"] == pytest.approx(0.9, abs=1e-3)  # the mean looks well
    assert found["router_entropy_min"] == pytest.approx(0.0, abs=1e-3)
    assert found["router_usage_max"] == pytest.approx(1.0, abs=1e-3)
    # sharp gates that share the work are no collapse of usage
    sharp = 30 * torch.eye(8).repeat(4, 1)
    found = {name: float(value) for name, value in router_statistics((sharp,)).items()}
    assert found["router_entropy_min"] == pytest.approx(0.0, abs=1e-3)
    assert found["router_usage_max"] == pytest.approx(1 / 8, abs=1e-3)


def test_router_statistics_take_logits_with_or_without_a_batch_dimension() -> None:
    logits = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1))
    flat, batched = router_statistics((logits.flatten(0, 1),)), router_statistics((logits,))
    assert {name: float(value) for name, value in flat.items()} == {n: float(value) for n, value in batched.items()}


def test_a_stack_model_has_every_series_and_no_masked_edge() -> None:
    model = build(params.Model(config=STACK), 64, 0, 3)
    series = model_statistics(model, ids())
    assert set(series) == ATTENTION | {"activation_outlier_rate"}
    assert all(isinstance(value, float) and math.isfinite(value) for value in series.values()), series
    assert series["masked_edge_share"] == 0.0
    assert 0 < series["attention_entropy_mean"] <= 1 and 0 < series["attention_entropy_median"] <= 1
    assert 0.5 < series["kv_ratio"] < 1 and 0 < series["kv_error"] < 0.05
    assert all(parameter.grad is None for parameter in model.parameters())
    assert series == model_statistics(model, ids())


def test_any_other_model_has_the_activation_series_only() -> None:
    model = build(params.Model(kind="auto", config=QWEN), 64, 0, 3)
    assert model_statistics(model, ids()) == {"activation_outlier_rate": 0.0}
    with torch.no_grad():
        model.model.norm.weight[5] = 1_000.0  # one loud channel of 64
    rate = model_statistics(model, ids())["activation_outlier_rate"]
    assert 0 < rate <= 1 / 64
