"""The objectives: properties of each term, and proof that their scale does not depend on how a step is split."""

import math
import os

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

from stackpkg import params
from stackpkg.model import build
from stackpkg.model.retrieval import embed
from stackpkg.objectives import Composer, StepCounts, losses

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, "block_size": 8,
}  # fmt: skip
QWEN = {
    "model_type": "qwen3_moe", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
    "num_key_value_heads": 2, "moe_intermediate_size": 16, "intermediate_size": 16, "num_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip
ROWS, LENGTH = 8, 24
USAGE = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.05, 0.15, 0.3, 0.5]])
ADDITIVE = params.Objectives(contrastive=0.0, load_balance=1.0, gate_entropy=1.0, long_range=1.0)
CONTRASTIVE = params.Objectives(
    language_modelling=0.0, contrastive=1.0, load_balance=0.0, gate_entropy=0.0, long_range=0.0
)


def batch() -> dict[str, torch.Tensor]:
    """Rows with very different numbers of label and answer tokens, and two rows of the same document."""
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 64, (ROWS, LENGTH), generator=g)
    labels = ids.clone()
    for row in range(ROWS):
        labels[row, : 2 * row + 1] = -100
    answers = torch.zeros_like(labels, dtype=torch.bool)
    answers[1, -3:] = answers[6, -1:] = True
    pairs = torch.randint(1, 64, (3, ROWS, 10), generator=g)
    keys = torch.tensor([0, 1, 2, 3, 4, 5, 6, 1])
    return {"ids": ids, "labels": labels, "answers": answers, "pairs": pairs.transpose(0, 1), "keys": keys}


def count(whole: dict[str, torch.Tensor], ranks: int) -> StepCounts:
    labelled = whole["labels"][:, 1:] != -100
    return StepCounts(int(labelled.sum()), int((whole["answers"][:, 1:] & labelled).sum()), ROWS, ranks)


def step(
    model: PreTrainedModel,
    weights: params.Objectives,
    part: dict[str, torch.Tensor],
    sizes: list[int],
    counts: StepCounts,
) -> tuple[dict[str, torch.Tensor], dict[str, float], Composer]:
    """Gradients, raw values and composer after one step of `part`, in micro-batches of `sizes` rows."""
    composer, sums = Composer(weights, top_k=2), {}
    composer.usage = USAGE
    model.zero_grad()
    for micro in (
        dict(zip(part, values, strict=True)) for values in zip(*(t.split(sizes) for t in part.values()), strict=True)
    ):
        out = model(input_ids=micro["ids"], output_router_logits=True)
        pair = None
        if weights.contrastive:
            pair = embed(model, micro["pairs"].flatten(0, 1), 0).unflatten(0, (-1, 3))
        query, positive, hard = (None, None, None) if pair is None else (pair[:, 0], pair[:, 1], pair[:, 2:])
        total, raw = composer.losses(
            out.logits,
            micro["labels"],
            micro["answers"],
            out.router_logits,
            query,
            positive,
            hard,
            micro["keys"],
            counts,
        )
        total.backward()
        for name, value in raw.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    composer.after_step()
    full = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g.clone() for n, g in full.items()}, sums, composer


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    flat = [torch.cat([d[name].flatten() for name in sorted(one)]) for d in (one, other)]
    return float((flat[0] - flat[1]).norm() / flat[0].norm())


# ---- scale proof


