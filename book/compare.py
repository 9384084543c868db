"""Two or more runs side by side: what differs in parameters, indicators, checklist and losses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
from myst import badge, code, table, text
from readiness import Run, duration, summaries

from stackpkg import runs

HELD = "loss on held-out text"


def page(found: list[Run], folders: list[Path]) -> str:
    order = sorted(range(len(found)), key=lambda i: found[i]["run"])
    found, folders = [found[i] for i in order], [folders[i] for i in order]
    sections = {
        "At a glance": summaries(found) + "\n" + glance(found),
        "Parameters that differ": parameters(found),
        "Indicators": indicators(found, folders),
        "Checklist": lines(found),
        "Losses": losses(found, folders),
        "Measured numbers that differ": numbers(found, folders),
    }
    return "\n".join(f"## {title}\n\n{body or 'None.'}\n" for title, body in sections.items())


def side_by_side(names: list[str], columns: list[dict[str, str]], head: str, everything: bool = False) -> str:
    """A row for each key on which the columns differ; all of them where `everything`. Cells are Markdown."""
    keys = list(dict.fromkeys(key for column in columns for key in column))
    shown = [key for key in keys if everything or len({column.get(key, "") for column in columns}) > 1]
    rows = [[code(key), *(column.get(key, "") for column in columns)] for key in shown]
    return table(" | ".join([head, *map(text, names)]), rows) if rows else ""


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {
        key: leaf for part, below in value.items() for key, leaf in flat(below, f"{name}.{part}".strip(".")).items()
    }


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def names(found: list[Run]) -> list[str]:
    return [run["run"] for run in found]


def glance(found: list[Run]) -> str:
    """When, how long, from which commit; of versions and machine what differs."""
    columns = []
    for run in found:
        states = [stage["state"] for stage in run["stages"].values()]
        started = min((stage["started"] for stage in run["stages"].values() if stage["started"]), default="")
        took = duration(sum(stage["seconds"] or 0 for stage in run["stages"].values()))
        column = {"stages ok": f"{states.count('ok')} of {len(states)}", "started": started, "took": took}
        columns.append({key: text(value) for key, value in column.items()})
    told = [{key: code(str(value)[:40]) for key, value in flat(run["environment"]).items()} for run in found]
    different = side_by_side(names(found), told, "machine and versions")
    return side_by_side(names(found), columns, "what", everything=True) + "\n" + different


def parameters(found: list[Run]) -> str:
    columns = [{key: code(value) for key, value in flat(run["params"]).items() if key != "run"} for run in found]
    return side_by_side(names(found), columns, "parameter")


def indicators(found: list[Run], folders: list[Path]) -> str:
    columns = []
    for folder in folders:
        path = folder / "telemetry/kpis.json"
        rows = runs.read_json(path) if path.exists() else []
        columns.append({
            row["kpi"]: f"{text(number(row['value']))} {text(row['comparison'])} {text(number(row['target']))} "
            + badge("green" if row["met"] else "red", "met" if row["met"] else "missed") for row in rows
        })  # fmt: skip
    return side_by_side(names(found), columns, "indicator", everything=True)


def lines(found: list[Run]) -> str:
    if not all(run["items"] for run in found):
        without = [run["run"] for run in found if not run["items"]]
        return text(f"No checklist yet: {', '.join(without)}.")
    columns = [{item["id"]: badge(item["status"]) for item in run["items"]} for run in found]
    return side_by_side(names(found), columns, "line", everything=True)


def epochs(folder: Path) -> pd.Series:
    """Validation loss in nats per token by step, as the epoch reports tell it."""
    reports = [runs.read_json(path) for path in sorted(folder.glob("eval/train/epoch_*.json"))]
    values = {report["step"]: float(report["validation_loss"]) for report in reports}
    return pd.Series(values, dtype=float).sort_index()


def losses(found: list[Run], folders: list[Path]) -> str:
    """A figure, its words, and its numbers."""
    series = {run["run"]: epochs(folder) for run, folder in zip(found, folders, strict=True)}
    both = pd.DataFrame({name: values for name, values in series.items() if len(values)})
    if both.empty:
        return ""
    from stackpkg import plots  # a second of imports that a book of one run need not pay

    plots.use_style()
    figure = plots.lines(both.rename_axis("step").interpolate(limit_area="inside"), f"{HELD}, nats per token")
    runs.write_text(Path("generated/losses.svg"), plots.svg(figure))
    parts = [f"{name} from {values.iloc[0]:.3f} at step {values.index[0]} to {values.iloc[-1]:.3f} at step "
             f"{values.index[-1]}" for name, values in both.items() for values in [values.dropna()]]  # fmt: skip
    told = text(f"{HELD}: {'; '.join(parts)}")
    rows = [[str(step), *("" if math.isnan(v) else f"{v:.4f}" for v in row)] for step, *row in both.itertuples()]
    shown = table(" | ".join(["step", *map(text, both)]), rows)
    return f"![{told}](generated/losses.svg)\n\n{told}\\.\n\n:::{{dropdown}} The numbers\n{shown}\n:::\n"


def numbers(found: list[Run], folders: list[Path]) -> str:
    columns = []
    for folder in folders:
        told = {path.stem: runs.read_json(path) for path in sorted(folder.glob("evidence/*.json"))}
        columns.append({key: code(number(value)) for key, value in flat(told).items()})
    shown = side_by_side(names(found), columns, "number")
    return f":::{{dropdown}} What the notebooks recorded\n{shown}\n:::\n" if shown else ""
