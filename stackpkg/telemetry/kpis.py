"""Key performance indicators of a run: one definition, one series and one target each."""

from __future__ import annotations

import operator

import pandas as pd

from stackpkg.params import Params

MET = {"<": operator.lt, "<=": operator.le, ">=": operator.ge}


def measure(history: pd.DataFrame, p: Params) -> pd.DataFrame:
    """kpi, definition, value, comparison, target, met; from the effective rows of rank 0, indexed by step. A model that
    has no router, no scopes or no cache has no such indicator; a value that is not a number meets no target."""
    last, limits = history.ffill().iloc[-1], p.evaluation
    waits = (history.data_wait_seconds / history.step_seconds).median()
    rows = [
        ("loss falls", "loss of the last step below the first", last.loss, "<", history.loss.iloc[0]),
        ("finite steps", "share of steps without NaN or Inf", 1 - history.nonfinite.gt(0).mean(), ">=", 1.0),
        ("data wait", "median share of a step", waits, "<=", limits.max_data_wait),
    ]
    series = (
        ("retrieval precision@k", "last evaluation, labelled held-out pairs", "precision_at_k", ">=",
         limits.min_precision_at_k),
        ("router entropy, lowest layer", "normalised gate entropy", "router_entropy_min", ">=", limits.entropy_band[0]),
        ("masked edge share", "attention on forbidden edges", "masked_edge_share", "<=", 0.0),
        ("KV round-trip error", "relative error of norms", "kv_error", "<=", 1e-3),
    )  # fmt: skip
    rows += [(name, what, last[key], sign, target) for name, what, key, sign, target in series if key in history]
    table = pd.DataFrame(rows, columns=["kpi", "definition", "value", "comparison", "target"])
    table["met"] = [MET[row.comparison](row.value, row.target) for row in table.itertuples()]
    return table
