import ast
import json
import random

import pyarrow as pa
import pytest

from stackpkg import runs
from stackpkg.data import labelled, preferences, records, retrieval_sets, tokenizer
from stackpkg.params import Auxiliary

SIZES = Auxiliary(pairs=60, query_tokens=8, document_tokens=16, hard_negatives=2)

TEXT = '''
import os

class A:
    async def method(self, x):
        """Read the thing slowly.

        Details follow.
        """
        y = x + 1
        if y: pass
        return y

    def __init__(self):
        """Make a thing now."""
        self.a = 1
        self.b = 2
        self.c = 3

def test_it():
    """Test the thing well."""
    a = 1
    b = 2
    assert a < b

def short(): return 1

def tricky():
    """One line here."""; z = 1
    z += 1
    z += 1
    return z

def plain(a):
    b = a
    c = b
    return c
'''


def test_functions_are_split_as_they_should_be():
    found = {f.prompt.split("(")[0].split()[-1]: f for f in labelled.functions(TEXT)}
    assert set(found) == {"method", "plain"}
    method = found["method"]
    assert method.query == "Read the thing slowly." and "Details" not in method.code and "Details" in method.prompt
    assert method.code.startswith("async def method(self, x):\n    y = x + 1\n") and method.body.endswith("return y\n")
    assert found["plain"].query == "" and ast.parse(found["plain"].code)


def test_modules_that_do_not_parse_give_nothing():
    assert labelled.functions("def broken(:\n") == [] and labelled.functions("x = '\x00'") == []


WORDS = ["mean", "median", "range", "order", "total"]


def module(seed):
    return "\n\n".join(
        f'def {word}_{seed}(a, b):\n    """Compute the {word} of module {seed} here.\n\n    More {seed}.\n    """\n'
        f"    x = a + {k * 100 + seed}\n    y = x * b\n    return x - y\n"
        for k, word in enumerate(WORDS)
    )


def table(texts, domain="code"):
    rows = [
        {
            "record_id": f"{domain}{k:013d}",
            "source": f"folder:t/{k}.py",
            "domain": domain,
            "licence": "MIT",
            "text": text,
        }
        for k, text in enumerate(texts)
    ]
    return records.table(rows)


CODE = table(module(k) for k in range(30))
HELD = set(CODE["record_id"].to_pylist()[:2])


def test_a_function_that_says_its_question_again_asks_nothing():
    body = '    """Tell what is wrong."""\n    if not a:\n        raise OSError("Tell what is wrong.")\n    return a\n'
    loud = module(40) + "\n\ndef loud(a):\n" + body
    pairs = labelled.mine(table([loud]), set(), SIZES, 0)
    assert len(pairs) == len(WORDS) and not [pair for pair in pairs if "loud" in pair["positive"]]


def test_pairs_keep_the_rules():
    docs = table([module(0)], "docs")
    pairs = labelled.mine(pa.concat_tables([docs, CODE]), HELD, SIZES, 8)
    assert len(pairs) == 60 and labelled.leakage(pairs) == 0
    assert len({pair["pair_key"] for pair in pairs}) == len({pair["query"] for pair in pairs}) == 60
    texts = dict(zip(CODE["record_id"].to_pylist(), CODE["text"].to_pylist(), strict=True))
    functions = {f.code for text in texts.values() for f in labelled.functions(text)}
    for pair in pairs:
        assert pair["query"] not in " ".join(pair["positive"].split()) and '"""' not in pair["positive"]
        assert len(set(pair["negatives"])) == 2 and pair["positive"] not in pair["negatives"]
        assert set(pair["negatives"]) <= functions
        assert pair["chosen"] in texts[pair["record_id"]] and pair["rejected"] in texts[pair["record_id"]]
        assert pair["chosen"] != pair["rejected"] and pair["prompt"].startswith("def ") and pair["licence"] == "MIT"
    out = [pair for pair in pairs if pair["split"] == "held_out"]
    assert len(out) == 10 and {pair["record_id"] for pair in out} == HELD and all(pair["unseen"] for pair in out)


