"""Key performance indicators of a run: one definition, one series and one target each."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import pandas as pd

from stackpkg.model.configuration import StackConfig
from stackpkg.objectives import routing
from stackpkg.params import Params

MET = {"<": operator.lt, "<=": operator.le, ">=": operator.ge}


PROBED = ("masked_edge_share", "kv_error")  # of the reference model


def expected(config: Mapping[str, Any]) -> set[str]:
    """The series that a model of this configuration (`config.json`) must have written."""
    routed = any((config.get(name) or 1) > 1 for name in routing.EXPERTS)
    own = config["model_type"] == StackConfig.model_type
    return {"precision_at_k", *["router_entropy_min"] * routed, *PROBED * own}


def measure(history: pd.DataFrame, config: Mapping[str, Any], p: Params) -> pd.DataFrame:
    """kpi, definition, value, comparison, target, met; from the effective rows of rank 0, indexed by step, and the
    configuration of the model: one without routers or scopes has no such indicator. A series that should be there and
    is not, or is not a number where it was measured last, meets no target."""
    limits, nothing = p.evaluation, pd.Series(math.nan, index=history.index)
    waits = (history.data_wait_seconds / history.step_seconds).median()
    text = history.loss_language_modelling
    rows = [
        ("loss falls", "language modelling, median of the last tenth below the first step",
         text.iloc[-max(1, len(text) // 10) :].median(), "<", text.iloc[0]),
        ("finite steps", "share of steps without NaN or Inf", 1 - history.nonfinite.gt(0).mean(), ">=", 1.0),
        ("data wait", "median share of a step", waits, "<=", limits.max_data_wait),
    ]  # fmt: skip
    series = (
        ("retrieval precision@k", "last evaluation, labelled held-out pairs", "precision_at_k", ">=",
         limits.min_precision_at_k),
        ("router entropy, lowest layer", "normalised gate entropy", "router_entropy_min", ">=", limits.entropy_band[0]),
        ("masked edge share", "attention on forbidden edges", "masked_edge_share", "<=", 0.0),
        ("KV round-trip error", "relative error of norms", "kv_error", "<=", 1e-3),
    )  # fmt: skip
    evaluated = history[history.get("validation_loss", nothing).notna()]
    for name, what, key, sign, target in series:
        if key in expected(config):
            measured = (evaluated if key == "precision_at_k" else history).get(key, nothing)
            rows.append((name, what, measured.iloc[-1] if len(measured) else math.nan, sign, target))
    table = pd.DataFrame(rows, columns=["kpi", "definition", "value", "comparison", "target"])
    table["met"] = [MET[row.comparison](row.value, row.target) for row in table.itertuples()]
    return table
