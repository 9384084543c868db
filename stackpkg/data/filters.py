"""Filters: the heuristics of Gopher, C4 and FineWeb with their papers' thresholds, and what every domain is asked.

Sources: Gopher, Rae et al. 2021, appendix A1.1 and table A1; C4, Raffel et al. 2020, section 2.2; FineWeb, Penedo et
al. 2024, section 3.6. Names follow datatrove's parameters. C4 edits pages line by line and here a document is kept or
dropped whole: a line rule drops a document of which it would leave no line, and sentences are counted in the lines that
all rules leave. Sentence ends of other scripts count as English ones do; Gopher's stop words are asked of English only.
"""

import operator
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numba import njit

from stackpkg.data import perplexity, records
from stackpkg.data.mixing import GOLDEN
from stackpkg.data.perplexity import CACHE, CODES, mixed
from stackpkg.data.scrub import SECRETS, scrub
from stackpkg.params import Data
from stackpkg.schema import DEFAULT_FILTERS, allowed

SIGNS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
BULLETS = ("•", "‣", "⁃", "◦", "▪", "●", "*", "-", "–")
TERMINAL = (".", "!", "?", '"', "”", "»", "。", "！", "？", "」", "।", "؟", "۔")
SENTENCE = re.compile(r"[.!?。！？।؟۔]+[\"'”»」)\]]*(?:(?=\s)|$|(?<=[。！？」]))")
LETTER = np.strings.isalpha(CODES.view("U1"))
Limits = Iterator[tuple[str, float, str, float]]  # filter, value, sign, threshold


