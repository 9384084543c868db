"""How often alerts fire on jobs that went well, and what so few steps can tell of the rate."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import chi2

from stackpkg.params import validate
from stackpkg.runs import read_json
from stackpkg.telemetry import rows
from stackpkg.telemetry.guard import Guard

CONFIDENCE = 0.95
EARNED = "precision_at_k"  # a target that was missed has earned its call


def jobs(run: Path) -> list[str]:
    """Jobs of the run in the folder `run` that went well: launched without a fault, done in one attempt, their rows on
    disk."""
    found = []
    for done in sorted((run / "checkpoints").glob("*/done.json")):
        job = read_json(done.with_name("job.json"))
        whole = (run / "telemetry" / f"{job['name']}.parquet").exists()
        if whole and not job["faults"] and len(read_json(done.with_name("attempts.json"))) == 1:
            found.append(job["name"])
    return found


def replay(run: Path, job: str) -> dict[str, Any]:
    """The rows of a job, in order, through a fresh guard with the thresholds of that job: `job`, `steps`, `alarms`, a
    count by name, without those that were earned, and `earned`."""
    watch = Guard.production(validate(read_json(run / "checkpoints" / job / "job.json")["params"]))
    table = rows.effective(pd.read_parquet(run / "telemetry" / f"{job}.parquet"))
    history = table[table["rank"] == 0].to_dict("records")
    fired = [alert for row in history for alert in watch.observe(row)]
    alarms = Counter(alert["alert"] for alert in fired if alert["series"] != EARNED)
    earned = Counter(alert["alert"] for alert in fired if alert["series"] == EARNED)
    return {"job": job, "steps": len(history), "alarms": dict(alarms), "earned": dict(earned)}


def rate(replays: list[dict[str, Any]]) -> dict[str, float]:
    """`steps` and `alarms` of all jobs together, alarms `per_1000_steps`, and `at_most`, the largest such rate under
    which one run in twenty would show so few.

    The number n of alarms in T steps is taken for Poisson; the exact 95 % upper limit of its rate is
    chi2(0.95; 2 n + 2) / (2 T)   (F. Garwood, Biometrika 28, 1936), for n = 0: -ln(0.05) / T, "the rule of three".
    """
    steps = sum(each["steps"] for each in replays)
    alarms = sum(sum(each["alarms"].values()) for each in replays)
    limit = float(chi2.ppf(CONFIDENCE, 2 * alarms + 2)) / 2
    return {"steps": steps, "alarms": alarms, "per_1000_steps": 1000 * alarms / steps, "at_most": 1000 * limit / steps}
