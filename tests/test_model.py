"""The reference model: exact causality, the contract with transformers."""

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import Largest
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from stackpkg import params
from stackpkg.model import StackConfig, StackForCausalLM, attention_statistics, build
from stackpkg.model.embedding import embed, sinusoids
from stackpkg.model.rotary import rotary

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, "block_size": 8,
}  # fmt: skip


def small(seed: int = 3, vocab: int = 64, **changes: object) -> StackForCausalLM:
    return build(params.Model(config=SMALL | changes), vocab, 0, seed)


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=15, deadline=None)
@given(length=st.integers(2, 90), data=st.data())
def test_no_output_depends_on_a_later_token(length: int, data: st.DataObject) -> None:
    changed = data.draw(st.integers(1, length - 1))
    ids = tokens(1, length)
    other = ids.clone()
    other[0, changed] = 63 if ids[0, changed] != 63 else 1
    for experts in (1, 4):
        model = small(num_experts=experts, num_experts_per_tok=min(experts, 2)).eval()
        with torch.no_grad():
            before, after = model(input_ids=ids).logits, model(input_ids=other).logits
        # exactly zero; with several experts a matrix product may round anew when its number of rows changes: there
        # it is the gradient that is exactly zero, see test_attention
        error = (before[:, :changed] - after[:, :changed]).abs().max()
        assert error <= (0 if experts == 1 else 1e-6)
        assert not torch.equal(before[:, changed:], after[:, changed:])


def packed(lengths: list[int], ids: torch.Tensor) -> torch.Tensor:
    """Positions of documents of these lengths, one after another, as a packed row has them."""
    return torch.cat([torch.arange(n) for n in lengths])[None].expand(len(ids), -1)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=2, max_size=5), data=st.data())
def test_a_packed_document_sees_nothing_of_another(lengths: list[int], data: st.DataObject) -> None:
    which = data.draw(st.integers(0, len(lengths) - 1))
    start, ids = sum(lengths[:which]), tokens(1, sum(lengths))
    other = (ids + 1) % 64
    other[:, start : start + lengths[which]] = ids[:, start : start + lengths[which]]
    for changes in ({"num_experts": 1, "num_experts_per_tok": 1}, {"summaries_per_block": 1}):
        model, positions = small(**changes).eval(), packed(lengths, ids)
        with torch.no_grad():
            mine, theirs = (model(input_ids=row, position_ids=positions).logits for row in (ids, other))
        difference = (mine - theirs)[0].abs().amax(-1)
        assert difference[start : start + lengths[which]].max() < 1e-6
        assert difference.max() > 1e-3, "the other documents should have changed"


