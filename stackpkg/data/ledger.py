"""From a step to its documents and back, from disk alone: the stream is a pure function, and so is its inverse."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stackpkg import params, runs
from stackpkg.data import curriculum, manifest
from stackpkg.data.provenance import withdrawals_due
from stackpkg.data.schedule import NEVER
from stackpkg.data.stream import RATES, Stream


class Ledger:
    """What a training job of a run read. Holds for any number of ranks and after any resume: these change nothing.

    `run` is the run's folder, `name` its job; with `decided`, as it was when no more than so many decisions about its
    data had been taken. Raises `ValueError` when the shards are no longer those of the job.
    """

    def __init__(self, run: Path, name: str, decided: int | None = None) -> None:
        home = run / "checkpoints" / name
        if not (home / "job.json").exists():
            jobs = sorted(path.parent.name for path in run.glob("checkpoints/*/job.json"))
            raise ValueError(f"{run.name} has no training job {name!r}; it has {jobs or 'none: run notebook 31'}")
        job = runs.read_json(home / "job.json")
        for file, sha in job["data"].items():
            if runs.digest(run / "data" / file) != sha:
                raise ValueError(f"{name} was trained on {file} {sha[:16]}, this is another: roll back to it first")
        self.steps, self.p = int(job["steps"]), params.validate(job["params"])
        self.stream = Stream(run / "data", self.p, curriculum.decisions(home / "decisions.jsonl")[:decided])

    def step(self, step: int) -> list[dict[str, Any]]:
        """What was in optimiser step `step` (from 0): a dict for each document, filler, task and labelled item."""
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} is outside 0..{self.steps - 1}, the optimiser steps of this job")
        plan, found = self.stream.plan, list[dict[str, Any]]()
        for i in plan.rows_at(plan.position(step)):
            found += [{"row": i, **item} for item in self._row(i)]
        return found

    def _row(self, i: int) -> Iterator[dict[str, Any]]:
        stream, row = self.stream, self.stream.plan[i]
        text = row.lane < len(stream.domains)
        for d, begin, count in stream.schedule.pieces(i):
            read = "text" if text else "filler"
            gone = stream.schedule.withdrawn.get(str(stream.corpus.records[d]), NEVER) <= i
            about = {"record_id": str(stream.corpus.records[d]), "domain": str(stream.corpus.domain[d])}
            yield about | {"use": "withdrawn" if gone else read, "begin": begin, "tokens": count}
        if not text:
            task = stream.task("train", row.before + row.ordinal)
            yield {
                "record_id": task["task_id"],
                "domain": "long_range",
                "use": "task",
                "begin": 0,
                "tokens": row.context,
            }
        for name in stream.labelled:
            if stream.carries(i, RATES[name]):
                for k, record in enumerate(stream.origins[name][stream.ridden(name, i)]):
                    yield {
                        "record_id": record,
                        "use": "negative" if k and name == "pairs" else name,
                        "begin": 0,
                        "tokens": 0,
                    }

    def document(self, *records: str) -> list[dict[str, Any]]:
        """The optimiser steps that read any of `records`, in order: {"step", "use"}. As text by the inverse of the
        schedule, as filler, pair, preference or conversation by looking at every row that carries one.
        """
        stream, found, sought = self.stream, set[tuple[int, str]](), set(records)
        documents = set(np.flatnonzero(stream.corpus.find(records) >= 0).tolist())
        gone = {d: int(stream.schedule.gone[d]) for d in documents}
        rows = [(i, "text", gone[d]) for d in documents for i in stream.schedule.rows_of(d)]
        far = len(stream.domains)
        for stage, lanes in enumerate(stream.plan.counts):
            for ordinal in range(int(lanes[far])):
                i = stream.plan.row_number(stage, far, ordinal)
                rows += [(i, "filler", gone[d]) for d, *_ in stream.schedule.pieces(i) if d in documents]
        for name in stream.labelled:
            if any(sought & {*origins} for origins in stream.origins[name]):
                for i in (i for i in range(len(stream.plan)) if stream.carries(i, RATES[name])):
                    for k, record in enumerate(stream.origins[name][stream.ridden(name, i)]):
                        use = "negative" if k and name == "pairs" else name
                        rows += [(i, use, stream.schedule.withdrawn.get(record, NEVER))] * (record in sought)
        for i, use, last in rows:
            step = stream.plan.step_at(stream.plan.position_of(i))
            if step is not None and step < self.steps and i < last:
                found.add((step, use))
        return [{"step": step, "use": use} for step, use in sorted(found)]

    def shard(self, name: str, blocks: Iterable[int] = (), tokens: np.ndarray | None = None) -> list[int]:
        """The optimiser steps, in order, that read a document of a shard as text or filler; with `blocks`, one that
        lies in these blocks of it, with `tokens`, one that holds any of these (int64[n], places in it, in order)."""
        corpus, steps = self.stream.corpus, list[int]()
        size = manifest.BLOCK // np.dtype(corpus.manifest["dtype"]).itemsize
        first, last = corpus.offset // size, (corpus.offset + corpus.tokens - 1) // size
        mine = np.array(corpus.names)[corpus.shard] == name
        hit = np.any([(first <= k) & (k <= last) for k in blocks] or [mine], axis=0)
        if tokens is not None and len(tokens):
            ends = (np.searchsorted(tokens, at) for at in (corpus.offset, corpus.offset + corpus.tokens))
            hit = np.less(*ends)
        documents, plan, schedule = {*np.flatnonzero(mine & hit).tolist()}, self.stream.plan, self.stream.schedule
        for step in range(self.steps):
            rows = ((d, i) for i in plan.rows_at(plan.position(step)) for d, *_ in schedule.pieces(i))
            if any(d in documents and schedule.gone[d] > i for d, i in rows):
                steps.append(step)
        return steps

    def damage(self, name: str) -> tuple[int | None, list[int], np.ndarray]:
        """The first optimiser step that read what is damaged of a shard, None when none did; its damaged blocks; and
        its damaged tokens, known once it was made again: then the step is exact, before it is the first that read any
        document of these blocks. Without a damaged copy it is the first that read the shard."""
        folder = self.stream.corpus.folder
        blocks, tokens = manifest.damaged(folder, name), manifest.changed(folder, name)
        return next(iter(self.shard(name, blocks, tokens)), None), blocks, tokens

    def sources(self, records: Iterable[str]) -> dict[str, str]:
        """record_id -> where each was read from, of those that are documents of the corpus."""
        wanted, found = pa.array(set(records), pa.string()), dict[str, str]()
        for path in manifest.records(self.stream.corpus.folder):
            part = pq.read_table(path, columns=["record_id", "source"])
            part = part.filter(pc.is_in(part["record_id"], wanted))
            found |= dict(zip(part["record_id"].to_pylist(), part["source"].to_pylist(), strict=True))
        return found

    def overdue(self, by: int) -> dict[str, str]:
        """record_id -> why, of the records that the job read and that may not be used any more at `by` (unix seconds):
        withdrawn, or past their time-to-live."""
        due = withdrawals_due(self.stream.corpus.folder, self.p.data, by)
        return {record: why for record, why in due.items() if self.document(record)}
