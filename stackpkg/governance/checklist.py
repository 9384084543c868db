"""The readiness checklist, evaluated: an item is green only by machine checks over hashed evidence."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any, Literal

import yaml
from pandas import DataFrame
from pydantic import Field, TypeAdapter

from stackpkg import runs
from stackpkg.params import Params, Section
from stackpkg.training.promotion import COMPARE

UNSIGNED = "the sign-offs came after this list was sealed; `stackpkg status` and the book judge this line over them"


class Check(Section):
    evidence: str  # stage whose evidence/<stage>.json holds the number
    value: str
    op: Literal[">", ">=", "<", "<=", "=="]
    limit: float | str  # a number, the name of another number of the same evidence, or params.<parameter>


class Item(Section):
    id: str
    workstream: str
    text: str
    notebooks: list[str]
    checks: list[Check] = Field(min_length=1)
    files: list[str] = Field([])  # globs below the run; each must match, what they match is hashed
    pending: str = ""  # what is still missing: holds the item at amber
    signed: bool = False  # waits for the sign-offs: amber in the sealed list, `standing.live` judges it over them


def definitions() -> list[Item]:
    """The items of `params/checklist.yaml`. Raises `ValueError` naming every bad key."""
    values = yaml.safe_load((runs.root() / "params/checklist.yaml").read_text(encoding="utf-8"))
    return TypeAdapter(list[Item]).validate_python(values)  # pydantic's error is a ValueError


def measure(check: Check, folder: Path, p: Params) -> dict[str, Any]:
    """The check with the number seen in a run's evidence, and why it fails ("" if it passes)."""
    path = folder / "evidence" / f"{check.evidence}.json"
    numbers = runs.read_json(path) if path.exists() else {}
    seen, limit = numbers.get(check.value), numbers.get(check.limit, check.limit)
    if isinstance(limit, str):
        limit = operator.attrgetter(limit[7:])(p) if limit.startswith("params.") else None
    passed = isinstance(seen, int | float) and isinstance(limit, int | float) and COMPARE[check.op](seen, limit)
    why = "" if passed else f"{check.evidence}: {check.value} is {seen}, must be {check.op} {limit}"
    return check.model_dump() | {"limit": limit, "seen": seen, "why": why}


def evaluate(folder: runs.RunFolder, p: Params) -> list[dict[str, Any]]:
    """Each item with its checks, the digests of its evidence, its status and the reasons for amber or red."""
    items = []
    for item in definitions():
        checks = [measure(check, folder.path, p) for check in item.checks]
        globs = [*(f"evidence/{check.evidence}.json" for check in item.checks), *item.files]
        found = {glob: folder.matches(glob) for glob in globs}
        failed = [check["why"] for check in checks if check["why"]] + [f"{g}: missing" for g in found if not found[g]]
        files = {str(path.relative_to(folder.path)): runs.digest(path) for paths in found.values() for path in paths}
        pending = UNSIGNED if item.signed else item.pending
        status = "red" if failed else "amber" if pending else "green"
        why = [*failed, pending] if pending else failed
        items.append(item.model_dump() | {"checks": checks, "files": files, "status": status, "reasons": why})
    return items


def write(folder: runs.RunFolder, items: list[dict[str, Any]]) -> Path:
    return runs.write_text(folder / "checklist.yaml", yaml.safe_dump(items, sort_keys=False, allow_unicode=True))


def read(folder: Path) -> list[dict[str, Any]]:
    """The items as they were written in a run's folder; empty before the sign-off notebook ran."""
    path = folder / "checklist.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else []


def board(items: list[dict[str, Any]]) -> DataFrame:
    """One row per item: identifier, status, text, and why it is not green."""
    rows = [(item["id"], item["status"], item["text"], "; ".join(item["reasons"])) for item in items]
    return DataFrame(rows, columns=["item", "status", "what", "why not green"])
