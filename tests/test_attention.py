"""Attention: parity of each pattern and pooling with a dense definition, exact causality, linear mode, scopes."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import Largest
from transformers import AutoModelForCausalLM

from stackpkg import params
from stackpkg.model import StackConfig, StackForCausalLM, attention_statistics, build, linear
from stackpkg.model.attention import SelfAttention
from stackpkg.model.patterns import Cut, documents, layout
from stackpkg.model.rotary import rotary, rotate
from stackpkg.model.scopes import Scopes
from stackpkg.model.statistics import SAMPLED
from stackpkg.model.summaries import pool, pyramid

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "moe_intermediate_size": 24, "num_experts": 1, "num_experts_per_tok": 1, "sliding_window": 16, "block_size": 8,
    "summaries_per_level": 2, "dilation": 3,
}  # fmt: skip
PATTERNS, POOLINGS = ("sliding", "dilated", "block", "hybrid"), ("mean", "max", "attention")
LINEAR = {"linear_from": 0}


def small(seed: int = 3, **changes: object) -> StackForCausalLM:
    return build(params.Model(config=SMALL | changes), 64, 0, seed)


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def packed(lengths: list[int], rows: int = 1) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None].expand(rows, -1)


def drawn_scopes(rows: int, length: int, enforce: bool, classes: int = 3) -> Scopes:
    g = torch.Generator().manual_seed(5)
    of = torch.randint(0, classes, (rows, length), generator=g)
    return Scopes(of, torch.rand(rows, length, classes, generator=g) < 0.7, enforce)


def dense(layer: SelfAttention, x: torch.Tensor, positions: torch.Tensor, scopes: Scopes | None = None) -> tuple:
    """Output [L, hidden], forbidden mass [L, heads], probabilities [heads, L, keys] and which keys are seen [L, keys],
    of a row from the definition: a list of all keys, each a set of tokens; a square mask; one softmax.
    """
    c, (length, _) = layer.config, x.shape
    cut, w, group = Cut.of(c, layer.pattern), c.sliding_window, c.num_attention_heads // c.num_key_value_heads
    starts = [t for t in range(length) if positions[t] == 0]
    document = [sum(s <= t for s in starts) for t in range(length)]

    def turn(t: torch.Tensor, position: int) -> torch.Tensor:
        return rotate(t[None, None], *rotary(c, torch.tensor([[position]]), t.dtype))[0, 0]

    raw, v = (p(x).view(length, c.num_key_value_heads, c.head_dim) for p in (layer.k_proj, layer.v_proj))
    q = layer.q_norm(layer.q_proj(x).view(length, c.num_attention_heads, c.head_dim))
    q = torch.stack([turn(q[t], int(positions[t])) for t in range(length)])
    members = {("token", t): [t] for t in range(length)} | {"null": []}
    keys = {("token", t): (turn(layer.k_norm(raw[t]), int(positions[t])), v[t]) for t in range(length)}
    keys["null"] = torch.zeros_like(raw[0]), torch.zeros_like(v[0])
    segments, size = c.pooled(length) // c.segment, 1
    while segments // size:
        for number in range(segments // size):
            span = range(number * size * c.segment, (number + 1) * size * c.segment)
            mine = members[size, number] = [t for t in span if document[t] == document[span[-1]]]
            if c.summary_pooling == "max":
                k, value = raw[mine].amax(0), v[mine].amax(0)
            else:
                weight = x.new_ones(len(mine), c.num_key_value_heads)
                if c.summary_pooling == "attention":
                    weight = layer.pool(layer.k_norm(raw[mine]))[..., 0].exp()
                k, value = ((t[mine] * weight[..., None]).sum(0) / weight.sum(0)[:, None] for t in (raw, v))
            middle = max(0, int(positions[span[-1]]) - (len(span) - 1 - len(span) // 2))
            keys[size, number] = turn(layer.k_norm(k), middle), value
        size *= 2

    def visible(t: int) -> set:
        if layer.pattern == "block":
            near = range(max(0, (t // (w // 2) - 1) * (w // 2)), t + 1)
        else:
            near = range(t, max(-1, t - w * cut.dilation), -cut.dilation)
        seen = {("token", s) for s in near if document[s] == document[t]} | {"null"}
        origin = t // (cut.chunk * cut.dilation) * cut.chunk * cut.dilation
        low, high = (min(segments, s // c.block_size * c.summaries_per_block) for s in (origin, t))
        size, keep = 1, c.summaries_per_level
        while high:
            low = max(0, low - keep) // (2 * size) * 2 * size
            seen |= {(size, n) for n in range(low // size, high // size)}
            size, high = size * 2, low
            keep = c.summaries_per_level // 2 * size
        ended = [
            k for k in seen if k == "null" or members[k][-1] // c.block_size < t // c.block_size or k[0] == "token"
        ]
        return {k for k in ended if k == "null" or document[members[k][-1]] == document[t]}

    names = list(keys)
    mask = torch.tensor([[name in seen for name in names] for seen in map(visible, range(length))])
    share = torch.zeros(length, len(names))  # of a key's tokens, those forbidden to a query
    if scopes is not None:
        bad = ~scopes.allowed[0][:, scopes.of[0]]
        share = torch.stack([bad[:, members[n]].float().mean(1) if members[n] else share[:, 0] for n in names], 1)
        if scopes.enforce:
            mask &= share == 0
    k, value = (torch.stack([keys[n][i] for n in names]).repeat_interleave(group, 1) for i in (0, 1))
    logits = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(c.head_dim)
    p = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    out = layer.o_proj(torch.einsum("hqk,khd->qhd", p, value).flatten(1))
    return out, torch.einsum("hqk,qk->qh", p, share.to(p)), p, mask


def run(
    layer: SelfAttention, x: torch.Tensor, positions: torch.Tensor, scopes: Scopes | None = None, measure: bool = False
) -> tuple:
    positions = positions.expand(x.shape[:2])
    shared = rotary(layer.config, positions, x.dtype), documents(positions)
    layouts = {layer.pattern: layout(layer.config, layer.pattern, positions, x.dtype, scopes)}
    return layer(x, *shared, layouts, scopes, measure)


@pytest.mark.parametrize("lengths", [[1], [7], [64], [90], [5, 40, 1, 30]], ids=str)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_chunked_attention_equals_the_dense_definition(pattern: str, pooling: str, lengths: list[int]) -> None:
    model = small(attention_pattern=pattern, summary_pooling=pooling)
    torch.manual_seed(0)
    for layer in model.model.layers[: 1 + (pattern == "hybrid")]:
        attention, x = layer.self_attn, torch.randn(1, sum(lengths), 32)
        if pooling == "attention":
            attention.pool.weight.data.normal_()
        out = run(attention, x, packed(lengths))[0]
        torch.testing.assert_close(out[0], dense(attention, x[0], packed(lengths)[0])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 8, "summaries_per_block": 1}, {"summaries_per_block": 0}, {"num_key_value_heads": 4},
        {"sliding_window": 13, "block_size": 6, "summaries_per_block": 3}, {"summaries_per_level": 1},
        {"summaries_per_level": 99}, {"attention_pattern": "dilated", "sliding_window": 9, "block_size": 4},
        {"attention_pattern": "block", "sliding_window": 10, "block_size": 4}, {"sliding_window": 66},
        {"sliding_window": 300, "summaries_per_level": 4},
    ],
    ids=str,
)  # fmt: skip
def test_sizes_that_do_not_divide_each_other_agree_with_the_definition_too(changes: dict) -> None:
    length = changes.get("sliding_window", 16) + 75
    attention, x = small(**changes).model.layers[0].self_attn, torch.randn(1, length, 32)
    out = run(attention, x, packed([length]))[0][0]
    torch.testing.assert_close(out, dense(attention, x[0], packed([length])[0])[0], atol=1e-5, rtol=1e-5)


@settings(max_examples=60)
@given(
    length=st.integers(1, 900), span=st.integers(1, 60), level=st.integers(1, 9), each=st.sampled_from((1, 2, 4)),
    block=st.sampled_from((4, 8, 12)),
)  # fmt: skip
def test_a_chunk_reads_every_finished_block_once_and_the_nearest_as_they_are(
    length: int, span: int, level: int, each: int, block: int
) -> None:
    c = StackConfig(block_size=block, summaries_per_block=each, summaries_per_level=level)
    zeros, chunks = torch.zeros(1, length, dtype=torch.long), -(-length // span)
    found = pyramid(c, zeros, zeros, chunks, span)
    sizes = [members for n, mate in enumerate(found.mates) for members in [c.segment << n] * mate.shape[1]]
    for chunk in range(chunks):
        mine = found.chosen[chunk][found.read[chunk]].tolist()
        covered = [t for i in mine for t in range(int(found.last[i]) - sizes[i] + 1, int(found.last[i]) + 1)]
        ready = min(c.pooled(length), ((chunk + 1) * span - 1) // block * block)
        assert sorted(covered) == list(range(ready))
        at_start = min(c.pooled(length), chunk * span // block * block)
        assert all(sizes[i] == c.segment for i in mine if found.last[i] >= at_start - level * c.segment)
        inside = span // c.segment + 2 * each
        assert len(mine) <= inside + level + 2 + (level // 2 + 2) * (len(found.mates) - 1)
    assert len(found.mates) <= 2 + math.log2(max(1, length / c.segment))


@pytest.mark.parametrize("pattern", PATTERNS[:3])
def test_the_start_of_a_row_reads_no_padding_and_its_parts_are_bounded(pattern: str) -> None:
    c = small(attention_pattern=pattern, sliding_window=512, block_size=128).config
    positions = torch.arange(9000)[None]
    found = layout(c, pattern, positions, torch.float32)
    cut, far = found.cut, found.pyramid.chosen.shape[1]
    keys = [mask.shape[-1] - 1 - far for mask in found.masks]
    assert keys[: cut.before] == [cut.chunk * (i + 1) for i in range(cut.before)]
    assert set(keys[cut.before :]) == {cut.chunk * (cut.before + 1)}
    queries = [mask.shape[0] * cut.chunk for mask in found.masks]
    assert 9000 <= sum(queries) < 9000 + cut.chunk * cut.dilation and max(queries) <= 2048


MODES = [{"attention_pattern": p, "summary_pooling": s} for p, s in itertools.product(PATTERNS, POOLINGS)]
MODES += [LINEAR | {"feature_map": name} for name in ("elu", "favor")]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(str(value) for value in mode.values()))
def test_no_output_and_no_gradient_depends_on_a_later_token(mode: dict) -> None:
    model, length = small(**mode).eval(), 131
    x = torch.randn(1, length, 32, generator=torch.Generator().manual_seed(1))
    for changed in (1, 16, 50, 97, 128):
        other, gradients, outputs = x.clone(), [], []
        other[0, changed:] += 1
        for row in (x.clone(), other):
            out = model(inputs_embeds=row.requires_grad_()).logits[:, :changed]
            gradients.append(torch.autograd.grad(out.square().sum(), row)[0])
            outputs.append(out)
        assert torch.equal(*outputs), f"an earlier output changed with token {changed}"
        assert gradients[0][:, changed:].abs().max() == 0
        assert torch.equal(gradients[0][:, :changed], gradients[1][:, :changed])


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(str(value) for value in mode.values()))
def test_no_gradient_comes_from_an_earlier_output_with_several_experts(mode: dict) -> None:
    """Values can't show it: a changed token changes the number of rows of an expert, and with it how others round. A
    gradient can: what no path leads to gets 0 times whatever was rounded.
    """
    model, length = small(num_experts=4, num_experts_per_tok=2, **mode), 131
    x = torch.randn(1, length, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    logits = model(inputs_embeds=x).logits
    for first in (1, 16, 50, 97, 128):
        towards = torch.randn(1, first, 64, generator=torch.Generator().manual_seed(first))
        (gradient,) = torch.autograd.grad(logits[:, :first], x, towards, retain_graph=True)
        assert torch.count_nonzero(gradient[:, first:]) == 0, f"outputs before {first} depend on what comes later"
        assert gradient[:, :first].abs().amax(-1).min() > 0


@pytest.mark.parametrize("mode", [*MODES[::4], *MODES[-2:]], ids=str)
def test_a_packed_document_sees_nothing_of_another(mode: dict) -> None:
    model, lengths, ids = small(**mode).eval(), [37, 5, 60, 29], tokens(1, 131)
    start = 0
    for n in lengths:
        other = (ids + 1) % 64
        other[:, start : start + n] = ids[:, start : start + n]
        with torch.no_grad():
            mine, theirs = (model(input_ids=row, position_ids=packed(lengths)).logits[0] for row in (ids, other))
        assert (mine - theirs)[start : start + n].abs().max() < 1e-6
        assert (mine - theirs).abs().max() > 1e-3
        start += n


@pytest.mark.parametrize("mode", [{}, {"attention_pattern": "dilated"}, {"attention_pattern": "block"}], ids=str)
def test_a_document_inside_a_row_reaches_its_own_first_token(mode: dict) -> None:
    model, positions = small(num_hidden_layers=1, **mode).eval(), packed([43, 150])
    ids = tokens(1, 193)
    other = ids.clone()
    other[0, 43] = 63 if ids[0, 43] != 63 else 1
    with torch.no_grad():
        a, b = (model(input_ids=row, position_ids=positions).logits[0] for row in (ids, other))
    # far beyond the reach of the pattern, through a coarse summary whose other half is another document
    assert (a - b)[43 + 16 * 3 + 8 :].abs().amax(-1).min() > 0


@pytest.mark.parametrize("mode", [*MODES[::4], *MODES[1:3], MODES[9], *MODES[-2:]], ids=str)
def test_no_pattern_makes_a_square_tensor(mode: dict) -> None:
    length = 2048
    model, ids = small(**mode, hidden_size=16, num_attention_heads=2, num_key_value_heads=1), tokens(1, length)
    with Largest() as largest:
        out = model(input_ids=ids, labels=ids, scopes=drawn_scopes(1, length, False), output_forbidden_mass=True)
        (out.loss + out.forbidden_mass[0].mean()).backward()
    assert largest.numbers < length * length / 4, f"a tensor of {largest.numbers} numbers at {length} tokens"


@pytest.mark.parametrize("mode", [MODES[5], MODES[9], MODES[11], MODES[-1]], ids=str)
def test_a_model_of_any_mode_checkpoints_saves_loads_and_generates(mode: dict, tmp_path: object) -> None:
    model, ids = small(**mode), tokens(2, 50)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.train().activation_checkpointing_enable()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    grown = ids
    for _ in range(3):
        grown = torch.cat((grown, again(input_ids=grown).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(again.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=-1), grown)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_constant_block_is_its_own_summary(pooling: str) -> None:
    model = small(summary_pooling=pooling, sliding_window=8, num_hidden_layers=1)
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 1, 32).expand(1, 64, 32)
    found = pyramid(model.config, torch.ones(1, 64, dtype=torch.long), torch.arange(64)[None], 1, 64)
    scores = None if pooling == "max" else torch.randn(1, 64, 2)
    v = attention.v_proj(x).view(1, 64, 2, 8)
    pooled = pool(v, scores, found.mates)
    torch.testing.assert_close(pooled, v[:, :1].expand_as(pooled), atol=1e-6, rtol=1e-5)


# ---- linear mode


def kernel(layer: SelfAttention, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    if layer.config.feature_map == "elu":
        return torch.einsum("qhm,khm->hqk", torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1)
    features, dtype = layer.features / 8**0.25, q.dtype
    q, k = ((t @ features.T - t.square().sum(-1, keepdim=True) / (2 * math.sqrt(8))).double().exp() for t in (q, k))
    return torch.einsum("qhm,khm->hqk", q, k).to(dtype) / len(features)


@pytest.mark.parametrize("scoped", [None, False, True])
@pytest.mark.parametrize("lengths", [[1], [300], [37, 1, 430, 200], [512, 9, 600]], ids=str)
@pytest.mark.parametrize("name", ["elu", "favor"])
def test_linear_attention_equals_the_dense_kernel(name: str, lengths: list[int], scoped: bool | None) -> None:
    layer, length = small(feature_map=name).model.layers[0].self_attn, sum(lengths)
    torch.manual_seed(0)
    x, positions = torch.randn(1, length, 32), packed(lengths)
    scopes = None if scoped is None else drawn_scopes(1, length, scoped)
    rotation = rotary(layer.config, positions, x.dtype)
    q, k, v = (p(x).view(1, length, -1, 8) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = rotate(layer.q_norm(q), *rotation), rotate(layer.k_norm(k), *rotation)
    p = kernel(layer, q[0], k[0].repeat_interleave(2, 1))
    which = documents(positions)[0]
    p = p * ((which[:, None] == which) & torch.ones(length, length, dtype=torch.bool).tril())
    if scopes is not None:
        bad = ~scopes.allowed[0][:, scopes.of[0]]
        if scopes.enforce:
            p = p * ~bad
    p = p / p.sum(-1, keepdim=True).clamp_min(1e-6 if name == "elu" else 1e-30)
    expected = layer.o_proj(torch.einsum("hqk,khd->qhd", p, v[0].repeat_interleave(2, 1)).flatten(1))
    out, _, mass = layer(x, rotation, documents(positions), None, scopes)
    torch.testing.assert_close(out[0], expected, atol=1e-5, rtol=1e-5)
    if scopes is not None:
        torch.testing.assert_close(mass[0], (p * bad).sum(-1).T, atol=1e-5, rtol=1e-5)


def test_random_features_are_made_piece_by_piece() -> None:
    layer, length = small(feature_map="favor").model.layers[0].self_attn, 8 * linear.PIECE
    x, positions = torch.randn(1, length, 32, requires_grad=True), packed([length])
    rotation = rotary(layer.config, positions, x.dtype)
    with Largest() as largest:
        layer(x, rotation, documents(positions), None)[0].sum().backward()
    assert largest.numbers <= length * 40, f"{largest.numbers} numbers; the features of all queries are {length * 128}"


def test_rows_past_the_switch_length_are_linear_and_others_are_not() -> None:
    ids = tokens(1, 40)
    window, switched, always = (small(linear_from=n).eval()(input_ids=ids).logits for n in (40, 39, 0))
    assert torch.equal(switched, always) and not torch.allclose(window, always)


def test_random_features_estimate_the_softmax_kernel_without_bias() -> None:
    g = torch.Generator().manual_seed(0)
    d, draws = 8, 4000
    q, k = (torch.nn.functional.normalize(torch.randn(6, d, generator=g), dim=-1) * d**0.5 / 2 for _ in range(2))
    found = []
    for seed in range(draws):
        omega = linear.draw(d, d, seed)
        positive = linear.favor(k, omega, False)
        # a query's features lack the factor exp(-max); put back, it is the estimate itself
        exponent = q * d**-0.25 @ omega.T - (q * d**-0.25).square().sum(-1, keepdim=True) / 2
        found.append(linear.favor(q, omega, True) * exponent.amax(-1, keepdim=True).exp() @ positive.T)
    found, exact = torch.stack(found), (q @ k.T / d**0.5).exp()
    error = (found.mean(0) - exact) / (found.std(0) / draws**0.5)
    assert error.abs().max() < 4.5, "36 means of 4,000 draws within 4.5 standard errors"
    assert (found.std(0) / draws**0.5 / exact).max() < 0.05, "the test has the power to see a bias of a quarter"


def test_random_features_are_orthogonal_and_of_the_length_of_normal_vectors() -> None:
    omega = linear.draw(64, 16, 3)
    for block in omega.split(16):
        gram = block @ block.T
        assert (gram - gram.diag().diag()).abs().max() < 1e-3
    norms = torch.cat([linear.draw(16, 16, seed).square().sum(1) for seed in range(200)])
    assert norms.mean() == pytest.approx(16, rel=0.03) and norms.var() == pytest.approx(32, rel=0.12)
    assert torch.equal(omega, linear.draw(64, 16, 3)) and not torch.equal(omega, linear.draw(64, 16, 4))
    assert "features" not in "".join(small(feature_map="favor").state_dict())


# ---- scopes


@pytest.mark.parametrize("enforce", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS[:3])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_scopes_equal_the_dense_definition(pattern: str, pooling: str, enforce: bool) -> None:
    layer = small(attention_pattern=pattern, summary_pooling=pooling).model.layers[0].self_attn
    torch.manual_seed(0)
    for lengths in ([70], [23, 40]):
        x, scopes = torch.randn(1, sum(lengths), 32), drawn_scopes(1, sum(lengths), enforce)
        out, _, mass = run(layer, x, packed(lengths), scopes)
        expected, forbidden, *_ = dense(layer, x[0], packed(lengths)[0], scopes)
        torch.testing.assert_close(out[0], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mass[0], forbidden, atol=1e-5, rtol=1e-5)
        assert (mass == 0).all() if enforce else mass.max() > 0.1


@pytest.mark.parametrize("mode", [{}, {"attention_pattern": "hybrid"}, LINEAR], ids=str)
def test_measuring_scopes_changes_no_logit_and_has_a_gradient_and_enforcing_blocks_it(mode: dict) -> None:
    model, ids = small(**mode), tokens(2, 60)
    of = (torch.arange(60) < 30).long().expand(2, -1)  # class 1 is read by nobody of class 0
    allowed = torch.stack((torch.ones_like(of), of), -1).bool()
    measured = model(input_ids=ids, scopes=Scopes(of, allowed, False), output_forbidden_mass=True)
    torch.testing.assert_close(measured.logits, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    assert len(measured.forbidden_mass) == 2 and measured.forbidden_mass[0].shape == (2, 60, 4)
    assert measured.forbidden_mass[0][:, :30].max() == 0 and measured.forbidden_mass[0][:, 30:].max() > 0.1
    sum(mass.mean() for mass in measured.forbidden_mass).backward()
    assert model.model.layers[1].self_attn.q_proj.weight.grad.norm() > 0
    other = ids.clone()
    other[:, :30] = other[:, :30] % 63 + 1
    with torch.no_grad():
        a, b = (model(input_ids=row, scopes=Scopes(of, allowed, True)).logits for row in (ids, other))
    assert (a - b)[:, 30:].abs().max() < 1e-6 and (a - b)[:, :30].abs().max() > 1e-3


def test_checkpointed_scopes_give_the_same_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = small().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        out = model(input_ids=tokens(2, 40), scopes=drawn_scopes(2, 40, False), output_forbidden_mass=True)
        (out.logits.square().mean() + sum(mass.mean() for mass in out.forbidden_mass)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


# ---- statistics


@pytest.mark.parametrize("mode", [*MODES[::4], *MODES[-2:]], ids=str)
def test_entropy_is_1_when_attention_is_uniform_and_no_edge_is_forbidden(mode: dict) -> None:
    model = small(**mode)
    for layer in model.model.layers:
        layer.self_attn.q_norm.weight.data.zero_()
    if "linear_from" in mode:
        for layer in model.model.layers:
            layer.self_attn.k_norm.weight.data.zero_()
    found = attention_statistics(model, tokens(2, 300))
    torch.testing.assert_close(found["entropy"], torch.ones(2, 4), atol=1e-4, rtol=1e-4)
    assert found["masked_edge_share"].shape == (2, 4) and found["masked_edge_share"].max() == 0


def row_entropy(p: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Per head, mean of H / log(visible keys) of the queries that see more than one; p [heads, L, keys]."""
    many = seen.sum(-1)
    counted = many > 1
    return (torch.special.entr(p).sum(-1) / many.clamp_min(2).log())[:, counted].mean(1)


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=3), pooling=st.sampled_from(POOLINGS),
    sharp=st.sampled_from((0.0, 1.0, 5.0, 40.0)), each=st.sampled_from((0, 1, 2)), seed=st.integers(0, 99),
)  # fmt: skip
def test_entropy_is_that_of_the_dense_definition_in_every_pattern(
    pattern: str, lengths: list[int], pooling: str, sharp: float, each: int, seed: int
) -> None:
    model = small(seed, attention_pattern=pattern, summary_pooling=pooling, summaries_per_block=each)
    torch.manual_seed(seed)
    for layer in model.model.layers[: 1 + (pattern == "hybrid")]:
        attention, x, positions = layer.self_attn, torch.randn(1, sum(lengths), 32), packed(lengths)
        attention.q_norm.weight.data.mul_(sharp)
        found = run(attention, x, positions, measure=True)[1]
        wide = copy.deepcopy(attention).double()
        with torch.no_grad():
            *_, p, seen = dense(wide, x[0].double(), positions[0])
        torch.testing.assert_close(found["entropy"].double(), row_entropy(p, seen), atol=1e-5, rtol=0)
        assert found["masked_edge_share"].max() == 0 and found["kernel_error"].max() < 1e-5


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(2, 80), min_size=1, max_size=3), name=st.sampled_from(("elu", "favor")),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_entropy_of_linear_attention_is_exact_at_the_queries_it_looks_at(
    lengths: list[int], name: str, seed: int
) -> None:
    length = sum(lengths)
    model = small(seed, **LINEAR, feature_map=name)
    attention, x, positions = model.model.layers[0].self_attn, torch.randn(1, length, 32), packed(lengths)
    found = attention(x, rotary(model.config, positions, x.dtype), documents(positions), None, measure=True)[1]
    wide, document = copy.deepcopy(attention).double(), documents(positions)[0]
    with torch.no_grad():
        q, k, *_ = wide.rotated(x.double(), *rotary(model.config, positions, torch.double))
        weights = kernel(wide, q[0], k[0].repeat_interleave(2, 1))
    seen = (document[:, None] == document).tril()
    p = weights * seen / (weights * seen).sum(-1, keepdim=True)
    looked = torch.linspace(1, length - 1, SAMPLED).long()
    torch.testing.assert_close(found["entropy"].double(), row_entropy(p[:, looked], seen[looked]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", [*MODES[::4], *MODES[-2:]], ids=str)
def test_measuring_attention_makes_no_square_tensor(mode: dict) -> None:
    length = 2048
    model = small(**mode, hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    with Largest() as largest:
        attention_statistics(model, tokens(1, length))
    assert largest.numbers < length * length / 4, f"a tensor of {largest.numbers} numbers at {length} tokens"


def test_a_kernel_that_does_not_heed_its_mask_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention",
        lambda q, k, v, mask, **more: honest(q, k, v, torch.zeros_like(mask), **more),
    )  # fmt: skip
    assert (attention_statistics(small(), tokens(1, 50))["kernel_error"] > 0.01).all()


@pytest.mark.parametrize("pattern", PATTERNS[:3])
def test_a_leaking_mask_is_seen_in_every_pattern(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(*arguments: object) -> object:
        found = layout(*arguments)
        found.masks[0][0, 0, 0, 2] = 0.0  # the first query sees a later one of its chunk
        return found

    monkeypatch.setattr("stackpkg.model.modeling.layout", leaky)
    share = attention_statistics(small(attention_pattern=pattern), tokens(1, 50))["masked_edge_share"]
    assert (share > 0).all() and (share < 0.05).all()


def test_a_leak_of_linear_attention_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = linear.attend
    monkeypatch.setattr(linear, "attend", lambda q, k, v, document: honest(q, k, v.roll(-1, 1), document))
    share = attention_statistics(small(**LINEAR), tokens(1, 50))["masked_edge_share"]
    assert (share > 0).all()


def test_settings_that_hide_an_unfinished_block_are_refused() -> None:
    for changes in ({"block_size": 16}, {"sliding_window": 17}, {"dilation": 0}, {"summaries_per_level": 0}):
        with pytest.raises(ValueError, match="half of it, which must be even"):
            small(attention_pattern="block", **changes)
    with pytest.raises(ValueError, match="attention_pattern"):
        small(attention_pattern="square")
