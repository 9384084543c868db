"""What a run tells, as tables to ask in SQL (DuckDB), read where they lie and never written."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from stackpkg.data import manifest
from stackpkg.runs import read_json, read_lines
from stackpkg.telemetry import privacy, rows

# table -> what it holds; a run has those that its files can fill
TABLES = {
    "rows": "every row: a step of a rank in an attempt",
    "effective": "of each step the rows of the latest attempt",
    "batches": "of every row where the text of its batch lies: shard, first_token in it, tokens",
    "events": "what befell the job: kind, happened, step, attempt, said (JSON)",
    "evaluations": "the report of each epoch",
    "documents": "the corpus: record_id, source, domain, split, shard, first_token, tokens",
}
BATCHES = """SELECT run, attempt, rank, step, unnest(batch_shards) AS shard, unnest(batch_offsets) AS first_token,
    unnest(batch_tokens) AS tokens FROM rows"""
EVENT = pa.schema([("kind", pa.string()), ("happened", pa.string()), ("step", pa.int64()), ("attempt", pa.int64()),
                   ("said", pa.string())])  # fmt: skip


def events(run: Path, job: str) -> list[dict[str, Any]]:
    """Attempts, rungs of the ladder, decisions about the data, alerts, thinned probes and checkpoints, by step. Steps
    are those of the rows, from 1; a decision holds from the one after its step."""
    home, found = run / "checkpoints" / job, list[dict[str, Any]]()
    begun = read_json(home / "attempts.json") if (home / "attempts.json").exists() else []
    for number, attempt in enumerate(begun, 1):
        came = attempt.get("resumed_from")
        step = int(came.rpartition("-")[2]) if came else 0
        found.append({key: value for key, value in attempt.items() if key != "record"}
                     | {"kind": "attempt", "attempt": number, "step": step})  # fmt: skip
    found += [{"kind": "rung", "step": rung["last"]} | rung for rung in read_lines(home / "ladder.jsonl")]
    found += [each | {"kind": "decision", "what": each["kind"]} for each in read_lines(home / "decisions.jsonl")]
    found += [{"kind": "alert"} | each for each in read_lines(run / f"telemetry/{job}.alerts.jsonl")]
    found += [{"kind": each.pop("event")} | each for each in read_lines(run / f"telemetry/{job}.events.jsonl")]
    for path in home.glob("checkpoint-*/complete.json"):
        at = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
        found.append({"kind": "checkpoint", "step": int(path.parent.name.rpartition("-")[2]), "happened": at})
    return [_event(each) for each in sorted(found, key=lambda each: each["step"])]


def _event(each: dict[str, Any]) -> dict[str, Any]:
    each["happened"] = each.pop("at", each.get("happened"))  # `at` is a word of SQL
    rest = {key: value for key, value in each.items() if key not in EVENT.names}
    return {name: each.get(name) for name in EVENT.names[:-1]} | {"said": json.dumps(privacy.clean(rest))}


def _documents(run: Path) -> pa.Table:
    """The index of the corpus with the names of its sources: hashed, as those of the records, where the run's profile
    asks for it."""
    data = run / "data"
    head = manifest.read(data)
    index = pa.ipc.open_file(str(manifest.index(data, head))).read_all()
    parts = [pq.read_table(path, columns=["record_id", "source"]) for path in manifest.records(data)]
    names = {name: source for part in parts for name, source in zip(*part.to_pydict().values(), strict=True)}
    columns = {name: index[name].to_pylist() for name in ("record_id", "domain", "split", "shard", "offset", "tokens")}
    columns["source"] = [names.get(record, "") for record in columns["record_id"]]
    if asked(run):
        for name in ("record_id", "source"):
            told = {value: privacy.hashed(value, run) for value in {*columns[name]}}
            columns[name] = [told[value] for value in columns[name]]
    columns["first_token"] = columns.pop("offset")
    return pa.table(columns)


def asked(run: Path) -> bool:
    """Whether a run's profile asks for the names of sources to be hashed, as its jobs say."""
    jobs = [read_json(path) for path in run.glob("checkpoints/*/job.json")]
    return any(job.get("params", {}).get("telemetry", {}).get("hash_sources") for job in jobs)


def connect(run: Path, job: str, sql: str = "") -> duckdb.DuckDBPyConnection:
    """A database in memory with views of the files of a job; it can reach these files and nothing else. `documents` is
    there when `sql` speaks of it. Raises `FileNotFoundError` when the job wrote no rows."""
    home, reports = run / "telemetry" / job, sorted((run / "eval" / job).glob("epoch_*.json"))
    lines, compacted = sorted(home.glob("rank-*.jsonl")), home.with_suffix(".parquet")
    fresh = compacted.exists() and all(path.stat().st_mtime <= compacted.stat().st_mtime for path in lines)
    source = f"SELECT * FROM read_parquet({rows.quoted([compacted])})" if fresh else rows.lines(home)  # noqa: S608
    database = duckdb.connect(config={"autoinstall_known_extensions": False, "autoload_known_extensions": False})
    database.register("events", pa.Table.from_pylist(events(run, job), EVENT))
    if "documents" in sql.lower() and (run / "data/manifest.json").exists():
        database.register("documents", _documents(run))
    views = {"rows": source, "effective": rows.EFFECTIVE}
    if reports:
        views["evaluations"] = f"SELECT * FROM read_json({rows.quoted(reports)}, union_by_name=true)"  # noqa: S608
    for name, text in views.items():
        database.execute(f"CREATE VIEW {name} AS {text}")
    if "batch_shards" in database.sql("SELECT * FROM rows LIMIT 0").columns:  # of a job that was launched since
        database.execute(f"CREATE VIEW batches AS {BATCHES}")
    database.execute(f"SET allowed_paths = {rows.quoted([*lines, compacted, *reports])}")
    database.execute("SET enable_external_access = false")
    database.execute("SET lock_configuration = true")
    return database


def ask(run: Path, job: str, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """(columns, rows) of one SELECT. Raises `ValueError` for anything else, and for what DuckDB does not understand,
    with the tables there are."""
    with connect(run, job, sql) as database:
        try:
            statements = database.extract_statements(sql)
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise ValueError("give one SELECT: nothing can be written here, and one question is asked at a time")
            found = database.sql(sql)
            return list(found.columns), found.fetchall()
        except duckdb.Error as error:
            names = {row[0] for row in database.sql("SHOW TABLES").fetchall()} | {"documents"}
            there = "\n".join(f"  {name:<12} {TABLES[name]}" for name in TABLES if name in names)
            raise ValueError(f"{str(error).strip()}\ntables (DESCRIBE tells their columns):\n{there}") from None
