"""Retrieval pairs and preferences mined from code the CodeSearchNet way (Husain et al. 2019, section 2)."""

import ast
import hashlib
import textwrap
import warnings
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from stackpkg.data import mixing, shards
from stackpkg.data.provenance import Record
from stackpkg.params import Auxiliary

PER_MODULE = 12  # functions of one module at most, so that no large file dominates
Pair = dict[str, Any]  # a row of pairs.parquet


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


def mine(records: Iterable[Record], validation: Collection[str], sizes: Auxiliary, held_out: int) -> list[Pair]:
    """At most `sizes.pairs` pairs from code records, each with its preference; hard negatives are of the same module.

    Whole modules are held out until `held_out` pairs are: first those of the `validation` records, which the language
    model never reads, then others by hash. A function seen before is passed over, and a query of under three words.
    """
    pairs: list[Pair] = []
    seen: set[str] = set()
    code = [record for record in records if record.domain == "code"]
    for record in sorted(code, key=lambda r: (r.record_id not in validation, mixing.hashed(1, r.record_id)[0])):
        split = "held_out" if len(pairs) < held_out else "train"
        fresh = list({f.code: f for f in functions(record.text) if f.code not in seen}.values())
        asked = {f.query: f for f in fresh if len(f.query.split()) >= 3 and f.query not in seen}
        seen.update(f.code for f in fresh)
        where = {"record_id": record.record_id, "source": record.source, "licence": record.licence, "split": split}
        for query, f in list(asked.items())[:PER_MODULE]:
            others = [other for other in fresh if other.body != f.body]
            hard = [others[k] for k in mixing.permutation(len(others), record.record_id, query)[: sizes.hard_negatives]]
            if len(hard) == sizes.hard_negatives:
                key = int(hashlib.sha256(f.code.encode()).hexdigest()[:15], 16)
                texts = {"query": query, "positive": f.code, "negatives": [other.code for other in hard]}
                choice = {"prompt": f.prompt, "chosen": f.body, "rejected": hard[0].body}
                pairs.append(where | texts | choice | {"pair_key": key, "unseen": record.record_id in validation})
                seen.add(query)
        if len(pairs) >= sizes.pairs:
            break
    return pairs[: sizes.pairs]


def encode(pairs: Iterable[Pair], model: Tokenizer, sizes: Auxiliary) -> list[Pair]:
    """The pairs with query_ids, positive_ids and negative_ids, cut to `query_tokens` and `document_tokens`."""
    made = []
    for pair in pairs:
        query, *documents = shards.encode(model, [pair["query"], pair["positive"], *pair["negatives"]])
        positive, *negatives = [ids[: sizes.document_tokens] for ids in documents]
        ids = {"query_ids": query[: sizes.query_tokens], "positive_ids": positive, "negative_ids": negatives}
        made.append(pair | ids)
    return made


def leakage(pairs: Iterable[Pair]) -> int:
    """Modules, queries and functions, negatives included, that both training and held-out pairs hold."""
    sides: dict[str, set[str]] = {"train": set(), "held_out": set()}
    for pair in pairs:
        sides[pair["split"]] |= {pair["record_id"], pair["query"], pair["positive"], *pair["negatives"]}
    return len(sides["train"] & sides["held_out"])
