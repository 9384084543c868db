"""Where a run stands now: its sealed checklist, with the lines that wait for sign-offs judged over the sign-offs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stackpkg.governance import checklist, seal, statements
from stackpkg.governance.tree import SUMS

UNSEALED = "not sealed yet: stackpkg run does it after the last stage"


def notice(folder: Path) -> str:
    """The warning that goes with demonstration keys; empty for reviewers' keys."""
    return seal.LOUD if seal.trust_for(folder)[1] else ""


def live(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The items as sealed, with their status as of now, and every problem that verification found.

    The list is sealed before anybody can sign it, so it can't say that it was signed. An item that is `signed` is
    green when all its checks passed and the run verifies, red when a check failed or somebody rejects, else amber.
    Another that is not green is `waived` while a sign-off that counts waives it. Nothing is written.
    """
    trust, _ = seal.trust_for(folder)
    problems = seal.verify(folder, trust) if (folder / SUMS).exists() else [UNSEALED]
    items = checklist.read(folder)
    waivers = {} if problems else _waivers(folder)
    for item in items:
        if item.get("signed") and item["reasons"] == [checklist.UNSIGNED]:
            rejected = any(" decided: reject" in problem for problem in problems)
            item["status"] = "red" if rejected else "amber" if problems else "green"
            item["reasons"] = problems or [notice(folder)] * bool(notice(folder))
        elif item["status"] != "green" and (waiver := waivers.get(item["id"])):
            item["status"] = "waived"
            item["reasons"] = [f"{waiver['reason']}: {waiver['signer']}, until {waiver['expires']}", *item["reasons"]]
    return items, problems


def _waivers(folder: Path) -> dict[str, dict[str, str]]:
    said = [statements.read(path, statements.SIGNOFF) for path in sorted((folder / "signoffs").glob("*.json"))]
    return {waiver["item"]: waiver for each in said for waiver in each["waivers"]}
