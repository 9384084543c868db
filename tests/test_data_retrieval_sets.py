import gzip
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackpkg.data import problems, retrieval_sets

CORPUS = [{"_id": f"d{k}", "title": f"Title {k}", "text": f"body of number {k}"} for k in range(4)]
QUERIES = [{"_id": "q0", "text": "first?"}, {"_id": "q1", "text": "second?", "metadata": {"from": "us"}}]
TRAIN, TEST = ["q0\td0\t2", "q0\td1\t0"], ["q1\td2\t1", "q1\td3\t1"]
HEADER = "query-id\tcorpus-id\tscore"


def beir(folder, corpus=(), queries=(), train=(), header=HEADER):
    """The good set with lines added to it; bytes and texts are written as they stand."""
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", [*CORPUS, *corpus]), ("queries", [*QUERIES, *queries])):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (folder / f"{name}.jsonl").write_bytes(b"\n".join(lines))
    (folder / "qrels/train.tsv").write_text("\n".join([header, *TRAIN, *train]) + "\n")
    (folder / "qrels/test.tsv").write_text("\n".join([HEADER, *TEST]) + "\n")
    return folder


def test_a_beir_folder_becomes_pairs(tmp_path):
    found = retrieval_sets.read(beir(tmp_path / "set"))
    assert found.problems == [] and len(found.pairs) == 3
    first, second, third = found.pairs
    assert first["query"] == "first?" and first["positive"] == "Title 0 body of number 0" and first["split"] == "train"
    assert first["negatives"] == ["Title 1 body of number 1"] and first["source"] == "set/d0" and not first["unseen"]
    assert second["split"] == third["split"] == "held_out" and second["unseen"] and second["negatives"] == []
    assert second["pair_key"] == third["pair_key"] != first["pair_key"], "both answer the same query"
    assert first["pair_key"] == retrieval_sets.key(first["positive"]), "as for mined pairs"
    assert len(found.documents) == 4 and found.documents[third["positive"]] == "held_out"


def test_packed_beir_files_are_read(tmp_path):
    plain, packed = beir(tmp_path / "set"), beir(tmp_path / "packed/set")
    for path in [path for path in packed.rglob("*") if path.is_file()]:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert retrieval_sets.read(packed) == retrieval_sets.read(plain)


WRONG = [
    ({"corpus": [{"text": "x"}]}, "corpus.jsonl", 5, "`_id` is missing"),
    ({"corpus": [{"_id": 5, "text": "x"}]}, "corpus.jsonl", 5, "`_id` is a int"),
    ({"corpus": [{"_id": "d0", "text": "x"}]}, "corpus.jsonl", 5, "that of an earlier line"),
    ({"corpus": [{"_id": "d9", "title": "", "text": " "}]}, "corpus.jsonl", 5, "`text` is empty"),
    ({"corpus": [{"_id": "d9", "title": ["x"], "text": "y"}]}, "corpus.jsonl", 5, "`title` is a list"),
    ({"corpus": [b"{"]}, "corpus.jsonl", 5, "no JSON in UTF-8"),
    ({"queries": [b"", {"_id": "q9"}]}, "queries.jsonl", 4, "`text` is missing"),
    ({"queries": [{"_id": "q1", "text": "x"}]}, "queries.jsonl", 3, "that of an earlier line"),
    ({"train": ["q7\td0\t1"]}, "train.tsv", 4, "'q7' is not in queries.jsonl"),
    ({"train": ["q0\td7\t1"]}, "train.tsv", 4, "'d7' is not in corpus.jsonl"),
    ({"train": ["q0\td2\t1.5"]}, "train.tsv", 4, "'1.5' is no whole number"),
    ({"train": ["q0\td2\t-1"]}, "train.tsv", 4, "'-1' is no whole number from 0"),
    ({"train": ["q0 d2 1"]}, "train.tsv", 4, "three columns below a header"),
    ({"train": ["q0\td0\t1"]}, "train.tsv", 4, "is judged before"),
    ({"train": [HEADER]}, "train.tsv", 4, "three columns below a header"),
    ({"header": "query\tdocument\tscore"}, "train.tsv", 1, "three columns below a header"),
]


@pytest.mark.parametrize(("changes", "file", "line", "message"), WRONG, ids=[f"{f} {m}" for _, f, _, m in WRONG])
def test_a_wrong_line_of_a_beir_folder_is_named(tmp_path, changes, file, line, message):
    found = retrieval_sets.read(beir(tmp_path / "set", **changes))
    assert [(item.file, item.line) for item in found.problems] == [(file, line)] and found.problems[0].mend
    assert message in found.problems[0].wrong and len(found.pairs) == 3


def test_a_judgement_of_two_splits_counts_in_the_first(tmp_path):
    found = retrieval_sets.read(beir(tmp_path / "set", train=["q1\td2\t1"]))
    assert [(item.file, item.line) for item in found.problems] == [("test.tsv", 2)]


def test_a_folder_that_is_no_beir_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no BEIR folder; give corpus.jsonl and qrels/train.tsv"):
        retrieval_sets.read(tmp_path)


