"""Retrieval sets in BEIR's format (Thakur et al. 2021) or as triples: read, validated, written; hard negatives."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_array

from stackpkg import runs
from stackpkg.data import mixing, problems
from stackpkg.data.items import record_id
from stackpkg.data.problems import Problem, Wrong

HEADER = ["query-id", "corpus-id", "score"]
SPLITS = {"train": "train", "dev": "held_out", "test": "held_out"}  # of BEIR -> of pairs.parquet
HELD_OUT = 0.1  # share of the queries of triples that is held out: they come without splits
SHINGLE, NEAR = 3, 0.7  # words; Jaccard: short texts this alike answer the same questions
K1, B = 1.2, 0.75  # how soon the count of a term saturates, how much a document's length weighs
SPARE = 64  # candidates looked at beyond those wanted
Pair = dict[str, Any]  # a row of pairs.parquet
Judged = dict[tuple[str, str], tuple[int, str, str, str]]  # query, document -> grade, split, source, licence


class RetrievalSet(NamedTuple):
    """A pair for each query and document relevant to it; the split of each document's text; what was set aside."""

    pairs: list[Pair]
    documents: dict[str, str]
    problems: list[Problem]


def key(text: str) -> int:
    """The pair_key of a pair: 60 bits. In a batch, pairs of one key are no negatives of each other."""
    return int(record_id(text)[:15], 16)


def read(path: Path) -> RetrievalSet:
    """A BEIR folder, or a file of triples {query or anchor, positive, negative or negatives}; .gz and .zst too.

    Grades above 0 are relevant, those of 0 negatives; `mine_negatives` finds more. Documents nobody judged are dealt to
    the splits as the pairs are. Raises `ValueError` when a folder lacks its corpus, its queries or all judgements.
    """
    judged, corpus, found = judgements(path) if path.is_dir() else _triples(path)
    graded: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for (query, text), (grade, *_) in judged.items():
        graded[query, grade > 0].append(text)
    pairs: list[Pair] = []
    for (query, text), (grade, split, source, licence) in judged.items():
        if grade > 0:
            about = {"split": split, "unseen": split == "held_out"}
            about["pair_key"] = key(text if len(graded[query, True]) == 1 else query)
            texts = {"query": query, "positive": text, "negatives": graded[query, False]}
            pairs.append(problems.origin(source, licence) | about | texts)
    share = sum(pair["unseen"] for pair in pairs) / max(1, len(pairs))
    dealt = {text: _drawn(share, "document", text) for text in corpus}
    return RetrievalSet(pairs, dealt | {text: split for (_, text), (_, split, *_) in judged.items()}, found)


def _drawn(share: float, *key: str) -> str:
    return "held_out" if mixing.hashed(1, *key)[0] / 2.0**64 < share else "train"


def judgements(folder: Path) -> tuple[Judged, list[str], list[Problem]]:
    """What a BEIR folder judges, the texts of its corpus, and the lines that were set aside. Raises as `read` does."""
    (corpus, bad), (queries, wrong) = (_entries(folder, name) for name in ("corpus", "queries"))
    judged: Judged = {}

    def judge(split: str, number: int, line: bytes) -> None:
        cells = line.decode("utf-8", "replace").strip("\r\n").split("\t")
        if len(cells) != 3 or (number == 1) != (cells == HEADER):
            raise Wrong(f"{cells}, where three columns below a header belong", f"begin with {HEADER}, tabs between")
        if number > 1:
            for cell, known, name in zip(cells, (queries, corpus), ("queries", "corpus"), strict=False):
                if cell not in known:
                    raise Wrong(f"{cell!r} is not in {name}.jsonl", "add it there, or drop the line")
            if not re.fullmatch("[0-9]{1,9}", cells[2]):
                raise Wrong(f"score {cells[2]!r} is no whole number from 0", "0 is not relevant, above is relevant")
            query, (text, source, licence) = queries[cells[0]][0], corpus[cells[1]]
            if (query, text) in judged:
                raise Wrong(f"{cells[1]!r}, or its text, is judged before for {cells[0]!r}", "judge it once")
            judged[query, text] = int(cells[2]), split, source, licence

    for name, split in SPLITS.items():
        for path in sorted(folder.glob(f"qrels/{name}.tsv*")):
            wrong += problems.sift(path, partial(judge, split))[1]
    return judged, [text for text, *_ in corpus.values()], bad + wrong


