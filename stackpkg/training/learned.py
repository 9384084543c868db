"""Whether a promoted version learned from what may not be used any more.

The entry of its promotion says which job it is of, at which step, and how many decisions about the data had been taken
then. These are only ever appended to, so a job that was rolled back since, and read other data from there on, does not
hide what the version had learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stackpkg import params
from stackpkg.data.ledger import Ledger
from stackpkg.data.provenance import withdrawals_due
from stackpkg.runs import read_json
from stackpkg.training import snapshots


def overdue(run: Path, entry: Mapping[str, Any], by: int) -> str:
    """In words, a record that the version of a promotion's `entry` learned from and that may not be used at `by` (unix
    seconds): withdrawn, or past its time-to-live; empty where there is none. `run` is the run's folder.

    A version whose job has made way for another counts as if it had learned from the whole corpus.
    """
    if not (run / "data/manifest.json").exists():
        return ""
    version, job, step = entry["version"], entry.get("job", ""), entry.get("step", 0)
    try:
        if version not in snapshots.promoted(run / "checkpoints" / job).get(step, ()):
            raise ValueError("the job that it is of has made way for another")
        ledger = Ledger(run, job, entry["decided"])
    except ValueError as error:
        jobs = sorted(run.glob("checkpoints/*/job.json"))
        p = params.validate(read_json(jobs[0])["params"] if jobs else {})
        due = withdrawals_due(run / "data", p.data, by)
        told = (f"record {record} is {why}, and whether {version} learned from it is not known: {error}"
                for record, why in due.items())  # fmt: skip
        return next(told, "")
    for record, why in ledger.overdue(by).items():
        if (first := ledger.document(record)[0]["step"]) < step:
            return f"record {record} is {why}, and {version} learned from it in step {first} of the job {job}"
    return ""
