"""What an approval asks for: conditions, which every later seal carries until they are met, and waivers of items."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, TypeAdapter

from stackpkg import runs
from stackpkg.governance import checklist, runlog, statements
from stackpkg.params import Params, Section

CONDITIONS = "approval/conditions.json"


class Demand(Section):
    """A number of a run's evidence that meets a condition."""

    evidence: str
    value: str
    op: Literal[">", ">=", "<", "<=", "=="]
    limit: float


class Condition(Section):
    """What must hold by `due`; without a `check`, a signed note of the role says that it does."""

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{0,31}$")
    text: str = Field(min_length=1, max_length=500)
    due: date
    check: Demand | None = None


class Waiver(Section):
    """An item of the checklist that the signer lets pass until `expires`, and why."""

    item: str
    reason: str = Field(min_length=1, max_length=500)
    expires: date


class Terms(Section):
    """Conditions and waivers of one sign-off, as its reviewer writes them in YAML."""

    conditions: list[Condition] = Field([])
    waivers: list[Waiver] = Field([])

    @classmethod
    def read(cls, path: Path) -> Terms:
        """Raises `ValueError` for an unknown key, item or day, and for a day that has passed."""
        found = TypeAdapter(cls).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
        known = {item.id for item in checklist.definitions()}
        if unknown := {waiver.item for waiver in found.waivers} - known:
            raise ValueError(f"{path.name} waives {', '.join(sorted(unknown))}; items: {', '.join(sorted(known))}")
        days = {c.id: c.due for c in found.conditions} | {w.item: w.expires for w in found.waivers}
        if len(days) < len(found.conditions) + len(found.waivers):
            raise ValueError(f"{path.name} names a condition or a waived item twice")
        if late := [name for name, day in days.items() if day.isoformat() < today()]:
            raise ValueError(f"{path.name}: the day of {', '.join(late)} has passed; give one to come")
        return found


def today() -> str:
    """UTC, as an ISO date; on the very day a condition and a waiver still hold."""
    return datetime.now(UTC).date().isoformat()


def overdue(said: dict[str, Any]) -> list[str]:
    """What of a sign-off has passed its day."""
    late = [f"condition {c['id']} was due {c['due']}" for c in said["conditions"] if c["due"] < today()]
    return late + [f"waiver of {w['item']} expired {w['expires']}" for w in said["waivers"] if w["expires"] < today()]


def carried(folder: Path, demonstration: bool) -> list[dict[str, Any]]:
    """Every condition that a sign-off of a run in the log asked for, or that a seal of one carried, oldest run first.

    Those of demonstrations bind demonstrations alone.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for run in _runs(folder):
        kept = runs.read_json(run / CONDITIONS) if (run / CONDITIONS).is_file() else []
        for path in sorted((run / "signoffs").glob("*.json")):
            kept += _asked(path)
        for each in kept:
            if each["reviewer"].endswith(statements.DEMONSTRATION) == demonstration:
                found.setdefault((each["statement"], each["id"]), each)
    return list(found.values())


def _asked(path: Path) -> list[dict[str, Any]]:
    """The conditions of a sign-off with where they come from; none of a file that is no statement of this form."""
    try:
        said = statements.read(path, statements.SIGNOFF)
        origin = {key: said[key] for key in ("run", "role", "reviewer")} | {"statement": runs.digest(path)}
        return [origin | Condition(**condition).model_dump(mode="json") for condition in said["conditions"]]
    except (ValueError, KeyError, TypeError):
        return []


def _runs(folder: Path) -> list[Path]:
    names = dict.fromkeys([*(entry["run"] for entry in runlog.entries(folder.parent)), folder.name])
    return [folder.parent / name for name in names if (folder.parent / name).is_dir()]


def judge(folder: Path, condition: dict[str, Any], trust: statements.Trust) -> dict[str, Any]:
    """The condition with `met`, by what, or with `open_until`, its day: a check over this run's evidence decides, else
    a signed note in any run of the log."""
    kept = {key: value for key, value in condition.items() if key not in ("met", "open_until")}
    if demand := condition.get("check"):
        seen = checklist.measure(checklist.Check(**demand), folder, Params())
        how = "" if seen["why"] else f"{demand['evidence']}: {demand['value']} is {seen['seen']}"
    else:
        how = next((by for run in _runs(folder) if (by := _noted(run, condition, trust))), "")
    return kept | ({"met": how} if how else {"open_until": condition["due"]})


def note_path(folder: Path, condition: dict[str, Any]) -> Path:
    return folder / f"approval/met/{condition['statement'][:12]}-{condition['id']}.json"


def _noted(run: Path, condition: dict[str, Any], trust: statements.Trust) -> str:
    """Whose signed note in `run` says that the condition is met; the role that asked must have signed it."""
    path = note_path(run, condition)
    if not path.is_file() or not path.with_name(f"{path.name}.sig").is_file():
        return ""
    said = statements.read(path, statements.MET)
    key, why = statements.signer(path, condition["role"], said["reviewer"], trust)
    same = (said["signed"], said["condition"]) == (condition["statement"], condition["id"])
    return f"note of {said['reviewer']}: {said['text']}" if same and not why and key not in trust.authors else ""


def write(folder: Path, trust: statements.Trust, demonstration: bool) -> Path:
    """`approval/conditions.json`: every carried condition, met or open. Made anew before each seal."""
    judged = [judge(folder, condition, trust) for condition in carried(folder, demonstration)]
    return runs.write_json(folder / CONDITIONS, judged)


def untrue(folder: Path, trust: statements.Trust) -> list[str]:
    """Conditions that the sealed list calls met and that are not, or the other way round."""
    told = runs.read_json(folder / CONDITIONS) if (folder / CONDITIONS).is_file() else []
    return [f"{CONDITIONS}: {each['id']} is not as it says" for each in told if judge(folder, each, trust) != each]


def meet(folder: Path, name: str, role: str, key: Path, reviewer: str, text: str) -> Path:
    """Write and sign the note that condition `name` is met; the next seal reads it.

    Raises `ValueError` when the role asked for no such condition, and when ssh-keygen can't sign.
    """
    demonstration = reviewer.endswith(statements.DEMONSTRATION)
    mine = {each["id"]: each for each in carried(folder, demonstration) if each["role"] == role}
    if name not in mine:
        raise ValueError(f"{role} asked for no condition {name!r}; it asked for: {', '.join(mine) or 'none'}")
    said = {"reviewer": reviewer, "role": role, "condition": name, "text": text, "at": runs.now()}
    written = statements.layout(name, mine[name]["statement"], statements.MET, said)
    return statements.write(note_path(folder, mine[name]), written, key, role)
