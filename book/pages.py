"""Write what a run's pages include: status, checklist, sign-offs, parameters, API. Called in the staged book.

python pages.py outbox/<run>      # writes run.json, generated/*.md and reference/package/*.md where it is called
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import drilled
import yaml
from myst import badge, code, div, table, text
from reference import api, parameters

from stackpkg import params, runs
from stackpkg.governance import seal
from stackpkg.telemetry import guard, kpis


def duration(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def gather(folder: Path) -> dict[str, Any]:
    """The run as plain data. Stage states come from the runner's locks, never from a notebook's own metadata."""
    stages = {}
    for notebook in sorted(Path("notebooks").glob("*.ipynb")):
        lock = folder / "lock" / f"{notebook.stem}.json"
        found = runs.read_json(lock) if lock.exists() else {"state": "not run"}
        stages[notebook.stem] = {key: found.get(key) for key in ("state", "started", "seconds", "error")}
    checklist = folder / "checklist.yaml"
    items = yaml.safe_load(checklist.read_text(encoding="utf-8")) if checklist.exists() else []
    signoffs = [runs.read_json(path)["predicate"] for path in sorted((folder / "signoffs").glob("*.json"))]
    return {
        "run": folder.name,
        "built": runs.now(),
        "stages": stages,
        "items": items,
        "signoffs": {signoff["role"]: signoff for signoff in signoffs},
        "demonstration": any(signoff["demonstration"] for signoff in signoffs),
    }


def status(run: dict[str, Any]) -> str:
    states = Counter(stage["state"] for stage in run["stages"].values())
    counts = Counter(item["status"] for item in run["items"])
    roles = seal.ROLES
    approved = [role for role in roles if run["signoffs"].get(role, {}).get("decision") == "approve"]
    missing = []
    if states["ok"] < len(run["stages"]):
        missing.append("stages: " + ", ".join(f"{states[state]} {state}" for state in states if state != "ok"))
    if not run["items"]:
        missing.append("there is no checklist yet")
    elif counts["green"] < len(run["items"]):
        missing.append(
            "checklist: " + ", ".join(f"{counts[colour]} {colour}" for colour in ("red", "amber") if counts[colour])
        )
    if len(approved) < len(roles):
        missing.append(f"{len(approved)} of {len(roles)} roles approved")
    if run["demonstration"]:
        missing.append("signed with demonstration keys only")
    verdict = (
        f"**Not ready.** {text('; '.join(missing))}\\."
        if missing
        else "**Ready.** Every stage, line and signature holds\\."
    )
    took = sum(stage["seconds"] or 0 for stage in run["stages"].values())
    colours = " ".join(badge(colour, f"{counts[colour]} {colour}") for colour in ("amber", "red") if counts[colour])
    tiles = [
        div("tile", "Run", f"**{text(run['run'])}**", f"{text(duration(took))} in all", fence="::::"),
        div(
            "tile",
            "Stages",
            f"**{states['ok']} of {len(run['stages'])} ok**",
            badge("failed", f"{states['failed']} failed") if states["failed"] else " ",
            fence="::::",
        ),
        div("tile", "Checklist", f"**{counts['green']} of {len(run['items'])} green**", colours or " ", fence="::::"),
        div("tile", "Sign\\-offs", f"**{len(approved)} of {len(roles)} roles**", signed(run), fence="::::"),
    ]
    rows = []
    for name, stage in run["stages"].items():
        error = (stage["error"] or "").strip().splitlines()
        note = code(error[-1][:200]) if error and stage["state"] != "ok" else ""
        rows.append([f"[](notebooks/{name}.ipynb)", badge(stage["state"]), text(duration(stage["seconds"])), note])
    return "\n".join(
        [
            div("verdict no" if missing else "verdict yes", verdict),
            div("tiles", *tiles, fence=":::::"),
            "## Stages\n",
            table("stage | state | took | note", rows),
        ]
    )


def signed(run: dict[str, Any]) -> str:
    return (
        badge("demonstration keys")
        if run["demonstration"]
        else "reviewers' keys"
        if run["signoffs"]
        else "not signed yet"
    )


def checklist(run: dict[str, Any]) -> str:
    if not run["items"]:
        return "This run has no checklist yet: its last notebook writes `checklist.yaml`.\n"
    parts: list[str] = []
    for workstream in dict.fromkeys(item["workstream"] for item in run["items"]):
        parts.append(f"## {text(workstream)}\n")
        for item in (item for item in run["items"] if item["workstream"] == workstream):
            notebooks = [f"[](../notebooks/{name}.ipynb)" for name in item["notebooks"] if name in run["stages"]]
            parts.append(f"### {text(item['id'])} {badge(item['status'])}\n\n{text(item['text'])}\n")
            in_table = {check["why"] for check in item["checks"]}
            parts += [f"- {text(reason)}" for reason in item["reasons"] if reason not in in_table]
            parts.append("")
            if item["checks"]:
                parts.append(table("measured | seen | must be | check", [_check(check) for check in item["checks"]]))
            parts.append(f"From {', '.join(notebooks)}\\.\n" if notebooks else "")
            if item["files"]:
                digests = [[archived(path), code(digest[:16])] for path, digest in item["files"].items()]
                parts.append(f":::{{dropdown}} Evidence\n{table('file | sha256', digests)}\n:::\n")
    return "\n".join(parts)


def _check(check: dict[str, Any]) -> list[str]:
    state = badge("failed") if check["why"] else badge("passed")
    return [code(check["value"]), code(check["seen"]), code(f"{check['op']} {check['limit']}"), state]


def archived(path: str) -> str:
    """A link to the copy of an evidence file when the book carries one, else its path."""
    return f"[{code(path)}](<../archive/{path}>)" if Path("archive", path).is_file() else code(path)


def archive(run: dict[str, Any], folder: Path) -> str:
    parts = []
    if run["demonstration"]:
        parts.append(
            ":::{danger} Demonstration keys\n"
            "Throw-away keys made these signatures on the spot. They show how signing works and approve nothing.\n:::\n"
        )
    if not run["signoffs"]:
        parts.append("This run is not signed yet.\n")
    else:
        rows = []
        for role, item in run["signoffs"].items():
            keys = badge("demonstration") if item["demonstration"] else badge("reviewer")
            names = " ".join(archived(f"signoffs/{role}.json{end}") for end in ("", ".sig"))
            rows.append(
                [text(role), text(item.get("reviewer")), text(item.get("decision")), text(item.get("at")), keys, names]
            )
        parts.append(table("role | reviewer | decision | at | keys | files", rows))
    sums = folder / "SHA256SUMS"
    if sums.exists():
        lines = sums.read_text(encoding="utf-8").rstrip()
        parts.append(f"{lines.count(chr(10)) + 1} files are sealed; digest of the list {code(runs.digest(sums))}\n")
        parts.append(f"````text\n{lines}\n````\n")
    else:
        parts.append("This run is not sealed yet: there is no `SHA256SUMS`.\n")
    return "\n".join(parts)


def support(found: dict[str, Any]) -> str:
    """Layout by model: largest relative difference of a gradient from one process's."""
    cells = {(row["layout"], row["model"]): row for row in found["rows"]}
    names = list(dict.fromkeys(model for _, model in cells))
    rows = []
    for layout in dict.fromkeys(layout for layout, _ in cells):
        here = [cells.get((layout, model)) for model in names]
        shown = [f"{row['gradient']:.0e}" if row and "gradient" in row else "" for row in here]
        rows.append([code(layout), *map(text, shown)])
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    limits = ", ".join(f"{name} {limit:g}" for name, limit in found["limits"].items())
    loss = text(f"{max(row.get('loss', 0.0) for row in found['rows']):.0e}")
    note = f"Of the gradient; of the loss, {loss} at most\\. Empty: no experts to spread\\. "
    note += f"Limits: {text(limits)}\\. Versions: {text(versions)}\\.\n"
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
        return not patterns or any(path for pattern in patterns for path in Path().glob(pattern))

    config["project"]["toc"] = [entry for entry in config["project"]["toc"] if has_page(entry)]
    return config


def main(folder: Path) -> None:
    run = gather(folder)
    pages, now, table_of_faults = Path("runbooks"), drilled.now(), runs.read_json(Path("faults.json"))
    drills = drilled.receipts(folder, table_of_faults)
    runs.write_json(Path("run.json"), {key: run[key] for key in ("run", "built", "stages", "demonstration")})
    fragments = {
        "status": status(run),
        "checklist": checklist(run),
        "archive": archive(run, folder),
        "parameters": parameters(),
        "support": support(runs.read_json(Path("support.json"))),
        "faults": faults(table_of_faults),
        "kpis": watched(),
        "drills": drilled.overview(pages, drills, now),
        "logbook": drilled.entries(folder, pages),
    }
    for name, fragment in fragments.items():
        runs.write_text(Path("generated", f"{name}.md"), fragment)
    for room, page in api().items():
        runs.write_text(Path("reference", "package", f"{room}.md"), page)
    drilled.stamp(pages, drills, now)
    config = contents(yaml.safe_load(Path("myst.yml").read_text(encoding="utf-8")))
    runs.write_text(Path("myst.yml"), yaml.safe_dump(config, sort_keys=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
