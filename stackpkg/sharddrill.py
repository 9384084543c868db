"""The drill of a shard that is damaged under a running job: from the byte that flips to two sealed attempts."""

from __future__ import annotations

import shutil
import time
from typing import Any

import numpy as np

from stackpkg import params, runs
from stackpkg.data import manifest, provenance, shards
from stackpkg.data.ledger import Ledger
from stackpkg.data.stream import Stream
from stackpkg.governance import seal
from stackpkg.params import Params
from stackpkg.runs import RunFolder
from stackpkg.telemetry import exporter, rows
from stackpkg.training import attempts, drills, faults, snapshots, tiny
from stackpkg.training.loader import RankBatches

JOB, EVERY = "job", 4
FLIPS, READ = 9, 11  # steps, from 1: just after a checkpoint, and before the next; a batch is fetched a step ahead
PAGES = ("CorruptedShardRollback", "DataShardCorrupt")


def profile() -> Params:
    """The job of the fault drills on two processes, which nothing restarts, with a checkpoint every four steps and a
    context that all documents fit, so that new ones are read in every step."""
    p = drills.profile(drills.Drill("", (), layout={"restarts": 0}), 2)
    changed: dict[str, Any] = {"snapshots": {"every_steps": EVERY}, "governance": {"demonstration_keys": True}}
    changed["curriculum"] = [{"steps": drills.STEPS, "context": p.data.longest_document, "long_range": 0.25}]
    return params.validate(p.model_dump(mode="json") | changed)


def victim(stream: Stream) -> tuple[str, int]:
    """(file, offset) of a byte in the middle of a text that step `READ` is the first to read, on rank 0; where there is
    one, from a block that this rank has checked, and trusts, before the byte flips."""
    corpus, plan, pieces = stream.corpus, stream.plan, stream.schedule.pieces
    size = manifest.BLOCK // np.dtype(corpus.manifest["dtype"]).itemsize
    mine = [
        [piece for i in numbers if plan[i].lane < len(stream.domains) for piece in pieces(i)]
        for numbers in RankBatches(stream, drills.STEPS, 1, 0, 2, lambda: 0)
    ]
    rows = (i for step in range(READ - 1) for i in plan.rows_at(plan.position(step)))
    before = {document for i in rows for document, *_ in pieces(i)}

    def place(piece: tuple[int, int, int]) -> tuple[int, int]:
        return int(corpus.shard[piece[0]]), int(corpus.offset[piece[0]]) + piece[1] + piece[2] // 2

    known = {(shard, at // size) for part in mine[: FLIPS - 1] for shard, at in map(place, part)}
    new = [(piece[2], *place(piece)) for piece in mine[READ - 1] if piece[0] not in before]
    _, shard, at = max(new, key=lambda each: ((each[1], each[2] // size) in known, each[0]))
    return f"data/shards/{corpus.names[shard]}.bin", at * manifest.BLOCK // size


def damage(folder: RunFolder, p: Params) -> dict[str, Any]:
    """Make a corpus of the package's own text in `folder`, train on it, and flip a byte under the job.

    What was seen: `shard`, `block`, `flip` (what was asked of the job), `said` (how the launch ended), `detect_seconds`
    from the flipped byte to that end, and `exported`, what the alert DataShardCorrupt watches.
    """
    tiny.prepare(folder.path, p)
    file, offset = victim(Stream(folder.path / "data", p))
    flip = {"kind": "flip_byte", "step": FLIPS, "rank": 0, "attempt": 1, "file": file, "offset": offset}
    said, path = drills.attempt(folder, p, [flip]).partition("\n")[0], folder.path / file
    found = {"shard": path.stem, "block": offset // manifest.BLOCK, "flip": flip, "said": runs.portable(said)}
    found["detect_seconds"] = round(time.time() - path.stat().st_mtime, 1)
    follower = exporter.Job(folder.path, JOB)
    follower.look()
    (gauge,) = (each for each in follower.collect() if each.name == "train_shards_corrupt")
    return found | {"exported": gauge.samples[0].value}


def recover(folder: RunFolder, p: Params, found: dict[str, Any], skip: bool = False) -> dict[str, Any]:
    """The page CorruptedShardRollback, act by act: set the shard aside, make it again (or pass over its records), ask
    which step read the damage first, go back to the newest checkpoint without it, go on, compare the attempts."""
    data, home, name = folder.path / "data", folder.path / "checkpoints" / JOB, found["shard"]
    put = manifest.quarantine(data, f"shards/{name}.bin")
    if skip:
        provenance.withdraw_shard(data, name, int(time.time()), "drill: its source is gone")
    else:
        shards.rebuild(data, name)
    first, blocks, tokens = Ledger(folder.path, JOB).damage(name)
    assert first is not None, "the byte lies in a text that the job reads"
    good, aside = snapshots.roll_back(home, snapshots.before(home, first))
    said, begun = drills.attempt(folder, p, [found["flip"]]).partition("\n")[0], attempts.read(home)
    table = rows.read(folder.path / "telemetry" / JOB)
    mine = table[table["rank"] == 0].set_index(["attempt", "step"]).sort_index()
    old, new = mine.loc[1], mine.loc[2]
    both = old.index.intersection(new.index)
    overlap = [{"step": int(step), "loss": [float(old.loss[step]), float(new.loss[step])]} for step in both]
    after = new.time[new.index > old.index.max()]
    return found | {
        "mended": "passed over" if skip else "made again", "quarantined": put.name, "first_step": first,
        "blocks": blocks, "tokens": len(tokens), "good": good.name if good else None, "aside": aside,
        "resumed_from": [attempt["resumed_from"] for attempt in begun], "again": said, "overlap": overlap,
        "rows_missing": rows.missing(table, drills.STEPS),
        "recover_seconds": round(float(after.min()) - put.stat().st_mtime, 1),
    }  # fmt: skip


def sealed(folder: RunFolder, p: Params) -> dict[str, Any]:
    """Seal and sign the run with keys that approve nothing: `problems` of its verification, and of each attempt what is
    named when a byte of its rows changes afterwards."""
    told = seal.finish(folder, p)
    trusted, _ = seal.trust_for(folder.path)
    path, named = folder.path / f"telemetry/{JOB}/rank-00000.jsonl", dict[str, list[str]]()
    text = path.read_bytes()
    for attempt in (1, 2):
        at = text.index(b'"attempt": %d' % attempt)
        faults.flip(path, at)
        named[str(attempt)] = [line.partition(":")[0] for line in seal.verify(folder.path, trusted)]
        faults.flip(path, at)
    again = seal.verify(folder.path, trusted)
    return {"manifest_sha256": told["manifest_sha256"], "problems": [*told["problems"], *again], "named": named}


def drill(run: str) -> dict[str, Any]:
    """All of it, below `outbox/.shard-<run>`, which is removed; what was seen, and the `pages` it is a drill of."""
    folder, p = RunFolder(f".shard-{run}/drill"), profile()
    shutil.rmtree(folder.path)
    try:
        found = recover(folder, p, damage(folder, p))
        whole = manifest.verify(folder.path / "data") == []
        return {"pages": [*PAGES], "at": runs.now(), "run": run, **found, "whole": whole, "sealed": sealed(folder, p)}
    finally:
        shutil.rmtree(folder.path.parent)