@njit(cache=CACHE)
def _repetition(words: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """float64[11]: at n, the share of characters in the most frequent n-gram (2 to 4; 0 if none is repeated) or in
    n-grams that occurred before (5 to 10); a character counts once. Hashes and lengths of the words, in order."""
    out, total, size = np.zeros(11), max(1, int(lengths.sum())), 4
    while size < 2 * len(words):
        size *= 2
    keys, counts, places = np.empty(size, np.uint64), np.empty(size, np.int64), np.empty(len(words), np.int64)
    grams, until = words.copy(), np.zeros(len(words) + 1, np.int64)
    until[1:] = np.cumsum(lengths)
    for n in range(2, 11):
        counts[:] = 0
        best, weight, end, covered = -1, 0, 0, 0
        for i in range(len(words) - n + 1):
            grams[i] = mixed(grams[i] * GOLDEN + words[i + n - 1])
            place: Any = np.int64(grams[i] & np.uint64(size - 1))
            while counts[place] and keys[place] != grams[i]:
                place = (place + 1) & (size - 1)
            keys[place], places[i] = grams[i], place
            counts[place] += 1
            if counts[place] > 1:
                long = until[i + n] - until[i]
                if n > 4:
                    covered, end = covered + int(until[i + n] - until[max(i, end)]), i + n
                elif best < 0 or (counts[place], long) > (counts[best], weight):
                    best, weight = place, long
        for i in range(len(words) - n + 1 if n < 5 and best >= 0 else 0):
            if places[i] == best:
                covered, end = covered + int(until[i + n] - until[max(i, end)]), i + n
        out[n] = covered / total
        if not covered:  # no n-gram is repeated, so no longer one is
            break
    return out


class Page:
    """What the statistics share: words by white space, lines and paragraphs that are not blank, stripped."""

    def __init__(self, text: str) -> None:
        self.text, self.words = text, text.split()
        self.lines = [line for line in map(str.strip, text.split("\n")) if line]

    @cached_property
    def lower(self) -> str:
        return self.text.lower()

    @cached_property
    def scripted(self) -> bool:
        return "javascript" in self.lower

    @cached_property
    def characters(self) -> int:
        """Those that are not white space."""
        return sum(map(len, self.words))

    @cached_property
    def alphabetic(self) -> float:
        """Share of letters among the characters; 0 for none."""
        letters = LETTER[np.frombuffer(self.text.encode("utf-32-le", "surrogatepass"), np.uint32)].sum()
        return float(letters) / max(1, self.characters)

    @cached_property
    def paragraphs(self) -> list[str]:
        return [piece for piece in map(str.strip, re.split(r"\n\s*\n", self.text)) if piece]

    @cached_property
    def repetition(self) -> list[float]:
        n = len(self.words)
        words, lengths = np.fromiter(map(hash, self.words), np.int64, n), np.fromiter(map(len, self.words), np.int64, n)
        return _repetition(words.view(np.uint64), lengths).tolist()

    @cached_property
    def sentences(self) -> int:
        """In the lines that C4 leaves: terminal punctuation, at least three words, no javascript."""
        left = (
            line for line in self.lines if line.endswith(TERMINAL) and line.count(" ") > 1 and not self.script(line)
        )
        return sum(max(1, len(SENTENCE.findall(line))) for line in left)

    def script(self, line: str) -> bool:
        return self.scripted and "javascript" in line.lower()

    def lines_where(self, test: Callable[[str], bool]) -> float:
        return sum(map(test, self.lines)) / max(1, len(self.lines))

    def per_word(self, *symbols: str) -> float:
        return sum(map(self.text.count, symbols)) / max(1, len(self.words))


def duplicates(pieces: Sequence[str]) -> tuple[float, float]:
    """Shares of pieces, and of their characters, that repeat an earlier piece; 0 for none."""
    unique, characters = set(pieces), sum(map(len, pieces))
    return (1 - len(unique) / len(pieces), 1 - sum(map(len, unique)) / characters) if pieces else (0.0, 0.0)


def _alphabetic_words(page: Page) -> float:
    mixed_words = [word for word in page.words if not word.isalpha()]
    return 1 - sum(not any(map(str.isalpha, word)) for word in mixed_words) / max(1, len(page.words))


Row = tuple[str, str, float, Callable[[Page], float]]  # name, sign, the paper's threshold, statistic


class Heuristic(NamedTuple):
    """A document is kept when `statistic` compares so with the threshold."""

    family: str
    sign: str
    threshold: float
    statistic: Callable[[Page], float]


def _ending(ends: tuple[str, ...]) -> Callable[[Page], float]:
    return lambda page: page.lines_where(lambda line: line.endswith(ends))


# removed are documents without "between 50 and 100,000 words, or whose mean word length is outside the range of 3 to 10
# characters", and with "a symbol-to-word ratio greater than 0.1 for either the hash symbol or the ellipsis"; table A1
GOPHER_QUALITY: list[Row] = [
    ("gopher_min_doc_words", ">=", 50, lambda p: len(p.words)),
    ("gopher_max_doc_words", "<=", 100_000, lambda p: len(p.words)),
    ("gopher_min_avg_word_length", ">=", 3, lambda p: p.characters / max(1, len(p.words))),
    ("gopher_max_avg_word_length", "<=", 10, lambda p: p.characters / max(1, len(p.words))),
    ("gopher_hash_word_ratio", "<=", 0.1, lambda p: p.per_word("#")),
    ("gopher_ellipsis_word_ratio", "<=", 0.1, lambda p: p.per_word("...", "…")),
    ("gopher_max_bullet_lines_ratio", "<=", 0.9, lambda p: p.lines_where(lambda line: line.startswith(BULLETS))),
    ("gopher_max_ellipsis_lines_ratio", "<=", 0.3, _ending(("...", "…"))),
    ("gopher_min_alpha_words_ratio", ">=", 0.8, _alphabetic_words),
    ("gopher_min_stop_words", ">=", 2, lambda p: len(STOP_WORDS.intersection(p.words))),
]
GOPHER_REPETITION: list[Row] = [
    ("gopher_dup_line_frac", "<=", 0.30, lambda p: duplicates(p.lines)[0]),
    ("gopher_dup_para_frac", "<=", 0.30, lambda p: duplicates(p.paragraphs)[0]),
    ("gopher_dup_line_char_frac", "<=", 0.20, lambda p: duplicates(p.lines)[1]),
    ("gopher_dup_para_char_frac", "<=", 0.20, lambda p: duplicates(p.paragraphs)[1]),
    ("gopher_top_2_gram_char_frac", "<=", 0.20, lambda p: p.repetition[2]),
    ("gopher_top_3_gram_char_frac", "<=", 0.18, lambda p: p.repetition[3]),
    ("gopher_top_4_gram_char_frac", "<=", 0.16, lambda p: p.repetition[4]),
    ("gopher_dup_5_gram_char_frac", "<=", 0.15, lambda p: p.repetition[5]),
    ("gopher_dup_6_gram_char_frac", "<=", 0.14, lambda p: p.repetition[6]),
    ("gopher_dup_7_gram_char_frac", "<=", 0.13, lambda p: p.repetition[7]),
    ("gopher_dup_8_gram_char_frac", "<=", 0.12, lambda p: p.repetition[8]),
    ("gopher_dup_9_gram_char_frac", "<=", 0.11, lambda p: p.repetition[9]),
    ("gopher_dup_10_gram_char_frac", "<=", 0.10, lambda p: p.repetition[10]),
]
C4: list[Row] = [
    ("c4_terminal_punctuation", ">", 0, _ending(TERMINAL)),
    ("c4_javascript", "<", 1, lambda p: p.lines_where(p.script)),
    ("c4_lorem_ipsum", "<=", 0, lambda p: p.lower.count("lorem ipsum")),
    ("c4_curly_bracket", "<=", 0, lambda p: p.text.count("{")),
    ("c4_min_num_sentences", ">=", 5, lambda p: p.sentences),
]
# removed are pages whose "fraction of lines ending with punctuation" is <= 0.12, "fraction of characters in duplicated
# lines" >= 0.1, "fraction of lines shorter than 30 characters" >= 0.67
FINEWEB: list[Row] = [
    ("fineweb_line_punct", ">", 0.12, _ending(TERMINAL)),
    ("fineweb_char_duplicates", "<", 0.1, lambda p: duplicates(p.lines)[1]),
    ("fineweb_short_line", "<", 0.67, lambda p: p.lines_where(lambda line: len(line) < 30)),
]
FAMILIES = {"gopher_quality": GOPHER_QUALITY, "gopher_repetition": GOPHER_REPETITION, "c4": C4, "fineweb": FINEWEB}
HEURISTICS = {row[0]: Heuristic(family, *row[1:]) for family, rows in FAMILIES.items() for row in rows}
ASKED = {  # what is asked beside the families; its parameters are fields of `Data`
    "min_words": ">=", "max_document_kb": "<=", "min_alphabetic": ">=", "licence": ">=", "language": ">=",
    "language_score": ">=", "perplexity_low": ">=", "perplexity_high": "<=",
}  # fmt: skip


def sign_of(name: str) -> str:
    """How a value must compare with the threshold for its document to be kept; what a scrub counts must be 0."""
    return HEURISTICS[name].sign if name in HEURISTICS else ASKED.get(name, "<=")


def licensed(expression: str, allowed: Sequence[str]) -> bool:
    """Whether an SPDX expression holds with the licences allowed: one of OR, all of AND, AND binds tighter."""

    def holds(flat: str) -> bool:
        return any(all(name.strip() in names for name in part.split(" AND ")) for part in flat.split(" OR "))

    names, before = {*allowed, "\0"}, ""
    while before != expression:
        before, expression = expression, re.sub(r"\(([^()]*)\)", lambda m: "\0" if holds(m[1]) else "-", expression)
    return holds(expression)


def _asked(row: dict[str, Any], data: Data, perplexed: tuple[float, perplexity.Model] | None) -> Limits:
    """Every limit that is put to a row, in order."""
    families, page, code = (
        data.filters.get(row["domain"], data.filters.get("*", [])),
        Page(row["text"]),
        row.get("language"),
    )
    yield "min_words", len(page.words), ">=", data.min_words
    yield "max_document_kb", len(page.text.encode(errors="replace")) / 1e3, "<=", data.max_document_kb
    yield "min_alphabetic", page.alphabetic, ">=", data.min_alphabetic
    if data.licences:
        yield "licence", licensed(row["licence"], data.licences), ">=", 1
    if "perplexity" in families and code is not None:  # prose: text whose language can be told
        if data.languages:
            yield "language", code in data.languages, ">=", 1
        yield "language_score", row["language_score"], ">=", data.min_language_score
    for name, (family, sign, threshold, statistic) in HEURISTICS.items():
        if family in families and not (name == "gopher_min_stop_words" and code not in (None, "", "en")):
            yield name, statistic(page), sign, data.thresholds.get(name, threshold)
    if perplexed:
        (low, high), wanted = perplexed[1].band(*data.perplexity_band), data.perplexity_band
        if wanted[0] > 0:
            yield "perplexity_low", perplexed[0], ">=", low
        if wanted[1] < 1:
            yield "perplexity_high", perplexed[0], "<=", high


def check(data: Data, domains: Collection[str]) -> None:
    """Raises `ValueError` for a domain in `data.filters` that no record has and that is none of the default's: a slip
    there would leave a domain unfiltered."""
    for name in data.filters.keys() - {*domains, *DEFAULT_FILTERS}:
        raise ValueError(f"data.filters has the domain {name!r}, which no record has; {allowed(name, domains)}")


def apply(part: pa.Table, data: Data, models: Path | None) -> pa.Table:
    """The same rows with `kept` and `decisions`, texts scrubbed (also of rows that are dropped: nobody reads a secret).

    `models`: the folder of n-gram models, or None; asked, as the language is, where a domain's families contain
    perplexity and the part has a `language`. Statistics are of the scrubbed text. Raises `ValueError` for a threshold
    of an unknown filter.
    """
    for name in data.thresholds.keys() - HEURISTICS.keys():
        raise ValueError(f"data.thresholds has {name!r}; {allowed(name, HEURISTICS)}")
    policy = {"personal": data.personal_data, "secret": data.secrets}
    scrubbed = [scrub(t, *(rule != "keep" for rule in policy.values())) for t in part["text"].to_pylist()]
    texts = pa.array([text for text, _ in scrubbed], part.schema.field("text").type)
    names = [name for name in part.column_names if name not in ("kept", "decisions")]
    part = part.select(names).set_column(names.index("text"), part.schema.field("text"), texts)
    prose = [("perplexity" in data.filters.get(d, data.filters.get("*", []))) for d in part["domain"].to_pylist()]
    values: list[Any] = [None] * len(part)
    if models is not None and any(prose) and "language" in names:
        rows = np.flatnonzero(prose)
        for k, value in zip(rows.tolist(), perplexity.score(part.take(rows), models), strict=True):
            values[k] = value
    kept, decisions = [], []
    seen = part.select([name for name in names if name in ("domain", "licence", "text", "language", "language_score")])
    for row, (_, counts), value in zip(seen.to_pylist(), scrubbed, values, strict=True):
        found = [
            (name, float(v), float(limit), "keep" if SIGNS[sign](v, limit) else "drop")
            for name, v, sign, limit in _asked(row, data, value)
        ]
        for kind, count in counts.items():
            group = "secret" if kind in SECRETS else "personal"
            found.append((f"{group}_{kind}", float(count), 0.0, policy[group] if count else "keep"))
        kept.append(all(verdict != "drop" for *_, verdict in found))
        decisions.append(found)
    part = part.append_column("kept", pa.array(kept, pa.bool_()))
    return part.append_column("decisions", pa.array(decisions, records.DECISIONS))
