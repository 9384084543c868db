"""Telemetry rows: nothing is lost or smoothed over, whatever a crash leaves behind."""

import json
import math
import tempfile
from pathlib import Path

import duckdb
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackpkg.telemetry import rows
from stackpkg.telemetry.rows import RowWriter


def write(folder: Path, attempt: int, rank: int, steps: range, ranks: int = 1, **series: float) -> RowWriter:
    writer = RowWriter(folder, "demo", attempt, rank, ranks)
    for step in steps:
        writer.write(step, loss=10.0 * attempt + step / 10, **series)
    writer.flush()
    return writer


def test_nan_and_infinity_survive_to_parquet(tmp_path: Path) -> None:
    writer = RowWriter(tmp_path / "job", "demo", 1, 0, 1)
    for step, loss in enumerate([1.5, math.nan, math.inf, -math.inf], start=1):
        row = writer.write(step, loss=loss, nonfinite=int(not math.isfinite(loss)))
        assert (row["run"], row["attempt"], row["rank"], row["step"]) == ("demo", 1, 0, step)
    writer.flush()
    path = rows.compact(tmp_path / "job")
    assert path == tmp_path / "job.parquet"
    table = pd.read_parquet(path)
    losses = table.loss.tolist()
    assert losses[0] == 1.5 and math.isnan(losses[1]) and losses[2:] == [math.inf, -math.inf]
    assert table.nonfinite.tolist() == [0, 1, 1, 1]  # a count, so that a NaN differs from a value never measured
    assert table.time.is_monotonic_increasing and not table.time.isna().any()


def test_what_is_no_number_is_told_from_what_was_not_measured(tmp_path: Path) -> None:
    writer = RowWriter(tmp_path / "2026-11-29", "2026-11-29", 1, 0, 1)  # a name that looks like a date
    series = [{"late": math.nan, "kinds": [[1, math.nan], [math.inf]]}, {"late": None}, {}, {"late": 2, "more": "1e5"}]
    for step, values in enumerate(series, start=1):
        writer.write(step, **values)
    writer.flush()
    found = duckdb.read_parquet(str(rows.compact(tmp_path / "2026-11-29")))
    assert found.project("run, isnan(late), late IS NULL, more").fetchall() == [
        ("2026-11-29", True, False, None), ("2026-11-29", None, True, None), ("2026-11-29", None, True, None),
        ("2026-11-29", False, False, "1e5"),
    ]  # fmt: skip
    (first, nan), (infinite,) = found.project("kinds").fetchall()[0][0]
    assert first == 1 and math.isnan(nan) and infinite == math.inf


finite = st.floats(allow_nan=False)


@given(st.lists(st.one_of(st.none(), st.floats(width=64), st.just(math.nan), st.just(-math.inf)), min_size=1), finite)
def test_every_number_comes_back_from_both_forms(values: list[float | None], other: float) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "job"
        writer = RowWriter(folder, "demo", 1, 0, 1)
        for step, value in enumerate(values, start=1):
            writer.write(step, value=value, other=other)
        writer.flush()
        lines = [json.loads(line)["value"] for line in (folder / "rank-00000.jsonl").read_text().splitlines()]
        table = duckdb.read_parquet(str(rows.compact(folder))).project("CAST(value AS DOUBLE), other").fetchall()
    for given_, line, (stored, beside) in zip(values, lines, table, strict=True):
        assert repr(given_) == repr(line) and beside == other
        assert repr(given_) == repr(stored)


def test_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    write(tmp_path, 1, 0, range(1, 5))
    path = tmp_path / "rank-00000.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])  # killed in the middle of the row of step 4
    write(tmp_path, 2, 0, range(4, 7))
    table = rows.read(tmp_path)
    assert list(zip(table.attempt, table.step, strict=True)) == [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (2, 6)]
    assert rows.missing(table, 6) == 0
    assert len(pd.read_parquet(rows.compact(tmp_path))) == 6
    path.write_bytes(path.read_bytes()[:-30])  # and the last line of a file that nobody wrote to again
    assert len(rows.read(tmp_path)) == len(pd.read_parquet(rows.compact(tmp_path))) == 5
    write(tmp_path, 3, 0, range(6, 7))
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 6


def test_a_whole_last_line_gets_no_empty_line_after_it(tmp_path: Path) -> None:
    write(tmp_path, 1, 0, range(1, 3))
    write(tmp_path, 2, 0, range(3, 5))
    assert (tmp_path / "rank-00000.jsonl").read_text().count("\n") == 4


def test_rows_reach_the_disk_in_blocks(tmp_path: Path) -> None:
    writer = RowWriter(tmp_path, "demo", 1, 0, 1)
    seen = []
    for step in range(1, 2 * rows.FLUSH_ROWS + 2):
        writer.write(step)
        seen.append((tmp_path / "rank-00000.jsonl").read_text().count("\n"))
    assert seen[rows.FLUSH_ROWS - 1] == rows.FLUSH_ROWS and seen[-1] == 2 * rows.FLUSH_ROWS
    writer.flush()
    assert len(rows.read(tmp_path)) == 2 * rows.FLUSH_ROWS + 1


def test_the_history_that_counts_takes_the_latest_attempt(tmp_path: Path) -> None:
    for rank in (0, 1):
        write(tmp_path, 1, rank, range(1, 6))
        write(tmp_path, 2, rank, range(4, 9))  # resumed from the checkpoint of step 3
    table = rows.read(tmp_path)
    assert len(table) == 20  # what was repeated is kept
    effective = rows.effective(table)
    for rank in (0, 1):
        mine = effective[effective["rank"] == rank]
        assert mine.step.tolist() == list(range(1, 9))
        assert mine.attempt.tolist() == [1, 1, 1, 2, 2, 2, 2, 2]
    assert rows.effective(table.sample(frac=1, random_state=1)).equals(effective)


def test_missing_counts_every_gap(tmp_path: Path) -> None:
    write(tmp_path, 1, 0, range(1, 7), ranks=3)
    write(tmp_path, 1, 1, range(1, 4), ranks=3)
    table = rows.read(tmp_path)
    assert rows.missing(table, 6) == 9  # rank 1 lacks steps 4 to 6, and rank 2 never wrote
    assert rows.missing(table, 3) == 3
    assert rows.missing(table[table.step != 2], 3) == 5
    assert rows.missing(table, 7) == 12  # of a step that nobody wrote, as many as there ever were


def test_a_job_that_goes_on_with_other_ranks_lacks_nothing(tmp_path: Path) -> None:
    for attempt, ranks, steps in ((1, 2, range(1, 6)), (2, 1, range(4, 8)), (3, 4, range(7, 10))):
        for rank in range(ranks):
            write(tmp_path, attempt, rank, steps, ranks=ranks)
    table = rows.read(tmp_path)
    assert rows.missing(table, 9) == 0
    kept = rows.effective(table)
    assert kept.groupby("step")["rank"].nunique().tolist() == [2, 2, 2, 1, 1, 1, 4, 4, 4]
    assert kept.groupby("step").attempt.nunique().eq(1).all(), "a step is of one attempt"


def test_no_rows_are_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    with pytest.raises(FileNotFoundError, match="no telemetry rows in job/"):
        rows.read(tmp_path / "job")
    (tmp_path / "job/rank-00000.jsonl").touch()
    with pytest.raises(FileNotFoundError, match="no telemetry rows in job/"):
        rows.compact(tmp_path / "job")
    assert not (tmp_path / "job.parquet").exists()