def test_a_document_at_the_start_of_a_row_is_as_if_alone() -> None:
    model, ids = small().eval(), tokens(2, 64)
    with torch.no_grad():
        row = model(input_ids=ids, position_ids=packed([48, 16], ids)).logits
        alone = model(input_ids=ids[:, :48]).logits
    torch.testing.assert_close(row[:, :48], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_models_of_transformers_keep_packed_documents_apart_too(kind: str) -> None:
    config = dict(QWEN.config) if kind == "qwen3_moe" else {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    model, ids = build(params.Model(kind="auto", config=config), 64, 0, 1).eval(), tokens(2, 30)
    with torch.no_grad():
        row = model(input_ids=ids, position_ids=packed([11, 19], ids), use_cache=False).logits
        parts = [model(input_ids=part).logits for part in (ids[:, :11], ids[:, 11:])]
    torch.testing.assert_close(row, torch.cat(parts, 1), atol=1e-5, rtol=1e-5)


def test_the_stock_trainer_keeps_packed_documents_apart(tmp_path: Path) -> None:
    ids = tokens(4, 48)
    rows = [{"input_ids": row, "labels": row, "position_ids": packed([20, 28], ids)[0]} for row in ids]
    apart, together = (
        float(small()(input_ids=ids, labels=ids, **more).loss.detach())
        for more in ({"position_ids": packed([20, 28], ids)}, {})
    )
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, logging_steps=1, per_device_train_batch_size=4, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(small(), arguments, train_dataset=rows)
    trainer.train()
    # it drops what a forward does not name: position_ids must be named
    assert trainer.state.log_history[0]["loss"] == pytest.approx(apart, rel=1e-6) != together


def test_summaries_carry_what_the_window_cannot_see() -> None:
    model, ids = small(num_hidden_layers=1).eval(), tokens(1, 60)
    other = ids.clone()
    other[0, 2] = 63 if ids[0, 2] != 63 else 1
    with torch.no_grad():
        difference = (model(input_ids=ids).logits - model(input_ids=other).logits)[0].abs().amax(-1)
    assert difference[2 + 16 :].min() > 0, "tokens past the window must see the change through a summary"


def test_attention_makes_no_square_tensor() -> None:
    length = 2048
    model = small(block_size=16)
    with Largest() as largest:
        model(input_ids=tokens(1, length), labels=tokens(1, length)).loss.backward()
    assert largest.numbers < length * length / 4, f"a tensor of {largest.numbers} numbers at {length} tokens"


def test_first_row_is_finite_and_learns() -> None:
    model = small()
    model(input_ids=tokens(2, 1)).logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_right_padding_changes_nothing_and_left_padding_is_refused() -> None:
    model, short = small().eval(), tokens(2, 21)
    padded = torch.nn.functional.pad(short, (0, 30))
    alone, together = embed(model, short, 0), embed(model, padded, 0)
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(alone.norm(dim=-1), torch.ones(2))
    with pytest.raises(ValueError, match="padding on the right"):
        model(input_ids=padded.flip(1), attention_mask=(padded.flip(1) != 0).long())


# ---- embeddings of texts, routers that begin apart


def test_texts_are_as_alike_as_their_rare_words_and_place_and_state_decide_what_counts() -> None:
    model = small(vocab=400, embedding_size=4_096).eval()
    generator = torch.Generator().manual_seed(0)
    word, rarity = torch.randint(1, 200, (400,), generator=generator), torch.rand(400, generator=generator)
    word[0], rarity[0], rarity = 0, 0.0, rarity[word] * (word > 0)
    model.embedder.begin(word, rarity, 7)
    ids = torch.randint(1, 400, (6, 30), generator=generator)
    counts = F.one_hot(word[ids], 200).sum(1) * torch.zeros(200).scatter(0, word, rarity)
    counts = F.normalize(counts.float(), dim=-1)
    found = embed(model, F.pad(ids, (0, 9)), 0)
    torch.testing.assert_close(found @ found.T, counts @ counts.T, atol=0.05, rtol=0)
    same = ids.clone()
    same[0, 3] = (word == word[ids[0, 3]]).nonzero()[-1]  # another token of the same word
    torch.testing.assert_close(embed(model, same, 0)[0], found[0], atol=1e-5, rtol=0)
    with torch.no_grad():
        model.embedder.weight.weight.copy_(sinusoids(torch.zeros(1, 30, 32))[:1] * 4)  # the first word alone, nearly
    first = F.normalize(model.embedder.words.weight[ids[:, 0]], dim=-1)
    alone = model.embedder(torch.zeros(6, 30, 32), ids)
    assert ((alone * first).sum(-1) > 0.9).all() and ((found * first).sum(-1) < 0.7).all()


def test_embeddings_of_texts_are_off_by_default_and_saved_where_they_are_on(tmp_path: Path) -> None:
    assert small().embedder is None and not [name for name in small().state_dict() if "embedder" in name]
    model, ids = small(embedding_size=24).eval(), tokens(3, 12)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert embed(model, ids, 0).shape == (3, 24) and torch.equal(embed(again, ids, 0), embed(model, ids, 0))
    assert model(input_ids=ids).text_embedding is None, "nobody asked"
    with pytest.raises(ValueError, match="pad_token_id"):
        StackForCausalLM(StackConfig(**SMALL, embedding_size=8))


@pytest.mark.parametrize("width", [32, 128])
def test_router_logits_begin_with_the_spread_that_is_asked_for_at_any_width(width: int) -> None:
    model = small(router_spread=1.8, hidden_size=width, num_experts=16)
    logits = model(input_ids=tokens(8, 64), output_router_logits=True).router_logits
    assert all(0.7 * 1.8 < float(layer.detach().std()) < 1.3 * 1.8 for layer in logits)


def test_longer_reach_interpolates_the_slowest_frequency_alone() -> None:
    near, far = StackConfig(rope_alpha=1.0), StackConfig(rope_alpha=0.5)
    angles = [torch.atan2(*rotary(c, torch.tensor([[1]]), torch.float64)[::-1])[0, 0, :64] for c in (near, far)]
    ratio = angles[1] / angles[0]
    assert ratio[0] == pytest.approx(1.0)
    assert ratio[-1] == pytest.approx(0.5, rel=1e-5)


def test_checkpointed_layers_give_the_same_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = small(retrieval=True).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        out = model(input_ids=tokens(2, 40), memory_ids=tokens(2, 9), output_router_logits=True)
        assert len(out.router_logits) == 2 and out.router_logits[0].shape == (80, 4)
        (out.logits.square().mean() + sum(r.softmax(-1)[:, 0].sum() for r in out.router_logits)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


def test_save_load_and_generate(tmp_path: object) -> None:
    model, ids = small(retrieval=True).eval(), tokens(2, 20)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), StackConfig)
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    grown = ids
    for _ in range(4):
        grown = torch.cat((grown, again(input_ids=grown).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(again.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=-1), grown)
    assert again(input_ids=ids, logits_to_keep=1).logits.shape == (2, 1, 64)


@pytest.mark.parametrize("kernel", ["batched_mm", "grouped_mm"])
def test_expert_kernels_agree_with_the_loop(kernel: str) -> None:
    results = []
    for name in ("eager", kernel):
        model = small()
        model.set_experts_implementation(name)
        logits = model(input_ids=tokens(2, 33)).logits
        logits.square().sum().backward()
        results.append(
            (logits, model.model.layers[0].mlp.experts.down_proj.grad, model.model.layers[1].mlp.gate.weight.grad)
        )
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_gate_temperature_and_top_1() -> None:
    cold, warm = small(num_experts_per_tok=1), small(num_experts_per_tok=1, gate_temperature=4.0)
    logits = [m(input_ids=tokens(1, 9), output_router_logits=True).router_logits[0] for m in (cold, warm)]
    torch.testing.assert_close(logits[0], logits[1] * 4)
    cold(input_ids=tokens(1, 9)).logits.square().sum().backward()
    assert cold.model.layers[0].mlp.gate.weight.grad.norm() > 0, "a top-1 gate must learn"


def test_records_are_read_on_odd_layers_only() -> None:
    model, ids = small(retrieval=True).eval(), tokens(1, 12)
    assert not any("cross" in name for name, _ in small().named_parameters())
    assert {name.split(".")[2] for name, _ in model.named_parameters() if "cross" in name} == {"1"}
    answers = [model(input_ids=ids, memory_ids=m).logits for m in (None, tokens(1, 5), tokens(1, 5, seed=1))]
    assert not torch.equal(answers[0], answers[1]) and not torch.equal(answers[1], answers[2])
    with pytest.raises(ValueError, match="pad_token_id"):
        StackForCausalLM(StackConfig(**SMALL, retrieval=True))


def test_records_have_no_order_and_their_padding_is_not_read() -> None:
    model, ids = small(retrieval=True).eval(), tokens(2, 12)
    one, other = tokens(2, 4, seed=1), tokens(2, 6, seed=2)
    ended = [F.pad(record, (0, 1)) for record in (one, other)]
    read = [
        model(input_ids=ids, memory_ids=memory).logits
        for memory in (torch.cat(ended, 1), torch.cat(ended[::-1], 1), torch.cat([*ended, torch.zeros_like(ids)], 1))
    ]
    for same in read[1:]:
        torch.testing.assert_close(read[0], same, atol=1e-6, rtol=1e-5)
    nothing = [model(input_ids=ids, memory_ids=m).logits for m in (None, torch.zeros_like(one), one[:, :0])]
    for same in nothing[1:]:  # the null slot alone
        torch.testing.assert_close(nothing[0], same, atol=1e-6, rtol=1e-5)


def test_cross_attention_equals_its_definition_in_plain_matrices() -> None:
    model, records = small(retrieval=True).eval(), tokens(2, 7, seed=1)
    records[0, 3:] = 0
    cross, x, memory = model.model.layers[1].cross_attn, torch.randn(2, 5, 32), model.model.embed_tokens(records)
    found = torch.empty_like(x)
    for b in range(2):
        heads = []
        for h in range(4):
            q = cross.q_norm(cross.q_proj(x[b]).view(5, 4, 8)[:, h])
            keys = cross.k_norm(cross.k_proj(memory[b]).view(7, 2, 8)[:, h // 2])
            values = cross.v_proj(memory[b]).view(7, 2, 8)[:, h // 2]
            weights = {j: (q @ keys[j - 1] / 8**0.5 if j else q.new_zeros(5)).exp() for j in range(7) if records[b, j]}
            total = 1 + sum(weights.values())
            heads.append(sum(w[:, None] * values[j] for j, w in weights.items()) / total[:, None])
        found[b] = cross.o_proj(torch.cat(heads, 1))
    torch.testing.assert_close(cross(x, memory, records != 0), found, atol=1e-6, rtol=1e-5)


def test_generation_reads_records() -> None:
    model, ids, records = small(retrieval=True).eval(), tokens(2, 20), tokens(2, 30, seed=1)
    grown = ids
    for _ in range(4):
        grown = torch.cat((grown, model(input_ids=grown, memory_ids=records).logits[:, -1:].argmax(-1)), 1)
    said = model.generate(ids, memory_ids=records, max_new_tokens=4, do_sample=False, eos_token_id=-1)
    assert torch.equal(said, grown)
    assert not torch.equal(said, model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=-1))


# ---- statistics


def test_entropy_is_1_when_attention_is_uniform_and_low_when_sharp() -> None:
    model = small(vocab=64)
    for layer, factor in zip(model.model.layers, (0.0, 200.0), strict=True):
        layer.self_attn.q_norm.weight.data.mul_(factor)
    found = attention_statistics(model, tokens(2, 50))
    torch.testing.assert_close(found["entropy"][0], torch.ones(4))
    assert found["entropy"][1].max() < 0.2
    assert found["masked_edge_share"].shape == (2, 4) and found["masked_edge_share"].max() == 0
    assert attention_statistics(small(retrieval=True), tokens(1, 5))["entropy"].isfinite().all()


def test_other_models_have_no_statistics() -> None:
    assert attention_statistics(build(QWEN, 64, 0, 1), tokens(1, 8)) == {}


# ---- build

QWEN = params.Model(
    kind="auto",
    config={
        "model_type": "qwen3_moe", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
        "num_key_value_heads": 2, "moe_intermediate_size": 16, "intermediate_size": 16, "num_experts": 4,
        "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1,
    },
)  # fmt: skip


def test_build_any_architecture_without_its_stock_auxiliary_loss(tmp_path: object) -> None:
    model, ids = build(QWEN, 64, 0, 1), tokens(2, 30)
    out = model(input_ids=ids, labels=ids, output_router_logits=True)
    assert out.loss == model(input_ids=ids, labels=ids).loss and len(out.router_logits) == 2
    assert embed(model, ids, 0).shape == (2, 32)
    model.save_pretrained(tmp_path)
    loaded = build(params.Model(kind="auto", name_or_path=str(tmp_path)), 64, 0, 1)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(ValueError, match="below the tokenizer"):
        build(params.Model(kind="auto", name_or_path=str(tmp_path)), 65, 0, 1)


def test_build_draws_weights_from_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    one, same, other = (torch.cat([p.flatten() for p in small(seed).parameters()]) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state) and one.dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"hiden_size": 32}, "did you mean 'hidden_size'"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "multiple of num_key_value_heads"),
        ({"block_size": 1024}, "at most sliding_window"),
        ({"num_experts": 2, "num_experts_per_tok": 4}, "1..num_experts"),
        ({"router_spread": -1.0}, "router_spread at least 0"),
    ],
)
def test_build_refuses_what_does_not_fit(config: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        build(params.Model(config=config), 64, 0, 1)


def test_build_refuses_an_unknown_architecture() -> None:
    with pytest.raises(ValueError, match="qwen3_mo"):
        build(params.Model(kind="auto", config={"model_type": "qwen3_mo"}), 64, 0, 1)


# ---- parallel


def loss(model: torch.nn.Module, ids: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    out = model(input_ids=ids, labels=ids, memory_ids=memory, output_router_logits=True)
    pair = embed(model, ids[:, :13], 0)  # after the language model's forward: see `embed`
    return out.loss + pair[:, 0].mean() + sum(r.softmax(-1)[:, 0].mean() for r in out.router_logits)


def worker(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    reference, ids, memory = torch.load(f"{folder}/reference.pt", weights_only=True)
    for sizes in ({"fsdp_size": 2}, {"fsdp_size": 2, "ep_size": 2}, {"tp_size": 2}):
        spread = DistributedConfig(**sizes)
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=spread, dtype=torch.float32).train()
        model.activation_checkpointing_enable()
        shares = (ids.chunk(2)[rank], memory.chunk(2)[rank]) if "fsdp_size" in sizes else (ids, memory)
        loss(model, *shares).backward()
        for name, parameter in model.named_parameters():
            full = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            error = (full - reference[name]).norm() / reference[name].norm().clamp_min(1e-9)
            assert error < 2e-4, f"{sizes} {name}: relative error {error:.1e}"
        share = attention_statistics(model, shares[0])["masked_edge_share"]
        assert share.max() == 0
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_sharded_gradients_equal_those_of_one_process(tmp_path: object) -> None:
    model = small(retrieval=True, attention_pattern="hybrid", summary_pooling="attention", embedding_size=24)
    ids, memory = tokens(4, 40), tokens(4, 12, seed=1) * (torch.arange(12) % 6 < 5)
    model.save_pretrained(tmp_path)
    loss(model, ids, memory).backward()
    torch.save(({n: p.grad for n, p in model.named_parameters()}, ids, memory), f"{tmp_path}/reference.pt")
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
