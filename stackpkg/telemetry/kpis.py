"""Key performance indicators of a run: one definition, one series and one target each, read from `params/kpis.yaml`."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml
from pydantic import Field, TypeAdapter

from stackpkg import runs
from stackpkg.model.configuration import StackConfig
from stackpkg.objectives import routing
from stackpkg.params import Params, Section
from stackpkg.telemetry import guard

MET = {"<": operator.lt, "<=": operator.le, ">=": operator.ge}
Statistic = Literal["last", "median", "maximum", "fall"]
WORDS: dict[Statistic, str] = {
    "last": "at the end",
    "median": "median over the steps",
    "maximum": "largest of all steps",
    "fall": "median of the last tenth of the steps over the first step",
}


def _fall(values: pd.Series) -> float:
    return float(values.iloc[-max(1, len(values) // 10) :].median() / values.iloc[0])


VALUE: dict[Statistic, Callable[[pd.Series], float]] = {
    "last": lambda values: values.iloc[-1],
    "median": pd.Series.median,
    "maximum": pd.Series.max,
    "fall": _fall,
}


class KPI(Section):
    """One indicator; `params/kpis.yaml` says what the fields mean."""

    name: str = Field(min_length=1)
    series: str = Field(pattern=r"^[a-z][a-z0-9_]*( / [a-z][a-z0-9_]*)?$")
    statistic: Statistic
    per: Literal["step", "evaluation"] = "step"
    comparison: Literal["<", "<=", ">="]
    target: float | str
    of: Literal["every", "routed", "reference", "conversations"] = "every"
    owner: Literal["architecture", "infrastructure", "safety"]
    missed: str = Field(min_length=1)
    runbook: str = Field("", pattern=r"^([A-Z]\w+)?$")

    @property
    def formula(self) -> str:
        end = "at the last evaluation" if self.per == "evaluation" else WORDS[self.statistic]
        return f"{self.series}, {end}"

    def value(self, history: pd.DataFrame) -> float:
        """Of the rows of one rank, indexed by step; NaN when the series is not there, or not where it counts."""
        nothing = pd.Series(math.nan, index=history.index)
        rows = history[history.get("validation_loss", nothing).notna()] if self.per == "evaluation" else history
        above, *below = (rows.get(name, nothing) for name in self.series.split(" / "))
        values = above / below[0] if below else above
        return float(VALUE[self.statistic](values)) if len(rows) else math.nan


def load(p: Params, path: Path | None = None) -> list[KPI]:
    """All indicators, a target that names a parameter replaced by its value. Raises `ValueError` naming every bad key,
    and an indicator that is defined twice."""
    values = yaml.safe_load((path or runs.root() / "params/kpis.yaml").read_text(encoding="utf-8"))
    found = TypeAdapter(list[KPI]).validate_python(values)  # pydantic's error is a ValueError
    if twice := {kpi.name for kpi in found if sum(kpi.name == other.name for other in found) > 1}:
        raise ValueError(f"defined twice: {', '.join(sorted(twice))}; give each indicator a name of its own")
    named = p.model_dump() | {alert.name: alert.threshold for alert in guard.load(p)}
    return [kpi.model_copy(update={"target": _target(kpi, named)}) for kpi in found]


def _target(kpi: KPI, named: dict[str, Any]) -> float:
    here: Any = kpi.target
    if isinstance(here, str):
        here = named
        for part in str(kpi.target).split("."):  # of a band, 0 is the lower end and 1 the upper
            try:
                here = here[int(part)] if part.isdigit() else here[part]
            except (KeyError, IndexError, TypeError):
                here = None
    if not isinstance(here, int | float):
        raise ValueError(f"{kpi.name}: the target {kpi.target!r} names no number among the parameters and the "
                         "alerts; allowed: a number, or a name such as evaluation.min_precision_at_k")  # fmt: skip
    return float(here)


def kinds(config: Mapping[str, Any], p: Params) -> set[str]:
    """Which `of` the run is: by the configuration of its model (`config.json`) and by its curriculum."""
    routed = any((config.get(name) or 1) > 1 for name in routing.EXPERTS)
    own = config["model_type"] == StackConfig.model_type
    talks = any(stage.conversations for stage in p.curriculum)
    return {"every", *["routed"] * routed, *["reference"] * own, *["conversations"] * talks}


def measure(history: pd.DataFrame, config: Mapping[str, Any], p: Params) -> pd.DataFrame:
    """kpi, value, comparison, target, met, owner, missed, runbook, formula; of the effective rows of rank 0, indexed by
    step. A series that should be there and is not, or is not a number where it counts, meets no target."""
    rows = []
    for kpi in load(p):
        if kpi.of in kinds(config, p):
            value = kpi.value(history)
            row = {"kpi": kpi.name, "value": value, "comparison": kpi.comparison, "target": kpi.target}
            row |= {"met": MET[kpi.comparison](value, kpi.target), "formula": kpi.formula}
            rows.append(row | kpi.model_dump(include={"owner", "missed", "runbook"}))
    return pd.DataFrame(rows)
