"""What the benchmarks measured, and whether that is what was aimed at: from `benchmarks/results/`, never typed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from myst import badge, code, table, text

from stackpkg import runs

LISTED = ("trainer", "snapshots", "telemetry", "stream", "series", "recovery")  # shown row by row


class Goal(NamedTuple):
    """A limit for a metric of a file, a regular expression whose groups fill the braces of `what`; `system` is a part
    of the row's system, "" for each that has the metric.
    """

    what: str
    file: str
    system: str
    metric: str
    limit: float
    most: bool = True  # at most `limit`; else at least


GOALS = (
    Goal("a step with everything on, above bare Trainer", "trainer", "stack", "overhead wall", 3.0),
    Goal("all probes together", "telemetry", "all probes", "at their cadence", 1.0),
    Goal("a snapshot behind the training stalls it, of a blocking one", "snapshots", "", "stall, behind / waited", 2.0),
    Goal("CPU time of attention grows with length to the power", "attention", "", "exponent", 1.1),
    Goal("tokens/s of {} tokens beside the rival's", "attention", "", r"(?!1024 )(\d+) tokens/s ratio", 1.0, False),
    Goal("near duplicates found are such", "dedup", "stackpkg on numba", "precision", 0.99, False),
    Goal("near duplicates that are found", "dedup", "stackpkg on numba", "recall", 0.99, False),
)
PEERS = ("dense SDPA", "Qwen3-MoE")  # measured beside, no goal is set for them


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = runs.read_json(Path("benchmarks", f"{name}.json"))
    return found


def _about(found: dict[str, Any]) -> str:
    """Machine, versions and load under which a file was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items())
    load = found.get("load", found.get("load_average", [""])[0])
    told = [
        found["date"],
        found.get("processor") or found.get("cpu"),
        f"{found['cores']} cores",
        f"load {load}",
        versions,
    ]
    return text(", ".join(part for part in told if part))


def goals() -> str:
    """Each goal with every row that it is about, the interval where the benchmark gives one, and whether it holds."""
    lines = []
    for goal in GOALS:
        rows = {(row["system"], row["metric"]): row for row in _read(goal.file)["rows"]}
        for (system, metric), row in rows.items():
            about = re.fullmatch(goal.metric, metric)
            if not about or goal.system not in system or system.startswith(PEERS):
                continue
            ends = [
                rows[system, f"{metric}, {end}"]["value"]
                for end in ("low", "high")
                if (system, f"{metric}, {end}") in rows
            ]
            value = f"{row['value']:g}" + (f" [{ends[0]:g}, {ends[1]:g}]" if ends else "")
            met = row["value"] <= goal.limit if goal.most else row["value"] >= goal.limit
            unsure = ends and not (max(ends) <= goal.limit if goal.most else min(ends) >= goal.limit)
            state = ("amber", "met, not surely") if met and unsure else ("green", "met") if met else ("red", "missed")
            sign = "at most" if goal.most else "at least"
            unit = "" if row["unit"] == "1" else f" {row['unit']}"
            lines.append(
                [
                    text(goal.what.format(*about.groups())),
                    text(system),
                    text(f"{sign} {goal.limit:g}"),
                    text(value + unit),
                    badge(*state),
                ]
            )
    return table("goal | of | limit | measured | met", lines)


def rows() -> str:
    """The files, each with its machine; those of `LISTED` in full."""
    parts = []
    for name in LISTED:
        found = _read(name)
        cells = [
            [text(r["system"]), text(r["metric"]), text(f"{float(r['value']):g}"), text(r["unit"])]
            for r in found["rows"]
        ]
        parts += [
            f"### {code(f'benchmarks/{name}.py')}\n",
            f"{_about(found)}\\.\n",
            table("system | metric | value | unit", cells),
        ]
    return "\n".join(parts)
