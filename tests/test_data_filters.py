"""Every heuristic against a value worked out by hand, repetition against brute force, and the laws of `apply`."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackpkg.data import filters, records
from stackpkg.data.filters import HEURISTICS, Page
from stackpkg.params import Data

PROSE = """The miller had to be up before the sun, and with him the whole house rose.
Nobody in the valley could remember a winter that had begun so early.
When the river froze, people would have carried their grain across on sledges.
His daughter kept the accounts, wrote letters and argued about prices with merchants.
In the evening they read aloud from an old book of travels to distant islands.
By March every sack was gone; still, hardly anyone complained."""
OPEN = Data(filters={"*": ["gopher_quality", "gopher_repetition", "c4", "fineweb", "perplexity"]})


def part(*texts, domain="prose", **columns):
    made = records.table(
        {"record_id": f"{k:016x}", "source": f"t/{k}", "domain": domain, "licence": "MIT", "text": text}
        for k, text in enumerate(texts)
    )
    for name, value in columns.items():
        made = made.append_column(name, pa.array([value] * len(texts)))
    return made


def decisions(text, data=OPEN, **columns):
    out = filters.apply(part(text, **columns), data, None)
    return out["kept"][0].as_py(), {row["filter"]: row for row in out["decisions"][0].as_py()}


def value(name, text):
    return HEURISTICS[name].statistic(Page(text))


HAND = {  # text, value
    "gopher_min_doc_words": ("one two  three\nfour", 4),
    "gopher_max_doc_words": ("one two  three\nfour", 4),
    "gopher_min_avg_word_length": ("a bb ccc dddd", 2.5),
    "gopher_max_avg_word_length": ("a bb ccc dddd", 2.5),
    "gopher_hash_word_ratio": ("# one two #three", 2 / 4),
    "gopher_ellipsis_word_ratio": ("one... two… three four", 2 / 4),
    "gopher_max_bullet_lines_ratio": ("- a\n* b\nc\n  • d\n", 3 / 4),
    "gopher_max_ellipsis_lines_ratio": ("a...\nb…  \n\nc\nd.", 2 / 4),
    "gopher_min_alpha_words_ratio": ("ab a1 12 -- é", 3 / 5),
    "gopher_min_stop_words": ("the the cat have", 2),
    "gopher_dup_line_frac": ("a\n\n b\na\n", 1 / 3),
    "gopher_dup_para_frac": ("a b\n\nc\n \na b\n\n\na b", 2 / 4),
    "gopher_dup_line_char_frac": ("long\nb\nlong\n", 4 / 9),
    "gopher_dup_para_char_frac": ("long\n\nb\n\nlong\n", 4 / 9),
    "gopher_top_2_gram_char_frac": ("aa b aa b ccc", 6 / 9),
    "gopher_top_3_gram_char_frac": ("x y z 1 x y z 2", 6 / 8),
    "gopher_top_4_gram_char_frac": ("x y z w x y z w 1", 8 / 9),
    "gopher_dup_5_gram_char_frac": ("a b c d e f a b c d e", 5 / 11),
    "gopher_dup_6_gram_char_frac": ("a b c d e f a b c d e f", 6 / 12),
    "gopher_dup_7_gram_char_frac": ("a b c d e f a b c d e f", 0),
    "gopher_dup_8_gram_char_frac": ("a " * 10, 9 / 10),
    "gopher_dup_9_gram_char_frac": ("a " * 10, 9 / 10),
    "gopher_dup_10_gram_char_frac": ("a " * 20, 19 / 20),
    "c4_terminal_punctuation": ('He said "no"\nand left\nWhy?\nSo.', 3 / 4),
    "c4_javascript": ("Enable JavaScript.\nOr not.", 1 / 2),
    "c4_lorem_ipsum": ("Lorem ipsum dolor", 1),
    "c4_curly_bracket": ("f() { return {}; }", 2),
    "c4_min_num_sentences": (
        "One of three. Two of it!\nShort one.\nNo end here at all\nTurn javascript on now.\nThe end.",
        2,
    ),
    "fineweb_line_punct": ("a.\nb\nc!\nd", 2 / 4),
    "fineweb_char_duplicates": ("long\nb\nlong\n", 4 / 9),
    "fineweb_short_line": ("x" * 30 + "\n" + "x" * 29, 1 / 2),
}


@pytest.mark.parametrize("name", HEURISTICS)
def test_each_heuristic_has_the_value_worked_out_by_hand(name):
    text, expected = HAND[name]
    assert value(name, text) == pytest.approx(expected)


LIMITS = {  # a value that passes and the nearest that does not, from the words of the papers
    "gopher_min_doc_words": (50, 49), "gopher_max_doc_words": (100_000, 100_001),
    "gopher_min_avg_word_length": (3, 2.99), "gopher_max_avg_word_length": (10, 10.01),
    "gopher_hash_word_ratio": (0.1, 0.11), "gopher_ellipsis_word_ratio": (0.1, 0.11),
    "gopher_max_bullet_lines_ratio": (0.9, 0.91), "gopher_max_ellipsis_lines_ratio": (0.3, 0.31),
    "gopher_min_alpha_words_ratio": (0.8, 0.79), "gopher_min_stop_words": (2, 1),
    "gopher_dup_line_frac": (0.3, 0.31), "gopher_dup_para_frac": (0.3, 0.31),
    "gopher_dup_line_char_frac": (0.2, 0.21), "gopher_dup_para_char_frac": (0.2, 0.21),
    "gopher_top_2_gram_char_frac": (0.2, 0.21), "gopher_top_3_gram_char_frac": (0.18, 0.19),
    "gopher_top_4_gram_char_frac": (0.16, 0.17), "gopher_dup_5_gram_char_frac": (0.15, 0.16),
    "gopher_dup_6_gram_char_frac": (0.14, 0.15), "gopher_dup_7_gram_char_frac": (0.13, 0.14),
    "gopher_dup_8_gram_char_frac": (0.12, 0.13), "gopher_dup_9_gram_char_frac": (0.11, 0.12),
    "gopher_dup_10_gram_char_frac": (0.10, 0.11), "c4_terminal_punctuation": (0.01, 0), "c4_javascript": (0.99, 1),
    "c4_lorem_ipsum": (0, 1), "c4_curly_bracket": (0, 1), "c4_min_num_sentences": (5, 4),
    "fineweb_line_punct": (0.13, 0.12), "fineweb_char_duplicates": (0.09, 0.1), "fineweb_short_line": (0.66, 0.67),
}  # fmt: skip


@pytest.mark.parametrize("name", HEURISTICS)
def test_the_defaults_are_those_of_the_papers(name):
    compare, limit = filters.SIGNS[HEURISTICS[name].sign], HEURISTICS[name].threshold
    assert [compare(number, limit) for number in LIMITS[name]] == [True, False]


def brute(words, n):
    """Top n-gram (n < 5) or n-grams that occurred before: share of characters, each position marked once."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    marked = set()
    if n < 5:
        counts = Counter(grams)
        tops = [g for g in counts if counts[g] == max(counts.values()) > 1]
        best = max(tops, key=lambda g: sum(map(len, g)), default=None)
        tied = [g for g in tops if sum(map(len, g)) == sum(map(len, best))]
        covers = [{j for i, g in enumerate(grams) if g == t for j in range(i, i + n)} for t in tied] or [set()]
        return {sum(len(words[j]) for j in cover) / max(1, sum(map(len, words))) for cover in covers}
    for i, gram in enumerate(grams):
        if gram in grams[:i]:
            marked |= set(range(i, i + n))
    return {sum(len(words[j]) for j in marked) / max(1, sum(map(len, words)))}


