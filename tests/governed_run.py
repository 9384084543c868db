"""A run that is small and has everything the governance of it reads; names in it are hostile."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stackpkg import params, runs
from stackpkg.data import items, manifest, records
from stackpkg.data.items import Item

ROOT = Path(__file__).parents[1]
TEXT = [
    "Write to jane.roe@contoso.com or call (718) 575-1816, never to user@example.com.",
    "Listen on 192.168.1.3 and ask 8.8.8.8; every second one is a[::2].",
    "Nothing of anybody stands in here.",
]
HOSTILE = 'jsonl:a.jsonl#<script>alert(1)</script> | [x](javascript:y) `c` $x$ "q"'


def home(tmp_path: Path) -> Path:
    """A repository with the templates, the crosswalk and a file of three rows to read."""
    shutil.copytree(ROOT / "governance", tmp_path / "governance")
    return tmp_path


def run_in(place: Path, licence: str = "MIT", third: str = HOSTILE) -> tuple[runs.RunFolder, params.Params]:
    """The run and its profile; the first two records are as the scrubber would have left them."""
    p = params.validate({"run": "demo", "data": {"sources": [{"kind": "jsonl", "path": str(place / "a.jsonl")}]},
                         "governance": {"demonstration_keys": True}})  # fmt: skip
    folder = runs.RunFolder.__new__(runs.RunFolder)
    folder.name, folder.path = "demo", place / "outbox/demo"
    names = ["jsonl:a.jsonl#id=1", "jsonl:a.jsonl#id=2", third]
    given = [
        {"id": str(n + 1), "text": text, "licence": licence, "domain": "code", "timestamp": 1_790_000_000}
        for n, text in enumerate(TEXT)
    ]
    lines = (json.dumps(row) + "\n" for row in given)
    runs.write_text(place / "a.jsonl", "".join(lines))
    rows = [
        items.record(Item(name, text, "code", {"licence": licence, "timestamp": 1_790_000_000}))
        for name, text in zip(names, TEXT, strict=True)
    ]
    rows[0]["text"] = TEXT[0].replace("jane.roe@contoso.com", "<email>")
    for number, group in enumerate((rows[:2], rows[2:])):
        part = records.table(group).append_column("language", pa.array(["en", None][: len(group)]))
        pq.write_table(
            part.append_column("trust", pa.array([0.9, 0.7][: len(group)])),
            folder / f"data/records/{number:05d}.parquet",
        )
    binary = folder / "data/shards/0123456789abcdef.bin"
    binary.write_bytes(b"tokens")
    shard = {"name": "0123456789abcdef", "sha256": runs.digest(binary), "tokens": 9}
    told: dict[str, Any] = {"format": manifest.FORMAT, "vocab_size": 1024, "tokens": {"train": {"code": 9}}}
    told |= {"mixture": {"code": 1.0}, "shards": [shard]}
    manifest.commit(folder / "data", told | {"records": [{"name": f"{n:05d}"} for n in range(2)]})
    audit = [
        {"record_id": f"{n:016x}", "source": name, "filter": why, "value": 1.0, "threshold": 0.0, "decision": decision}
        for n, (name, why, decision) in enumerate(
            [(names[0], "personal_email", "mask"), ("jsonl:a.jsonl#7", "min_words", "drop"),
             (HOSTILE, f"unreadable: {HOSTILE}", "drop")]
        )
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(audit, records.AUDIT), folder / "data/audit.parquet")
    trusted = pa.table({"trust": [0.9, 0.7, 0.4], "record_id": [r["record_id"] for r in rows]})
    pq.write_table(trusted, folder / "data/trust.parquet")
    tasks = pa.table({"task_id": ["t"], "reach": [3], "subjects": [[1, 2]]})
    pq.write_table(tasks, folder / "data/long_range.parquet")
    runs.write_json(folder / "evidence/40_evaluate.json", {"precision_at_k": 0.25})
    lock = {"state": "ok", "started": "2026-11-29T08:00:00+00:00", "seconds": 3.5, "outputs": {"data/records": ""}}
    runs.write_json(folder / "lock/10_curate_corpus.json", lock | {"key": {"evidence/40_evaluate.json": ""}})
    runs.write_text(folder / "nb/10_curate_corpus.ipynb", "{}")
    return folder, p
