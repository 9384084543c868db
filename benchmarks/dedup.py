"""Speed and quality of deduplication, ours and others', on one corpus of real documents; and ours up to a million.

    python benchmarks/corpus.py FOLDER
    python benchmarks/dedup.py FOLDER [--peers-python PYTHON ...] [--scale 10000 ...] [--json FILE]

Every implementation runs alone on one core, in a process of its own, with the interpreter (this one, then those of
--peers-python) that can import it. Documents per CPU-second: user and system time of the process and its children, the
reading of the Parquet file included; imports and compilation are a number of their own.

Truth is exact: word ids, shingle ids and all pairs by prefix filter, no hash, no sampling; checked against all pairs
of a few hundred documents. With J of two documents over their sets of 5-word shingles, and t = 0.8:

    precision        share of the removed documents that are superfluous: of the component of the graph J >= t that each
                     lies in another document stays
    recall           superfluous documents removed / all of them; of each component all but one are superfluous
    precision_kept   share of the removed documents that have J >= t with a document that is kept
    recall_kept      those / (those + the kept documents that have J >= t with an earlier one that is kept)

The last two take the graph for a set of pairs: who removes the far end of a chain of versions loses precision there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import pyarrow.parquet as pq
from peers import JACCARD, PEERS, SHINGLE
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from stackpkg import runs

WORD = re.compile(rb"[0-9a-z_\x80-\xff]+")
HERE = Path(__file__).parent
COLUMNS = [
    "documents_per_cpu_second",
    "megabytes_per_cpu_second",
    "precision",
    "recall",
    "precision_kept",
    "recall_kept",
]
COLUMNS += ["peak_memory", "cpu_seconds", "startup_cpu_seconds", "removed"]
UNITS = {"documents_per_cpu_second": "1/s", "megabytes_per_cpu_second": "MB/s", "peak_memory": "MB"}
UNITS |= {"cpu_seconds": "s", "startup_cpu_seconds": "s", "removed": "documents"}


def shingle_matrix(texts: list[bytes]) -> csr_array:
    """bool[documents, shingles], rarer shingles first. Ids of words and runs of words stand for themselves."""
    vocabulary: dict[bytes, int] = {}
    words = [[vocabulary.setdefault(word, len(vocabulary)) for word in WORD.findall(text.lower())] for text in texts]
    words = [ids + [-1] * (SHINGLE - len(ids)) if ids else [] for ids in words]
    lengths = np.array([len(ids) for ids in words])
    flat = np.fromiter(itertools.chain.from_iterable(words), np.int64, lengths.sum()) + 1
    del words
    runs_, width = flat, 1
    while width < SHINGLE:  # a run of width + step words is two runs of `width`, `step` apart
        step = min(width, SHINGLE - width)
        codes = runs_[:-step] * (runs_.max() + 1) + runs_[step:]
        runs_, width = np.unique(codes, return_inverse=True)[1], width + step
    ends = np.cumsum(lengths)
    inside = np.concatenate([np.arange(a, max(a, b - SHINGLE + 1)) for a, b in zip(ends - lengths, ends, strict=True)])
    documents = np.repeat(np.arange(len(texts)), np.maximum(0, lengths - SHINGLE + 1))
    pairs = np.unique(documents * (runs_.max() + 1) + runs_[inside])
    documents, shingles = np.divmod(pairs, runs_.max() + 1)
    frequency = np.bincount(shingles)
    place = np.empty(len(frequency), np.int64)
    place[np.argsort(frequency, kind="stable")] = np.arange(len(frequency))
    matrix = csr_array((np.ones(len(pairs), np.int32), (documents, place[shingles])), (len(texts), len(frequency)))
    matrix.sort_indices()
    return matrix


def truth(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """int64[pairs, 2] of all documents with J >= t, the lower number first, and int64[documents], equal sets alike."""
    matrix = shingle_matrix(texts)
    bounds, sizes = matrix.indptr, np.diff(matrix.indptr)
    sets = [matrix.indices[a:b] for a, b in itertools.pairwise(bounds)]
    equal: dict[bytes, int] = {}
    same = np.array(
        [
            equal.setdefault(one.tobytes() or bytes([0, row % 251]) + str(row).encode(), row)
            for row, one in enumerate(sets)
        ]
    )
    # J(x, y) >= t: x and y share one of the |x| - ceil(t |x|) + 1 rarest shingles of x        (Bayardo et al. 2007)
    prefix = sizes - np.ceil(JACCARD * sizes - 1e-9).astype(np.int64) + 1
    rows = np.repeat(np.arange(len(sets)), sizes)
    first = (np.arange(len(rows)) - bounds[rows] < prefix[rows]) & (same == np.arange(len(sets)))[rows]
    rare = csr_array((matrix.data[first], (rows[first], matrix.indices[first])), matrix.shape)
    shared = (rare @ rare.T).tocoo()
    a, b = shared.coords
    fits = (a < b) & (np.minimum(sizes[a], sizes[b]) >= JACCARD * np.maximum(sizes[a], sizes[b]) - 1e-9)
    a, b = a[fits], b[fits]
    common = np.array([np.intersect1d(sets[x], sets[y], True).size for x, y in zip(a, b, strict=True)], np.int64)
    near = common / np.maximum(1, sizes[a] + sizes[b] - common) >= JACCARD
    return np.stack([a[near], b[near]], axis=1).astype(np.int64), same


def expand(pairs: np.ndarray, same: np.ndarray) -> np.ndarray:
    """All pairs of documents, from those of their distinct sets."""
    members: dict[int, list[int]] = {}
    for row, one in enumerate(same.tolist()):
        members.setdefault(one, []).append(row)
    made = [pair for rows in members.values() for pair in itertools.combinations(rows, 2)]
    made += [pair for a, b in pairs.tolist() for pair in itertools.product(members[a], members[b])]
    return np.sort(np.array(made or np.empty((0, 2)), np.int64).reshape(-1, 2), axis=1)


def naive(texts: list[bytes]) -> set[tuple[int, int]]:
    """All pairs with J >= t by Python's own sets."""
    words = [WORD.findall(text.lower()) for text in texts]
    sets = [{tuple(w[k : k + SHINGLE]) for k in range(max(1, len(w) - SHINGLE + 1))} if w else set() for w in words]
    near = lambda x, y: len(x & y) >= JACCARD * len(x | y) > 0  # noqa: E731
    return {(a, b) for a, b in itertools.combinations(range(len(sets)), 2) if near(sets[a], sets[b])}