@pytest.mark.parametrize("config", [SMALL, QWEN], ids=["reference", "qwen3_moe"])
@pytest.mark.parametrize("sizes", [[4, 4], [1, 7], [2, 2, 2, 2], [1, 4, 1, 2]], ids=str)
def test_accumulation_changes_no_additive_term(config: dict, sizes: list[int]) -> None:
    model = build(params.Model(kind="auto" if "model_type" in config else "stack", config=config), 64, 0, 3)
    for name in ("language_modelling", "load_balance", "gate_entropy", "long_range", None):
        off = dict.fromkeys(("language_modelling", "load_balance", "gate_entropy", "long_range"), 0.0)
        weights = ADDITIVE if name is None else ADDITIVE.model_copy(update=off | {name: 1.0})
        whole, values, composer = step(model, weights, batch(), [ROWS], count(batch(), 1))
        split, sums, other = step(model, weights, batch(), sizes, count(batch(), 1))
        assert distance(whole, split) < 1e-5, name
        assert sums == pytest.approx(values, rel=1e-5)
        assert torch.equal(composer.usage, other.usage), "one update a step, from the counts of all micro-batches"


def test_contrastive_term_depends_on_the_negatives_in_a_micro_batch() -> None:
    model, counts = build(params.Model(config=SMALL), 64, 0, 3), count(batch(), 1)
    whole, value, _ = step(model, CONTRASTIVE, batch(), [ROWS], counts)
    split, sums, _ = step(model, CONTRASTIVE, batch(), [4, 4], counts)
    assert sums["contrastive"] < value["contrastive"] and distance(whole, split) > 1e-3


def worker(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    spread = DistributedConfig(fsdp_size=2)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=spread, dtype=torch.float32)
    assert any(isinstance(p, DTensor) for p in model.parameters())
    share = {name: t.chunk(2)[rank] for name, t in batch().items()}
    for kind, sizes in (("additive", [4]), ("additive", [1, 3]), ("additive", [1, 1, 1, 1]), ("contrastive", [4])):
        weights = ADDITIVE if kind == "additive" else CONTRASTIVE
        found, sums, composer = step(model, weights, share, sizes, count(batch(), 2))
        if rank == 0:
            gradients, usage = torch.load(f"{folder}/{kind}.pt", weights_only=True)
            assert distance(gradients, found) < 1e-5, (kind, sizes)
            assert torch.equal(composer.usage, usage), "counts are those of all ranks"
        values = torch.tensor([sums[name] for name in sorted(sums)])
        torch.distributed.all_reduce(values)
        expected = torch.load(f"{folder}/{kind}-values.pt", weights_only=True)
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
    torch.distributed.destroy_process_group()


def test_two_fsdp_ranks_give_the_gradient_of_one_process(tmp_path: object) -> None:
    model = build(params.Model(config=SMALL), 64, 0, 3)
    model.save_pretrained(tmp_path)
    for kind, weights in (("additive", ADDITIVE), ("contrastive", CONTRASTIVE)):
        gradients, sums, composer = step(model, weights, batch(), [ROWS], count(batch(), 1))
        torch.save((gradients, composer.usage), f"{tmp_path}/{kind}.pt")
        torch.save(torch.tensor([sums[name] for name in sorted(sums)]), f"{tmp_path}/{kind}-values.pt")
    mp.spawn(worker, (str(tmp_path),), nprocs=2)


def test_canary_stock_trainer_scales_its_auxiliary_loss_with_accumulation(tmp_path: object) -> None:
    """When this fails upstream has mended it: transformers #48690."""
    row = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(1))
    norms = []

    class Gate(TrainerCallback):
        def on_pre_optimizer_step(self, *_: object, model: torch.nn.Module, **__: object) -> None:
            norms.append(torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "mlp.gate." in n]).norm())

    for accumulation in (1, 4):
        model = build(params.Model(kind="auto", config=QWEN), 64, 0, 3)
        model.config.output_router_logits, model.router_aux_loss_coef = True, 0.1
        model.loss_function = lambda logits, *_, **__: logits.sum() * 0.0  # the auxiliary term alone
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=accumulation,
            max_steps=1, learning_rate=0.0, max_grad_norm=0.0, use_cpu=True, save_strategy="no",
            report_to=[], disable_tqdm=True,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row}] * 8
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Gate()]).train()
    assert norms[1] / norms[0] == pytest.approx(4.0, rel=1e-3)


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
