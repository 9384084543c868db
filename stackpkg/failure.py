"""A stage that failed, in words: the notebook, the cell, the cause, and what to do next."""

from __future__ import annotations

from pathlib import Path

import nbformat

NEXT = {
    "AssertionError": "a check did not hold: the cause has its numbers, the notebook or the profile the limit",
    "FileNotFoundError": "make the file first, most often by the notebook with the lower number that writes it",
    "ModuleNotFoundError": "`stackpkg doctor` tells where the environment differs from the lock, `make env` mends it",
    "DeadKernelError": "the kernel died, most often for want of memory: `stackpkg doctor` tells how much there is; "
                       "take fewer processes or a smaller batch",
    "Stopped": "nothing has to be mended: the job has a checkpoint of its last step",
    "MemoryError": "take fewer processes or a smaller batch; `stackpkg doctor` tells what memory is there",
    "CellTimeoutError": "the cell hung: see its last output in the executed copy, and the runbook HangDiagnosis",
}  # fmt: skip
ELSE = "mend the cause; `make lab` opens the notebook to step through it"
LONGEST = 1500  # characters of a cause; the executed copy has all of it


class StageFailed(RuntimeError):
    """The message names notebook, cell, cause and next step; `__cause__` is what was raised."""


def cell(executed: Path) -> str:
    """Which code cell of an executed notebook was the last to begin, under which heading; empty when none did.

    papermill 2.7 calls the cell of a dead kernel completed, so the state of a cell is not asked.
    """
    found, number, heading, total = "", 0, "", 0
    for part in nbformat.read(executed, as_version=4).cells if executed.exists() else ():
        if "papermill-error-cell-tag" in part.metadata.get("tags", []):
            continue
        if part.cell_type == "markdown":
            lines = [line.lstrip("# ") for line in part.source.splitlines() if line.startswith("#")]
            heading = lines[-1] if lines else heading
        elif part.cell_type == "code":
            total += 1
            if part.metadata.get("papermill", {}).get("start_time"):
                number, found = (
                    total,
                    f"{heading and f' under {heading!r}'}: {(part.source.splitlines() or [''])[0][:80]}",
                )
    return f"code cell {number} of {total}{found}" if number else ""


def explain(stage: str, executed: Path, error: BaseException) -> str:
    """Four lines or more: what failed where, cause, where to look, what to do."""
    kind, said = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
    cause = f"{kind}: {said}".strip()[-LONGEST:].replace("\n", "\n         ")
    where = cell(executed)
    copy = f"outbox/{executed.parents[1].name}/nb/{executed.name}"
    seen = f"{copy}, the executed copy with the traceback" if where else "no cell ran"
    return "\n".join(
        [
            f"{stage} failed{' in ' * bool(where)}{where}",
            f"  cause  {cause}",
            f"  see    {seen}",
            f"  next   {NEXT.get(kind, ELSE)}; then the same command goes on at this stage",
        ]
    )
