"""Alerts inside the training process: every row is checked against `params/alerts.yaml` within its own step."""

import math
from collections import deque
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any, Literal

import yaml
from pydantic import Field, TypeAdapter

from stackpkg import runs
from stackpkg.params import Params, Section

WINDOW, WARM = 64, 8  # accepted measurements that a window holds at most, and needs before it judges


class Drill(Section):
    hold: int = Field(ge=1)
    fault: float
    threshold: float | None = None


class Alert(Section):
    """One alert; `params/alerts.yaml` says what the fields mean. Its runbook is `book/runbooks/<name>.md`."""

    name: str = Field(pattern=r"^Train([A-Z][a-z]*)+$")
    series: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    comparison: Literal["above", "below", "robust_z_above", "times_median_above"]
    threshold: float | str
    hold: int = Field(ge=1)
    per: Literal["step", "evaluation"] = "step"
    drill: Drill
    severity: Literal["critical", "warning"]
    action: Literal["log", "skip", "roll_back", "retrieval_off", "snapshot", "stop"]
    summary: str

    def drilled(self) -> "Alert":
        return self.model_copy(update=self.drill.model_dump(exclude={"fault"}, exclude_none=True))


def load(p: Params, path: Path | None = None) -> list[Alert]:
    """The alerts, thresholds that name a parameter replaced by its value. Raises `ValueError` naming every bad key."""
    values = yaml.safe_load((path or runs.root() / "params/alerts.yaml").read_text(encoding="utf-8"))
    alerts = TypeAdapter(list[Alert]).validate_python(values)  # pydantic's error is a ValueError
    try:
        named = {alert.name: attrgetter(alert.threshold)(p) for alert in alerts if isinstance(alert.threshold, str)}
    except AttributeError as error:
        raise ValueError(f"a threshold names no parameter: {error}; such as evaluation.min_precision_at_k") from None
    return [alert.model_copy(update={"threshold": named.get(alert.name, alert.threshold)}) for alert in alerts]


class Guard:
    """Watches the rows of one rank. An alert fires once when its hold is reached, and again only after it cleared."""

    def __init__(self, alerts: list[Alert], drill: bool = False) -> None:
        self.alerts = [alert.drilled() for alert in alerts] if drill else alerts
        self._held = {alert.name: 0 for alert in alerts}
        self._windows: dict[str, deque[float]] = {alert.name: deque(maxlen=WINDOW) for alert in alerts}

    @classmethod
    def production(cls, p: Params) -> "Guard":
        return cls(load(p))

    def named(self, name: str) -> Alert:
        return next(alert for alert in self.alerts if alert.name == name)

    def forget(self, name: str) -> None:
        """As if the alert had not held: what it told of was dealt with, and it must tell of the next."""
        self._held[name] = 0

    def observe(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Alerts this row fires. A series that is absent, null or not finite says nothing; `nonfinite` counts those."""
        fired = []
        for alert in self.alerts:
            value = row.get(alert.series)
            if value is None or not math.isfinite(value):
                continue
            found, limit = score(alert, value, self._windows[alert.name]), float(alert.threshold)
            beyond = found < limit if alert.comparison == "below" else found > limit
            self._held[alert.name] = (self._held[alert.name] + 1) * beyond
            if not beyond and not row.get("update_skipped"):
                self._windows[alert.name].append(value)
            if self._held[alert.name] == alert.hold:
                told = alert.model_dump(include={"series", "threshold", "hold", "severity", "action", "summary"})
                fired.append({"alert": alert.name, "value": value, "runbook": f"runbooks/{alert.name}.md", **told})
        return fired

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: how long each alert has held, and its window."""
        return {name: [held, *self._windows[name]] for name, held in self._held.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """An alert that the state does not know starts afresh."""
        for name in self._held.keys() & state:
            self._held[name], self._windows[name] = state[name][0], deque(state[name][1:], maxlen=WINDOW)


def score(alert: Alert, value: float, window: deque[float]) -> float:
    if alert.comparison in ("above", "below"):
        return value
    if len(window) < WARM:
        return 0.0
    centre = median(window)
    if alert.comparison == "times_median_above":
        return value / max(centre, 1e-12)
    # robust z = (x - median) / (1.4826 MAD)   (Iglewicz & Hoaglin 1993); a flat window counts as 1% wide
    spread = 1.4826 * median(abs(x - centre) for x in window)
    return (value - centre) / max(spread, 0.01 * abs(centre), 1e-12)
