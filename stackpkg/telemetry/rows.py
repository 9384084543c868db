"""One row per step and rank, keyed (run, attempt, rank, step): append-only JSONL while training, Parquet after.

Non-finite values are kept as they are: a NaN that telemetry hides can't raise an alert. Values of each layer or head
are nested lists, in Parquet too; what an alert or an indicator reads is a number of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from stackpkg.runs import read_lines, replacing
from stackpkg.telemetry.privacy import clean, known

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
    """Appends rows of one rank, out of `ranks`, and attempt, in blocks: of `FLUSH_ROWS`, or less at a checkpoint and at
    the end. What a row says later is on the device until then, and comes from there in one copy a block.
    """

    def __init__(self, folder: Path, run: str, attempt: int, rank: int, ranks: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        path = folder / f"rank-{rank:05d}.jsonl"
        torn = path.exists() and not path.read_bytes().endswith(b"\n")
        self._stream = path.open("a", encoding="utf-8")
        if torn:  # the attempt before was killed in the middle of a line
            self._stream.write("\n")
        self._secrets = known()
        self._key = {"run": run, "attempt": attempt, "rank": rank, "ranks": ranks}
        self._held: list[tuple[dict[str, Any], Mapping[str, Tensor]]] = []
        self.complete: Callable[[list[dict[str, Any]]], None] = lambda rows: None  # adds to the rows of a block
        self.told: Callable[[list[dict[str, Any]]], None] = lambda rows: None  # hears of them when they are whole

    def write(self, step: int, later: Mapping[str, Tensor] | None = None, **series: Any) -> dict[str, Any]:
        """The row of `step`, as far as it is known now; `later` are values that stay on the device until the flush."""
        row = {**self._key, "step": step, "time": time.time(), **clean(series, self._secrets)}
        self._held.append((row, later or {}))
        if len(self._held) >= FLUSH_ROWS:
            self.settle()
        return row

    def settle(self) -> None:
        """End the block; all ranks do so at the same step, for `complete` may ask the others."""
        if self._held:
            self.complete([row for row, _ in self._held])
        self.flush()

    def flush(self) -> None:
        """Put on disk what there is, without asking anybody."""
        rows, self._held = copied(self._held), []
        self._stream.writelines(json.dumps(row) + "\n" for row in rows)
        self._stream.flush()
        self.told(rows)


def copied(held: list[tuple[dict[str, Any], Mapping[str, Tensor]]]) -> list[dict[str, Any]]:
    """Rows with their values on the device among them, all of which take one copy; numbers in lists to six decimals."""
    tensors = [value.detach().double().flatten() for _, later in held for value in later.values()]
    numbers = torch.cat([each.to(tensors[0].device) for each in tensors]).cpu().numpy() if tensors else np.empty(0)
    rows, at = [], 0
    for row, later in held:
        found = dict[str, Any]()
        for name, value in later.items():
            part = numbers[at : at + value.numel()].reshape(value.shape)
            found[name], at = (part.round(6) if value.dim() else part).tolist(), at + value.numel()
        rows.append(row | found)
    return rows


def read(folder: Path) -> pd.DataFrame:
    """All rows of all ranks and attempts below `folder`, in key order; a line torn by a crash is left out."""
    rows = [row for path in sorted(folder.glob("rank-*.jsonl")) for row in read_lines(path)]
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


def quoted(paths: Iterable[Path]) -> str:
    """A list of files in SQL."""
    return "[" + ", ".join("'" + str(path).replace("'", "''") + "'" for path in paths) + "]"


def lines(folder: Path) -> str:
    """SQL that reads the row files of a job: types by all values, no row of a torn line. Raises `FileNotFoundError`
    when there are none."""
    files = [path for path in sorted(folder.glob("rank-*.jsonl")) if path.stat().st_size]
    if not files:
        raise FileNotFoundError(f"no telemetry rows in {folder.name}/: the launch that writes them did not run")
    options = "format='newline_delimited', ignore_errors=true, union_by_name=true, sample_size=-1"
    read = f"SELECT * REPLACE (CAST(run AS VARCHAR) AS run) FROM read_json({quoted(files)}, {options})"  # noqa: S608
    return f"{read} WHERE step IS NOT NULL ORDER BY {', '.join(KEY)}"


def compact(folder: Path) -> Path:
    """Write `folder`.parquet with every row, NaN as NaN and what was not measured as null; returns its path."""
    target = folder.with_suffix(".parquet")
    with replacing(target) as temporary, duckdb.connect() as database:
        database.sql(lines(folder)).write_parquet(str(temporary), compression="zstd")
    return target
