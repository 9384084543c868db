"""Retrieval pairs and preferences: mined from code the CodeSearchNet way (Husain et al. 2019, section 2), and given."""

import ast
import textwrap
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from stackpkg import runs
from stackpkg.data import mixing, preferences, problems, retrieval_sets, tokenizer
from stackpkg.data.retrieval_sets import Pair
from stackpkg.params import Auxiliary

PER_MODULE = 12  # functions of one module at most, so that no large file dominates
WORDS, OVERLAP = 13, 0.5  # of an n-gram; share of a training text that makes it a copy
BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")  # where a statement of Python holds statements
ORIGIN = ("record_id", "source", "licence")


class Function(NamedTuple):
    """One function: the first paragraph of its docstring, signature with docstring, body, signature with body."""

    query: str
    prompt: str
    body: str
    code: str


def functions(text: str) -> list[Function]:
    """Functions with three lines of body or more, no tests, no dunder methods; none of what doesn't parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in strings
            nodes: list[Any] = list(ast.parse(text).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    lines, found = [line + "\n" for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")], []
    for node in nodes:  # statements alone, which hold every function: a tenth of the tree
        nodes += [inner for name in BLOCKS for inner in getattr(node, name, [])]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith(("test", "__")):
            first, docstring = node.body[0], ast.get_docstring(node) or ""
            start, end = first.lineno - 1, (first.end_lineno or 0) if docstring else first.lineno - 1
            signature, body = "".join(lines[node.lineno - 1 : start]), "".join(lines[end : node.end_lineno])
            shared = start < node.lineno or (docstring and len(node.body) > 1 and node.body[1].lineno == end)
            if not shared and body.count("\n") >= 3:
                query, prompt = " ".join(docstring.split("\n\n")[0].split()), signature + "".join(lines[start:end])
                found.append(Function(query, textwrap.dedent(prompt), body, textwrap.dedent(signature + body)))
    return found


def mine(
    records: pa.Table | Iterable[Mapping[str, Any]], validation: Collection[str], sizes: Auxiliary, held_out: int
) -> list[Pair]:
    """At most `sizes.pairs` pairs from code records, each with its preference: rejected is a body of the same module.

    Whole modules are held out until `held_out` pairs are: first those of the `validation` records, which the language
    model never reads, then others by hash. A body seen before is passed over, and so are a docstring seen before, which
    may ask for either function, one of under three words, and one that its function says again. Hard negatives are
    functions of the same split.
    """
    if isinstance(records, pa.Table):
        records = records.select([*ORIGIN, "domain", "text"]).filter(pc.field("domain") == "code").to_pylist()
    pairs: list[Pair] = []
    seen, asked, documents, owner = set[str](), dict[str, str](), dict[str, str](), dict[str, str]()
    code = [(record["record_id"], record) for record in records if record["domain"] == "code"]
    for name, record in sorted(code, key=lambda item: (item[0] not in validation, mixing.hashed(1, item[0])[0])):
        split = "held_out" if len(pairs) < held_out else "train"
        where = {key: record[key] for key in ORIGIN} | {"split": split, "unseen": name in validation}
        fresh = list({f.body: f for f in functions(record["text"]) if f.body not in seen}.values())
        seen |= {f.body for f in fresh}
        first = [f for f in fresh if asked.setdefault(f.query or f.code, f.code) == f.code]
        documents |= {f.code: split for f in first}
        owner |= {f.code: name for f in first}
        asks = [f for f in first if len(f.query.split()) >= 3 and f.query not in " ".join(f.code.split())]
        for f in asks[:PER_MODULE]:
            others = (fresh[k].body for k in mixing.permutation(len(fresh), name, f.query))
            if wrong := next((body for body in others if not retrieval_sets.similar(body, f.body)), ""):
                choice = {"prompt": f.prompt, "chosen": f.body, "rejected": wrong, "format": preferences.EXPLICIT}
                texts = {"query": f.query, "positive": f.code, "negatives": list[str]()}
                pairs.append(where | texts | choice | {"pair_key": retrieval_sets.key(f.code)})
        if len(pairs) >= sizes.pairs:
            break
    made = retrieval_sets.mine_negatives(pairs[: sizes.pairs], documents, sizes.hard_negatives, sizes.negative_margin)
    return [pair | {"negative_records": [owner[text] for text in pair["negatives"]]} for pair in made]


class Labelled(NamedTuple):
    """Rows of pairs.parquet and of preferences.parquet; the lines of given files that were set aside; training rows
    that share text with the evaluation: source, share."""

    pairs: list[Pair]
    preferences: list[Pair]
    problems: list[problems.Problem]
    contaminated: list[dict[str, Any]]


def load(sizes: Auxiliary, mined: Sequence[Pair], evaluation: Collection[str] = ()) -> Labelled:
    """`mined` pairs, evenly mixed with those of `sizes.retrieval_set`; their preferences, with `sizes.preference_set`.

    A training row that shares over `OVERLAP` of its text with held-out rows or `evaluation` texts is left out. Raises
    `ValueError`, with the lines to mend first, when over a tenth of a given file is wrong.
    """
    pairs: list[Pair] = []
    choices: list[Pair] = []
    found: list[problems.Problem] = []
    if sizes.retrieval_set:
        given, documents, found = retrieval_sets.read(path := runs.root() / sizes.retrieval_set)
        problems.check(path, len(given), found)
        pairs = retrieval_sets.mine_negatives(given, documents, sizes.hard_negatives, sizes.negative_margin)
        pairs = [pair | {"negative_records": [pair["record_id"]] * len(pair["negatives"])} for pair in pairs]
    if sizes.preference_set:
        stated, wrong = preferences.read(path := runs.root() / sizes.preference_set)
        problems.check(path, len(stated), wrong)
        choices, found = preferences.split(stated, retrieval_sets.HELD_OUT), [*found, *wrong]
    pairs, shared = _joined(
        mined, pairs, ("query", "positive", "negatives", "negative_records", "pair_key", "unseen"), evaluation
    )
    choices, copied = _joined(mined, choices, (*preferences.TEXTS, "format"), evaluation)
    return Labelled(pairs, choices, found, shared + copied)


def _joined(
    mined: Sequence[Pair], given: Sequence[Pair], columns: Sequence[str], evaluation: Collection[str]
) -> tuple[list[Pair], list[dict[str, Any]]]:
    """Both, evenly mixed, a row that `mined` has too once, with these columns; and what of them is contaminated."""
    sides = [[{key: row[key] for key in (*ORIGIN, "split", *columns)} for row in side] for side in (mined, given)]
    known = {(row[columns[0]], row[columns[1]]) for row in sides[0]}
    sides[1] = [row for row in sides[1] if (row[columns[0]], row[columns[1]]) not in known]
    counts = [len(side) for side in sides]
    lane, ordinal = mixing.interleave([count / max(1, sum(counts)) for count in counts], sum(counts), "labelled")
    rows = [sides[side][k] for side, k in zip(lane.tolist(), ordinal.tolist(), strict=True)]
    shares = contamination(
        rows, [name for name in ("query", "positive", "negatives", "prompt") if name in columns], evaluation
    )
    report = [{"source": row["source"], "share": share} for row, share in zip(rows, shares, strict=True) if share]
    return [row for row, share in zip(rows, shares, strict=True) if share <= OVERLAP], report


def encode(pairs: Iterable[Pair], model: Tokenizer, sizes: Auxiliary) -> list[Pair]:
    """The pairs with query_ids, positive_ids and negative_ids, cut to `query_tokens` and `document_tokens`."""
    made = []
    for pair in pairs:
        query, *documents = tokenizer.encode(model, [pair["query"], pair["positive"], *pair["negatives"]])
        positive, *negatives = [ids[: sizes.document_tokens] for ids in documents]
        ids = {"query_ids": query[: sizes.query_tokens], "positive_ids": positive, "negative_ids": negatives}
        made.append(pair | ids)
    return made


def contamination(rows: Sequence[Pair], columns: Sequence[str], evaluation: Collection[str] = ()) -> list[float]:
    """Share of a training row's text that held-out rows or `evaluation` texts hold: of the 13-grams of that text, of
    its `columns`, that has most; 1 for a text that is theirs but for case and spaces. Held-out rows have none."""

    def texts(row: Pair) -> list[str]:
        return [text for name in columns for text in ([row[name]] if isinstance(row[name], str) else row[name])]

    def grams(text: str) -> set[tuple[str, ...]]:
        words = retrieval_sets.terms(text)  # 13 of them, as in Brown et al. 2020 (GPT-3), appendix C
        return {tuple(words[k : k + WORDS]) for k in range(len(words) - WORDS + 1)}

    def share(text: str) -> float:
        return 1.0 if " ".join(text.lower().split()) in whole else len(grams(text) & parts) / max(1, len(grams(text)))

    held = [*evaluation, *(text for row in rows if row["split"] == "held_out" for text in texts(row))]
    whole, parts = {" ".join(text.lower().split()) for text in held}, set[tuple[str, ...]]().union(*map(grams, held))
    return [max(map(share, texts(row))) if row["split"] == "train" else 0.0 for row in rows]


def leakage(pairs: Iterable[Pair]) -> int:
    """Modules, queries and functions, negatives included, that both training and held-out pairs hold."""
    sides: dict[str, set[str]] = {"train": set(), "held_out": set()}
    for pair in pairs:
        sides[pair["split"]] |= {pair["record_id"], pair["query"], pair["positive"], *pair["negatives"]}
    return len(sides["train"] & sides["held_out"])
