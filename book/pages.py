"""Write what a run's pages include: status, checklist, sign-offs, parameters, API. Called in the staged book.

python pages.py outbox/<run> [outbox/<another> ...]   # writes run.json, generated/ and reference/package/ where it is
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import compare
import drilled
import measured
import readiness
import yaml
from myst import code, table, text
from reference import api, parameters
from signoffs import asked

from stackpkg import params, runs
from stackpkg.telemetry import guard, kpis


def support(found: dict[str, Any]) -> str:
    """Layout by model: largest relative difference of a gradient from one process's."""
    cells = {(row["layout"], f"{row['model']} {row['precision']}".removesuffix(" fp32")): row for row in found["rows"]}
    names = sorted(dict.fromkeys(model for _, model in cells), key=lambda model: model.endswith("bf16"))
    rows = []
    for layout in dict.fromkeys(layout for layout, _ in cells):
        here = [cells.get((layout, model)) for model in names]
        shown = [f"{row['gradient']:.0e}" if row and "gradient" in row else "" for row in here]
        rows.append([code(layout), *map(text, shown)])
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    exact = [row for row in found["rows"] if row["precision"] == "fp32"]
    loss, average = (text(f"{max(row.get(name, 0.0) for row in exact):.0e}") for name in ("loss", "average"))
    repeated = sum(row.get("repeats", False) for row in found["rows"])
    note = f"Of the gradient; of the loss, {loss} at most, of the average of the weights {average} (fp32)\\. "
    note += "Empty: no experts to spread, or tied embeddings, which no pipeline cuts\\. "
    note += f"Repeated by a resume: {repeated} of {len(found['rows'])}\\. "
    for precision, limits in found["limits"].items():
        told = ", ".join(f"{name} {limit:g}" for name, limit in limits.items())
        note += f"Limits of {precision}: {text(told)}\\. "
    note += f"Versions: {text(versions)}\\.\n"
    return note + "\n" + table(" | ".join(["layout", *names]), rows)


def runbook(name: str) -> str:
    """A link to the page, where the book has it."""
    return f"[](runbooks/{name}.md)" if Path("runbooks", f"{name}.md").is_file() else text(name)


def watched() -> str:
    """The indicators with owner and action, and the alerts with what they do, for the default profile."""
    p = params.validate({})
    rows = [
        [text(kpi.name), code(kpi.formula), text(f"{kpi.comparison} {kpi.target:g}"), text(kpi.owner), text(kpi.missed),
         runbook(kpi.runbook)]
        for kpi in kpis.load(p)
    ]  # fmt: skip
    parts = ["## Indicators\n", table("indicator | formula | target | owner | if missed | page", rows), "## Alerts\n"]
    fired = [
        [runbook(alert.name), text(alert.summary), code(alert.series), text(alert.severity),
         text(alert.action), text(alert.seen)]
        for alert in guard.load(p)
    ]  # fmt: skip
    return "\n".join([*parts, table("alert | tells | series | severity | action | seen by", fired)])


def faults(found: dict[str, Any]) -> str:
    """What each drill did to a job, and how the job went on."""
    rows = []
    for row in found["rows"]:
        less = float(row["loss_difference"])  # strict JSON holds "NaN" as a string
        difference = "to the bit" if row["same"] else f"{less:+.1e}" if less == less else "ended"
        again = f"{row['again']}" if row["attempts"] > 1 else ""
        seconds = f"{row['seconds']:.0f}" if row["seconds"] else ""
        went = ", ".join(row["went"]) or "nothing to do"
        rows.append(list(map(text, (row["fault"], went, again, str(row["rows_missing"]), difference, seconds))))
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    machine = ", ".join(f"{value} {key}" if key == "cores" else value for key, value in found["machine"].items())
    note = f"{len(rows)} faults, {text(found['at'][:10])}, {text(machine)}, {text(versions)}\\.\n\n"
    head = ["fault", "how it went on", "steps again", "rows lost", "weights and last loss", "seconds"]
    return note + table(" | ".join(head), rows)


def contents(config: dict[str, Any]) -> dict[str, Any]:
    """`myst.yml` without the parts that have no page yet: mystmd reports such a pattern as an error, but goes on."""

    def has_page(entry: dict[str, Any]) -> bool:
        patterns = [child["pattern"] for child in entry.get("children", []) if "pattern" in child]
        patterns += [entry["file"]] if "file" in entry else []
        return not patterns or any(path for pattern in patterns for path in Path().glob(pattern))

    config["project"]["toc"] = [entry for entry in config["project"]["toc"] if has_page(entry)]
    return config


def main(folder: Path, *other: Path) -> None:
    run, others = readiness.gather(folder), [readiness.gather(path) for path in other]
    kept = ("run", "built", "stages", "demonstration", "defaults")
    runs.write_json(Path("run.json"), {key: run[key] for key in kept} | {"others": len(others)})
    pages, now, table_of_faults = Path("runbooks"), drilled.now(), runs.read_json(Path("faults.json"))
    drills = drilled.receipts(folder, table_of_faults)
    fragments = {
        "status": readiness.status(run, others),
        "checklist": readiness.checklist(run),
        "archive": readiness.archive(run, others, folder),
        "asked": asked(folder),
        "parameters": parameters(),
        "support": support(runs.read_json(Path("support.json"))),
        "faults": faults(table_of_faults),
        "kpis": watched(),
        "goals": measured.goals(),
        "benchmarks": measured.rows(),
        "false_alarms": drilled.false_alarms(folder),
        "drills": drilled.overview(pages, drills, now),
        "logbook": drilled.entries(folder, pages),
    }
    if others:
        fragments["compare"] = compare.page([run, *others], [folder, *other])
    else:
        Path("compare.md").unlink()  # a run alone has nothing to be compared with
    for name, fragment in fragments.items():
        runs.write_text(Path("generated", f"{name}.md"), fragment)
    for room, page in api().items():
        runs.write_text(Path("reference", "package", f"{room}.md"), page)
    drilled.stamp(pages, drills, now)
    config = contents(yaml.safe_load(Path("myst.yml").read_text(encoding="utf-8")))
    runs.write_text(Path("myst.yml"), yaml.safe_dump(config, sort_keys=False))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
