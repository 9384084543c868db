"""One deduplicator on one Parquet file, in a process of its own: `python peers.py NAME CORPUS RESULT`.

Each is used as its documentation shows, with 5-word shingles of lower-cased words, 128 hashes in 16 bands of 8 and
Jaccard 0.8; the first document of a cluster stays. RESULT becomes JSON: CPU seconds (user and system, of the process
and its children, from before the file is read; imports and compilation apart), peak memory, removed row numbers.
"""

from __future__ import annotations

import json
import os
import re
import resource
import struct
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

SHINGLE, JACCARD, HASHES, BANDS, ROWS = 5, 0.8, 128, 16, 8


def cpu_seconds() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


def shingles(text: str) -> list[str]:
    words = re.findall(r"\w+", text.lower())
    return [" ".join(words[k : k + SHINGLE]) for k in range(max(1, len(words) - SHINGLE + 1))]


def texts(path: str) -> list[str]:
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=["text"])["text"].to_pylist()


def ours() -> Callable:
    import numba
    import pyarrow as pa
    import pyarrow.parquet as pq

    from stackpkg.data import dedup, records

    numba.set_num_threads(1)
    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as folder:  # compiles every kernel: same words, other bytes
        few = records.table({"record_id": text, "text": text} for text in ("a b c d e f", "A b c d e f"))
        pq.write_table(few, Path(folder) / "few.parquet")
        dedup.deduplicate([Path(folder) / "few.parquet"], {}, SHINGLE, JACCARD)

    def run(path: str) -> list[int]:
        files = sorted(Path(path).glob("*.parquet")) if Path(path).is_dir() else [Path(path)]
        removed = set(dedup.deduplicate(files, {}, SHINGLE, JACCARD)["removed"].to_pylist())
        if len(files) > 1:
            return list(range(len(removed)))
        ids = pq.read_table(path, columns=["record_id"])["record_id"].to_pylist()
        return [row for row, name in enumerate(ids) if name in removed]

    return run


def datasketch(check: bool = False) -> Callable:
    from datasketch import MinHash, MinHashLSH

    def run(path: str) -> list[int]:
        index, removed, kept = MinHashLSH(num_perm=HASHES, params=(BANDS, ROWS)), [], {}
        for row, text in enumerate(texts(path)):
            sketch = MinHash(num_perm=HASHES)
            sketch.update_batch([shingle.encode() for shingle in shingles(text)])
            found = index.query(sketch)
            if any(sketch.jaccard(kept[k]) >= JACCARD for k in found) if check else found:
                removed.append(row)
            else:
                index.insert(row, sketch)
                kept[row] = sketch if check else None
        return removed

    return run


def rensa() -> Callable:
    from rensa import RMinHashDeduplicator

    def run(path: str) -> list[int]:
        index = RMinHashDeduplicator(threshold=JACCARD, num_perm=HASHES, use_lsh=True, num_bands=BANDS)
        kept = index.add_pairs((str(row), shingles(text)) for row, text in enumerate(texts(path)))
        return [row for row, stays in enumerate(kept) if not stays]

    return run


def gaoya() -> Callable:
    from gaoya.minhash import MinHashStringIndex

    def run(path: str) -> list[int]:
        index = MinHashStringIndex(32, JACCARD, BANDS, ROWS, None, "word", True, (SHINGLE, SHINGLE))
        removed = []
        for row, text in enumerate(texts(path)):
            if index.query(text):
                removed.append(row)
            else:
                index.insert_document(row, text)
        return removed

    return run


def daft() -> Callable:
    import daft
    import numpy as np
    from daft import functions as f
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    def run(path: str) -> list[int]:
        words = f.normalize(daft.col("text"), remove_punct=True, lowercase=True, white_space=True)
        sketch = f.minhash(words, num_hashes=HASHES, ngram_size=SHINGLE, hash_function="xxhash")
        column = daft.read_parquet(path).select(sketch.alias("sketch")).to_arrow()["sketch"].combine_chunks()
        values = np.asarray(column.flatten()).reshape(len(column), BANDS, ROWS)
        links = []
        for band in range(BANDS):  # every document of a bucket is linked to its first
            _, first, bucket = np.unique(values[:, band], axis=0, return_index=True, return_inverse=True)
            links.append(np.stack([first[bucket.ravel()], np.arange(len(values))]))
        a, b = np.concatenate(links, axis=1)
        label = connected_components(coo_array((np.ones(len(a)), (a, b)), (len(values),) * 2), directed=False)[1]
        return np.setdiff1d(np.arange(len(values)), np.unique(label, return_index=True)[1]).tolist()

    return run


def datatrove() -> Callable:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):  # its own ones need spaCy and are many times slower
        word_tokenize = staticmethod(str.split)
        sent_tokenize = span_tokenize = None

    def run(path: str) -> list[int]:
        config = MinhashConfig(n_grams=SHINGLE, num_buckets=BANDS, hashes_per_bucket=ROWS)
        with tempfile.TemporaryDirectory() as folder:
            sketches, buckets, removed = (f"{folder}/{name}" for name in ("sketches", "buckets", "removed"))
            signature = MinhashDedupSignature(sketches, config, Words())
            reader = ParquetReader(str(Path(path).parent), id_key="record_id", glob_pattern=Path(path).name)
            steps = [reader, signature], [MinhashDedupBuckets(sketches, buckets, config=config)]
            for pipeline in (*steps, [MinhashDedupCluster(buckets, removed, config)]):
                tasks, logs = BANDS if pipeline is steps[1] else 1, f"{folder}/logs"
                LocalPipelineExecutor(pipeline, tasks, 1, logging_dir=logs, skip_completed=False).run()
            return [row for (row,) in struct.iter_unpack("<I", (Path(removed) / "000000.remove").read_bytes())]

    return run


PEERS: dict[str, tuple[str, Callable]] = {
    "stackpkg on numba": ("numba", ours),
    "datatrove": ("datatrove", datatrove),
    "datasketch": ("datasketch", datasketch),
    "datasketch, estimate checked": ("datasketch", partial(datasketch, check=True)),
    "rensa": ("rensa", rensa),
    "daft": ("daft", daft),
    "gaoya": ("gaoya", gaoya),
}


def main(name: str, corpus: str, result: str) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one thread, whatever a library thinks
    package, make = PEERS[name]
    before = cpu_seconds()
    run = make()
    start = cpu_seconds()
    removed = run(corpus)
    used = cpu_seconds() - start
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent's memory too
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    found = {"cpu": used, "startup": start - before, "peak_mb": peak, "removed": removed}
    Path(result).write_text(json.dumps(found | {"version": metadata.version(package)}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