def quality(removed: list[int], pairs: np.ndarray, documents: int) -> dict[str, float]:
    gone, kept_twin, still = (np.zeros(documents, bool) for _ in range(3))
    gone[removed] = True
    for one, other in (pairs.T, pairs.T[::-1]):
        kept_twin[one[~gone[other]]] = True
    still[pairs[~gone[pairs].any(axis=1), 1]] = True
    beside, total = int((gone & kept_twin).sum()), max(1, int(gone.sum()))
    label = connected_components(coo_array((np.ones(len(pairs)), pairs.T), (documents, documents)), directed=False)[1]
    spare = np.bincount(label) - 1
    right = float(np.minimum(np.bincount(label, weights=gone), spare).sum())
    made = {"precision": right / total, "recall": right / max(1, int(spare.sum()))}
    made |= {"precision_kept": beside / total, "recall_kept": beside / max(1, beside + int(still.sum()))}
    return made | {"removed": total}


def measure(name: str, pythons: list[str], path: Path) -> dict[str, Any]:
    """What a process of its own measured, by the first interpreter that can import the package; else the reason."""
    reason = ""
    threads = dict.fromkeys(["OMP_NUM_THREADS", "RAYON_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS"], "1")
    known = os.environ | threads | {"PYTHONPATH": str(HERE.parent), "DO_NOT_TRACK": "1", "DAFT_PROGRESS_BAR": "0"}
    for python in [sys.executable, *pythons]:
        has = subprocess.run([python, "-c", f"import {PEERS[name][0]}"], capture_output=True, env=known)
        if has.returncode:
            reason = reason or f"{PEERS[name][0]} cannot be imported"
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = [python, str(HERE / "peers.py"), name, str(path), f"{folder}/result.json"]
            done = subprocess.run(command, capture_output=True, text=True, env=known)
            if done.returncode == 0:
                return runs.read_json(Path(folder) / "result.json")
            reason = (done.stderr.strip().splitlines() or ["failed"])[-1]
    return {"reason": reason}


