"""What curation did: borderline samples, thresholds from quantiles, metrics by domain, and the flow of what was lost.

Every function streams over parts as `filters.apply` writes them, and returns frames; what is text in them comes from
the data, so it is escaped wherever it is drawn.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from stackpkg.data.filters import SIGNS, Page, sign_of

EXCERPT = 200  # characters


def _rows(parts: Sequence[Path], *columns: str) -> Iterator[dict[str, Any]]:
    """The rows of all parts, with those of the columns they have."""
    for path in parts:
        file = pq.ParquetFile(path)
        for batch in file.iter_batches(1000, columns=[name for name in columns if name in file.schema_arrow.names]):
            yield from batch.to_pylist()


def borderline(parts: Sequence[Path], name: str, n: int) -> pd.DataFrame:
    """The `n` documents nearest to a filter's threshold on either side: what the audit shows to a human."""
    sides: dict[bool, list[tuple[float, str, int, dict[str, Any]]]] = {True: [], False: []}
    turn = count()
    for row in _rows(parts, "record_id", "source", "domain", "text", "decisions"):
        for item in row["decisions"]:
            if item["filter"] == name:
                shown = {key: row[key] for key in ("record_id", "source", "domain")} | item
                entry = (-abs(item["value"] - item["threshold"]), row["record_id"], next(turn), shown)
                shown["excerpt"] = row["text"][:EXCERPT]
                side = sides[item["decision"] == "keep"]
                (heapq.heappush if len(side) < n else heapq.heappushpop)(side, entry)
    found = [shown for side in sides.values() for *_, shown in side]
    if not found:
        raise ValueError(f"no record of these parts was asked {name!r}; see the filter column of the audit for names")
    return pd.DataFrame(found).sort_values(["value", "record_id"], ignore_index=True)


def propose(parts: Sequence[Path], shares: Sequence[float]) -> pd.DataFrame:
    """For each filter, domain and share: the threshold that drops about this share, and what it would really drop.

    Ties at a threshold are kept or dropped together, so `would_drop` may differ from the share asked for.
    """
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    limits: dict[tuple[str, str], float] = {}
    for row in _rows(parts, "domain", "decisions"):
        for item in row["decisions"]:
            key = item["filter"], row["domain"]
            values[key].append(item["value"])
            limits[key] = item["threshold"]
    made = []
    for (name, domain), found in sorted(values.items()):
        sign: Any = SIGNS[sign_of(name)]
        measured = np.array(found)
        for share in shares:
            at = float(np.quantile(measured, share if sign_of(name).startswith(">") else 1 - share))
            now, would = (1 - float(np.mean(sign(measured, limit))) for limit in (limits[name, domain], at))
            made.append((name, domain, len(measured), limits[name, domain], now, share, at, would))
    names = ["filter", "domain", "documents", "threshold", "drops", "share", "proposed", "would_drop"]
    return pd.DataFrame(made, columns=names)


def metrics(parts: Sequence[Path]) -> pd.DataFrame:
    """One row a domain, of the rows that no stage has dropped: the same before a stage and after it.

    documents; mb (10^6 bytes of UTF-8); words; median_words; unique_words (mean share of a document's words that are
    distinct); alphabetic (mean share of letters); language and language_share (the most frequent one);
    perplexity (median); duplicates (share whose content another document has).
    """
    made = []
    for row in _rows(parts, "domain", "text", "content_hash", "language", "kept", "decisions"):
        if row.get("kept", True):
            page, asked = Page(row["text"]), {item["filter"]: item["value"] for item in row.get("decisions", ())}
            size, n = len(page.text.encode(errors="replace")) / 1e6, len(page.words)
            distinct, ppl = len(set(page.words)) / max(1, n), asked.get("perplexity_high", asked.get("perplexity_low"))
            language, content = row.get("language", ""), row["content_hash"]
            made.append((row["domain"], size, n, distinct, page.alphabetic, language, ppl, content))
    names = ["domain", "mb", "words", "unique_words", "alphabetic", "language", "perplexity", "content"]
    numbers = {"mb": float, "words": int, "unique_words": float, "alphabetic": float, "perplexity": float}
    by = pd.DataFrame(made, columns=names).astype(numbers).groupby("domain")  # typed when there are no rows, too
    columns = {"documents": by.size(), "mb": by["mb"].sum(), "words": by["words"].sum()}
    columns |= {"median_words": by["words"].median(), "unique_words": by["unique_words"].mean()}
    columns |= {"alphabetic": by["alphabetic"].mean(), "language": by["language"].agg(lambda codes: codes.mode()[0])}
    most = by["language"].agg(lambda codes: codes.value_counts(normalize=True).max())
    columns |= {"language_share": most.astype(float)}
    columns |= {"perplexity": by["perplexity"].median(), "duplicates": 1 - by["content"].nunique() / by.size()}
    return pd.DataFrame(columns)


def losses(parts: Sequence[Path], stage: str) -> pd.DataFrame:
    """Documents by domain, stage and reason; the reason is the first filter that dropped one, empty for the kept."""
    counts: Counter[tuple[str, str]] = Counter()
    for row in _rows(parts, "domain", "kept", "decisions"):
        reasons = [item["filter"] for item in row["decisions"] if item["decision"] == "drop"]
        counts[row["domain"], "" if row["kept"] else (reasons or [stage])[0]] += 1
    rows = [(domain, stage, reason, n) for (domain, reason), n in sorted(counts.items())]
    return pd.DataFrame(rows, columns=["domain", "stage", "reason", "documents"])


def flow(lost: pd.DataFrame) -> dict[tuple[str, str], int]:
    """What `plots.flow` draws: documents from each domain to the stage that lost them and on to the reason, or to kept.

    `lost` has the columns of `losses`, one stage below the other; kept documents count at the last stage alone.
    """
    links: Counter[tuple[str, str]] = Counter()
    last = list(lost["stage"])[-1] if len(lost) else ""
    for domain, stage, reason, documents in lost.itertuples(index=False):
        if reason:
            links[domain, f"lost: {stage}"] += documents
            links[f"lost: {stage}", reason] += documents
        elif stage == last:
            links[domain, "kept"] += documents
    return dict(links)
