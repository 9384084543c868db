"""Has it drifted? Epochs are compared by the loss of each held-out row, corpora by what is known of each document.

How often the tests alarm where nothing changed is simulated in `tests/test_drift.py`, and in notebook 40 on its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
from scipy.stats import chi2_contingency, ks_2samp, wilcoxon

from stackpkg.data import manifest
from stackpkg.data.corpus import Corpus

ALPHA = 0.01  # false alarms of a comparison
RARE = 5  # expected documents of a cell below which chi-square is no chi-square (Cochran 1954)
TOLD = ["domain", "licence", "language", "trust"]


def rows(change: np.ndarray) -> float:
    """p of no change in either direction, from the change of each row [rows]; 0 where one is not finite.

    Wilcoxon's signed-rank test (1945), exact up to 50 rows; rows that did not change say nothing.
    """
    moved = change[change != 0]
    if not np.isfinite(moved).all():
        return 0.0
    return float(wilcoxon(moved, method="exact" if len(moved) <= 50 else "approx").pvalue) if len(moved) else 1.0


def epochs(reports: Sequence[Mapping]) -> pd.DataFrame:
    """Each epoch against the one before: median change of a held-out row in nats a token, p, and whether it drifted."""
    made = []
    for before, now in pairwise(reports):
        domains = before["validation_loss_by_row"]
        flat = [[loss for name in domains for loss in one["validation_loss_by_row"][name]] for one in (before, now)]
        change = np.subtract(flat[1], flat[0])
        made.append({"epoch": now["epoch"], "rows": len(change), "median": np.median(change), "p": rows(change)})
    table = pd.DataFrame(made, columns=["epoch", "rows", "median", "p"])
    return table.assign(test="Wilcoxon signed-rank", drifted=table.p < ALPHA)


def documents(corpus: Corpus) -> pd.DataFrame:
    """split, tokens, domain, licence, language and trust of each record of a corpus."""
    files = ds.dataset(manifest.records(corpus.folder, corpus.version))
    known = files.to_table(columns=["record_id", *TOLD]).to_pandas().drop_duplicates("record_id")
    parts = pd.DataFrame({"record_id": corpus.records, "split": corpus.split, "tokens": corpus.tokens})
    return parts.groupby("record_id").agg({"split": "first", "tokens": "sum"}).join(known.set_index("record_id"))


def corpora(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """feature, test, statistic, p and drifted of each column of two tables of documents: Kolmogorov and Smirnov's test
    for numbers, the chi-square test of homogeneity for names; names rarer than `RARE` are one.

    Documents count as independent, as those of a random split are.
    """
    made = []
    for feature in one:
        if pd.api.types.is_numeric_dtype(one[feature]):
            test, found = "Kolmogorov-Smirnov", ks_2samp(one[feature], other[feature], method="asymp")
            statistic, p = found.statistic, found.pvalue
        else:
            test, counts = "chi-square", pd.concat([t[feature].value_counts() for t in (one, other)], axis=1).fillna(0)
            least = counts.sum(axis=1) * min(len(one), len(other)) / (len(one) + len(other))
            pooled = np.vstack([counts[least >= RARE], counts[least < RARE].sum()])
            pooled = pooled[pooled.sum(1) > 0]
            statistic, p = chi2_contingency(pooled, correction=False)[:2] if len(pooled) > 1 else (0.0, 1.0)
        made.append({"feature": feature, "test": test, "statistic": statistic, "p": p})
    table = pd.DataFrame(made)
    # of m tests one has p < alpha / m by chance with at most probability alpha        (Bonferroni; Dunn 1961)
    return table.assign(drifted=table.p < ALPHA / max(1, len(table)))
