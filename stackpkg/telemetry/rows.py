"""One row per step and rank, keyed (run, attempt, rank, step): append-only JSONL while training, Parquet after.

Non-finite values are kept as they are: a NaN that telemetry hides can't raise an alert.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa

from stackpkg.runs import replacing
from stackpkg.telemetry.privacy import clean

KEY = ["run", "attempt", "rank", "step"]
FLUSH_ROWS = 8
# The history that counts, of a table `rows`: of each step the rows of the latest attempt; of a row that an attempt
# wrote twice, the later.
EFFECTIVE = """
SELECT * FROM rows
QUALIFY attempt = max(attempt) OVER (PARTITION BY run, step)
    AND row_number() OVER (PARTITION BY run, attempt, rank, step ORDER BY time DESC) = 1
"""


class RowWriter:
    """Appends rows of one rank, out of `ranks`, and attempt; flushed in blocks, at every checkpoint and at the end."""

    def __init__(self, folder: Path, run: str, attempt: int, rank: int, ranks: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{rank:05d}.jsonl"
        torn = path.exists() and not path.read_bytes().endswith(b"\n")
        self._stream = path.open("a", encoding="utf-8")
        if torn:  # the attempt before was killed in the middle of a line
            self._stream.write("\n")
        self._key = {"run": run, "attempt": attempt, "rank": rank, "ranks": ranks}
        self._pending = 0

    def write(self, step: int, **series: Any) -> dict[str, Any]:
        row = {**self._key, "step": step, "time": time.time(), **clean(series)}
        self._stream.write(json.dumps(row) + "\n")
        self._pending += 1
        if self._pending >= FLUSH_ROWS:
            self.flush()
        return row

    def flush(self) -> None:
        self._stream.flush()
        self._pending = 0


def read(folder: Path) -> pd.DataFrame:
    """All rows of all ranks and attempts below `folder`, in key order; a line torn by a crash is left out."""
    rows = []
    for path in sorted(folder.glob("rank-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    if not rows:
        raise FileNotFoundError(f"no telemetry rows in {folder.name}/: the launch that writes them did not run")
    return pd.DataFrame(rows).sort_values(KEY, ignore_index=True)


def effective(rows: pd.DataFrame) -> pd.DataFrame:
    """The history that counts (`EFFECTIVE`), in key order."""
    keys = pa.Table.from_pandas(rows[[*KEY, "time"]], preserve_index=False)
    with duckdb.connect() as database:
        database.register("rows", keys.append_column("place", pa.array(np.arange(len(rows)))))
        found = database.sql(f"SELECT place FROM ({EFFECTIVE}) ORDER BY {', '.join(KEY)}")  # noqa: S608  constants
        places = found.fetchnumpy()["place"]
    return rows.iloc[places].reset_index(drop=True)


def missing(rows: pd.DataFrame, steps: int) -> int:
    """How many (rank, step) of the effective history have no row; 0 when telemetry is complete. A step has as many
    ranks as the attempt that made it; one without any row, as many as there ever were."""
    found = effective(rows)
    ranks, have = found.groupby("step")["ranks"].max(), found.groupby("step")["rank"].nunique()
    return sum(int(ranks.get(step, rows["ranks"].max())) - int(have.get(step, 0)) for step in range(1, steps + 1))


def lines(folder: Path) -> str:
    """SQL that reads the row files of a job: types by all values, no row of a torn line. Raises `FileNotFoundError`
    when there are none."""
    files = [str(path) for path in sorted(folder.glob("rank-*.jsonl")) if path.stat().st_size]
    if not files:
        raise FileNotFoundError(f"no telemetry rows in {folder.name}/: the launch that writes them did not run")
    options = "format='newline_delimited', ignore_errors=true, union_by_name=true, sample_size=-1"
    listed = ", ".join("'" + name.replace("'", "''") + "'" for name in files)
    read = f"SELECT * REPLACE (CAST(run AS VARCHAR) AS run) FROM read_json([{listed}], {options})"  # noqa: S608
    return f"{read} WHERE step IS NOT NULL ORDER BY {', '.join(KEY)}"


def compact(folder: Path) -> Path:
    """Write `folder`.parquet with every row, NaN as NaN and what was not measured as null; returns its path."""
    target = folder.with_suffix(".parquet")
    with replacing(target) as temporary, duckdb.connect() as database:
        database.sql(lines(folder)).write_parquet(str(temporary), compression="zstd")
    return target