def test_order_and_form_of_the_records_are_no_matter():
    made = labelled.mine(CODE, set(), SIZES, 8)
    assert made == labelled.mine(CODE.to_pylist()[::-1], set(), SIZES, 8)
    assert made == labelled.mine(CODE.take(random.Random(1).sample(range(30), 30)), set(), SIZES, 8)


def test_copied_functions_count_once_and_small_modules_not_at_all():
    single = 'def f(a):\n    """Do one thing here."""\n    b = a\n    c = b\n    return c\n'
    pairs = labelled.mine(table([module(1), module(1), single]), set(), Auxiliary(), 8)
    assert len(pairs) == 5 and len({pair["record_id"] for pair in pairs}) == 1


def test_functions_that_answer_the_same_question_are_no_negatives_of_each_other():
    same = "".join(
        f'def {n}(a):\n    """Do the one thing."""\n    {n} = a * {k}\n    log_{n}("{n}", {n})\n    return {n}\n\n'
        for k, n in enumerate("fgh")
    )
    other = "def z(a):\n    y = a + 1\n    y = y / 2\n    return y\n"
    (pair,) = labelled.mine(table([same + other]), set(), Auxiliary(), 8)
    assert pair["query"] == "Do the one thing." and pair["negatives"] == [other]


def test_a_body_under_another_name_is_the_same_function():
    twins = "".join(
        f'def {n}(a):\n    """Do one thing in {n}."""\n    b = a\n    c = b\n    return c\n\n' for n in "fgh"
    )
    other = "def k(a):\n    z = a + 1\n    y = z\n    return y\n"
    assert labelled.mine(table([twins]), set(), Auxiliary(), 8) == []
    (pair,) = labelled.mine(table([twins + other]), set(), Auxiliary(), 8)
    assert pair["negatives"] == [other] and pair["rejected"] == other.split(":\n", 1)[1]


def test_a_rejected_body_is_no_near_copy_of_the_chosen_one():
    long = "\n".join(f"    step_{k}(a, {k})" for k in range(20))
    near = "".join(f'def {n}(a):\n    """Do all the steps of {n}."""\n{long}\n    return {n}\n\n' for n in "fg")
    assert labelled.mine(table([near]), set(), Auxiliary(), 8) == []
    other = "def z(a):\n    y = a + 1\n    y = y / 2\n    return y\n"
    pairs = labelled.mine(table([near + other]), set(), Auxiliary(), 8)
    assert len(pairs) == 2 and {pair["rejected"] for pair in pairs} == {other.split(":\n", 1)[1]}


def test_leakage_is_seen():
    pairs = labelled.mine(CODE, set(), SIZES, 8)
    pairs[-1]["negatives"][0] = pairs[0]["positive"]
    assert labelled.leakage(pairs) == 1


def test_contamination_by_hand():
    words = [f"w{k}" for k in range(40)]
    held = " ".join(words[:15])
    rows = [
        {"split": "held_out", "text": held},
        {"split": "train", "text": "W0  " + " ".join(words[1:15])},  # the same but for case and spaces
        {"split": "train", "text": "new, " + " ".join(words[2:18])},  # 5 13-grams, of which w2-w14 is theirs
        {"split": "train", "text": " ".join(words[3:15])},  # twelve words are no 13-gram
        {"split": "train", "text": " ".join(words[20:])},
    ]
    assert labelled.contamination(rows, ["text"]) == [0.0, 1.0, 0.2, 0.0, 0.0]
    assert labelled.contamination(rows, ["text"], [" ".join(words[19:])]) == [0.0, 1.0, 0.2, 0.0, 1.0]
    lists = [{"split": "train", "q": "unlike", "n": ["no", held]}, {"split": "held_out", "q": held, "n": []}]
    assert labelled.contamination(lists, ["q", "n"]) == [1.0, 0.0]