def _entries(folder: Path, name: str) -> tuple[dict[str, tuple[str, str, str]], list[Problem]]:
    """_id -> (title and text, source, licence) of a corpus or of queries."""
    found: dict[str, tuple[str, str, str]] = {}

    def parse(number: int, line: bytes) -> None:
        row = problems.row(line)
        key, about = problems.text(row, "_id"), row.get("metadata")
        told = [part for part in ("title", "text") if row.get(part)] or ["text"]
        if key in found:
            raise Wrong(f"_id {key!r} is that of an earlier line", "give every line its own")
        about = about if isinstance(about, dict) else {}
        body = " ".join(problems.text(row, part) for part in told)
        found[key] = body, str(about.get("source", f"{folder.name}/{key}")), str(about.get("licence", ""))

    paths = sorted(folder.glob(f"{name}.jsonl*"))
    if not paths or not list(folder.glob("qrels/*.tsv*")):
        raise ValueError(f"{folder} is no BEIR folder; give {name}.jsonl and qrels/train.tsv, dev.tsv or test.tsv")
    return found, problems.sift(paths[0], parse)[1]


def _triples(path: Path) -> tuple[Judged, list[str], list[Problem]]:
    judged: Judged = {}
    seen: dict[tuple[str, ...], int] = {}

    def parse(number: int, line: Any) -> None:
        row = problems.row(line)
        query, positive = problems.text(row, "query" if "query" in row else "anchor"), problems.text(row, "positive")
        given = row.get("negatives", row.get("negative", []))
        listed = given if isinstance(given, list) else [given]
        negatives = [problems.text({"negative": item}, "negative") for item in listed]
        for text in negatives:
            if similar(text, positive) or judged.get((query, text), (0,))[0]:
                raise Wrong(f"the negative {text[:40]!r} is, nearly or quite, a positive of the query", "drop it")
        if (query, positive) in judged and not judged[query, positive][0]:
            raise Wrong(f"the positive {positive[:40]!r} is a negative of the query before", "decide which it is")
        if (same := seen.setdefault((query, positive, *negatives), number)) != number:
            raise Wrong(f"duplicate of line {same}", "drop one of them")
        split = _drawn(HELD_OUT, "query", " ".join(query.lower().split()))
        for grade, text in [(1, positive), *((0, text) for text in negatives)]:
            judged.setdefault((query, text), (grade, split, f"{path.name}/{number}", ""))

    return judged, [], problems.sift(path, parse)[1]


