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
from stackpkg.data import mixing, preferences, problems, retrieval_sets, shards
from stackpkg.data.retrieval_sets import Pair
from stackpkg.params import Auxiliary

PER_MODULE = 12  # functions of one module at most, so that no large file dominates
WORDS, OVERLAP = 13, 0.5  # of an n-gram; share of a training row's n-grams that make it a copy of evaluation text
WHERE = ("record_id", "source", "licence", "split")


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
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    lines, found = [line + "\n" for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")], []
    for node in ast.walk(tree):
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
    may ask for either function, and one of under three words. Hard negatives are functions of the split.
    """
    if isinstance(records, pa.Table):
        records = records.filter(pc.field("domain") == "code").select([*WHERE[:3], "domain", "text"]).to_pylist()
    pairs: list[Pair] = []
    asked: dict[str, str] = {}
    seen: set[str] = set()
    documents: dict[str, str] = {}
    code = [(record["record_id"], record) for record in records if record["domain"] == "code"]
    for name, record in sorted(code, key=lambda item: (item[0] not in validation, mixing.hashed(1, item[0])[0])):
        fresh = list({f.body: f for f in functions(record["text"]) if f.body not in seen}.values())
        seen |= {f.body for f in fresh}
        where = {"record_id": name, "source": record["source"], "licence": record["licence"]}
        where["split"] = "held_out" if len(pairs) < held_out else "train"
        usable = [f for f in fresh if asked.setdefault(f.query or f.code, f.code) == f.code]
        documents |= {f.code: where["split"] for f in usable}
        for f in [f for f in usable if len(f.query.split()) >= 3][:PER_MODULE]:
            if others := [other.body for other in fresh if not retrieval_sets.similar(other.body, f.body)]:
                wrong = others[mixing.permutation(len(others), name, f.query)[0]]
                texts = {"query": f.query, "positive": f.code, "negatives": list[str]()}
                choice = {"prompt": f.prompt, "chosen": f.body, "rejected": wrong}
                pairs.append(
                    where | texts | choice | {"pair_key": retrieval_sets.key(f.code), "unseen": name in validation}
                )
        if len(pairs) >= sizes.pairs:
            break
    n, margin = sizes.hard_negatives, sizes.negative_margin
    return retrieval_sets.mine_negatives(pairs[: sizes.pairs], documents, n, margin)


class Labelled(NamedTuple):
    """Pairs and preferences; the lines of given files that were set aside; the training rows that share text with the
    evaluation, of which those that copy it were left out."""

    pairs: list[Pair]
    preferences: list[Pair]
    problems: list[problems.Problem]
    contaminated: list[dict[str, Any]]


def load(sizes: Auxiliary, mined: Sequence[Pair], evaluation: Collection[str] = ()) -> Labelled:
    """`mined` pairs, evenly mixed with those of `sizes.retrieval_set`; their preferences, with `sizes.preference_set`.

    A training row of which a text, or over `OVERLAP` of the 13-grams, is in a held-out row or an `evaluation` text is
    left out. Raises `ValueError`, with the lines to mend first, when over a tenth of a given file is wrong.
    """
    pairs: list[Pair] = [
        {name: value for name, value in pair.items() if name not in preferences.TEXTS} for pair in mined
    ]
    choices: list[Pair] = [
        {name: pair[name] for name in (*WHERE, *preferences.TEXTS)} | {"format": preferences.EXPLICIT} for pair in mined
    ]
    found: list[problems.Problem] = []
    if sizes.retrieval_set:
        given, documents, found = retrieval_sets.read(path := runs.root() / sizes.retrieval_set)
        problems.check(path, len(given), found)
        filled = retrieval_sets.mine_negatives(given, documents, sizes.hard_negatives, sizes.negative_margin)
        pairs = _joined(pairs, filled)
    if sizes.preference_set:
        stated, wrong = preferences.read(path := runs.root() / sizes.preference_set)
        problems.check(path, len(stated), wrong)
        choices, found = _joined(choices, preferences.split(stated, retrieval_sets.HELD_OUT)), found + wrong
    copies = contamination(pairs, ("query", "positive", "negatives"), evaluation)
    repeats = contamination(choices, ("prompt",), evaluation)
    pairs, choices = _without(pairs, copies), _without(choices, repeats)
    return Labelled(pairs, choices, found, [*copies, *repeats])


def _without(rows: list[Pair], copies: list[dict[str, Any]]) -> list[Pair]:
    taken = {item["row"] for item in copies if item["exact"] or item["share"] > OVERLAP}
    return [row for k, row in enumerate(rows) if k not in taken]


def _joined(ours: list[Pair], theirs: list[Pair]) -> list[Pair]:
    """Both, evenly mixed."""
    total = max(1, len(ours) + len(theirs))
    lane, ordinal = mixing.interleave([len(ours) / total, len(theirs) / total], len(ours) + len(theirs), "labelled")
    return [(ours, theirs)[side][k] for side, k in zip(lane.tolist(), ordinal.tolist(), strict=True)]


def encode(pairs: Iterable[Pair], model: Tokenizer, sizes: Auxiliary) -> list[Pair]:
    """The pairs with query_ids, positive_ids and negative_ids, cut to `query_tokens` and `document_tokens`."""
    made = []
    for pair in pairs:
        query, *documents = shards.encode(model, [pair["query"], pair["positive"], *pair["negatives"]])
        positive, *negatives = [ids[: sizes.document_tokens] for ids in documents]
        ids = {"query_ids": query[: sizes.query_tokens], "positive_ids": positive, "negative_ids": negatives}
        made.append(pair | ids)
    return made


def contamination(
    rows: Sequence[Pair], columns: Sequence[str], evaluation: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Training rows that share text with held-out rows or with `evaluation`, the worst first: row, source, `exact`,
    whether a whole text is the same but for case and spaces, and `share` of the row's 13-grams."""

    def texts(row: Pair) -> list[str]:
        return [text for name in columns for text in ([row[name]] if isinstance(row[name], str) else row[name])]

    def grams(found: Iterable[str]) -> set[tuple[str, ...]]:
        # 13 words, as GPT-3 looked for benchmarks in its text        (Brown et al. 2020, appendix C)
        words = (retrieval_sets.terms(text) for text in found)
        return {tuple(w[k : k + WORDS]) for w in words for k in range(len(w) - WORDS + 1)}

    held = [*evaluation, *(text for row in rows if row["split"] == "held_out" for text in texts(row))]
    whole, parts, made = {" ".join(text.lower().split()) for text in held}, grams(held), []
    for k, row in enumerate(rows):
        if row["split"] == "train":
            own = grams(texts(row))
            exact = any(" ".join(text.lower().split()) in whole for text in texts(row))
            made.append(
                {"row": k, "source": row["source"], "exact": exact, "share": len(own & parts) / max(1, len(own))}
            )
    return sorted(
        (item for item in made if item["exact"] or item["share"]), key=lambda item: (-item["exact"], -item["share"])
    )


def leakage(pairs: Iterable[Pair]) -> int:
    """Modules, queries and functions, negatives included, that both training and held-out pairs hold."""
    sides: dict[str, set[str]] = {"train": set(), "held_out": set()}
    for pair in pairs:
        sides[pair["split"]] |= {pair["record_id"], pair["query"], pair["positive"], *pair["negatives"]}
    return len(sides["train"] & sides["held_out"])
