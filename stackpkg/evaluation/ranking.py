"""Ranking metrics, on numpy alone."""

import numpy as np


def ranking(scores: np.ndarray, relevant: np.ndarray, k: int) -> dict[str, float]:
    """Precision@k, recall@k and mean reciprocal rank; `scores` float [queries, documents], `relevant` bool, same shape.

    Manning, Raghavan and Schuetze 2008, chapter 8. Ties count against the system: a relevant document ranks below
    every other of equal score, so constant scores can't look good. Every query needs a relevant document.
    """
    if not relevant.any(1).all():
        raise ValueError("every query needs at least one relevant document")
    order = np.lexsort((relevant, -scores), axis=1)
    hits = np.take_along_axis(relevant, order, 1)
    return {
        f"precision_at_{k}": float((hits[:, :k].sum(1) / k).mean()),
        f"recall_at_{k}": float((hits[:, :k].sum(1) / relevant.sum(1)).mean()),
        "mrr": float((1 / (hits.argmax(1) + 1)).mean()),
    }
