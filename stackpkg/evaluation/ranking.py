"""Ranking metrics, computed by trec_eval (https://github.com/usnistgov/trec_eval)."""

import numpy as np
import pytrec_eval

DEPTH = 1_000  # places of a ranking that are judged, as in BEIR (Thakur et al. 2021)
CUT = 10  # of NDCG, and of every metric of a set in BEIR's format


def ranking(scores: np.ndarray, relevant: np.ndarray, k: int) -> dict[str, float]:
    """Precision@k, recall@k, mean reciprocal rank, and NDCG@10 with linear gains (Järvelin and Kekäläinen 2002).

    `scores` float [queries, documents], `relevant` bool or int grades, 0 for what is not, same shape.

    Ties count against the system: a relevant document ranks below every other of equal score, so constant scores
    can't look good. Every query needs a relevant document.
    """
    if not relevant.any(1).all():
        raise ValueError("every query needs at least one relevant document")
    order = np.lexsort((relevant, -scores), axis=1)[:, :DEPTH]
    run = {str(q): {str(d): float(-place) for place, d in enumerate(row)} for q, row in enumerate(order.tolist())}
    judged = {str(q): {str(d): int(row[d]) for d in np.flatnonzero(row)} for q, row in enumerate(relevant)}
    names = {"precision_at_": ("P", k), "recall_at_": ("recall", k), "ndcg_at_": ("ndcg_cut", CUT)}
    asked = {f"{measure}.{cut}" for measure, cut in names.values()} | {"recip_rank"}
    found = pytrec_eval.RelevanceEvaluator(judged, asked).evaluate(run).values()
    keys = {f"{name}{cut}": f"{measure}_{cut}" for name, (measure, cut) in names.items()} | {"mrr": "recip_rank"}
    return {name: float(np.mean([query[key] for query in found])) for name, key in keys.items()}
