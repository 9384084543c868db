"""The report of one epoch as an evidently page: every number with the limit it must meet.

Evidently's own ranking metrics label rank k as k + 1 (0.7.23), so the numbers come from `evaluation.metrics`, those of
ranking from trec_eval.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("DO_NOT_TRACK", "1")  # before the import: evidently sends usage data otherwise

import pandas as pd
from evidently import Dataset, Report
from evidently.core.metric_types import SingleValueCalculation, SingleValueMetric
from evidently.core.report import Context
from evidently.tests import gte, lte

from stackpkg.params import Params
from stackpkg.runs import replacing

REGRESSION = 1.05  # a few validation rows are noisy; an epoch this much worse than the one before is not noise


class Measured(SingleValueMetric):
    """A number measured outside evidently, carried in a column of one row."""

    column: str


class MeasuredCalculation(SingleValueCalculation[Measured]):
    def calculate(self, context: Context, current_data: Dataset, reference_data: Dataset | None) -> Any:
        current, reference = (
            None if data is None else self.result(float(data.as_dataframe()[self.metric.column].iloc[0]))
            for data in (current_data, reference_data)
        )
        return current, reference

    def display_name(self) -> str:
        return self.metric.column.replace("_", " ")


def flat(report: dict[str, Any]) -> dict[str, float]:
    """The numbers of an epoch report under one level of names; strict JSON holds those not finite as strings."""
    strings, parts = ("NaN", "Infinity", "-Infinity"), [("", report), ("ema_", report["ema"])]
    parts += [(f"{name}_", ranked) for name, ranked in report["retrieval_sets"].items()]
    parts += [(f"{start}validation_loss_", part["validation_loss_by_domain"]) for start, part in parts[:2]]
    numbers = {
        start + key: float(value)
        for start, part in parts
        for key, value in part.items()
        if isinstance(value, (int, float)) or value in strings
    }
    far = report["long_range_by_distance"]
    numbers |= {f"long_range_accuracy_to_{row['up_to']}": float(row["value"]) for row in far}
    for index, layer in enumerate(report["router"]):
        numbers[f"router_entropy_layer_{index}"] = float(layer["entropy"])
        numbers[f"router_usage_max_layer_{index}"] = float(max(layer["usage"]))
    return numbers


def limits(p: Params, name: str, previous: dict[str, float] | None) -> list[Any]:
    """The evidently tests of one number; none for a number that only informs."""
    low, high = p.evaluation.entropy_band
    if name == "precision_at_k":
        return [gte(p.evaluation.min_precision_at_k)]
    if name.startswith("router_entropy"):
        return [gte(low), lte(high)]
    return [lte(REGRESSION * previous[name])] if name == "validation_loss" and previous else []


def write(report: dict[str, Any], previous: dict[str, Any] | None, p: Params, target: Path) -> pd.DataFrame:
    """Write the page of one epoch to `target` (HTML, opens offline); returns its table of numbers, limits, verdicts."""
    numbers, before = flat(report), flat(previous) if previous else None
    metrics = [Measured(column=name, tests=limits(p, name, before)) for name in sorted(numbers)]
    current = Dataset.from_pandas(pd.DataFrame([numbers]))
    reference = Dataset.from_pandas(pd.DataFrame([before]).reindex(columns=list(numbers))) if before else None
    snapshot = Report(metrics).run(current, reference)
    with replacing(target) as temporary:
        snapshot.save_html(str(temporary))
    tests = snapshot.dict()["tests"]
    return pd.DataFrame([{"test": t["name"], "status": t["status"].value, "finding": t["description"]} for t in tests])
