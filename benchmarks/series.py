"""What rows of telemetry cost: to write, to compact, to ask for the history that counts.

    python benchmarks/series.py [--json FILE] [--steps 5000] [--ranks 4]

A row has sixty numbers and the places of eight documents; in the middle a tenth of the steps is done again. Seconds are
of the processor, over all threads, so that what else runs on the machine counts little; of a row the median over blocks
of 500. The peer of compaction is a table of pandas, which wrote the Parquet before, and lost what is not finite.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import pandas as pd
import report

from stackpkg.telemetry import page, rows, store

COUNT = "SELECT count(*), sum(step)::BIGINT, max(loss) FROM effective"


def taken(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


def row(step: int) -> dict[str, Any]:
    series = {f"series_{k}": step / (k + 1) for k in range(59)} | {"loss": 9.0 - step / 1e4}
    places = {"batch_shards": ["24290d1bc8279fd6", "44aa665ca393aa20"] * 4, "batch_tokens": [128] * 8}
    return series | places | {"batch_offsets": [step * 7919 + k * 104729 for k in range(8)]}


def main() -> None:
    given = argparse.ArgumentParser()
    given.add_argument("--json", type=Path)
    given.add_argument("--steps", type=int, default=5_000)
    given.add_argument("--ranks", type=int, default=4)
    options = given.parse_args()
    told: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        run, costs, plain = Path(place) / "demo", list[float](), list[float]()
        home, again = run / "telemetry/train", range(options.steps // 2, options.steps * 6 // 10)
        for rank in range(options.ranks):
            for attempt, steps in ((1, range(1, options.steps + 1)), (2, again)):
                writer = rows.RowWriter(home, "demo", attempt, rank, options.ranks)
                for first in range(steps.start, steps.stop, 500):
                    made = [(step, row(step)) for step in range(first, min(first + 500, steps.stop))]
                    costs.append(taken(lambda: [writer.write(step, **each) for step, each in made])[0] / len(made))  # noqa: B023
                    plain.append(taken(lambda: [json.dumps(each) for _, each in made])[0] / len(made))  # noqa: B023
                writer.flush()
        lines = options.ranks * (options.steps + len(again))
        told.append(report.row("row", "written", 1e6 * statistics.median(costs), "us"))
        told.append(report.row("row", "of that, JSON alone", 1e6 * statistics.median(plain), "us"))
        size = sum(path.stat().st_size for path in home.glob("*.jsonl"))
        told.append(report.row("rows", "count", lines, "rows"))
        told.append(report.row("rows", "JSONL", size / 2**20, "MiB"))
        from_lines, history = taken(lambda: store.ask(run, "train", COUNT)[1][0])
        told.append(report.row("DuckDB over JSONL", "history that counts", from_lines, "s"))
        compacting, parquet = taken(lambda: rows.compact(home))
        told.append(report.row("DuckDB", "compaction", compacting, "s"))
        told.append(report.row("DuckDB", "Parquet", parquet.stat().st_size / 2**20, "MiB"))
        from_parquet, same = taken(lambda: store.ask(run, "train", COUNT)[1][0])
        told.append(report.row("DuckDB over Parquet", "history that counts", from_parquet, "s"))
        by_pandas, peer = taken(lambda: rows.read(home))
        told.append(report.row("pandas", "reading JSONL", by_pandas, "s"))
        writing, _ = taken(lambda: peer.to_parquet(Path(place) / "peer.parquet"))
        told.append(report.row("pandas", "reading and Parquet", by_pandas + writing, "s"))
        assert history == same and same[0] == options.ranks * options.steps, f"{history}, {same}"
        assert len(rows.effective(pd.read_parquet(parquet))) == same[0]
        looked, _ = taken(followed := page.Followed(run, "train").told)
        told.append(report.row("live page", "first look", looked, "s"))
        told.append(report.row("live page", "look, nothing new", taken(followed)[0], "s"))
    report.write(told, options.json)


if __name__ == "__main__":
    main()
