"""Retrieval sets in BEIR's format that a run is measured on each epoch, besides its own held-out pairs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from stackpkg import runs
from stackpkg.data import retrieval_sets, tokenizer
from stackpkg.evaluation.ranking import CUT, ranking
from stackpkg.model.embedding import embed
from stackpkg.params import Params

CHUNK = 64  # texts embedded at once


class Judged(NamedTuple):
    """query_ids int64 [q, Lq], document_ids int64 [d, Ld], padded on the right; grades int64 [q, d]."""

    query_ids: Tensor
    document_ids: Tensor
    grades: np.ndarray


def load(data: Path, p: Params, pad_id: int) -> dict[str, Judged]:
    """The sets of `evaluation.retrieval_sets` by name: at most `evaluation.pairs` queries of their dev and test splits
    that have a relevant document, and every document of their corpora; encoded with the tokenizer of the shards.

    Raises `ValueError` for a folder that is no BEIR set, has wrong lines, or nothing held out.
    """
    sizes, found = p.auxiliary, dict[str, Judged]()
    for path in map(Path, p.evaluation.retrieval_sets):
        judged, corpus, problems = retrieval_sets.judgements(runs.root() / path)
        if problems:
            raise ValueError(f"{path}: {len(problems)} wrong lines, the first: {problems[0]}; mend them in its files")
        held = {(query, text): grade for (query, text), (grade, split, *_) in judged.items() if split == "held_out"}
        queries = list(dict.fromkeys(query for (query, _), grade in held.items() if grade))[: p.evaluation.pairs]
        if not queries:
            raise ValueError(f"{path} has no relevant document in qrels/dev.tsv or test.tsv: give judgements there")
        rows, columns = ({text: k for k, text in enumerate(dict.fromkeys(texts))} for texts in (queries, corpus))
        grades = np.zeros((len(rows), len(columns)), np.int64)
        for (query, text), grade in held.items():
            if query in rows:
                grades[rows[query], columns[text]] = grade
        model = tokenizer.of_shards(data)
        ids = [
            torch.tensor([(row + [pad_id] * length)[:length] for row in tokenizer.encode(model, list(texts))])
            for texts, length in ((rows, sizes.query_tokens), (columns, sizes.document_tokens))
        ]
        found[path.name] = Judged(ids[0], ids[1], grades)
    return found


def _embedded(model: nn.Module, ids: Tensor, pad_id: int, device: torch.device) -> Tensor:
    return torch.cat([embed(model, part.to(device), pad_id).float().cpu() for part in ids.split(CHUNK)])


@torch.no_grad()
def measure(model: nn.Module, judged: Judged, pad_id: int, device: torch.device) -> dict[str, float]:
    """`ranking` at 10, as BEIR reports it, of all documents for each query, and how many there are."""
    query, document = (_embedded(model, ids, pad_id, device) for ids in judged[:2])
    counts = {"queries": len(query), "documents": len(document)}
    return ranking((query @ document.T).numpy(), judged.grades, CUT) | counts
