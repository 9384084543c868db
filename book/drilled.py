"""When each runbook was last drilled, from the receipts of a run and the table of the fault drills: never typed."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from myst import code, div, table, text

from stackpkg import runs
from stackpkg.telemetry import logbook

FRESH = 90  # days after which a drill has to be done again; book.js holds the same number
# fault drill (`stackpkg/training/drills.py`) -> the pages that it is a drill of
FAULTS = {
    "kill_rank": ("FailureRecovery", "FailureRecoveryProcess"), "kill_job": ("FailureRecoveryJob", "TrainTargetAbsent"),
    "fewer_ranks": ("FailureRecoveryNode",), "kill_all": ("ResumeSelfTest",), "hang": ("HangDiagnosis", "TrainStalled"),
    "preempted": ("KillSwitch",), "poison": ("SpikeRollback",), "nan_parameter": ("TrainRolledBack",),
    "nan_gradient": ("TrainNonFinite",), "burst": ("TrainSkippedUpdates",), "spike": ("TrainGradSpike",),
    "slow_rank": ("SlowRank",), "disk_full": ("DiskWillFill",),
}  # fmt: skip


HOW = (
    "Commands are typed in the repository, with its environment\\. `RUN` is the run that the alert names; what else is "
    "set before a command, such as `STEP`, is yours to fill in\\."
)


class Receipt(NamedTuple):
    """A drill of a page: when, in which run, seconds to detect and to recover where they were measured, the file."""

    at: datetime
    run: str
    detect: float | None
    recover: float | None
    file: str


def _read(folder: Path, name: str) -> dict[str, Any]:
    return runs.read_json(folder / name) if (folder / name).exists() else {}


def receipts(folder: Path, faults: dict[str, Any]) -> dict[str, list[Receipt]]:
    """Page -> its drills, the newest first: of the run in `folder`, and of the table in faults.json."""
    found: dict[str, list[Receipt]] = {}

    def add(page: str, at: str, run: str, file: str, detect: Any = None, recover: Any = None) -> None:
        seconds = (None if value is None else max(0.0, float(value)) for value in (detect, recover))
        found.setdefault(page, []).append(Receipt(datetime.fromisoformat(at), run, *seconds, file))

    told, guard = (_read(folder, f"telemetry/{name}.json") for name in ("receipts", "drill"))
    for letter in told.get("letters", []):
        add(letter["alert"], told["at"], folder.name, "telemetry/receipts.json", letter["delay_seconds"])
    for receipt in (each for each in guard.get("receipts", []) if each["fired"]):
        add(receipt["alert"], guard["at"], folder.name, "telemetry/drill.json")
    for receipt in _read(folder, "telemetry/faults.json").get("receipts", []):
        add(receipt["page"], receipt["at"], folder.name, "telemetry/faults.json", None, receipt["recover_seconds"])
    for receipt in _read(folder, "runbooks/drills.json").get("receipts", []):
        seconds = receipt["detect_seconds"], receipt["recover_seconds"]
        add(receipt["page"], receipt["at"], folder.name, "runbooks/drills.json", *seconds)
    shard = _read(folder, "data/shard_drill.json")
    for page in shard.get("pages", []):
        seconds = shard["detect_seconds"], shard["recover_seconds"]
        add(page, shard["at"], folder.name, "data/shard_drill.json", *seconds)
    withdrawn = _read(folder, "data/drills.json")
    if withdrawn.get("withdrawn") and "at" in withdrawn:
        add("DataWithdrawal", withdrawn["at"], folder.name, "data/drills.json")
    for row in faults["rows"]:
        for page in FAULTS.get(row["drill"], ()):
            add(page, faults["at"], "fault drills", "book/faults.json", None, row["seconds"])
    measured = {page: sorted(each, key=lambda one: (one.at, one[2:4] != (None, None))) for page, each in found.items()}
    return {page: each[::-1] for page, each in measured.items()}


def _parts(drills: list[Receipt]) -> list[Receipt]:
    """The newest that tells how long it took to detect, and the newest that tells how long to recover."""
    best = [next((one for one in drills if one[field] is not None), None) for field in (2, 3)]
    return list(dict.fromkeys(filter(None, best))) or drills[:1]


def _took(one: Receipt) -> str:
    words = [f"{verb} after {value:.1f} s" for verb, value in (("detected", one.detect), ("recovered", one.recover))
             if value is not None]  # fmt: skip
    return ", ".join(words) or "seen at work, not timed"


def _stamp(one: Receipt, now: datetime) -> str:
    old = (now - one.at).days > FRESH
    late = f" (more than {FRESH} days ago: drill it again)" if old else ""
    return f"{{span .badge .{'amber' if old else 'ok'}}}`{one.at:%Y-%m-%d}`{late}"


def line(drills: list[Receipt], now: datetime) -> str:
    """What stands on top of a page: loud where there was never a drill, yellow where the last is old."""
    if not drills:
        return div("drilled never", "**Never drilled.** Nobody has seen this page work: try it before you need it\\.")
    told = [
        f"{_stamp(one, now)} {text(_took(one))} \\({text(one.run)}, {code(one.file)}\\)\\." for one in _parts(drills)
    ]
    return div("drilled", "Last drill: " + " ".join(told))


def stamp(pages: Path, found: dict[str, list[Receipt]], now: datetime) -> None:
    """Put the line into every staged page, below its promise."""
    for page in sorted(pages.glob("*.md")):
        parts = page.read_text(encoding="utf-8").split("\n\n", 2)
        runs.write_text(page, "\n\n".join([*parts[:2], line(found.get(page.stem, []), now), HOW, *parts[2:]]))


def overview(pages: Path, found: dict[str, list[Receipt]], now: datetime) -> str:
    """All pages, those that were never drilled first."""
    rows = []
    for page in sorted(pages.glob("*.md"), key=lambda page: (page.stem in found, page.stem)):
        parts = _parts(found[page.stem]) if page.stem in found else []
        told = [f"{_stamp(one, now)} {text(_took(one))}" for one in parts]
        runs_of = ", ".join(dict.fromkeys(one.run for one in parts))
        rows.append([f"[](runbooks/{page.name})", " ".join(told) or "{span .badge .red}`never`", text(runs_of)])
    return div("drilled", table("page | last drill | run", rows))


def entries(folder: Path, pages: Path) -> str:
    """The logbook of the run: what alerts and people wrote, shown literally, with a link to each alert's page."""
    path = folder / logbook.FILE
    if not path.exists():
        return "No alert of this run was an incident, and nobody has added a note: there is no `logbook.md`\\.\n"
    shown = []
    for raw in path.read_text(encoding="utf-8").splitlines():
        if raw.startswith("## "):
            name = raw.split()[2] if len(raw.split()) > 2 else ""
            page = f" [page](runbooks/{name}.md)" if (pages / f"{name}.md").is_file() else ""
            shown += [f"\n## {text(raw[3:])}\n", *([f"{page.strip()}\n"] if page else [])]
        elif raw.strip() and not raw.startswith("# "):
            shown.append(f"- {text(raw[2:])}" if raw.startswith("- ") else f"{text(raw)}\n")
    return "\n".join(shown) + "\n"


def false_alarms(folder: Path) -> str:
    """What the guard said to the jobs of the run that went well, from the evidence of notebook 51."""
    found = _read(folder, "evidence/51_drill_alerts.json")
    if "clean_jobs" not in found:
        return "Not measured in this run\\.\n"

    def told(alarms: dict[str, int]) -> str:
        return text(", ".join(f"{name} ({count})" for name, count in alarms.items()) or "none")

    rows = [[code(job["job"]), text(f"{job['steps']}"), told(job["alarms"]), told(job["earned"])]
            for job in found["clean_jobs"]]  # fmt: skip
    rate = f"{found['clean_alarms']} false alarms in {found['clean_steps']} steps: {found['false_alarm_rate']:.3g} per "
    rate += f"1,000 steps, with 95 % confidence at most {found['false_alarm_rate_at_most']:.3g} (exact Poisson limit)."
    return text(rate) + "\n\n" + table("job | steps | false alarms | missed targets", rows)


def now() -> datetime:
    return datetime.now(UTC)
