"""The schedule is the one transformers runs; what is documented of moments and Robbins-Monro holds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from stackpkg import params
from stackpkg.params import Optimization
from stackpkg.training.optim import (
    Adafactor,
    effective_beta,
    effective_betas,
    learning_rates,
    robbins_monro,
    training_arguments,
)


def scheduled(o: Optimization, steps: int) -> list[float]:
    """Learning rates of a real optimiser under the scheduler that `training_arguments` names."""
    given = training_arguments(params.validate({"optimization": o.model_dump()}), Path("unused"), steps)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=given["learning_rate"])
    scheduler = get_scheduler(
        given["lr_scheduler_type"],
        optimizer,
        given["warmup_steps"],
        given["max_steps"],
        scheduler_specific_kwargs=given["lr_scheduler_kwargs"],
    )
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("warmup", "steps", "floor"),
    [
        (3, 12, 3e-4),
        (0, 12, 1e-5),  # no warm-up: the first step is at the peak
        (8, 50, 0.0),
        (5, 5, 1e-4),  # the run ends with its warm-up
        (8_000, 10, 1e-5),  # the run ends inside its warm-up
        (0, 1, 1e-5),
        (1, 40, 3e-3),  # floor = peak: constant
    ],
)
def test_learning_rates_are_those_of_the_scheduler(warmup: int, steps: int, floor: float) -> None:
    o = Optimization(learning_rate=3e-3, warmup_steps=warmup, floor=floor)
    rates = learning_rates(o, steps)
    assert rates.shape == (steps,) and rates.dtype == np.float64
    np.testing.assert_allclose(rates, scheduled(o, steps), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("warmup", "steps", "decay"), [(3, 20, 5), (0, 12, 12), (5, 9, 100), (30, 10, 4)])
def test_warm_up_stable_decay_is_that_of_the_scheduler(warmup: int, steps: int, decay: int) -> None:
    o = Optimization(learning_rate=3e-3, warmup_steps=warmup, floor=3e-4, schedule="wsd", decay_steps=decay)
    rates = learning_rates(o, steps)
    np.testing.assert_allclose(rates, scheduled(o, steps), rtol=1e-12, atol=0)
    if steps == 20:
        assert rates[3:16].tolist() == [o.learning_rate] * 13 and rates[16] < rates[15]
        found = robbins_monro(rates, warmup)
        assert found["diverges"] and found["bounded"]  # in its decay


@pytest.mark.parametrize(("decay", "bounded"), [(1, False), (8, False), (10, True), (100, True)])
def test_a_stable_stretch_must_end_in_a_decay_of_a_tenth(decay: int, bounded: bool) -> None:
    o = Optimization(learning_rate=3e-3, warmup_steps=3, floor=3e-4, schedule="wsd", decay_steps=decay)
    assert robbins_monro(learning_rates(o, 103), 3)["bounded"] == bounded


def test_robbins_monro_holds_for_a_decay_to_a_floor_and_for_nothing_less() -> None:
    o = Optimization(learning_rate=1e-2, warmup_steps=5, floor=1e-4)
    rates = learning_rates(o, 100)
    found = robbins_monro(rates, o.warmup_steps)
    assert found["sum"] == pytest.approx(rates.sum()) and found["sum_of_squares"] == pytest.approx((rates**2).sum())
    assert found["diverges"] and found["bounded"]
    stopped = learning_rates(o.model_copy(update={"floor": 0.0}), 100)
    assert not robbins_monro(np.append(stopped, 0.0), 5)["diverges"]  # at its floor of 0 nothing is learnt any more
    constant = learning_rates(o.model_copy(update={"floor": o.learning_rate}), 100)
    assert robbins_monro(constant, 5)["diverges"] and not robbins_monro(constant, 5)["bounded"]  # the noise stays
    assert not robbins_monro(rates, 0)["bounded"]  # a rate that rises: here the warm-up, taken for the rest
    unfinished = robbins_monro(rates[:5], 5)
    assert not unfinished["diverges"] and not unfinished["bounded"]  # all warm-up: nothing is known of the rest


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.95, 0.999])
def test_effective_beta_is_the_weight_of_the_past_in_adam(beta: float) -> None:
    gradients = np.random.default_rng(1).normal(size=50)
    assert effective_beta(beta, 0) == 0.0  # nothing was updated yet
    moment, corrected = 0.0, 0.0
    for t, gradient in enumerate(gradients, start=1):
        before = corrected
        moment = beta * moment + (1 - beta) * gradient
        corrected = moment / (1 - beta**t)
        share = effective_beta(beta, t)
        # m^_t = share m^_(t-1) + (1 - share) g_t
        assert corrected == pytest.approx(share * before + (1 - share) * gradient, abs=1e-12)
    assert effective_beta(beta, 100_000) == pytest.approx(beta)


def test_adafactor_tells_its_own_weight_of_the_past() -> None:
    o = params.validate({"optimization": {"optimizer": "adafactor"}}).optimization
    weight = torch.nn.Parameter(torch.zeros(3))
    made = Adafactor([weight], lr=1e-3, scale_parameter=False, relative_step=False)
    moment = torch.zeros(3)
    for t, gradient in enumerate(torch.randn(20, 3, generator=torch.Generator().manual_seed(1)), start=1):
        weight.grad = gradient
        made.step()
        share = effective_betas(o, t)[1]
        moment = share * moment + (1 - share) * (gradient**2 + 1e-30)
        torch.testing.assert_close(made.state[weight]["exp_avg_sq"], moment)
    assert effective_betas(o, 20)[0] == 0.0 and effective_betas(o, 0) == (0.0, 0.0)


def test_training_arguments_divide_the_batch_and_hide_no_nan(tmp_path: Path) -> None:
    layout, training = {"processes": 4, "fsdp": 2}, {"batch_tokens": 24 * 256, "accumulation": 3}
    p = params.validate({"layout": layout, "training": training, "optimization": {"betas": (0.8, 0.9), "clip": 0.5}})
    made = TrainingArguments(**training_arguments(p, tmp_path, 7), use_cpu=True)
    assert made.logging_nan_inf_filter is False and made.logging_steps == 1
    assert made.per_device_train_batch_size == 2 and made.gradient_accumulation_steps == 3
    assert 4 * made.per_device_train_batch_size * made.gradient_accumulation_steps * 256 == p.training.batch_tokens
    assert (made.adam_beta1, made.adam_beta2, made.max_grad_norm, made.max_steps) == (0.8, 0.9, 0.5, 7)
    assert made.report_to == [] and made.optim == "adamw_torch_fused"
    factored = params.validate({"optimization": {"optimizer": "adafactor"}})
    assert TrainingArguments(**training_arguments(factored, tmp_path, 7), use_cpu=True).optim == "adafactor"
