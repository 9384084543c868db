"""What the sign-offs of a run ask for, and the lines of the log about it: a fragment of the archive's page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from myst import code, table, text

from stackpkg import runs
from stackpkg.governance import runlog, terms


def asked(folder: Path) -> str:
    """Conditions the run is under or was given, items its reviewers waived, its lines of the log. All as the files say:
    whether the signatures hold is told above."""
    said = [runs.read_json(path)["predicate"] for path in sorted((folder / "signoffs").glob("*.json"))]
    carried = runs.read_json(folder / terms.CONDITIONS) if (folder / terms.CONDITIONS).is_file() else []
    new = [one | {"role": each["role"], "run": folder.name} for each in said for one in each.get("conditions", [])]
    conditions = [
        [code(one["id"]), *map(text, (one["text"], one["role"], one["run"], one["due"], one.get("met", "open")))]
        for one in [*carried, *new]
    ]
    waivers = [
        [code(one["item"]), *map(text, (one["reason"], one["signer"], one["expires"]))]
        for each in said
        for one in each.get("waivers", [])
    ]
    lines = [
        [text(entry["at"]), code(entry["file"]), code(entry["sha256"][:16]), code(entry["previous"][:16])]
        for entry in logged(folder)
    ]
    parts = [
        ("Conditions", "id | asks for | role | set on | due | met by", conditions, "No condition is open or was set."),
        ("Waivers", "item | reason | signer | until", waivers, "No line of the checklist is waived."),
        ("Log", "at | file | its digest | line before", lines, "No line of the log is about this run."),
    ]
    return "\n".join(f"## {name}\n\n{table(head, rows) if rows else text(none)}\n" for name, head, rows, none in parts)


def logged(folder: Path) -> list[dict[str, Any]]:
    """The entries about this run; none from a log whose chain is broken, which verification tells."""
    try:
        return [entry for entry in runlog.entries(folder.parent) if entry["run"] == folder.name]
    except ValueError:
        return []
