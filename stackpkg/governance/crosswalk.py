"""From what NIST AI RMF, ISO/IEC 42001 and Annex IV of the EU AI Act ask for to the files of a run that answer."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import Field, TypeAdapter, model_validator

from stackpkg import runs
from stackpkg.governance.datacards import render
from stackpkg.params import Section

TABLE = "governance/crosswalk.yaml"


class Requirement(Section):
    framework: str
    clause: str
    asks: str
    evidence: list[str] = Field([], description="globs below the run, each of which must match")
    outside: str = Field("", description="why no run can answer")

    @model_validator(mode="after")
    def _one_answer(self) -> Requirement:
        if bool(self.evidence) == bool(self.outside):
            raise ValueError(f"{self.framework} {self.clause}: give `evidence`, or say in `outside` why there is none")
        return self


def definitions() -> list[Requirement]:
    """The rows of `governance/crosswalk.yaml`. Raises `ValueError` naming every bad key."""
    values = yaml.safe_load((runs.root() / TABLE).read_text(encoding="utf-8"))
    return TypeAdapter(list[Requirement]).validate_python(values)


def rows(folder: runs.RunFolder) -> list[dict[str, Any]]:
    """Each requirement with `evidence`, path -> SHA-256 of what its globs match now, and the globs that match nothing
    as `missing`."""
    made = []
    for each in definitions():
        found = {glob: [path for path in folder.matches(glob) if path.is_file()] for glob in each.evidence}
        files = {path.relative_to(folder.path).as_posix(): runs.digest(path) for f in found.values() for path in f}
        missing = [glob for glob, paths in found.items() if not paths]
        made.append(each.model_dump() | {"evidence": files, "missing": missing})
    return made


def write(folder: runs.RunFolder) -> list[dict[str, Any]]:
    """`governance/crosswalk.md` and `crosswalk.json`; returns the rows."""
    found = rows(folder)
    runs.write_json(folder / "governance/crosswalk.json", found)
    runs.write_text(folder / "governance/crosswalk.md", render("crosswalk.md.j2", {"run": folder.name, "rows": found}))
    return found