@given(st.lists(st.sampled_from(["a", "bb", "cc", "ddd"]), max_size=40))
def test_repetition_agrees_with_brute_force(words):
    found = Page(" ".join(words)).repetition
    for n in range(2, 11):
        assert min(abs(found[n] - expected) for expected in brute(words, n)) < 1e-12


REPEATED = [name for name in HEURISTICS if "dup" in name]
PARAGRAPH = st.lists(st.sampled_from(["alpha", "beta", "gamma", "delta", "eta", "iota"]), min_size=10, max_size=20)


@given(st.lists(PARAGRAPH, min_size=1, max_size=6), st.data())
def test_a_repeated_paragraph_never_lowers_a_repetition_fraction(paragraphs, data):
    pieces = [" ".join(words) for words in paragraphs]
    text = "\n\n".join(pieces)
    longer = f"{text}\n\n{data.draw(st.sampled_from(pieces))}"
    for name in REPEATED:
        assert value(name, longer) >= value(name, text) - 1e-12, name
    for name in ("gopher_top_2_gram_char_frac", "gopher_top_4_gram_char_frac"):
        assert 0 <= value(name, longer) <= 1


ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


@settings(max_examples=60)
@given(st.lists(ANY, min_size=1, max_size=4))
def test_any_text_gets_finite_values_and_each_filter_decides_once(texts):
    out = filters.apply(part(*texts, language="en", language_score=0.9), OPEN, None)
    asked = None
    for kept, rows in zip(out["kept"].to_pylist(), out["decisions"].to_pylist(), strict=True):
        names = [row["filter"] for row in rows]
        assert len(set(names)) == len(names) and (asked is None or names == asked)
        assert all(np.isfinite(row["value"]) for row in rows)
        assert kept == all(row["decision"] != "drop" for row in rows)
        asked = names
    assert set(HEURISTICS) < set(asked)


MIXED = [PROSE, "too short", "mail anna.smith@firm.de " + PROSE, "x = 1\n" * 50, PROSE * 3, "", "ключ " * 30]


