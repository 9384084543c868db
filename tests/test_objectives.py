"""The objectives: properties of each term, and what the composer does with them."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import DEEPSEEK, MIXTRAL, OLMOE, QWEN, STACK

from stackpkg import params
from stackpkg.model import build
from stackpkg.model.embedding import embed
from stackpkg.model.scopes import load
from stackpkg.objectives import Composer, Pairs, StepCounts, bandit, losses, norms, preference, reading, routing
from stackpkg.objectives.conformance import Conversations, read
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


def test_token_losses_and_what_is_summed_of_them_have_the_right_gradient_and_range() -> None:
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 5, 7, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 7, (2, 5), generator=g)
    labels[0, 2] = -100
    answers = torch.rand(2, 5, generator=g) < 0.5
    assert answers[:, 1:].any() and not answers[:, 1:].all()
    assert torch.autograd.gradcheck(lambda z: losses.token_losses(z, labels), (logits,))
    assert torch.autograd.gradcheck(lambda z: losses.long_range(losses.token_losses(z, labels), answers), (logits,))
    assert torch.autograd.gradcheck(lambda z: reading.reading(reading.Reading(z, labels)), (logits,))
    found = losses.token_losses(logits, labels)
    assert 0 <= losses.long_range(found, answers) <= found.sum() == reading.reading(reading.Reading(logits, labels))
    assert losses.long_range(found, answers & False) == 0
    alike = losses.token_losses(torch.full((1, 2, 7), 3.0), torch.tensor([[0, 4]]))
    assert alike[0, 0].item() == pytest.approx(math.log(7))
    order = torch.randperm(7, generator=g)
    named = torch.where(labels < 0, labels, order.argsort()[labels.clamp_min(0)])
    torch.testing.assert_close(losses.token_losses(logits[..., order], named), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_low_precision_are_taken_in_float32(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(3, 7, 11).to(dtype), torch.randint(0, 11, (3, 7))
    assert torch.equal(losses.token_losses(logits, labels), losses.token_losses(logits.float(), labels))
    assert torch.equal(losses.z_loss(logits), losses.z_loss(logits.float()))
    assert losses.z_loss(logits).dtype == losses.token_losses(logits, labels).dtype == torch.float32


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


def test_info_nce_leaves_out_what_scores_like_the_positive_only_with_a_margin() -> None:
    q = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64), dim=-1)
    d = F.normalize(torch.tensor([[1.0, 0.2], [0.2, 1.0]], dtype=torch.float64), dim=-1)
    near = F.normalize(torch.tensor([[[1.0, 0.25]], [[1.0, 0.0]]], dtype=torch.float64), dim=-1)
    keys = torch.arange(2)
    far_only = losses.info_nce(q, d, near, keys, 0.1, margin=0.1)
    expected = F.cross_entropy(torch.stack([q[0] @ d[0], q[0] @ d[1]])[None] / 0.1, torch.tensor([0]))
    expected += F.cross_entropy(
        torch.stack([q[1] @ d[1], q[1] @ d[0], q[1] @ near[1, 0]])[None] / 0.1, torch.tensor([0])
    )
    torch.testing.assert_close(far_only, expected)
    assert losses.info_nce(q, d, near, keys, 0.1) > far_only
    alike = torch.ones(4, 3, dtype=torch.float64) / 3**0.5
    assert losses.info_nce(alike, alike, alike[:, None], torch.arange(4), 0.05, margin=0.1) == 0, "why it is off"


@settings(max_examples=30)
@given(st.integers(2, 6), st.integers(0, 3), st.integers(0, 99))
def test_info_nce_range_and_order_of_rows(rows: int, hard: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q, d, n = (F.normalize(torch.randn(rows, *s, 4, generator=g).double(), dim=-1) for s in ((), (), (hard,)))
    value, order = losses.info_nce(q, d, n, torch.arange(rows), 0.2), torch.randperm(rows, generator=g)
    assert 0 <= value <= rows * (math.log(rows + hard) + 2 / 0.2)
    torch.testing.assert_close(losses.info_nce(q[order], d[order], n[order], torch.arange(rows), 0.2), value)


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


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1), st.floats(0.1, 20), st.permutations(range(4)), st.integers(0, 99))
def test_gate_entropy_is_between_0_and_1_and_blind_to_names(
    target: float, sharp: float, order: list[int], seed: int
) -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gate = (sharp * logits).softmax(-1)
    value = losses.gate_entropy(gate, target)
    assert 0 <= value <= 6 * max(target, 1 - target) ** 2 + 1e-6
    torch.testing.assert_close(losses.gate_entropy(gate[:, order], target), value)


@settings(max_examples=30)
@given(st.floats(-20, 20), st.permutations(range(4)), st.integers(0, 99))
def test_z_loss_grows_when_logits_shift_and_is_blind_to_names(shift: float, order: list[int], seed: int) -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    centred = logits - logits.logsumexp(-1, keepdim=True)
    assert losses.z_loss(centred) == pytest.approx(0.0, abs=1e-9)
    assert float(losses.z_loss(centred + shift)) == pytest.approx(6 * shift**2, rel=1e-5, abs=1e-9)
    torch.testing.assert_close(losses.z_loss(logits[:, order]), losses.z_loss(logits))
    torch.testing.assert_close((centred + shift).softmax(-1), logits.softmax(-1))  # which a gate does not see


def test_z_loss_gradient() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(losses.z_loss, (logits,))


# ---- any mixture of experts of transformers


MIXTURES = {"reference": STACK, "qwen3_moe": QWEN, "mixtral": MIXTRAL, "olmoe": OLMOE, "deepseek_v3": DEEPSEEK}
ROUTER = ("load_balance", "gate_entropy", "z_loss", "regret")
EVEN = params.Objectives(contrastive=0, long_range=0, z_loss=1, load_balance=1, gate_entropy=1, regret=1, norms_every=1)


def tiny(config: dict, **changes: int):
    kind = "auto" if "model_type" in config else "stack"
    return build(params.Model(kind=kind, config=config | changes), 64, 0, 3)


def forward(model, composer: Composer, ids: torch.Tensor):
    with routing.record(model) as routed:
        logits = model(input_ids=ids, use_cache=False).logits
    counts = StepCounts(ids[:, 1:].numel(), 0, len(ids), 1)
    return composer.losses(logits, ids, torch.zeros_like(ids, dtype=torch.bool), routed, None, counts), routed


@pytest.mark.parametrize("config", MIXTURES.values(), ids=MIXTURES)
def test_router_terms_of_any_mixture(config: dict) -> None:
    model, ids = tiny(config), torch.randint(1, 64, (3, 14), generator=torch.Generator().manual_seed(1))
    routers, composer = routing.routers(model), Composer(EVEN)
    values = []
    for _ in range(3):
        step, routed = forward(model, composer, ids)
        values.append(step.raw)
        composer.after_step()
    assert len(routers) == len(routed) == 2 and routed[0].logits.shape == (42, 4) and routed[0].chosen.shape == (42, 2)
    for layer in routed:
        torch.testing.assert_close(layer.gate().sum(-1), torch.ones(42))
        assert (layer.gate() > 0).all()
    assert values[2].keys() == {"language_modelling", *ROUTER} and all(v.isfinite() for v in values[2].values())
    assert 0 <= values[2]["load_balance"] <= math.log(4) and 0 <= values[2]["regret"] <= 1
    weights, pulls = [router.weight for router in routers], {}
    for name in ROUTER:
        only = EVEN.model_copy(update=dict.fromkeys({"language_modelling", *ROUTER} - {name}, 0.0))
        other = Composer(only)
        other.load_state_dict(composer.state_dict())
        step, routed = forward(model, other, ids)
        at = [layer.logits for layer in routed]
        pulls[name] = torch.cat([g.flatten() for g in torch.autograd.grad(step.total, at, retain_graph=True)])
        gradients = torch.autograd.grad(step.total, weights)
        assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients), name
    step, _ = forward(model, composer, ids)
    told = norms({name: float(value) for name, value in step.squares.items()})
    assert set(told) == {"language_modelling", *ROUTER, "cosine_regret_load_balance"}
    cosine = float(torch.cosine_similarity(pulls["regret"], pulls["load_balance"], dim=0))
    assert told["cosine_regret_load_balance"] == pytest.approx(cosine, abs=1e-5)
    assert all(math.isfinite(value) for value in told.values())


def beside(model, g: torch.Generator) -> tuple[dict, StepCounts]:
    """What training hands the composer of a model of transformers: a text with answers, pairs of texts, a preferred and
    a rejected answer, conversations with a protected scope; and how much of it there is.
    """
    ids, texts = torch.randint(1, 64, (3, 14), generator=g), torch.randint(1, 64, (4, 9), generator=g)
    answers = torch.zeros_like(ids, dtype=torch.bool)
    answers[:2, -3:] = True
    found = embed(model, torch.randint(1, 64, (12, 8), generator=g), 0).unflatten(0, (-1, 4))
    pairs = Pairs(found[:, 0], found[:, 1], found[:, 2:], torch.arange(3))
    asked = preference.stacked({"chosen_ids": texts[:2], "rejected_ids": texts[2:]}, 0)
    said = preference.answers(model(**asked).logits, asked["input_ids"], torch.tensor([3, 4, 3, 4]), 0)
    sides = [preference.Answers(said.log_probs[rows], said.tokens[rows]) for rows in (slice(2), slice(2, None))]
    talk = {
        "conversation_ids": torch.randint(1, 64, (2, 12), generator=g),
        "conversation_roles": torch.zeros(2, 12, dtype=torch.long),
        "conversation_spans": torch.where(torch.arange(12)[:, None] < 6, -1, torch.zeros(2, 12, 4, dtype=torch.long)),
    }
    given = {
        "labels": ids, "answer_mask": answers, "pairs": pairs,
        "preferences": preference.Preferences(*sides, torch.arange(2)),
        "conversations": read(model, talk, load(), torch.tensor([7, 9, 30]), 0),
    }  # fmt: skip
    return given, StepCounts(ids[:, 1:].numel(), int(answers.sum()), len(ids), 1, 2, 24, 12)


OTHERS = ("language_modelling", "long_range", "contrastive", "preference", "conformance")


@pytest.mark.parametrize("kind", ["simpo", "orpo"])
@pytest.mark.parametrize("config", MIXTURES.values(), ids=MIXTURES)
def test_every_other_objective_trains_any_mixture(config: dict, kind: str) -> None:
    """With the heads that training gives a model of transformers, none, each term reaches every layer."""
    model, off = tiny(config), dict.fromkeys({*OTHERS, *ROUTER}, 0.0)
    given, counts = beside(model, torch.Generator().manual_seed(1))
    with routing.record(model) as routed:
        logits = model(input_ids=given["labels"], use_cache=False).logits
    for name in OTHERS:
        weights = params.Objectives(**off | {name: 1.0}, ramp_steps={}, preference_loss=kind)
        step = Composer(weights).losses(logits, routed=routed, counts=counts, **given)
        assert {n for n, value in step.weighted.items() if value} == {name}
        assert step.total.isfinite() and step.total > 0
        gradients = torch.autograd.grad(step.total, list(model.parameters()), retain_graph=True, allow_unused=True)
        for (parameter, _), gradient in zip(model.named_parameters(), gradients, strict=True):
            assert gradient is None or gradient.isfinite().all(), (name, parameter)
        for layer in range(2):
            of = [g for (n, _), g in zip(model.named_parameters(), gradients, strict=True) if f"layers.{layer}." in n]
            assert sum(float(g.abs().sum()) for g in of if g is not None) > 0, (name, layer)


@pytest.mark.parametrize("config", MIXTURES.values(), ids=MIXTURES)
def test_what_is_recorded_is_what_the_experts_got(config: dict) -> None:
    model, ids, got = tiny(config), torch.arange(1, 13)[None], []
    experts = [m for n, m in model.named_modules() if n.endswith("experts") and "shared" not in n]
    for module in experts:
        module.register_forward_hook(lambda _, args, __: got.append(args[1:]))
    with routing.record(model) as routed:
        model(input_ids=ids, use_cache=False)
    model(input_ids=ids, use_cache=False)  # outside the block: not recorded
    assert len(routed) == 2 and len(got) == 4
    for layer, (chosen, weights) in zip(routed, got, strict=False):
        assert torch.equal(layer.chosen, chosen)
        ratio = layer.gate().gather(1, chosen)  # the gate is what the weights come from, normalised or scaled
        torch.testing.assert_close(ratio[:, 0] * weights[:, 1], ratio[:, 1] * weights[:, 0])


@pytest.mark.parametrize("config", MIXTURES.values(), ids=MIXTURES)
def test_collapsed_layers_do_not_score_as_balanced_whatever_k(config: dict) -> None:
    scores = {}
    for k in (1, 2):
        model, composer = tiny(config, num_experts_per_tok=k), Composer(EVEN)
        routed = forward(model, composer, torch.ones(2, 9, dtype=torch.long))[1]
        collapsed = [torch.roll(torch.arange(4), 2 * layer)[:k].expand(18, k) for layer in range(2)]
        composer._chosen = None
        composer._count([layer._replace(chosen=c) for layer, c in zip(routed, collapsed, strict=True)])
        composer.after_step()
        scores[k] = losses.balance_divergence(composer.usage)
        assert losses.balance_divergence(composer.usage.mean(0, keepdim=True)) < scores[k].min()
    torch.testing.assert_close(scores[1], torch.full((2,), math.log(4)))
    torch.testing.assert_close(scores[2], torch.full((2,), math.log(2)))


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(0, 99))
def test_router_coefficients_do_not_depend_on_k(k: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, 4, generator=g, requires_grad=True)
    even = torch.stack([torch.arange(40 * k).view(40, k) % 4]).squeeze(0)  # every expert equally often
    composer = Composer(EVEN)
    for _ in range(3):
        step = router_step(composer, [Routed(logits, even)])
        composer.after_step()
    assert float(step.raw["load_balance"]) == pytest.approx(0.0, abs=1e-6)
    gate = logits.softmax(-1)
    assert float(step.raw["z_loss"]) == pytest.approx(float(losses.z_loss(logits) / 40), rel=1e-5)
    assert float(step.raw["gate_entropy"]) == pytest.approx(float(losses.gate_entropy(gate, 0.6) / 40), rel=1e-5)
    paid = bandit.Bandit()
    paid.credit(torch.full((40,), 0.5), [gate.detach()], [even])
    paid.after_step()
    torch.testing.assert_close(paid.estimates, torch.full((1, 4), 0.5, dtype=torch.float64))


def test_a_router_of_another_kind_is_refused() -> None:
    model = tiny(QWEN)
    routing.routers(model)[0].scoring_func = "sqrtsoftplus"
    with pytest.raises(ValueError, match="softmax and sigmoid"), routing.record(model):
        model(input_ids=torch.arange(1, 6)[None])
    assert routing.routers(tiny({"model_type": "llama", "hidden_size": 32, "num_attention_heads": 2})) == []


# ---- balance without a loss


@pytest.mark.parametrize("config", [STACK, DEEPSEEK], ids=["reference", "deepseek_v3"])
def test_choice_bias_balances_moves_no_weight_and_is_saved(config: dict, tmp_path: object) -> None:
    model = tiny(config)
    routers = routing.routers(model)
    for router in routers:
        router.e_score_correction_bias.copy_(torch.tensor([0.6, -0.2, -0.2, -0.2]))  # expert 0 gets every token
    ids = torch.randint(1, 64, (4, 40), generator=torch.Generator().manual_seed(1))
    composer = Composer(EVEN.model_copy(update={"bias_rate": 0.01, "usage_decay": 0.0}), routers)
    spread = []
    for step in range(60):
        with torch.no_grad(), routing.record(model) as routed:
            model(input_ids=ids, use_cache=False)
        composer._count(routed)
        composer.after_step(applied=step != 1)
        spread.append(float(losses.balance_divergence(composer.usage).max()))
        assert all(abs(float(r.e_score_correction_bias.sum())) < 1e-5 for r in routers), "the mean of each move is 0"
    assert spread[-1] < 0.3 * spread[0] and spread[0] > 0.1 and composer.steps == 59
    for router, layer in zip(routers, routed, strict=True):
        x = torch.randn(7, 64)
        logits, weights, chosen = router(x)
        bare = Routed(logits, chosen, layer.sigmoid).gate().gather(1, chosen)
        torch.testing.assert_close(weights[:, 0] * bare[:, 1], weights[:, 1] * bare[:, 0])
    model.save_pretrained(tmp_path)
    again = routing.routers(type(model).from_pretrained(tmp_path))
    for router, other in zip(routers, again, strict=True):
        assert router.e_score_correction_bias.abs().sum() > 0
        assert torch.equal(router.e_score_correction_bias, other.e_score_correction_bias)


def test_centred_routers_forget_what_all_tokens_have_in_common(tmp_path: Path) -> None:
    model = tiny(STACK)
    routers = routing.routers(model)
    ids = torch.randint(1, 64, (4, 40), generator=torch.Generator().manual_seed(1))
    for router in routers:  # expert 0 is everybody's first choice
        router.center.copy_(torch.tensor([-3.0, 0.0, 0.0, 0.0]))
    composer = Composer(EVEN.model_copy(update={"center_rate": 0.3, "usage_decay": 0.0}), routers)
    usage, seen = [], []
    for step in range(30):
        with torch.no_grad(), routing.record(model) as routed:
            model(input_ids=ids, use_cache=False)
        for rows in (slice(0, 60), slice(60, None)):  # in two micro-batches of different size
            composer._count([Routed(layer.logits[rows], layer.chosen[rows]) for layer in routed])
        before = [router.center.clone() for router in routers]
        composer.after_step(applied=step != 1)
        if step == 1:
            assert all(torch.equal(router.center, old) for router, old in zip(routers, before, strict=True))
            continue
        usage.append(float(composer.usage.max()))
        seen.append(max(float(layer.logits.mean(0).abs().max()) for layer in routed))
        for router, old, layer in zip(routers, before, routed, strict=True):
            torch.testing.assert_close(router.center, old + 0.3 * layer.logits.mean(0), atol=1e-5, rtol=1e-4)
    assert usage[0] == 0.5 and usage[-1] < 0.4 and seen[-1] < 0.01 * seen[0]
    model.save_pretrained(tmp_path)
    again = routing.routers(type(model).from_pretrained(tmp_path))
    assert all(torch.equal(one.center, other.center) for one, other in zip(routers, again, strict=True))


def test_a_center_needs_a_router_that_has_one() -> None:
    composer = Composer(EVEN.model_copy(update={"center_rate": 0.1}), routing.routers(tiny(QWEN)))
    forward(tiny(QWEN), composer, torch.ones(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="center_rate to 0"):
        composer.after_step()


def test_choice_bias_needs_a_router_that_has_one() -> None:
    composer = Composer(EVEN.model_copy(update={"bias_rate": 0.1}), routing.routers(tiny(QWEN)))
    forward(tiny(QWEN), composer, torch.ones(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="bias_rate to 0"):
        composer.after_step()


# ---- composer


def router_step(composer: Composer, routed: list[Routed], **more):
    rows = len(routed[0].logits) // 5 if routed else 2
    labels = torch.arange(rows * 5).view(rows, 5) % 3
    counts = StepCounts(rows * 4, 0, rows, 1)
    logits = torch.randn(rows, 5, 3, generator=torch.Generator().manual_seed(len(labels)), requires_grad=True)
    return composer.losses(logits, labels, labels < 0, routed, None, counts, **more)


def one_step(composer: Composer, logits: torch.Tensor, k: int = 1) -> dict[str, torch.Tensor]:
    return router_step(composer, [Routed(logits.requires_grad_(), logits.topk(k, -1).indices)]).raw


def test_usage_moves_once_a_step_and_survives_a_checkpoint() -> None:
    composer = Composer(params.Objectives(usage_decay=0.5))
    first, second = torch.zeros(10, 4), torch.zeros(10, 4)
    first[:, 0] = second[:, 1] = 5.0
    composer.after_step()
    assert composer.usage is None and composer.state_dict()["usage"].numel() == 0
    assert "load_balance" not in one_step(composer, first)
    composer.after_step()
    assert composer.usage.tolist() == [[1.0, 0.0, 0.0, 0.0]]
    for _ in range(2):
        assert float(one_step(composer, second)["load_balance"]) == pytest.approx(math.log(4))
    assert composer.usage.tolist() == [[1.0, 0.0, 0.0, 0.0]], "fixed within a step"
    composer.after_step()
    assert composer.usage.tolist() == [[0.5, 0.5, 0.0, 0.0]]
    again = Composer(composer.weights)
    again.load_state_dict(composer.state_dict())
    assert torch.equal(again.usage, composer.usage)


def said(margin: torch.Tensor) -> Conversations:
    """One protected token whose forbidden one has this much more than the only other, of a model without scopes."""
    logits = torch.stack((margin, torch.zeros(()))).expand(1, 2, 2)
    inside = torch.tensor([[False, True]])
    return Conversations(logits, (), ~inside | inside, inside, torch.tensor([0]))


def test_terms_of_weight_0_and_models_without_a_router_are_left_out() -> None:
    quiet = params.Objectives(contrastive=0, load_balance=0, gate_entropy=0, long_range=0, regret=0, conformance=0)
    assert set(one_step(Composer(quiet), torch.randn(10, 4))) == {"language_modelling"}
    assert set(router_step(Composer(quiet), [], conversations=said(torch.ones(()))).raw) == {"language_modelling"}
    assert set(router_step(Composer(params.Objectives()), []).raw) == {"language_modelling", "long_range"}
    dense = one_step(Composer(params.Objectives()), torch.randn(10, 1))
    assert set(dense) == {"language_modelling", "long_range"}, "one expert is a dense layer"


def test_a_skipped_step_teaches_nothing_and_moves_no_schedule() -> None:
    composer = Composer(params.Objectives())
    for applied in (True, False):
        one_step(composer, torch.randn(10, 4))
        before = composer.state_dict()
        composer.after_step(applied)
        assert composer.steps == 1
    torch.testing.assert_close(composer.state_dict(), before, rtol=0, atol=0)


def test_a_ramp_grows_to_the_weight_and_survives_a_checkpoint() -> None:
    weights = params.Objectives(conformance=0.5, ramp_steps={"conformance": 4}, norms_every=2)
    composer, seen, measured, p = Composer(weights), [], [], 1 / (1 + math.exp(-3))
    for _ in range(6):
        point = torch.tensor(3.0, requires_grad=True)
        step = router_step(composer, [], conversations=said(point))
        assert float(step.raw["conformance"]) == pytest.approx(math.log1p(math.exp(3)))
        seen.append(float(step.weighted["conformance"] / step.raw["conformance"]))
        measured.append(norms(step.squares).get("conformance"))
        torch.testing.assert_close(step.total.detach(), torch.stack(list(step.weighted.values())).sum())
        step.total.backward()
        assert float(point.grad) == pytest.approx(seen[-1] * p), "the norm taken before left no trace"
        composer.after_step()
        state = composer.state_dict()
        composer = Composer(weights)
        composer.load_state_dict(state)
    assert seen == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])
    norm = p * math.sqrt(2)  # p at the forbidden logit, -p at the other
    assert measured == [pytest.approx(s * norm) if i % 2 == 0 else None for i, s in enumerate(seen)]


def test_norms_of_a_step_do_not_depend_on_its_split() -> None:
    logits = torch.randn(40, 4, generator=torch.Generator().manual_seed(3), requires_grad=True)
    gate_only = params.Objectives(load_balance=0, regret=0, norms_every=1)
    labels = torch.zeros(8, 5, dtype=torch.long)
    sums = []
    for sizes in ([8], [1, 4, 3]):
        squares = 0.0
        for rows in torch.arange(8).split(sizes):
            part = logits.view(8, 5, 4)[rows].flatten(0, 1)
            nothing = torch.zeros(len(rows), 5, 3, requires_grad=True)
            routed = [Routed(part, part.topk(2, -1).indices)]
            counts = StepCounts(32, 0, 8, 1)
            step = Composer(gate_only).losses(nothing, labels[rows], labels[rows] > 0, routed, None, counts)
            squares += float(step.squares["gate_entropy"])
        sums.append(squares)
    value = 0.01 / 40 * losses.gate_entropy(logits.softmax(-1), 0.6)
    assert sums == pytest.approx([float(torch.autograd.grad(value, logits)[0].square().sum())] * 2, rel=1e-4)
