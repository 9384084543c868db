"""Conversations: drawn from the corpus alone, laid out as the rules need, read from chat data, and withdrawn."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_corpus import conversing, corpus, profile

from stackpkg import runs
from stackpkg.data import conversations, curriculum, provenance, tokenizer
from stackpkg.data.corpus import Corpus
from stackpkg.data.ledger import Ledger
from stackpkg.data.stream import Stream
from stackpkg.model import scopes
from stackpkg.schema import ROLES, Auxiliary

RULES = scopes.load(Path(__file__).parents[1] / "params/scopes.yaml")
STAGES = [{"steps": 6, "context": 64, "conversations": 0.5}, {"steps": 4, "context": 64}]
MODEL = tokenizer.of_shards(corpus())
SAID = [
    {"role": "system", "content": "Be brief."},
    {"role": "system", "content": "The code is 42.", "scope": "vault"},
    {"role": "data", "content": "A record.", "record": "r1", "segment": "s"},
    {"role": "user", "content": "And this?", "segment": "s"},
    {"role": "tool", "content": "Done", "tool_call": 1, "scope": "vault"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.fixture(scope="module")
def made() -> list[dict]:
    return conversations.generate(profile(), Corpus(corpus()), MODEL)


def test_what_is_forbidden_is_what_holds_a_character() -> None:
    ids = conversations.forbidden(MODEL, "07")
    texts = [MODEL.decode([token]) for token in range(MODEL.get_vocab_size())]
    assert ids.tolist() == [k for k, text in enumerate(texts) if "0" in text or "7" in text] and len(ids) >= 2
    assert not len(conversations.forbidden(MODEL, ""))


def test_conversations_are_a_function_of_seed_and_corpus(made: list[dict]) -> None:
    assert made == conversations.generate(profile(), Corpus(corpus()), MODEL)
    other = conversations.generate(profile(seed=18), Corpus(corpus()), MODEL)
    assert all(a["input_ids"] != b["input_ids"] for a, b in zip(made, other, strict=True))
    longer = profile(auxiliary=profile().auxiliary.model_dump() | {"conversations": 32})
    assert conversations.generate(longer, Corpus(corpus()), MODEL)[: len(made)] == made, "more of them move none"


def test_a_conversation_is_real_text_of_its_split_with_a_secret_in_its_protected_scope(made: list[dict]) -> None:
    found, banned = Corpus(corpus()), set(conversations.forbidden(MODEL, profile().auxiliary.forbidden).tolist())
    split_of = dict(zip(found.records.tolist(), found.split.tolist(), strict=True))
    text = " ".join(map(str, np.concatenate([found.read(d, 0, int(n)) for d, n in enumerate(found.tokens)]).tolist()))
    known = conversations.marks(MODEL)
    for row in made:
        assert {split_of[name] for name in row["record_ids"]} == {
            "validation" if row["split"] == "held_out" else "train"
        }
        assert (
            len(row["input_ids"]) == len(row["roles"]) == len(row["spans"]) == profile().auxiliary.conversation_tokens
        )
        spans, ids = np.array(row["spans"]), np.array(row["input_ids"])
        first = spans[:, 0] == 0  # the system prompt: its mark, then what a document says
        mark = known["system", False]
        assert ids[first][: len(mark)].tolist() == mark
        assert f" {' '.join(map(str, ids[first][len(mark) :].tolist()))} " in f" {text} "
        inside = spans[:, scopes.PROTECTED] >= 0
        assert {ROLES[k] for k in np.array(row["roles"])[inside]} >= {"system", "tool", "assistant"}
        assert sum(token in banned for token in ids[inside].tolist()) >= 2 * conversations.SECRET
    assert {row["split"] for row in made} == {"train", "held_out"}


def test_the_rules_allow_and_forbid_what_they_should_in_each(made: list[dict]) -> None:
    wanted = {  # (reader, source) -> whether some edge between them is open, of messages in no protected scope
        ("assistant", "user"): True, ("user", "assistant"): True, ("assistant", "data"): True, ("user", "tool"): False,
        ("code", "user"): True, ("tool", "user"): False, ("data", "assistant"): False, ("data", "user"): False,
    }  # fmt: skip
    seen: dict[tuple[str, str], set[bool]] = {pair: set() for pair in wanted}
    for row in made:
        roles, spans = torch.tensor([row["roles"]]), torch.tensor([row["spans"]])
        edges = scopes.mask(RULES, roles, spans)[0]
        assert edges.diagonal().all(), "every token reads itself"
        scope, call, record = (spans[0, :, k] for k in (2, 1, 3))
        walls = (scope[None] >= 0) & (scope[:, None] != scope[None])
        walls |= (call[None] >= 0) & (call[:, None] >= 0) & (call[:, None] != call[None])
        walls |= (record[None] >= 0) & (record[:, None] >= 0) & (record[:, None] != record[None])
        assert not (edges & walls).any() and walls.tril().any()
        leak = torch.nonzero((scope >= 0) & (roles[0] == ROLES.index("assistant")))[-1].item()
        told = (scope == scope[leak]) & (roles[0] == ROLES.index("system"))
        assert edges[leak][told].all(), "the assistant in the scope reads the secret"
        plain = (scope < 0)[:, None] & (scope < 0)[None] & torch.ones_like(edges).tril().bool()
        for (reader, source), values in seen.items():
            part = plain & (roles[0] == ROLES.index(reader))[:, None] & (roles[0] == ROLES.index(source))[None]
            values |= set(edges[part].unique().tolist())
    assert {pair: True in values for pair, values in seen.items()} == wanted
    assert all(seen.values()), "a pair of roles never met"


def test_a_width_that_cuts_the_secret_and_a_set_without_forbidden_tokens_are_refused() -> None:
    sizes = profile().auxiliary.model_dump()
    for change, said in (
        ({"conversation_tokens": 64}, r"conversation_tokens 64 cuts the protected scope"),
        ({"forbidden": ""}, "no token has such a character"),
    ):
        with pytest.raises(ValueError, match=said):
            conversations.generate(profile(auxiliary=sizes | change), Corpus(corpus()), MODEL)


# ---- chat data


def test_chat_data_gets_roles_and_spans(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": SAID}) + "\n")
    (row,), bad = conversations.read(tmp_path / "c.jsonl")
    assert bad == [] and row["source"] == "c.jsonl/1"
    messages = [m | {"ids": MODEL.encode(m["content"]).ids} for m in row["messages"]]
    laid = conversations.lay_out(messages, conversations.marks(MODEL), 10_000)
    of = list(dict.fromkeys((role, *span) for role, span in zip(laid["roles"], laid["spans"], strict=True)))
    assert [(ROLES[role], *span) for role, *span in of] == [
        ("system", 0, -1, -1, -1), ("system", 1, -1, 0, -1), ("data", 2, -1, -1, 0), ("user", 2, -1, -1, -1),
        ("tool", 3, 0, 0, -1), ("assistant", 4, -1, -1, -1),
    ]  # fmt: skip
    text = MODEL.decode(laid["input_ids"])
    assert "\n<|system|>\nBe brief.\n<|system protected|>\nThe code is 42." in text
    edges = scopes.mask(RULES, torch.tensor([laid["roles"]]), torch.tensor([laid["spans"]]))[0]
    segment = np.array(laid["spans"])[:, 0]
    user = int(np.flatnonzero(np.array(laid["roles"]) == ROLES.index("user"))[0])
    assert edges[user][torch.as_tensor(np.array(laid["roles"]) == ROLES.index("data"))].all(), "attached to its message"
    assert not edges[user][torch.as_tensor(segment == 1)].any(), "the vault"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "robot", "content": "x"}, "role 'robot' is unknown in message 2"),
        ({"role": "user"}, "`content` is missing in message 2"),
        ({"role": "tool", "content": "x"}, "role tool without `tool_call` in message 2"),
        ({"role": "data", "content": "x"}, "role data without `record` in message 2"),
        ({"role": "user", "content": "x", "scope": [1]}, "`scope` is a list in message 2"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, message: dict, said: str) -> None:
    lines = [{"messages": SAID}, {"messages": [SAID[0], message]}, {"messages": []}]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{no json\n")
    rows, bad = conversations.read(path)
    assert len(rows) == 1 and [problem.line for problem in bad] == [2, 3, 4]
    assert said in bad[0].wrong and bad[0].mend


def test_a_file_is_encoded_and_split_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "root", lambda: tmp_path)
    talks = [{"messages": [*SAID[:-1], {"role": "assistant", "content": f"Yes {k}."}]} for k in range(60)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    sizes = Auxiliary(conversation_set="c.jsonl", conversation_tokens=70)
    rows, bad = conversations.load(sizes, MODEL)
    assert len(rows) == 60 and not bad and {row["split"] for row in rows} == {"train", "held_out"}
    assert all("r1" in row["record_ids"] and len(row["input_ids"]) <= 70 for row in rows)
    (tmp_path / "c.jsonl").write_text("nothing\n" * 3)
    with pytest.raises(ValueError, match=r"c\.jsonl:1: no JSON"):
        conversations.load(sizes, MODEL)
    assert conversations.load(Auxiliary(), MODEL) == ([], [])


# ---- in the stream


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conversing(tmp_path_factory.mktemp("run"))


def test_they_ride_along_at_their_rate_for_whole_steps(run: Path) -> None:
    stream = Stream(run / "data", profile(curriculum=STAGES))
    width = profile().auxiliary.conversation_tokens
    for step in range(10):
        batch = stream[step]
        assert batch["conversation_ids"].shape == batch["conversation_roles"].shape == (16, width)
        assert batch["conversation_spans"].shape == (16, width, 4)
        assert ((batch["conversation_key"] >= 0) == (step in (1, 3, 5))).all()
    keys = np.concatenate([stream[step]["conversation_key"] for step in (1, 3, 5)])
    assert len(set(keys.tolist())) > 10
    held = stream.validation_conversations(2)
    assert held["conversation_ids"].shape == (2, width)
    assert Stream(run / "data", profile()).validation_conversations(2) == {}, "no stage asks for them"
    assert "conversation_ids" not in Stream(run / "data", profile())[0]


def test_a_withdrawn_record_is_in_no_later_conversation_and_the_ledger_tells_of_all(run: Path) -> None:
    p, home = profile(curriculum=STAGES), run / "checkpoints/main"
    before = Stream(run / "data", p)
    victim = before.origins["conversations"][before.ridden("conversations", before.plan.rows_at(5).start)][-1]
    held = before._held_talks[0][0][0]
    decisions = [{"kind": "withdraw", "step": 4, "record_id": name} for name in (victim, held)]
    curriculum.record(home / "decisions.jsonl", decisions)
    files = ("manifest.json", "conversations.parquet", "scopes.yaml")
    job = {"params": p.model_dump(mode="json"), "steps": 10}
    runs.write_json(home / "job.json", job | {"data": {name: runs.digest(run / "data" / name) for name in files}})
    ledger = Ledger(run, "main")
    expected: dict[str, set[int]] = {}
    for step in range(10):
        told = [item for item in ledger.step(step) if item["use"] == "conversations"]
        assert bool(told) == (step in (1, 3, 5))
        for item in told:
            expected.setdefault(item["record_id"], set()).add(step)
    assert 5 not in expected.get(victim, set())
    for name, steps in expected.items():
        assert {item["step"] for item in ledger.document(name) if item["use"] == "conversations"} == steps
    rows = [ledger.stream.validation_conversations(99), before.validation_conversations(99)]
    assert len(rows[0]["conversation_key"]) < len(rows[1]["conversation_key"]), "held out, it is gone at once"


def test_ids_of_another_tokenizer_are_refused(run: Path, tmp_path: Path) -> None:
    data = shutil.copytree(run / "data", tmp_path / "data")
    rows = tokenizer.read_ids(data / "conversations.parquet", Corpus(data).manifest[tokenizer.STAMP])
    provenance.write(data / "conversations.parquet", rows, **{tokenizer.STAMP: "0" * 64})
    with pytest.raises(ValueError, match=r"conversations\.parquet has tokenizer"):
        Stream(data, profile(curriculum=STAGES))
