"""The corpora that `benchmarks/dedup.py` measures on: real files with planted near-duplicates, and synthetic text.

    python benchmarks/corpus.py FOLDER [--documents 30000] [--root DIR ...]

Both are Parquet files of `stackpkg.data.records.SCHEMA` in row groups of 1,000. All is decided by the names and the
content of the files and by a fixed seed.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stackpkg.data import mixing, records

ROOTS = [sysconfig.get_paths()["purelib"], "/usr/share/doc", "/usr/lib/python3"]
TEXT = re.compile(
    r".*\.(pyi?|c|h|[ch]pp|cuh?|rs|js|md|rst|txt|pod|tex|html?)"
    r"|(readme|license|licence|copying|changelog|copyright|news|notice|authors|metadata).*"
)
SHORTEST, PIECE = 300, 60_000  # characters; a file twice as long as a piece is cut into pieces at line ends
EDITS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08)  # share of words that a planted copy changes
GROUP = 1_000


def _files(roots: Sequence[str]) -> list[tuple[str, Path]]:
    """(name below its root, path) of every text file, in the order of the hash of its name."""
    found = {}
    for root in roots:
        for path in Path(root).rglob("*"):
            name = path.name.lower().removesuffix(".gz")
            if TEXT.fullmatch(name) and path.is_file() and not path.is_symlink():
                found[f"{Path(root).name}/{path.relative_to(root).as_posix()}"] = path
    return sorted(found.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())


def _documents(roots: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name, path in _files(roots):
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8", errors="ignore").replace("\x00", "")
        cuts = [0]
        while len(text) - cuts[-1] > PIECE * (1 if len(cuts) > 1 else 2):
            end = text.rfind("\n", cuts[-1] + 1, cuts[-1] + PIECE)
            cuts.append(end if end > 0 else cuts[-1] + PIECE)
        for number, (start, end) in enumerate(zip(cuts, [*cuts[1:], len(text)], strict=True)):
            if SHORTEST <= end - start <= PIECE and number < 20:
                yield f"{name}#{number}", text[start:end]


def _edited(rng: random.Random, text: str, share: float, vocabulary: Sequence[str]) -> str:
    """A copy with `share` of the words replaced, deleted or added to; one copy in four lacks a passage instead."""
    words = text.split(" ")
    count = max(1, round(share * len(words)))
    if rng.random() < 0.25:
        start = rng.randrange(max(1, len(words) - 3 * count))
        del words[start : start + 3 * count]
        return " ".join(words)
    for place in rng.sample(range(len(words)), count):
        other = rng.choice(vocabulary)
        words[place] = rng.choice([other, other, other, "", f"{words[place]} {other}"])
    return " ".join(words)


def real(path: Path, documents: int, roots: Sequence[str] = ROOTS, seed: int = 7) -> Path:
    """`documents` documents, one in ten a changed copy of another, shuffled."""
    rng, made = random.Random(seed), []  # noqa: S311  a fixed seed, no secret
    for name, text in _documents(roots):
        made.append((name, text))
        if len(made) == documents - documents // 10:
            break
    else:
        raise ValueError(f"{len(made)} documents of {documents} found below {list(roots)}: give more with --root")
    vocabulary = " ".join(text for _, text in made[:300]).split()
    long = [item for item in made if item[1].count(" ") >= 60]
    for number in range(documents // 10):
        (name, text), share = rng.choice(long), rng.choice(EDITS)
        made.append((f"{name}@{number}", _edited(rng, text, share, vocabulary)))
    rng.shuffle(made)
    groups = (made[start : start + GROUP] for start in range(0, documents, GROUP))
    return _write(path, groups)


def synthetic(folder: Path, documents: int, part: int = 50_000, seed: int = 7) -> list[Path]:
    """Parts of documents of 150 to 300 words from a Zipf vocabulary of 50,000; one in ten is a copy, with up to five
    words changed, of an earlier one of its group."""
    words = np.array([f"w{x:x}" for x in mixing.hashed(50_000, seed, "words") >> np.uint64(36)])
    edges = np.cumsum(1 / np.arange(1, 50_001))

    def group(number: int) -> Iterator[tuple[str, str]]:
        rng, size = np.random.default_rng([seed, number]), min(GROUP, documents - number * GROUP)
        lengths = rng.integers(150, 301, size)
        drawn = words[np.searchsorted(edges, rng.random(lengths.sum()) * edges[-1])]
        texts = np.split(drawn, np.cumsum(lengths)[:-1])
        for k in range(9 * size // 10, size):
            copy = texts[rng.integers(9 * size // 10)].copy()
            copy[rng.integers(len(copy), size=rng.integers(6))] = words[rng.integers(50_000)]
            texts[k] = copy
        yield from ((f"{number}/{k}", " ".join(text)) for k, text in enumerate(texts))

    folder.mkdir(parents=True, exist_ok=True)
    groups = range(-(-documents // GROUP))
    starts = range(0, len(groups), max(1, part // GROUP))
    pieces = [groups[start : start + max(1, part // GROUP)] for start in starts]
    return [_write(folder / f"{k:05}.parquet", map(group, piece)) for k, piece in enumerate(pieces)]


def _write(path: Path, groups: Iterator) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, records.SCHEMA, compression="zstd", use_dictionary=False) as writer:
        for group in groups:
            rows = ({"record_id": _id(name), "source": f"bench:{name}", "text": text} for name, text in group)
            writer.write_table(records.table(rows))
    return path


def _id(name: str) -> str:
    return hashlib.sha256(f"bench:{name}".encode()).hexdigest()[:16]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=30_000)
    parser.add_argument("--root", action="append", help=f"folder to read; default: {', '.join(ROOTS)}")
    given = parser.parse_args()
    file = real(given.folder / "corpus.parquet", given.documents, given.root or ROOTS)
    text = pc.sum(pc.binary_length(pq.read_table(file, columns=["text"])["text"])).as_py()
    print(f"{file}: {given.documents:,} documents, {text / 1e6:.0f} MB of text")
