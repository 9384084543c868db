"""The alerts of `params/alerts.yaml` for Prometheus and Alertmanager, over the exporter's gauges `train_<series>`."""

import math
from typing import Any

import yaml

from stackpkg.telemetry.guard import WINDOW, Alert
from stackpkg.telemetry.privacy import clean

RECEIVERS = {"critical": "page", "warning": "ticket", "info": "deadman"}  # by severity
LOGBOOK = "http://127.0.0.1:9095/logbook"  # where `stackpkg inbox` listens
SIGN = {"above": ">", "below": "<"}


def expression(alert: Alert, step_seconds: float, grace_seconds: float = 0.0) -> str:
    """PromQL that is true while the series is beyond its threshold; windows are `WINDOW` steps and a minute long. One
    that never met it is let pass for `grace_seconds`."""
    name, limit, span = f"train_{alert.series}", alert.threshold, f"[{math.ceil(WINDOW * step_seconds) + 60}s"
    centre = f"quantile_over_time(0.5, {name}{span}])"
    if alert.comparison == "always":
        return "vector(1)"
    if alert.series == "up":  # Prometheus' own, of each target that it should reach
        return f'up{{run!=""}} {SIGN[alert.comparison]} {limit}'
    if alert.comparison == "older_than":
        return f"time() - {name} > {limit}"
    if alert.comparison == "fills_within":  # at the rate of a twenty-fourth of that time
        return f"predict_linear({name}[{max(10, int(float(limit) / 24))}s], {limit}) < 0"
    if alert.comparison == "returns_above":
        still = f"{name} offset {math.ceil(grace_seconds)}s > {limit}"
        return f"{name} > {limit} and (min_over_time({name}[30d]) <= {limit} or {still})"
    if alert.comparison.startswith("times_median"):
        return f"{name} {'<' if alert.falls else '>'} {limit} * {centre} and {name} < Inf"
    if alert.comparison == "robust_z_above":
        spread = f"1.4826 * quantile_over_time(0.5, abs({name} - {centre}){span}:])"
        far = f"({name} - {centre}) > {limit} * {spread} and ({name} - {centre}) > {limit} * 0.01 * abs({centre})"
        return f"{far} and {name} < Inf"  # what is not finite is `nonfinite`'s to tell, as in the guard
    if alert.hold == 1 and alert.seen == "job":  # the extreme of a minute: no step slips through between two scrapes
        name = f"train_{'min' if alert.falls else 'max'}_{alert.series}"
    return f"{name} {SIGN[alert.comparison]} {limit}"


def render(alerts: list[Alert], step_seconds: float, evaluation_seconds: float) -> str:
    """A rules file (YAML). `hold` becomes `for`, by the measured seconds between two steps or two evaluations."""
    rules: list[dict[str, Any]] = []
    lasts = {"step": step_seconds, "evaluation": evaluation_seconds, "second": 1.0}
    for alert in alerts:
        wait = math.ceil((alert.hold - 1) * lasts[alert.per])
        notes = {"summary": "{{ $labels.run }}: " + alert.summary, "runbook_url": f"runbooks/{alert.name}.html"}
        labels = {"severity": alert.severity, "action": alert.action, "seen": alert.seen}
        expr = expression(alert, step_seconds, (alert.grace or 0) * lasts[alert.per])
        rule = {"alert": alert.name, "expr": expr, "for": f"{wait}s"}
        rules.append(rule | clean({"labels": labels, "annotations": notes}))
    return yaml.safe_dump({"groups": [{"name": "training", "rules": rules}]}, sort_keys=False, width=1000)


def routes(hooks: dict[str, str], wait: str = "10s", logbook: str = LOGBOOK) -> str:
    """Alertmanager's configuration (YAML): each severity to a receiver, which is a webhook at `hooks[receiver]`; before
    that, what no guard in a job can note down to `logbook`. Alerts of one name and job go out together, `wait` after
    the first. Raises `ValueError` for a receiver without a hook.
    """
    if missing := sorted({*RECEIVERS.values()} - hooks.keys()):
        raise ValueError(f"no webhook for {', '.join(missing)}; give a URL for each of {', '.join(RECEIVERS.values())}")
    by_severity = [
        {"matchers": [f'severity="{severity}"'], "receiver": receiver} for severity, receiver in RECEIVERS.items()
    ]
    noted = {"matchers": ['seen="outside"', 'severity!="info"'], "receiver": "logbook", "continue": True}
    root = {"receiver": "page", "group_by": ["alertname", "run", "job"], "routes": [noted, *by_severity]}
    root |= {"group_wait": wait, "group_interval": wait, "repeat_interval": "4h"}
    receivers = [
        {"name": name, "webhook_configs": [{"url": url, "send_resolved": True}]}
        for name, url in (hooks | {"logbook": logbook}).items()
    ]
    return yaml.safe_dump({"route": root, "receivers": receivers}, sort_keys=False)
