"""Roles and scopes: the compiled rules against their definition, edge by edge; no illegal edge is ever allowed."""

from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stackpkg.model import scopes
from stackpkg.model.scopes import CLASSES, ROLES

RULE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(ROLES),
        "reads": st.lists(st.sampled_from(ROLES), max_size=6),
        "writes": st.lists(st.sampled_from(ROLES), max_size=6),
        "within": st.sampled_from(CLASSES),
    }
)
RULES = st.lists(RULE, max_size=14)
OPEN = [{"role": role, "reads": list(ROLES), "writes": list(ROLES), "within": "CAUSAL"} for role in ROLES]


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Roles [b, L] and spans [b, L, 4] of up to 2 x 12 tokens."""
    rows, length = draw(st.integers(1, 2)), draw(st.integers(1, 12))
    token = st.tuples(st.integers(0, 5), *[st.integers(-1, 1)] * 4)
    drawn = draw(st.lists(token, min_size=rows * length, max_size=rows * length))
    both = torch.tensor(drawn).view(rows, length, 5)
    return both[..., 0], both[..., 1:]


def legal(listed: list[dict], roles: list[int], spans: list[list[int]], q: int, k: int) -> bool:
    """The definition, for one edge: from the rules as they are written."""
    if k > q:
        return False
    reader, source = ROLES[roles[q]], ROLES[roles[k]]

    def holds(name: str) -> bool:
        column = CLASSES.index(name) - 1
        return name == "CAUSAL" or spans[q][column] == spans[k][column] != -1

    may_read = any(r["role"] == reader and source in r["reads"] and holds(r["within"]) for r in listed)
    may_write = any(r["role"] == source and reader in r["writes"] and holds(r["within"]) for r in listed)
    other_call = -1 not in (spans[q][1], spans[k][1]) and spans[q][1] != spans[k][1]
    out_of_protection = spans[k][2] != -1 and spans[q][2] != spans[k][2]
    other_record = -1 not in (spans[q][3], spans[k][3]) and spans[q][3] != spans[k][3]
    return may_read and may_write and not (other_call or out_of_protection or other_record)


def expanded(compiled: scopes.Scopes) -> torch.Tensor:
    """[b, L, L] from the small form, with causality, as attention composes them."""
    columns = compiled.of[:, None].expand(-1, compiled.of.shape[1], -1)
    return compiled.allowed.gather(-1, columns).tril()


@settings(max_examples=80, deadline=None)
@given(listed=RULES, batch=batches())
def test_the_compiled_rules_allow_exactly_the_legal_edges(listed: list[dict], batch: tuple) -> None:
    roles, spans = batch
    compiled = scopes.compile(scopes.rules(listed), roles, spans, enforce=True)
    assert torch.equal(expanded(compiled), scopes.mask(scopes.rules(listed), roles, spans))
    for row, found in enumerate(expanded(compiled)):
        ids, places = roles[row].tolist(), spans[row].tolist()
        edges = [[legal(listed, ids, places, q, k) for k in range(len(ids))] for q in range(len(ids))]
        assert found.tolist() == edges


@settings(max_examples=40, deadline=None)
@given(listed=RULES, batch=batches(), data=st.data())
def test_a_rule_that_is_deleted_never_adds_an_edge(listed: list[dict], batch: tuple, data: st.DataObject) -> None:
    assume(listed)
    fewer = list(listed)
    fewer.pop(data.draw(st.integers(0, len(listed) - 1)))
    before, after = (scopes.mask(scopes.rules(some), *batch) for some in (listed, fewer))
    assert not (after & ~before).any()


@settings(max_examples=40, deadline=None)
@given(batch=batches(), data=st.data())
def test_what_no_rule_allows_is_denied(batch: tuple, data: st.DataObject) -> None:
    roles, spans = batch
    assert not scopes.mask(scopes.rules([]), roles, spans).any()
    assert not scopes.mask(scopes.rules([r | {"writes": []} for r in OPEN]), roles, spans).any()
    assert not scopes.mask(scopes.rules([r | {"reads": []} for r in OPEN]), roles, spans).any()
    mute = data.draw(st.sampled_from(ROLES))
    edges = scopes.mask(scopes.rules([r for r in OPEN if r["role"] != mute]), roles, spans)
    its = roles == ROLES.index(mute)
    assert not (edges & (its[:, :, None] | its[:, None])).any()


@settings(max_examples=40, deadline=None)
@given(batch=batches())
def test_no_rule_opens_a_wall(batch: tuple) -> None:
    roles, spans = batch
    edges = scopes.mask(scopes.rules(OPEN), roles, spans)
    for row, q, k in edges.nonzero().tolist():
        reader, source = spans[row, q].tolist(), spans[row, k].tolist()
        assert k <= q
        assert -1 in (reader[1], source[1]) or reader[1] == source[1], "another tool call"
        assert -1 in (reader[3], source[3]) or reader[3] == source[3], "another retrieved record"
        assert source[2] in (-1, reader[2]), "a protected scope, from outside"
    open_ground = (spans[..., 1:] == -1).all(-1)
    assert edges[open_ground[:, :, None] & open_ground[:, None] & torch.ones_like(edges).tril()].all()


@settings(max_examples=40, deadline=None)
@given(listed=RULES, batch=batches(), data=st.data())
def test_an_edge_does_not_depend_on_later_tokens_or_on_how_spans_are_numbered(
    listed: list[dict], batch: tuple, data: st.DataObject
) -> None:
    roles, spans = batch
    table, length = scopes.rules(listed), roles.shape[1]
    cut = data.draw(st.integers(1, length))
    whole = expanded(scopes.compile(table, roles, spans, enforce=True))
    part = expanded(scopes.compile(table, roles[:, :cut], spans[:, :cut], enforce=True))
    assert torch.equal(whole[:, :cut, :cut], part)
    renamed = torch.where(spans >= 0, 90 - 7 * spans, -1)
    assert torch.equal(expanded(scopes.compile(table, roles, renamed, enforce=True)), whole)


def conversation(turns: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns of user, assistant, a tool call with code and result, a retrieved record; `size` tokens a message."""
    roles, spans = [0] * size, [[0, -1, -1, -1]] * size
    for turn in range(turns):
        for role, call, record in ((1, -1, -1), (2, -1, -1), (4, turn, -1), (3, turn, -1), (5, -1, turn), (2, -1, -1)):
            roles += [role] * size
            spans += [[len(roles) // size, call, -1, record]] * size
    return torch.tensor([roles]), torch.tensor([spans])


def test_the_compiled_form_stays_small() -> None:
    default = scopes.load()
    widths = {}
    for turns, size in ((1, 4), (1, 64), (8, 4), (8, 64)):
        roles, spans = conversation(turns, size)
        compiled = scopes.compile(default, roles, spans, enforce=False)
        widths[turns, size] = compiled.allowed.shape[-1]
        assert compiled.of.shape == roles.shape and int(compiled.of.max()) + 1 == compiled.allowed.shape[-1]
    # system, user and assistant are one class each, however many messages; code, tool and data one a turn
    assert widths == {(1, 4): 6, (1, 64): 6, (8, 4): 27, (8, 64): 27}


def test_the_default_rules_isolate_system_tool_and_data() -> None:
    default = scopes.load()
    direct = (default.read.any(-1) & default.write.any(-1).T).long()
    reach = direct + torch.eye(len(ROLES), dtype=torch.long)
    for _ in ROLES:
        reach = ((reach @ reach) > 0).long()
    learns = {ROLES[i]: {ROLES[j] for j in range(len(ROLES)) if reach[i, j]} for i in range(len(ROLES))}
    assert learns["system"] == {"system"} and learns["data"] == {"data"}
    assert learns["tool"] == {"tool", "system"}, "of system only what shares its protected scope"
    assert learns["assistant"] == set(ROLES)


def test_the_default_rules_let_a_conversation_flow() -> None:
    roles, spans = conversation(2, 1)
    edges = scopes.mask(scopes.load(), roles, spans)[0]
    # 0 system; 1 user, 2 assistant, 3 code, 4 tool, 5 data, 6 assistant; 7 user, 8 assistant, 9 code, 10 tool, 11 data
    assert edges[12].nonzero().flatten().tolist() == list(range(13)), "the answer reads everything before it"
    assert edges[9].nonzero().flatten().tolist() == [0, 1, 2, 6, 7, 8, 9], "no tool, no data, not the other call's code"
    assert edges[10].nonzero().flatten().tolist() == [10]
    assert edges[11].nonzero().flatten().tolist() == [11]
    assert edges.diagonal().all()


def test_a_secret_is_read_inside_its_scope_alone() -> None:
    roles = torch.tensor([[0, 0, 3, 3, 2]])
    spans = torch.full((1, 5, 4), -1)
    spans[0, 1:3, 2] = 0  # the second token of the system prompt and the first of the tool's result
    edges = scopes.mask(scopes.load(), roles, spans)[0]
    assert edges[2, 1] and not edges[3, 1] and not edges[4, 1] and not edges[4, 2]
    assert edges[4, 0] and not edges[2, 0]


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ([{"role": "asistant", "reads": ["user"], "within": "CAUSAL"}], "did you mean 'assistant'"),
        ([{"role": "user", "reads": ["tol"], "within": "CAUSAL"}], r"rule 0.reads.0: .*did you mean 'tool'"),
        ([{"role": "user", "reads": ["tool"], "within": "tool_scop"}], "did you mean 'TOOL_SCOPE'"),
        ([{"role": "user", "writes": ["x"], "within": "CAUSAL"}], "allowed: system, user"),
        (
            [{"role": "user", "read": ["tool"], "within": "CAUSAL"}],
            r"rule 0.read: .*\n.*keys role, reads, writes, within",
        ),
        ([{"role": "user", "reads": ["tool"]}], "rule 0.within: Field required"),
        ({"role": "user"}, "valid list"),
        (None, "valid list"),
    ],
)
def test_bad_rules_are_refused_with_the_nearest_name(values: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        scopes.rules(values)


def test_a_file_that_is_not_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for text in ("- {role: user", "- !!python/object/apply:os.system [echo]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"mine\.yaml"):
            scopes.load(path)
    path.write_text("- {role: user, reads: [user], writes: [user], within: CAUSAL}")
    assert scopes.load(path).read.sum() == scopes.load(path).write.sum() == 1


@pytest.mark.parametrize(
    ("roles", "spans", "complaint"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3, 4).long(), "torch.float32"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3, 3).long(), r"\[2, 3, 3\]"),
        (torch.zeros(3).long(), torch.zeros(3, 4).long(), r"allowed: integers \[b, L\]"),
        (torch.full((1, 2), 6), torch.zeros(1, 2, 4).long(), "roles from 6 to 6"),
        (torch.full((1, 2), -1), torch.zeros(1, 2, 4).long(), "roles from -1"),
    ],
)
def test_bad_ids_are_refused(roles: torch.Tensor, spans: torch.Tensor, complaint: str) -> None:
    for function in (
        lambda *ids: scopes.compile(scopes.load(), *ids, enforce=True),
        lambda *i: scopes.mask(scopes.load(), *i),
    ):
        with pytest.raises(ValueError, match=complaint):
            function(roles, spans)