@pytest.fixture
def given(tmp_path, monkeypatch):
    """The pairs mined, and sizes that name a retrieval set and a preference set."""
    monkeypatch.setattr(runs, "root", lambda: tmp_path)
    rows = [{"query": f"where is item {k}", "positive": f"item {k} lies in box {k * k}"} for k in range(40)]
    rows += [{"query": "", "positive": "x"}, {"query": "where is item 0", "positive": "item 0 lies in the box"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    likes = [{"prompt": f"Say {k}: ", "chosen": f"{k}", "rejected": f"{k + 1}"} for k in range(30)] + [{"prompt": "x"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, likes)))
    mined = labelled.mine(CODE, HELD, SIZES, 8)
    return mined, SIZES.model_copy(update={"retrieval_set": "t.jsonl", "preference_set": "p.jsonl"})


def test_given_sets_join_the_mined_ones(given):
    mined, sizes = given
    alone = labelled.load(SIZES, mined)
    assert [pair["query"] for pair in alone.pairs] == [pair["query"] for pair in mined] and alone.problems == []
    assert [row["chosen"] for row in alone.preferences] == [pair["chosen"] for pair in mined]
    both = labelled.load(sizes, mined)
    assert [(item.file, item.line) for item in both.problems] == [("t.jsonl", 41), ("p.jsonl", 31)]
    assert len(both.pairs) > 60 + 35 and len(both.preferences) == 60 + 30
    assert labelled.leakage(both.pairs) == 0 and all(len(pair["negatives"]) == 2 for pair in both.pairs)
    assert len({tuple(row) for row in both.pairs}) == len({tuple(row) for row in both.preferences}) == 1, "one schema"
    firsts = [pair["source"].startswith("t.jsonl") for pair in both.pairs[:30]]
    assert 8 <= sum(firsts) <= 18, "evenly mixed"
    assert labelled.load(sizes, mined) == both
    model = tokenizer.train_tokenizer([row["query"] for row in both.pairs], 300)
    encoded = labelled.encode(both.pairs, model, sizes)
    assert all(len(pair["query_ids"]) <= 8 and len(pair["negative_ids"]) == 2 for pair in encoded)
    assert len(preferences.encode(both.preferences, model, 8, 16)) > 80


def test_what_copies_the_evaluation_is_left_out(given):
    mined, sizes = given
    train = next(pair for pair in mined if pair["split"] == "train")
    likes = preferences.split([{"prompt": f"Say {k}: "} for k in range(30)], retrieval_sets.HELD_OUT)
    kept, out = ([row["prompt"] for row in likes if row["split"] == side] for side in ("train", "held_out"))
    made = labelled.load(sizes, mined, [train["query"].upper(), kept[0], out[0]])
    assert train["query"] not in {pair["query"] for pair in made.pairs}
    gone = {item["source"] for item in made.contaminated if item["share"] == 1.0}
    assert train["source"] in gone
    prompts = {row["prompt"] for row in made.preferences}
    assert kept[0] not in prompts and {out[0], kept[1]} <= prompts and len(made.preferences) == 60 + 30 - 1


def test_a_set_that_repeats_the_mined_pairs_adds_nothing(given, tmp_path):
    mined, sizes = given
    retrieval_sets.write_beir(tmp_path / "beir", mined)
    again = labelled.load(sizes.model_copy(update={"retrieval_set": "beir", "preference_set": ""}), mined)
    assert again == labelled.load(SIZES, mined)


@pytest.mark.parametrize("name", ["retrieval_set", "preference_set"])
def test_a_set_that_is_mostly_wrong_is_refused(given, tmp_path, name):
    mined, _ = given
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n' * 3)
    with pytest.raises(ValueError, match=r"(?s)0 usable rows, 3 problems.*bad.jsonl:1: "):
        labelled.load(SIZES.model_copy(update={name: "bad.jsonl"}), mined)