def triples(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return retrieval_sets.read(path)


def test_triples_become_pairs(tmp_path):
    rows = [
        {"query": "q?", "positive": "an answer here", "negative": "no answer"},
        {"anchor": "q?", "positive": "an answer here", "negative": "wrong thing"},
        {"anchor": "r?", "positive": "other words", "negatives": ["a", "b"]},
        {"anchor": "s?", "positive": "more words"},
    ]
    found = triples(tmp_path / "t.jsonl", rows)
    assert found.problems == [] and [pair["negatives"] for pair in found.pairs] == [
        ["no answer", "wrong thing"], ["a", "b"], []]  # fmt: skip
    assert [pair["source"] for pair in found.pairs] == ["t.jsonl/1", "t.jsonl/3", "t.jsonl/4"]
    many = triples(tmp_path / "m.jsonl", [{"query": f"q {k}", "positive": f"p {k}"} for k in range(1000)])
    assert 62 <= sum(pair["split"] == "held_out" for pair in many.pairs) <= 138  # binomial: 100, four deviations


T = {"query": "q?", "positive": "an answer here", "negative": "no answer"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"positive": "x", "negative": "y"}, "`anchor` is missing"),
        ({"query": "x", "negative": "y"}, "`positive` is missing"),
        (T | {"query": ""}, "`query` is empty"),
        (T | {"negative": 7}, "`negative` is a int"),
        (T | {"negatives": ["z", None]}, "`negative` is missing"),
        (T | {"negative": "An answer, here!"}, "the negative 'An answer, here!' is, nearly or quite, a positive"),
        (T, "duplicate of line 1"),
        (T | {"positive": "no answer", "negative": "z"}, "the positive 'no answer' is a negative of the query before"),
        (T | {"positive": "new one", "negative": "an answer here"}, "a positive of the query"),
        ("[]", "a list, no object"),
    ],
    ids=str,
)
def test_a_wrong_triple_is_named(tmp_path, row, message):
    found = triples(tmp_path / "t.jsonl", [T, row])
    assert [item.line for item in found.problems] == [2] and message in found.problems[0].wrong
    assert len(found.pairs) == 1 and found.pairs[0]["negatives"] == ["no answer"]


WORDS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip)


@settings(max_examples=40, deadline=None)
@given(st.lists(WORDS, min_size=9, max_size=9, unique=True), st.lists(st.booleans(), min_size=3, max_size=3), st.data())
def test_pairs_survive_beir(tmp_path_factory, texts, held, data):
    folder = tmp_path_factory.mktemp("b")
    pairs = [
        problems.origin(f"made/{k}", data.draw(st.sampled_from(["MIT", ""])))
        | {"split": "held_out" if held[k] else "train", "query": texts[k], "positive": texts[3 + k], "unseen": held[k]}
        | {"negatives": [texts[6 + k], texts[6 + (k + 1) % 3]][: data.draw(st.integers(0, 2))]}
        | {"pair_key": retrieval_sets.key(texts[3 + k])}
        for k in range(3)
    ]
    retrieval_sets.write_beir(folder, pairs)
    found = retrieval_sets.read(folder)
    assert found.problems == [] and sorted(found.pairs, key=lambda p: p["source"]) == pairs


def test_statistics_by_hand():
    pairs = [
        {"query": "a b", "positive": "c d e", "negatives": ["x"], "split": "train"},
        {"query": "a b", "positive": "c d e", "negatives": ["x", "y"], "split": "train"},
        {"query": "a", "positive": "c", "negatives": [], "split": "held_out"},
        {"query": "a", "positive": "d", "negatives": ["z"], "split": "held_out"},
    ]
    assert retrieval_sets.statistics(pairs) == {
        "pairs": 4, "held_out": 2, "duplicates": 1, "distinct_query": 2, "query_words": 1.5, "distinct_positive": 3,
        "positive_words": 2.0, "negatives": 1.0,
    }  # fmt: skip


def test_bm25_by_hand():
    asked, weights = retrieval_sets.bm25(["sky blue blue", "unheard"], ["blue sky", "blue sea and the deep", "grey"])
    scores = (asked @ weights).toarray()
    # N = 3 documents of 2, 5, 1 words, 8/3 on average; `blue` is in two of them, `sky` in one
    slow = [1.2 * (0.25 + 0.75 * length * 3 / 8) for length in (2, 5)]
    blue, sky = math.log(1 + 1.5 / 2.5), math.log(1 + 2.5 / 1.5)
    expected = [(2 * blue + sky) / (1 + slow[0]), 2 * blue / (1 + slow[1]), 0]
    assert scores[0] == pytest.approx(expected) and not scores[1].any()


def pair(k, query, positive, split="train", negatives=()):
    return {"query": query, "positive": positive, "negatives": list(negatives), "split": split, "k": k}


QUERY = "how to sort a list of numbers"
POSITIVE = "to sort a list of numbers call sorted on the list and keep what it gives back"
COPY = "To sort a list of numbers, call sorted on the list and keep what it gives back!!"
BETTER = "how to sort a list of numbers: use the method sort of the list"
RELATED = "a list of names is kept in the file of the users, numbers of telephones too"
POOL = dict.fromkeys([COPY, BETTER, RELATED, "fishing in cold water", "weather in the north"], "train")