def test_any_split_of_the_rows_and_masked_text_give_the_same():
    whole = filters.apply(part(*MIXED), OPEN, None)
    table = part(*MIXED)
    halves = [filters.apply(table.slice(a, b - a), OPEN, None) for a, b in ((0, 1), (1, 5), (5, 7))]
    assert pa.concat_tables(halves).combine_chunks().equals(whole.combine_chunks())
    again = filters.apply(whole, OPEN, None)
    assert again["text"].equals(whole["text"]) and again["kept"].equals(whole["kept"])
    assert again.schema == whole.schema and len(filters.apply(table.slice(0, 0), OPEN, None)) == 0
    assert "anna" not in whole["text"][2].as_py() and whole["kept"][2].as_py()
    values = [
        [(r["filter"], r["value"]) for r in rows if "personal" not in r["filter"]]
        for rows in whole["decisions"].to_pylist()
    ]
    assert values == [
        [(r["filter"], r["value"]) for r in rows if "personal" not in r["filter"]]
        for rows in again["decisions"].to_pylist()
    ]


def test_clean_prose_passes_and_each_fault_is_named():
    assert decisions(PROSE)[0]
    for name, text in {
        "gopher_min_doc_words": PROSE[:240], "max_document_kb": PROSE * 700, "min_alphabetic": "12 34 5% == " * 90,
        "gopher_dup_para_frac": f"{PROSE}\n\n" * 2, "c4_curly_bracket": PROSE + "\nThis is what { does to it here.",
        "gopher_max_bullet_lines_ratio": "- " + PROSE.replace("\n", "\n- "),
    }.items():  # fmt: skip
        kept, rows = decisions(text)
        assert not kept and rows[name]["decision"] == "drop", name


def test_families_follow_the_domain_and_thresholds_the_profile():
    data = Data(filters={"code": [], "*": ["fineweb"]}, thresholds={"fineweb_short_line": 0.01})
    assert not set(decisions(PROSE, data, domain="code")[1]) & set(HEURISTICS)
    kept, rows = decisions(PROSE + "\nshort.", data, domain="web")
    assert {n for n in rows if n in HEURISTICS} == {n for n, h in HEURISTICS.items() if h.family == "fineweb"}
    assert not kept and rows["fineweb_short_line"]["threshold"] == 0.01
    with pytest.raises(ValueError, match="did you mean 'fineweb_short_line'"):
        decisions(PROSE, Data(thresholds={"fineweb_shortline": 0.5}))


def test_language_is_asked_of_prose_only_and_stop_words_of_english_only():
    data = Data(languages=["en"])
    for code, score, kept in (("en", 0.9, True), ("en", 0.2, False), ("de", 0.9, False)):
        found, rows = decisions(PROSE, data, language=code, language_score=score)
        assert (found, "gopher_min_stop_words" in rows) == (kept, code == "en")
        assert rows["language"]["decision"] == ("keep" if code == "en" else "drop")
    assert not {"language", "language_score"} & set(
        decisions(PROSE, data, language="de", language_score=0.1, domain="code")[1]
    )


@pytest.mark.parametrize(
    ("expression", "kept"),
    [
        ("MIT", True), ("GPL-3.0-only", False), ("", False), ("MIT OR GPL-3.0-only", True), ("+", False),
        ("MIT AND GPL-3.0-only", False), ("(MIT OR GPL-3.0-only) AND ISC", True), ("MIT) AND (ISC", False),
        ("GPL-3.0-only AND (MIT OR ISC)", False), ("((MIT) AND (ISC OR X))", True), ("MIT OR X AND GPL-3.0-only", True),
    ],
)  # fmt: skip
def test_licence_expressions(expression, kept):
    assert filters.licensed(expression, ["MIT", "ISC"]) is kept


def test_the_audit_has_one_row_a_decision_and_never_a_secret():
    secret = "ghp_" + "aB3dE5gH1jK2mN4pQ6rS7tU8vW9xY0zA1bC2"
    text = f"{PROSE}\ntoken is {secret} and write to anna.smith@firm.de or bob@firm.de."
    for rule, verdict in (("mask", True), ("drop", False)):
        out = filters.apply(part(text), Data(secrets=rule, filters={"*": []}), None)
        audit = records.audit_rows(out).to_pylist()
        rows = {row["filter"]: row for row in audit}
        assert len(rows) == len(audit) and secret not in str(out.to_pylist())
        assert (rows["secret_access_token"]["value"], rows["secret_access_token"]["decision"]) == (1, rule)
        assert (rows["personal_email"]["value"], rows["personal_email"]["decision"]) == (2, "mask")
        assert out["kept"][0].as_py() is verdict
    untouched = filters.apply(part(text), Data(secrets="keep", personal_data="keep", filters={"*": []}), None)
    assert untouched["text"][0].as_py() == text and len(untouched["decisions"][0]) == 3


def test_families_of_a_domain_are_laid_over_the_default():
    default = Data().filters
    assert Data(filters={"law": ["c4"]}).filters == default | {"law": ["c4"]}
    assert Data(filters={"*": [], "law": ["c4"]}).filters == {"*": [], "law": ["c4"]}
    filters.check(Data(), {"text"})
    filters.check(Data(filters={"law": ["c4"]}), {"law", "text"})
    with pytest.raises(
        ValueError, match=r"data.filters has the domain 'lwa', which no record has; did you mean 'law'\?"
    ):
        filters.check(Data(filters={"lwa": ["c4"]}), {"law", "text"})
