import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_corpus import sentence
from hypothesis import given, settings
from hypothesis import strategies as st

from stackpkg.data import contamination, records


def write(path, rows, **columns):
    """Rows of (name, text) in row groups of three; a name is record_id and source."""
    table = records.table({"record_id": name, "source": name, "text": text} for name, text in rows)
    for name, values in columns.items():
        table = table.append_column(name, [values])
    pq.write_table(table, path, row_group_size=3)
    return path


def split(text):
    """Paragraphs by Python's own means."""
    return [" ".join(part.lower().split()) for part in re.split(r"\n[ \t]*\n", text) if part.strip()]


NOTICE = "Copyright the authors, all rights\n  reserved by them and others."
PLACES = "First own words of {0}, that no one else has.\n\n{1}\n\nLast own words of {0}.\n"


def notices(count, **changed):
    texts = {f"{k}": PLACES.format(f"d{k}", NOTICE) for k in range(count)} | changed
    return list(texts.items())


def test_a_repeated_paragraph_stays_in_the_best_document_alone(tmp_path):
    path = write(tmp_path / "p", notices(4, other="Own words\n\n" + NOTICE.upper().replace("\n", " ") + "\n"))
    found = contamination.repeated_paragraphs([path], 8, 4, {"2": 0.9})
    assert found.schema == contamination.PARAGRAPHS
    assert found.to_pylist() == [
        {"record_id": name, "paragraph": 1, "documents": 5} for name in ("0", "1", "3", "other")
    ]
    made = contamination.cut(pq.read_table(path), found)
    texts = dict(zip(made["record_id"].to_pylist(), made["text"].to_pylist(), strict=True))
    assert texts["2"] == PLACES.format("d2", NOTICE) and texts["other"] == "Own words\n\n"
    assert texts["0"] == "First own words of d0, that no one else has.\n\nLast own words of d0.\n"
    decisions = {name: row[-1] for name, row in zip(texts, made["decisions"].to_pylist(), strict=True)}
    assert decisions["2"] == {"filter": "paragraph_repeats", "value": 0.0, "threshold": 0.0, "decision": "keep"}
    assert decisions["0"] == {"filter": "paragraph_repeats", "value": 1.0, "threshold": 0.0, "decision": "mask"}
    assert made["decisions"].type == records.DECISIONS and all(made["kept"].to_pylist())


def test_few_repeats_short_paragraphs_and_dropped_documents_do_not_count(tmp_path):
    path = write(tmp_path / "p", notices(5), kept=[True] * 4 + [False])
    assert contamination.repeated_paragraphs([path], 8, 4, {}).num_rows == 0
    assert contamination.repeated_paragraphs([path], 8, 3, {}).num_rows == 3
    assert contamination.repeated_paragraphs([path], 10, 3, {}).num_rows == 3
    assert contamination.repeated_paragraphs([path], 11, 3, {}).num_rows == 0
    with pytest.raises(ValueError, match=r"repeats = 0.*1 or more"):
        contamination.repeated_paragraphs([path], 8, 0, {})


def test_a_paragraph_twice_in_one_document_is_no_repeat_and_goes_wholly_elsewhere(tmp_path):
    path = write(tmp_path / "p", [("a", f"{NOTICE}\n\n{NOTICE}"), ("b", f"{NOTICE}\n\n{NOTICE}\n")])
    assert contamination.repeated_paragraphs([path], 8, 2, {}).num_rows == 0
    found = contamination.repeated_paragraphs([path], 8, 1, {})
    assert [(row["record_id"], row["paragraph"]) for row in found.to_pylist()] == [("a", 0), ("a", 1)]
    made = contamination.cut(pq.read_table(path), found).to_pylist()  # b is longer
    assert made[0]["text"] == "" and not made[0]["kept"] and made[0]["decisions"][0]["decision"] == "drop"
    assert made[1]["kept"] and made[1]["text"] == f"{NOTICE}\n\n{NOTICE}\n"


def test_a_row_that_was_dropped_before_is_left_alone(tmp_path):
    before = {"filter": "trust", "value": 0.1, "threshold": 0.6, "decision": "drop"}
    rows = [("a", NOTICE), ("b", NOTICE)]
    part = records.table({"record_id": name, "source": name, "text": text} for name, text in rows)
    part = part.append_column("kept", [[False, True]])
    part = part.append_column("decisions", pa.chunked_array([pa.array([[before], []], records.DECISIONS)]))
    table = pa.table([["a", "b"], [0, 0], [9, 9]], schema=contamination.PARAGRAPHS)
    made = contamination.cut(part, table).to_pylist()
    assert made[0]["text"] == NOTICE and made[0]["decisions"] == [before] and not made[0]["kept"]
    assert [row["decision"] for row in made[1]["decisions"]] == ["drop"]


LINES = st.lists(st.sampled_from(["a b", "A  b", " b", "", " ", "\tc\t", "ü c"]), max_size=9)