def write_beir(folder: Path, pairs: Sequence[Pair]) -> None:
    """The pairs as a BEIR folder that `read` gives back: positives of score 1, negatives of score 0."""
    corpus: dict[str, dict[str, str]] = {text: {} for pair in pairs for text in pair["negatives"]}
    corpus |= {pair["positive"]: {name: pair[name] for name in ("source", "licence")} for pair in pairs}
    rows = [{"_id": record_id(text), "title": "", "text": text, "metadata": found} for text, found in corpus.items()]
    asked = [{"_id": record_id(text), "text": text} for text in dict.fromkeys(pair["query"] for pair in pairs)]
    for name, lines in (("corpus", rows), ("queries", asked)):
        runs.write_text(folder / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    for name in ("train", "test"):
        members = [pair for pair in pairs if pair["split"] == SPLITS[name]]
        scores = {(pair["query"], text): "0" for pair in members for text in pair["negatives"]}
        scores |= {(pair["query"], pair["positive"]): "1" for pair in members}
        cells = [HEADER, *([record_id(query), record_id(text), score] for (query, text), score in scores.items())]
        runs.write_text(folder / f"qrels/{name}.tsv", "".join("\t".join(row) + "\n" for row in cells))


def statistics(pairs: Sequence[Pair]) -> dict[str, float]:
    """Pairs, of each split, repeated; distinct queries and positives; means of negatives and of words."""
    made: dict[str, float] = {"pairs": len(pairs), "held_out": sum(pair["split"] == "held_out" for pair in pairs)}
    made |= {"duplicates": len(pairs) - len({(pair["query"], pair["positive"]) for pair in pairs})}
    for name in ("query", "positive"):
        made[f"distinct_{name}"] = len({pair[name] for pair in pairs})
        made[f"{name}_words"] = sum(len(pair[name].split()) for pair in pairs) / max(1, len(pairs))
    return made | {"negatives": sum(len(pair["negatives"]) for pair in pairs) / max(1, len(pairs))}


def terms(text: str) -> list[str]:
    """Words in lower case; names in snake_case fall into their words."""
    return re.findall(r"[^\W_]+", text.lower())


@lru_cache(maxsize=65_536)
def _shingles(text: str) -> frozenset[tuple[str, ...]]:
    words = terms(text) or [text]
    return frozenset(tuple(words[k : k + SHINGLE]) for k in range(max(1, len(words) - SHINGLE + 1)))


def similar(a: str, b: str) -> bool:
    """Whether the Jaccard of their sets of shingles is `NEAR` or more."""
    return len(_shingles(a) & _shingles(b)) >= NEAR * len(_shingles(a) | _shingles(b))


def bm25(queries: Sequence[str], documents: Sequence[str]) -> tuple[csr_array, csr_array]:
    """(asked [queries, terms], weights [terms, documents]); asked @ weights are the scores."""
    places: dict[str, int] = {}
    rows = [[places.setdefault(term, len(places)) for term in terms(text)] for text in [*documents, *queries]]
    ends, columns = np.cumsum([0, *map(len, rows)]), np.array([place for row in rows for place in row], np.int64)
    counts = csr_array((np.ones(len(columns)), columns, ends), (len(rows), len(places)))
    counts.sum_duplicates()
    weights, lengths = counts[: len(documents)], np.diff(ends)[: len(documents)]
    # w = tf / (k1 (1 - b + b l / mean l) + tf) * log(1 + (N - n + 0.5) / (n + 0.5))
    #     (Robertson, Zaragoza 2009, eq. 3.15; 1 inside the logarithm keeps frequent terms above 0, as in Lucene)
    n = np.bincount(weights.indices, minlength=len(places))
    slow = K1 * (1 - B + B * lengths / max(1.0, lengths.mean()))
    weights.data /= weights.data + np.repeat(slow, np.diff(weights.indptr))
    weights.data *= np.log1p((len(documents) - n + 0.5) / (n + 0.5))[weights.indices]
    return counts[len(documents) :], weights.T.tocsr()


def mine_negatives(
    pairs: Sequence[Pair], documents: Mapping[str, str], n: int, margin: float, seed: int = 0
) -> list[Pair]:
    """The pairs that get `n` negatives: their own, then documents of their split by BM25 score for the query.

    `documents` maps texts to splits; a positive of another split is in none. Never taken is a false negative: a text
    alike (`similar`) to the query, its positive or another document relevant to it, and one that scores above `margin`
    times the positive (TopK-PercPos: Moreira et al. 2024, NV-Retriever).
    """
    relevant, positives = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for pair in pairs:
        relevant[pair["query"]].add(pair["positive"])
        positives[pair["split"]].add(pair["positive"])
    made = [pair | {"negatives": list(dict.fromkeys(pair["negatives"]))[:n]} for pair in pairs]
    for split, own in positives.items():
        members = [pair for pair in made if pair["split"] == split]
        free = {text for text, side in documents.items() if side == split}.difference(*positives.values())
        place = {text: k for k, text in enumerate(sorted(own | free))}
        pool, tie = list(place), mixing.hashed(len(place), seed, split) / 2.0**64 * 1e-9
        asked, weights = bm25([pair["query"] for pair in members], pool)
        for k, pair in enumerate(members):
            scores = (asked[[k]] @ weights).toarray()[0]
            scores = np.where(scores > margin * scores[place[pair["positive"]]], -1, scores + tie)
            best = np.argpartition(-scores, min(n + SPARE, len(pool) - 1))[: n + SPARE]
            for text in (pool[at] for at in best[np.argsort(-scores[best])] if scores[at] >= 0):
                barred = {pair["query"], *relevant[pair["query"]], *pair["negatives"]}
                if len(pair["negatives"]) < n and not any(similar(text, other) for other in barred):
                    pair["negatives"].append(text)
    return [pair for pair in made if len(pair["negatives"]) == n]
