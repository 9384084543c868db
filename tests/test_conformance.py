"""Safety conformance: properties of both penalties, and a model with planted violations that unlearns them."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stackpkg import params
from stackpkg.model import StackForCausalLM, build
from stackpkg.model.scopes import ROLES, Scopes, compile, mask, rules
from stackpkg.objectives.conformance import (
    FLOOR,
    allowed_labels,
    forbidden_attention,
    forbidden_share,
    forbidden_tokens,
    violations,
)
from stackpkg.objectives.losses import token_losses

SYSTEM, USER, ASSISTANT, TOOL = (ROLES.index(name) for name in ("system", "user", "assistant", "tool"))
RULES = rules(
    [
        {"role": "user", "reads": ["user"], "writes": ["user", "assistant"], "within": "CAUSAL"},
        {"role": "assistant", "reads": ["user", "assistant", "tool"], "writes": ["assistant"], "within": "CAUSAL"},
        {"role": "tool", "reads": ["tool"], "writes": ["tool"], "within": "CAUSAL"},
    ]
)  # tool never writes to the assistant


class Layer(nn.Module):
    """Dense causal attention with normed queries and keys; the forbidden mass comes from class indicators appended to
    the values.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm, self.q_norm, self.k_norm = nn.RMSNorm(width), nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)

    def forward(self, x: Tensor, scopes: Scopes) -> tuple[Tensor, Tensor, Tensor]:
        """x [b, L, width] -> output, forbidden mass [b, L, heads], and the attention matrix to check it by."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        q, k = self.q_norm(q), self.k_norm(k)
        indicators = F.one_hot(scopes.of, scopes.allowed.shape[-1]).to(x.dtype)
        values = torch.cat((v, indicators[:, None].expand(-1, self.heads, -1, -1)), -1)
        read = F.scaled_dot_product_attention(q, k, values, is_causal=True)
        out, share = read.split((v.shape[-1], indicators.shape[-1]), -1)
        mass = (share * ~scopes.allowed[:, None]).sum(-1).transpose(1, 2)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~torch.ones_like(q @ k.mT).bool().tril(), -math.inf)
        return x + self.out(out.transpose(1, 2).flatten(2)), mass, scores.softmax(-1)


class Tiny(nn.Module):
    """Two such layers over embeddings of tokens and positions."""

    def __init__(self, vocab: int, length: int, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList([Layer(width, heads) for _ in range(2)])
        self.head = nn.Linear(width, vocab)

    def forward(self, ids: Tensor, scopes: Scopes) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, masses = self.tokens(ids) + self.places.weight[: ids.shape[1]], []
        for layer in self.layers:
            x, mass, _ = layer(x, scopes)
            masses.append(mass)
        return self.head(x), tuple(masses)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- attention on forbidden edges


@settings(max_examples=25, deadline=None)
@given(data=st.data(), length=st.integers(1, 20), seed=st.integers(0, 99))
def test_appended_indicators_read_what_the_attention_matrix_has_on_forbidden_edges(
    data: st.DataObject, length: int, seed: int
) -> None:
    roles = torch.tensor([data.draw(st.lists(st.integers(0, 5), min_size=length, max_size=length)) for _ in range(2)])
    spans = torch.full((2, length, 4), -1)
    torch.manual_seed(seed)
    layer = Layer(8, 2).double()
    _, mass, matrix = layer(drawn(seed, 2, length, 8) * 3, compile(RULES, roles, spans, enforce=False))
    forbidden = (torch.ones(length, length).tril().bool() & ~mask(RULES, roles, spans))[:, None]
    torch.testing.assert_close(mass, (matrix * forbidden).sum(-1).transpose(1, 2), atol=1e-12, rtol=1e-9)


def test_forbidden_attention_is_a_sum_over_queries_of_the_mean_over_layers_and_heads() -> None:
    mass = [drawn(layer, 3, 5, 2 + layer).sigmoid() for layer in range(2)]  # layers may differ in heads
    queries = [(layer, b, q) for layer in range(2) for b in range(3) for q in range(5)]
    by_hand = sum(-(1 - mass[layer][b, q]).log().mean().item() / 2 for layer, b, q in queries)
    assert forbidden_attention(mass).item() == pytest.approx(by_hand, rel=1e-12)
    assert forbidden_share(mass).item() == pytest.approx(sum(mass[i][b, q].mean().item() / 2 for i, b, q in queries))
    parts = sum(forbidden_attention([layer[b : b + 1] for layer in mass]) for b in range(3))
    assert float(parts) == pytest.approx(by_hand, rel=1e-12), "additive over rows"
    with pytest.raises(ValueError, match="enforce=False"):
        forbidden_attention(())


def test_the_range_of_forbidden_attention() -> None:
    empty, full = [torch.zeros(3, 5, 2)] * 4, [torch.ones(3, 5, 2)] * 4
    assert forbidden_attention(empty) == 0 and forbidden_share(empty) == 0
    assert forbidden_attention(full).item() == pytest.approx(15 * (1 - math.log(FLOOR))) and forbidden_share(full) == 15
    rising = [float(forbidden_attention([torch.full((1, 1, 1), m)])) for m in torch.linspace(0, 1, 400).tolist()]
    assert rising == sorted(set(rising)), "it grows with every bit of mass, below the floor too"


@pytest.mark.parametrize("m", [0.001, 0.5, 0.985, 0.995, 1 - 1e-9])
def test_forbidden_attention_has_the_right_gradient(m: float) -> None:
    mass = torch.full((1, 2, 2), m, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: forbidden_attention([t, t]), mass, eps=1e-10, atol=1e-4)
    margin = torch.logit(mass.detach()).requires_grad_()
    forbidden_attention([margin.sigmoid()]).backward()
    expected = m / 2 if 1 - m > FLOOR else m * (1 - m) / FLOOR / 2
    torch.testing.assert_close(margin.grad, torch.full_like(margin, expected)), "m along the margin, per head"


def test_forbidden_attention_has_the_right_gradient_down_to_the_hidden_states() -> None:
    roles = torch.tensor([[SYSTEM, TOOL, USER, ASSISTANT, TOOL, ASSISTANT]])
    scopes = compile(RULES, roles, torch.full((1, 6, 4), -1), enforce=False)
    layer = Layer(4, 2).double()
    x = drawn(1, 1, 6, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: forbidden_attention([layer(t, scopes)[1]]), x)


def test_all_edges_allowed_is_exactly_zero() -> None:
    roles = torch.full((2, 7), USER)
    for listed in (RULES, rules([{"role": "user", "reads": ["user"], "writes": ["user"], "within": "CAUSAL"}])):
        _, masses = Tiny(9, 7)(
            torch.ones(2, 7).long(), compile(listed, roles, torch.full((2, 7, 4), -1), enforce=False)
        )
        assert forbidden_attention(masses) == 0


# ---- probability of forbidden tokens

LOGITS = st.integers(0, 10_000).map(lambda seed: drawn(seed, 2, 6, 7) * 3)
INSIDE = st.lists(st.booleans(), min_size=12, max_size=12).map(lambda flags: torch.tensor(flags).view(2, 6))
FORBIDDEN = st.sets(st.integers(0, 6), max_size=6).map(lambda ids: torch.tensor(sorted(ids), dtype=torch.long))


@settings(max_examples=60, deadline=None)
@given(logits=LOGITS, inside=INSIDE, forbidden=FORBIDDEN)
def test_forbidden_tokens_is_minus_log_of_the_allowed_probability(
    logits: Tensor, inside: Tensor, forbidden: Tensor
) -> None:
    value, p = forbidden_tokens(logits, inside, forbidden), logits.softmax(-1)
    by_hand = [-math.log1p(-p[b, t - 1, forbidden].sum()) for b in range(2) for t in range(1, 6) if inside[b, t]]
    assert value.item() == pytest.approx(sum(by_hand), rel=1e-5, abs=1e-6)
    assert value >= 0
    torch.testing.assert_close(forbidden_tokens(logits + 5, inside, forbidden), value, rtol=1e-4, atol=1e-5)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    moved = forbidden_tokens(logits[..., order], inside, order.argsort()[forbidden])
    torch.testing.assert_close(moved, value, rtol=1e-5, atol=1e-6)
    rows = sum(forbidden_tokens(logits[b : b + 1], inside[b : b + 1], forbidden) for b in range(2))
    torch.testing.assert_close(rows, value, rtol=1e-5, atol=1e-6)
    top = logits[:, :-1].argmax(-1)
    greedy = sum(bool(inside[b, t + 1]) and int(top[b, t]) in forbidden.tolist() for b in range(2) for t in range(5))
    assert violations(logits, inside, forbidden) == greedy


def test_forbidden_tokens_is_exactly_zero_when_nothing_is_forbidden() -> None:
    none, first = torch.tensor([], dtype=torch.long), torch.zeros(2, 6, dtype=torch.bool)
    first[:, 0] = True  # the first token of a row is predicted by nothing
    for inside, forbidden in ((torch.ones(2, 6).bool(), none), (first, torch.tensor([1])), (~first & first, none)):
        logits = drawn(3, 2, 6, 7).requires_grad_()
        value = forbidden_tokens(logits, inside, forbidden)
        value.backward()
        assert value == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("margin", [-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4])
def test_forbidden_tokens_is_safe_where_p_is_0_or_1(margin: float) -> None:
    """p = sigmoid(margin); at 100 already 1 - p is 0 in float32, where -log(1 - p) would be infinite."""
    logits = torch.tensor([[[margin, 0.0], [0.0, 0.0]]], requires_grad=True)
    value = forbidden_tokens(logits, torch.tensor([[False, True]]), torch.tensor([0]))
    value.backward()
    exact = margin if margin > 50 else math.log1p(math.exp(margin)) if margin > -700 else 0.0
    assert value.item() == pytest.approx(exact, rel=1e-6)
    p = 1 / (1 + math.exp(min(-margin, 700)))
    assert logits.grad[0, 0].tolist() == pytest.approx([p, -p], rel=1e-5), "the gradient is p, also near 1"
    assert logits.grad[0, 1].abs().max() == 0


def test_forbidden_tokens_has_the_right_gradient() -> None:
    logits, inside = drawn(5, 2, 4, 5).requires_grad_(), torch.tensor([[False, True, True, False], [True, False] * 2])
    assert torch.autograd.gradcheck(lambda z: forbidden_tokens(z, inside, torch.tensor([1, 4])), logits)


@pytest.mark.parametrize(
    ("inside", "forbidden", "complaint"),
    [
        (torch.ones(2, 5).bool(), [1], r"\[2, 5\]"),
        (torch.ones(2, 6), [1], "torch.float32"),
        (torch.ones(2, 6).bool(), [7], "0 to 6"),
        (torch.ones(2, 6).bool(), [-1], "0 to 6"),
        (torch.ones(2, 6).bool(), list(range(7)), "all 7 tokens are forbidden"),
    ],
)
def test_bad_arguments_are_refused(inside: Tensor, forbidden: list[int], complaint: str) -> None:
    for function in (forbidden_tokens, violations):
        with pytest.raises(ValueError, match=complaint):
            function(drawn(0, 2, 6, 7), inside, torch.tensor(forbidden))


# ---- planted violations

LETTERS, LENGTH, ROWS = 8, 10, 64
LR = 1e-2
GIVEN, SECRET, REPEATED, LEAKED = 1, 3, 7, 9  # the user's token at 1 is what 7 repeats, the tool's at 3 what 9 leaks
PROTECTED = torch.arange(LETTERS)  # forbidden at 9; the tool's secret is one of them


def planted(seed: int) -> tuple[Tensor, Scopes, Tensor]:
    """Rows in which the assistant repeats what the user said and, in a protected scope, what only a tool knows."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(LETTERS, 2 * LETTERS, (ROWS, LENGTH), generator=g)
    ids[:, SECRET] = torch.randint(0, LETTERS, (ROWS,), generator=g)
    ids[:, REPEATED], ids[:, LEAKED] = ids[:, GIVEN], ids[:, SECRET]
    roles = torch.tensor([USER, USER, TOOL, TOOL, TOOL] + [ASSISTANT] * 5).expand(ROWS, -1)
    inside = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    inside[:, LEAKED] = True
    return ids, compile(RULES, roles, torch.full((ROWS, LENGTH, 4), -1), enforce=False), inside


