"""What of a run holds a document or a whole source: records, shards, labelled sets, optimiser steps, snapshots."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stackpkg.data import manifest, provenance
from stackpkg.data.corpus import Corpus
from stackpkg.data.ledger import Ledger
from stackpkg.training import promotion, snapshots

SETS = {"pairs": ("record_id", "negative_records"), "preferences": ("record_id",), "conversations": ("record_ids",)}


def _rows(file: Path, columns: tuple[str, ...], ids: set[str]) -> int:
    """How many rows of a labelled set are made of one of the records."""
    table, hit, wanted = pq.read_table(file, columns=list(columns)), set[int](), pa.array(sorted(ids), pa.string())
    for name in columns:
        column = table[name].combine_chunks()
        lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        flat = pc.list_flatten(column) if lists else column
        rows = pc.list_parent_indices(column) if lists else pa.array(np.arange(len(column)))
        hit |= {*rows.filter(pc.is_in(flat.cast(pa.string()), wanted)).to_pylist()}
    return len(hit)


def _job(run: Path, name: str, ids: set[str]) -> dict[str, Any]:
    home = run / "checkpoints" / name
    try:
        read = Ledger(run, name).document(*ids)
    except ValueError as error:
        return {"unknown": str(error)}
    steps = sorted({row["step"] for row in read})
    told: dict[str, Any] = {"steps": steps, "uses": dict(Counter(row["use"] for row in read)), "snapshots": []}
    return told | (snapshots.reach(home, steps[0]) if steps else {})


def holders(run: Path, document: str) -> dict[str, Any]:
    """Everything of a run that holds the records that `document` names (`provenance.named`), ready for JSON.
    A job whose data is another now says so as `unknown`; `versions_unknown` were promoted from jobs that moved away.

    Raises `ValueError` where the corpus has no such record.
    """
    data = run / "data"
    records = provenance.named(data, document)
    corpus, ids = Corpus(data), {*records}
    mine = np.flatnonzero(corpus.find(sorted(ids)) >= 0)
    shards = Counter(corpus.names[corpus.shard[d]] for d in mine.tolist())
    files = [f.name for f in manifest.records(data)
             if not ids.isdisjoint(pq.read_table(f, columns=["record_id"])["record_id"].to_pylist())]  # fmt: skip
    sets = {name: _rows(data / f"{name}.parquet", columns, ids) for name, columns in SETS.items()
            if (data / f"{name}.parquet").exists()}  # fmt: skip
    gone = provenance.withdrawals(data / "withdrawn.jsonl")
    jobs = sorted(path.parent.name for path in run.glob("checkpoints/*/job.json"))
    versions = {path.name for path in run.glob("artifacts/*")} & promotion.promotions(run / "artifacts").keys()
    for name in jobs:
        versions.difference_update(*snapshots.promoted(run / "checkpoints" / name).values())
    return {
        "records": records, "withdrawn": sorted(ids & gone.keys()), "record_files": files,
        "shards": dict(sorted(shards.items())), "sets": sets, "jobs": {name: _job(run, name, ids) for name in jobs},
        "versions_unknown": sorted(versions),
    }  # fmt: skip


def spans(steps: list[int]) -> str:
    """Numbers in order as text: 0-3, 7."""
    groups = (list(group) for _, group in groupby(enumerate(steps), lambda pair: pair[1] - pair[0]))
    ends = ((group[0][1], group[-1][1]) for group in groups)
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in ends) or "none"


def lines(told: dict[str, Any]) -> list[str]:
    """What `holders` found, for a reader."""
    made = [f"records: {len(told['records'])}, withdrawn {len(told['withdrawn'])}"]
    made += [f"  {name}  {where}" for name, where in [*told["records"].items()][:10]]
    made += ["  ..."] * (len(told["records"]) > 10)
    made.append(f"record files: {', '.join(told['record_files'])}")
    made += [f"shard {name}: {count} documents" for name, count in told["shards"].items()]
    made += [f"{name}: {count} rows" for name, count in told["sets"].items()]
    for name, job in told["jobs"].items():
        if "unknown" in job:
            made.append(f"job {name}: not known. {job['unknown']}")
            continue
        made.append(f"job {name}: steps {spans(job['steps'])}; snapshots {', '.join(job['snapshots']) or 'none'}")
        if job["steps"]:
            made.append(f"  newest checkpoint without it: {job['newest_without'] or 'none'}")
    made += [f"version {name}: not known, its job is another now; take it for one that holds it"
             for name in told["versions_unknown"]]  # fmt: skip
    return made
