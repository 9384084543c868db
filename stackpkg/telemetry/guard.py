"""Alerts inside the training process: every row is checked against `params/alerts.yaml` within its own step."""

import math
from collections import deque
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any, Literal

import yaml
from pydantic import Field, TypeAdapter, model_validator

from stackpkg import runs
from stackpkg.params import Params, Section

WINDOW, WARM = 64, 8  # accepted measurements that a window holds at most, and needs before it judges


class Drill(Section):
    hold: int = Field(ge=1)
    fault: float
    threshold: float | None = None


class Alert(Section):
    """One alert; `params/alerts.yaml` says what the fields mean. Its runbook is `book/runbooks/<name>.md`."""

    name: str = Field(pattern=r"^([A-Z][a-z]*)+$")
    series: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    comparison: Literal[
        "above", "below", "returns_above", "robust_z_above", "times_median_above", "times_median_below",
        "older_than", "fills_within", "always",
    ]  # fmt: skip
    threshold: float | str
    hold: int = Field(ge=1)
    grace: int | None = Field(None, ge=1)
    per: Literal["step", "evaluation", "second"] = "step"
    seen: Literal["job", "outside"] = "job"
    drill: Drill
    severity: Literal["critical", "warning", "info"]
    action: Literal["log", "skip", "roll_back", "retrieval_off", "snapshot", "stop"]
    summary: str

    @model_validator(mode="after")
    def _grace_is_given(self) -> "Alert":
        if (self.grace is None) == (self.comparison == "returns_above"):
            why = "the measurements in which its limit must be met once; no other comparison has it"
            raise ValueError(f"{self.name}: `returns_above` needs `grace`, {why}")
        return self

    @property
    def falls(self) -> bool:
        """Whether it is a small value that is bad."""
        return self.comparison in ("below", "times_median_below")

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
    """Watches the rows of one rank, for the alerts that a job can see. An alert fires once when its hold is reached,
    and again only after it cleared."""

    def __init__(self, alerts: list[Alert], drill: bool = False) -> None:
        inside = [alert for alert in alerts if alert.seen == "job"]
        self.alerts = [alert.drilled() for alert in inside] if drill else inside
        self._held = {alert.name: 0 for alert in inside}
        self._windows: dict[str, deque[float]] = {alert.name: deque(maxlen=WINDOW) for alert in inside}

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
            window, limit = self._windows[alert.name], float(alert.threshold)
            found = score(alert, value, window)
            over = found < limit if alert.falls else found > limit
            self._held[alert.name] = (self._held[alert.name] + 1) * over
            if not over and not row.get("update_skipped"):
                window.append(value)
            grace = 0 if window else alert.grace or 0  # of a limit that was never met
            if self._held[alert.name] == grace + alert.hold:
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
    if alert.comparison in ("above", "below", "returns_above"):
        return value
    if len(window) < WARM:
        return math.inf if alert.falls else 0.0
    centre = median(window)
    if alert.comparison.startswith("times_median"):
        return value / max(centre, 1e-12)
    # robust z = (x - median) / (1.4826 MAD)   (Iglewicz & Hoaglin 1993); a flat window counts as 1% wide
    spread = 1.4826 * median(abs(x - centre) for x in window)
    return (value - centre) / max(spread, 0.01 * abs(centre), 1e-12)
