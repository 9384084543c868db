"""The alerts of `params/alerts.yaml` as Prometheus rules over the gauges `train_<series>`."""

import math
from typing import Any

import yaml

from stackpkg.telemetry.guard import WINDOW, Alert


def expression(alert: Alert, step_seconds: float) -> str:
    """PromQL that is true while the series is beyond its threshold; windows are `WINDOW` steps and a minute long."""
    name, limit, span = f"train_{alert.series}", alert.threshold, f"[{math.ceil(WINDOW * step_seconds) + 60}s"
    centre = f"quantile_over_time(0.5, {name}{span}])"
    if alert.comparison == "times_median_above":
        return f"{name} > {limit} * {centre}"
    if alert.comparison == "robust_z_above":
        spread = f"1.4826 * quantile_over_time(0.5, abs({name} - {centre}){span}:])"
        return f"({name} - {centre}) > {limit} * {spread} and ({name} - {centre}) > {limit} * 0.01 * abs({centre})"
    sign, furthest = {"above": (">", "max_over_time"), "below": ("<", "min_over_time")}[alert.comparison]
    # one bad step must not slip through between two scrapes
    return f"{furthest}({name}[1m]) {sign} {limit}" if alert.hold == 1 else f"{name} {sign} {limit}"


def render(alerts: list[Alert], step_seconds: float, evaluation_seconds: float) -> str:
    """A rules file (YAML). `hold` becomes `for`, by the measured seconds between two steps or two evaluations."""
    rules: list[dict[str, Any]] = []
    for alert in alerts:
        wait = math.ceil((alert.hold - 1) * (step_seconds if alert.per == "step" else evaluation_seconds))
        notes = {"summary": "{{ $labels.run }}: " + alert.summary, "runbook_url": f"runbooks/{alert.name}.html"}
        labels = {"severity": alert.severity, "action": alert.action}
        rule = {"alert": alert.name, "expr": expression(alert, step_seconds), "for": f"{wait}s", "labels": labels}
        rules.append(rule | {"annotations": notes})
    return yaml.safe_dump({"groups": [{"name": "training", "rules": rules}]}, sort_keys=False, width=1000)