def speed(found: dict[str, Any], documents: int, size: float) -> dict[str, float]:
    made = {"documents_per_cpu_second": documents / found["cpu"], "megabytes_per_cpu_second": size / found["cpu"]}
    made |= {"cpu_seconds": found["cpu"], "startup_cpu_seconds": found["startup"]}
    return made | {"peak_memory": found["peak_mb"]}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, one row a system."""
    columns = [name for name in COLUMNS if any(name in result for result in results.values())]
    lines = [
        "| system | " + " | ".join(name.replace("_", " ") for name in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for system, result in results.items():
        cells = [
            f"{result[name]:,.4f}" if name.startswith(("prec", "rec")) else f"{result[name]:,.1f}"
            for name in columns
            if name in result
        ]
        lines.append(f"| {system} | " + (" | ".join(cells) or f"not measured: {result['reason']}") + " |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    load = [round(value, 2) for value in os.getloadavg()]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_average": load,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where corpus.parquet is, and synthetic parts are made")
    parser.add_argument("--peers-python", nargs="*", default=[], help="interpreters of other environments")
    parser.add_argument("--scale", nargs="*", type=int, default=[], help="sizes of synthetic corpora (documents)")
    parser.add_argument("--json", type=Path, help="write the numbers here, and the tables beside it as .md")
    given = parser.parse_args()
    path, results, scale = given.folder / "corpus.parquet", {}, {}
    texts = [text.encode() for text in pq.read_table(path, columns=["text"])["text"].to_pylist()]
    pairs = expand(*truth(texts))
    some = np.unique(pairs[np.random.default_rng(1).permutation(len(pairs))[:150]])[:250]
    expected = {(x, y) for x, y in pairs.tolist() if {x, y} <= set(some.tolist())}
    if {(int(some[x]), int(some[y])) for x, y in naive([texts[k] for k in some])} != expected:
        raise RuntimeError("the truth differs from all pairs by Python's sets: the benchmark is wrong")
    header = machine() | {
        "documents": len(texts),
        "megabytes": round(sum(map(len, texts)) / 1e6, 1),
        "true_pairs": len(pairs),
    }
    header |= {"shingle_words": SHINGLE, "jaccard": JACCARD}
    print(json.dumps(header), flush=True)
    for name in PEERS:
        found = measure(name, given.peers_python, path)
        results[name] = found
        if "cpu" in found:
            results[f"{name} {found['version']}"] = speed(found, len(texts), header["megabytes"]) | quality(
                found["removed"], pairs, len(texts)
            )
            del results[name]
        print(table(results).splitlines()[-1], flush=True)
    del texts
    for documents in given.scale:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            parts = corpus.synthetic(Path(folder), documents)
            size = sum(int(np.sum(pq.read_table(part, columns=["text"])["text"].nbytes)) for part in parts) / 1e6
            found = measure("stackpkg on numba", [], Path(folder))
        scale[f"{documents:,} documents"] = speed(found, documents, size) | {"removed": len(found["removed"])}
        print(table(scale).splitlines()[-1], flush=True)
    header["load_average_at_the_end"] = machine()["load_average"]
    tables = "\n\n".join(table(rows) for rows in (results, scale) if rows)
    print(tables)
    if given.json:
        rows = [(s, m, v) for part in (results, scale) for s, one in part.items() for m, v in one.items()]
        listed = [{"system": s, "metric": m, "value": v, "unit": UNITS.get(m, "1")} for s, m, v in rows]
        runs.write_json(given.json, header | {"rows": listed})
        about = "\n".join(f"- {name}: {value}" for name, value in header.items())
        runs.write_text(given.json.with_suffix(".md"), f"# Deduplication\n\n{about}\n\n{tables}\n")


if __name__ == "__main__":
    main()