@torch.no_grad()
def measured(model: nn.Module) -> dict[str, float]:
    """On fresh rows: mean mass of all queries and of the leaking one, p, greedy violations, accuracy where allowed."""
    ids, scopes, inside = planted(10_000)
    logits, masses = model(ids, scopes)
    return {
        "mass": float(forbidden_share(masses) / ids.numel()),
        "leaking": max(float(layer[:, LEAKED - 1].mean()) for layer in masses),
        "p": float(logits[:, LEAKED - 1].softmax(-1)[:, PROTECTED].sum(-1).max()),
        "violations": int(violations(logits, inside, PROTECTED)),
        "accuracy": float((logits[:, REPEATED - 1].argmax(-1) == ids[:, REPEATED]).float().mean()),
    }


def train(model: nn.Module, steps: int, weight: float, first: int, clean: bool, lr: float = LR) -> dict[str, float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        ids, scopes, inside = planted(first + step)
        logits, masses = model(ids, scopes)
        labels = torch.full_like(ids, -100)
        labels[:, [REPEATED, LEAKED]] = ids[:, [REPEATED, LEAKED]]
        if clean:
            labels = allowed_labels(labels, inside, PROTECTED)
        loss = token_losses(logits, labels).sum() / (labels != -100).sum()
        if weight:
            tokens = forbidden_tokens(logits, inside, PROTECTED) / inside.sum()
            loss = loss + weight * (forbidden_attention(masses) / ids.numel() + tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return measured(model)


def test_training_on_planted_violations_drives_both_to_zero() -> None:
    """A model that has learned to leak unlearns it at the default weight 0.1, and keeps what it may do. The control
    sees the same rows and labels without the penalty, and leaks on.
    """
    torch.manual_seed(2)
    model = Tiny(2 * LETTERS, LENGTH)
    taught = train(model, 200, weight=0.0, first=0, clean=False)
    control = Tiny(2 * LETTERS, LENGTH)
    control.load_state_dict(model.state_dict())
    without = train(control, 400, weight=0.0, first=200, clean=True)
    after = train(model, 400, weight=0.1, first=200, clean=True)
    for leaking in (taught, without):
        assert leaking["mass"] > 0.2 and leaking["leaking"] > 0.5 and leaking["p"] > 0.9
        assert leaking["violations"] > ROWS / 4
    assert after["mass"] < 0.01 and after["leaking"] < 0.01 and after["p"] < 0.01 and after["violations"] == 0
    assert taught["accuracy"] > 0.95 and after["accuracy"] > 0.95


class Reference(nn.Module):
    """The reference model, told the place of a token, which here is all that tells its role, as `Tiny` is."""

    def __init__(self) -> None:
        super().__init__()
        config = {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
            "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 2, "num_experts_per_tok": 1,
            "sliding_window": 16, "block_size": 8,
        }  # fmt: skip
        self.model = build(params.Model(config=config), 2 * LETTERS + 1, 2 * LETTERS, 2)
        self.places = nn.Embedding(LENGTH, 32)

    def forward(self, ids: Tensor, scopes: Scopes) -> tuple[Tensor, tuple[Tensor, ...]]:
        x = self.model.get_input_embeddings()(ids) + self.places.weight
        out = self.model(inputs_embeds=x, scopes=scopes, output_forbidden_mass=True, use_cache=False)
        return out.logits, out.forbidden_mass


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Such small products are slower on several threads, much so where others want them too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_reference_model_unlearns_planted_violations_too(one_thread: None) -> None:
    """Here the mass is what the model itself tells of, and the weight 1. The control reads on what it may not."""
    torch.manual_seed(1)
    model = Reference()
    assert isinstance(model.model, StackForCausalLM)
    taught = train(model, 120, weight=0.0, first=0, clean=False)
    control = copy.deepcopy(model)
    without = train(control, 60, weight=0.0, first=200, clean=True)
    train(model, 240, weight=1.0, first=200, clean=True, lr=2 * LR)
    after = train(model, 60, weight=1.0, first=200, clean=True, lr=LR / 5)
    assert taught["p"] > 0.9 and taught["violations"] == ROWS
    assert all(reading["mass"] > 0.2 and reading["leaking"] > 0.4 for reading in (taught, without))
    assert after["mass"] < 0.01 and after["leaking"] < 0.01 and after["p"] < 0.01 and after["violations"] == 0
    assert after["accuracy"] > 0.95


@pytest.mark.parametrize("weight", [0.1, 10.0])
def test_against_forbidden_labels_the_penalty_only_bargains(weight: float) -> None:
    logits = torch.zeros(1, 2, 4, requires_grad=True)
    labels, inside, forbidden = torch.tensor([[0, 3]]), torch.tensor([[False, True]]), torch.tensor([3])
    optimizer = torch.optim.LBFGS([logits], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = token_losses(logits, labels).sum() + weight * forbidden_tokens(logits, inside, forbidden)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert logits[0, 0].softmax(-1)[3].item() == pytest.approx(1 / (1 + weight), rel=1e-3)
    assert allowed_labels(labels, inside, forbidden).tolist() == [[0, -100]]
    assert torch.equal(allowed_labels(labels, ~inside, forbidden), labels)
