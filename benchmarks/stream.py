"""The stream against mosaicml-streaming, litdata and datasets at one job: shuffled batches of packed documents.

    python benchmarks/stream.py --peers-python PEERS/bin/python [--json FILE] [--mb 40] [--steps 1000]

The job: a batch of 8 rows of 2,048 tokens as int64 tensors of tokens, labels that stop at document boundaries, and
positions that restart with each document, in shuffled order, in one process with one thread. The peers read rows that
were packed for them beforehand; this package packs as it opens, and compares every block with its checksum when it is
first read, which no peer does. `open` is the time to the first batch in a new process, imports done; `resume` that from
what is on disk to a batch in the middle of the epoch, `seek` the same from an open loader. `check` is the sample of all
blocks that a job compares before it starts. Every system runs in a process of its own, thrice; the median counts.
`PEERS` holds requirements-stream.txt; without it only this package and datasets are measured.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import report
import torch
from stream_peers import BATCH, measure
from torch.utils.data import DataLoader

from stackpkg import params
from stackpkg.data import manifest, records, shards, sources, tokenizer
from stackpkg.data.corpus import Corpus
from stackpkg.data.schedule import Schedule
from stackpkg.data.stream import Stream

CONTEXT = 2048
PEERS = ("mosaicml-streaming", "litdata", "datasets")


def profile(mb: float) -> params.Params:
    """Text rows only: nothing rides along, as with the peers."""
    return params.validate(
        {
            "data": {
                "sources": [{"max_mb": mb}],
                "vocab_size": 16_384,
                "longest_document": CONTEXT,
                "workers": 1,
                "max_epochs": 1000,
            },
            "curriculum": [{"steps": 100_000, "context": CONTEXT, "long_range": 0.0, "retrieval": 0.0}],
            "training": {"batch_tokens": BATCH * CONTEXT},
            "layout": {"processes": 1, "fsdp": 1},
        }
    )


def build(folder: Path, p: params.Params) -> None:
    """Shards of installed distributions, and the same documents packed into rows for the peers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = sources.write_parts(p.data.sources, folder / "parts", p.data.part_mb, [])
    found = pa.concat_tables([records.kept(pq.read_table(part)) for part in parts])
    keep = pa.table({"record_id": found["record_id"], "trust": np.ones(len(found))})
    files = shards.partition(parts, keep, folder / "data", p.data)
    sample = found["text"].to_pylist()[::4]
    shards.build(folder / "data", files, tokenizer.train_tokenizer(sample, p.data.vocab_size), p.data)
    schedule = Schedule(Corpus(folder / "data"), p)
    packs = [(rows, r) for lane in schedule.epochs for rows in [lane[0].whole] for r in range(len(rows))]
    made = np.zeros((len(packs), CONTEXT), np.uint16)
    for k, (rows, r) in enumerate(packs):
        tokens = np.concatenate([schedule.corpus.read(int(d), 0, int(schedule.corpus.tokens[d])) for d in rows.row(r)])
        made[k, : len(tokens)] = tokens
    np.save(folder / "rows.npy", made)


def ours(folder: Path, p: params.Params) -> dict[str, float]:
    from stackpkg.training.loader import RankBatches, StreamDataset, collate

    def opened(start: int | None = None, loader: DataLoader | None = None) -> DataLoader:
        stream = loader.dataset.stream if loader is not None else Stream(folder / "data", p)
        batches = RankBatches(stream, p.max_steps, 1, 0, 1, lambda: start or 0)
        return DataLoader(StreamDataset(stream), batch_sampler=batches, collate_fn=collate)

    found, start = measure(opened, lambda loader, step: step, args.steps), time.perf_counter()
    manifest.check(folder / "data")
    return found | {"check": time.perf_counter() - start, "documents": len(Corpus(folder / "data").tokens)}


def rows(folder: Path, p: params.Params) -> list[dict]:
    found = {"stackpkg": [], **{name: [] for name in PEERS}}
    for name in [name for _ in range(3) for name in found]:
        script = [__file__, "--measure", str(folder)] if name == "stackpkg" else ["stream_peers.py", name, str(folder)]
        python = args.peers_python if name in PEERS[:2] else sys.executable
        if not python:
            continue
        command = [python, str(Path(__file__).parent / Path(script[0]).name), *script[1:]]
        command += ["--mb", str(args.mb), "--steps", str(args.steps)] if name == "stackpkg" else [str(args.steps)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=report.quiet())
        if done.returncode:
            print(f"{name} failed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        found[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    made = []
    for name, runs_ in found.items():
        for metric, unit, value in (
            ("throughput", "Mtokens/CPU-s", lambda r: r["tokens"] / r["cpu"] / 1e6),
            ("throughput", "Mtokens/s", lambda r: r["tokens"] / r["wall"] / 1e6),
            ("open", "ms", lambda r: 1e3 * r["open"]),
            ("resume", "ms", lambda r: 1e3 * r["resume"]),
            ("seek", "ms", lambda r: 1e3 * r["seek"]),
        ):
            if runs_:
                made.append(report.row(name, metric, statistics.median(map(value, runs_)), unit))
    for metric, unit, scale in (("check", "ms", 1e3), ("documents", "documents", 1)):
        made.append(report.row("stackpkg", metric, scale * found["stackpkg"][0][metric], unit))
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--mb", type=float, default=40.0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        print(json.dumps(ours(args.measure, profile(args.mb))))
        sys.exit()
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        build(Path(place), profile(args.mb))
        size = np.load(Path(place) / "rows.npy", mmap_mode="r").shape
        print(f"{size[0]} rows of {size[1]} tokens, made in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        report.write(rows(Path(place), profile(args.mb)), args.json)