def test_planted_false_negatives_would_be_taken_and_are_not(monkeypatch):
    pairs = [pair(0, QUERY, POSITIVE), pair(1, "what is the weather like", "weather is cold")]
    pool = [*POOL, POSITIVE]
    asked, weights = retrieval_sets.bm25([QUERY], pool)
    ranked = [pool[k] for k in np.argsort(-(asked @ weights).toarray()[0])]
    assert set(ranked[:3]) == {COPY, BETTER, POSITIVE}, "the two false negatives score highest"
    mined = retrieval_sets.mine_negatives(pairs, POOL, 1, 0.95)[0]["negatives"]
    assert mined == [RELATED]
    assert retrieval_sets.mine_negatives(pairs, POOL, 1, 100.0)[0]["negatives"] == [BETTER], "no margin: it is taken"
    monkeypatch.setattr(retrieval_sets, "NEAR", 1.5)
    bare = retrieval_sets.mine_negatives(pairs, POOL, 3, 100.0)[0]["negatives"]
    assert set(bare) == {COPY, BETTER, POSITIVE}, "no guard at all: all are taken"


def test_what_is_relevant_elsewhere_is_no_negative():
    other = "sort numbers of a list in place"
    pairs = [pair(0, QUERY, POSITIVE), pair(1, QUERY, other)]
    mined = retrieval_sets.mine_negatives(pairs, POOL, 2, 100.0)
    assert all(POSITIVE not in made["negatives"] and other not in made["negatives"] for made in mined)
    assert retrieval_sets.mine_negatives([pairs[0]], POOL | {other: "train"}, 2, 100.0)[0]["negatives"][1] == other


def test_own_negatives_come_first_and_splits_stay_apart():
    pairs = [pair(0, QUERY, POSITIVE, negatives=["said to be wrong"]), pair(1, QUERY + " now", RELATED, "held_out")]
    pool = POOL | {"sort a heap of stones": "held_out", "sort numbers by the dozen": "held_out"}
    train, held = retrieval_sets.mine_negatives(pairs, pool, 2, 0.95)
    assert train["negatives"][0] == "said to be wrong" and RELATED not in train["negatives"], "positive of the other"
    assert set(held["negatives"]) == {"sort a heap of stones", "sort numbers by the dozen"}
    assert [made["k"] for made in retrieval_sets.mine_negatives(pairs, pool, 3, 0.95)] == [0], "too few for the other"
    assert pairs[0]["negatives"] == ["said to be wrong"], "the input stays as it was"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=9), min_size=4, max_size=30),
    st.integers(1, 3),
    st.randoms(),
)
def test_no_mined_negative_breaks_a_rule_and_order_is_no_matter(words, n, random):
    texts = list(dict.fromkeys(" ".join(item) for item in words))
    pairs = [pair(k, text.split()[0], text, "held_out" if k % 3 == 0 else "train") for k, text in enumerate(texts[::2])]
    documents = {text: "held_out" if k % 3 == 0 else "train" for k, text in enumerate(texts)}
    mined = retrieval_sets.mine_negatives(pairs, documents, n, 0.9)
    for made in mined:
        assert len(set(made["negatives"])) == n
        for text in made["negatives"]:
            assert not retrieval_sets.similar(text, made["positive"]) and not retrieval_sets.similar(
                text, made["query"]
            )
            assert not any(p["query"] == made["query"] and p["positive"] == text for p in pairs)
            assert not any(p["positive"] == text and p["split"] != made["split"] for p in pairs)
    shuffled = random.sample(pairs, len(pairs))
    again = retrieval_sets.mine_negatives(
        shuffled, dict(random.sample(list(documents.items()), len(documents))), n, 0.9
    )
    assert sorted(again, key=lambda made: made["k"]) == mined


def test_the_seed_decides_between_equals():
    pairs, pool = [pair(0, "alpha", "alpha beta")], {f"nothing {word}": "train" for word in "cdefghijkl"}
    drawn = [retrieval_sets.mine_negatives(pairs, pool, 2, 0.9, seed)[0]["negatives"] for seed in range(9)]
    assert len({tuple(texts) for texts in drawn}) > 3
    assert drawn[4] == retrieval_sets.mine_negatives(pairs, pool, 2, 0.9, 4)[0]["negatives"]


def test_texts_without_a_word_are_told_apart():
    assert retrieval_sets.similar("+", "+") and not retrieval_sets.similar("+", "-")


def test_documents_nobody_judged_are_dealt_as_the_pairs_are(tmp_path):
    more = [{"_id": f"x{k}", "text": f"unjudged {k}"} for k in range(900)]
    found = retrieval_sets.read(beir(tmp_path / "set", corpus=more))
    held = sum(found.documents[row["text"]] == "held_out" for row in more)
    assert 543 <= held <= 657  # two of three pairs: 600, and four standard deviations