@given(st.lists(LINES.map("\n".join), min_size=1, max_size=5), st.integers(1, 2), st.integers(1, 3))
@settings(max_examples=40)
def test_paragraphs_are_those_of_python(tmp_path_factory, texts, words, repeats):
    path = write(tmp_path_factory.mktemp("p") / "p", [(f"{k}", text) for k, text in enumerate(texts)])
    found = contamination.repeated_paragraphs([path], words, repeats, {})
    rank = sorted(range(len(texts)), key=lambda k: (-len(texts[k].encode()), f"{k}"))
    holders = {}
    for k in rank:
        for part in split(texts[k]):
            holders.setdefault(part, [])
            holders[part] += [k] if k not in holders[part] else []
    expected = [
        (f"{k}", number, len(holders[part]))
        for k, text in enumerate(texts)
        for number, part in enumerate(split(text))
        if len(part.split()) >= words and len(holders[part]) > repeats and holders[part][0] != k
    ]
    assert [tuple(row.values()) for row in found.to_pylist()] == expected
    gone = {(int(name), number) for name, number, _ in expected}
    for k, row in enumerate(contamination.cut(pq.read_table(path), found).to_pylist()):
        left = [part for number, part in enumerate(split(texts[k])) if (k, number) not in gone]
        assert split(row["text"]) == left and row["kept"] == (bool(left) or not texts[k].strip())


TEST = "What is the capital of the country whose flag has a white cross on red ground? Bern, of course."
WORDS = TEST.split()


def test_shared_runs_of_words_are_found_and_shown(tmp_path):
    tests = write(
        tmp_path / "t", [("jsonl:quiz#0", TEST), ("jsonl:quiz#1", sentence(1, 30)), ("folder:f/a.md", "too few")]
    )
    quoted = "An essay. " + " ".join(WORDS[2:16]).upper().replace(" ", ", ") + "; and so on."
    path = write(tmp_path / "p", [("clean", sentence(2, 90)), ("a", quoted), ("b", " ".join(WORDS[:12])), ("c", TEST)])
    found = contamination.contaminated([path], [tests], 13)
    assert found.schema == contamination.CONTAMINATED
    grams = len(WORDS) - 12
    assert found.drop_columns("excerpt").to_pylist() == [
        {"record_id": "a", "evaluation": "jsonl:quiz#0", "shared": 2, "share": 2 / grams},
        {"record_id": "c", "evaluation": "jsonl:quiz#0", "shared": grams, "share": 1.0},
    ]
    assert found["excerpt"].to_pylist() == [" ".join(WORDS[2:15]).upper().replace(" ", ", "), " ".join(WORDS[:13])]
    made = contamination.report(found, [tests], 13).to_pylist()
    names = ("documents", "too_short", "found", "largest_share", "records")
    assert [(row["evaluation_set"], *(row[name] for name in names)) for row in made] == [
        ("folder:f", 1, 1, 0, 0.0, 0),
        ("jsonl:quiz", 2, 0, 1, 1.0, 2),
    ]


def test_boilerplate_is_no_evidence(tmp_path):
    few, many = contamination.COMMON, contamination.COMMON + 1
    tests = write(tmp_path / "t", [("jsonl:quiz#0", TEST)])
    for count, expected in ((few, few), (many, 0)):
        path = write(tmp_path / f"p{count}", [(f"{k:02}", f"{k} {TEST}") for k in range(count)])
        assert contamination.contaminated([path], [tests], 13).num_rows == expected
    path = write(tmp_path / "p", [("a", TEST)])
    for count, expected in ((few, few), (many, 0)):  # a template that every question of the set begins with
        tests = write(tmp_path / "t", [(f"jsonl:quiz#{k}", f"{TEST} {k}") for k in range(count)])
        assert contamination.contaminated([path], [tests], 13).num_rows == expected


@pytest.mark.parametrize("texts", [[], ["", "!"], ["one two"]])
def test_nothing_to_compare(tmp_path, texts):
    rows = [(f"{k}", text) for k, text in enumerate(texts)]
    path, tests = write(tmp_path / "p", [("a", TEST), *rows]), write(tmp_path / "t", rows)
    found = contamination.contaminated([path], [tests], 5)
    assert found.num_rows == 0 and found.schema == contamination.CONTAMINATED
    assert contamination.contaminated([], [tests], 5).num_rows == 0
    assert contamination.report(found, [tests], 5).schema == contamination.REPORT
    assert contamination.repeated_paragraphs([], 5, 1, {}).num_rows == 0


@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=10), max_size=4),
    st.lists(st.lists(st.sampled_from("abc"), max_size=10), max_size=4),
)
@settings(max_examples=40)
def test_shared_counts_are_those_of_python_sets(tmp_path_factory, corpus, tests):
    folder, n = tmp_path_factory.mktemp("c"), 5
    path = write(folder / "p", [(f"{k}", " ".join(words)) for k, words in enumerate(corpus)])
    other = write(folder / "t", [(f"jsonl:t#{k}", " ".join(words)) for k, words in enumerate(tests)])
    grams = [[{tuple(w[k : k + n]) for k in range(len(w) - n + 1)} for w in side] for side in (corpus, tests)]
    expected = [
        (f"{a}", f"jsonl:t#{b}", len(x & y), len(x & y) / len(y))
        for a, x in enumerate(grams[0])
        for b, y in enumerate(grams[1])
        if x & y
    ]
    found = contamination.contaminated([path], [other], n).to_pylist()
    assert [tuple(row.values())[:4] for row in found] == expected
    for row in found:
        text = " ".join(corpus[int(row["record_id"])])
        shared = grams[0][int(row["record_id"])] & grams[1][int(row["evaluation"][8:])]
        assert row["excerpt"] == min((" ".join(gram) for gram in shared), key=text.index)
