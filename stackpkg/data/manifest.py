"""Versions of a corpus: an immutable manifest each, a head, a history; verify, roll back, quarantine, rebuild.

Files are named by what is in them and never written over, so every version stays readable until it is `prune`d. A
version's id is the beginning of the SHA-256 of its manifest, which holds no clock: the same content has the same id.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from stackpkg import runs

BLOCK = 1 << 16  # bytes that share a checksum
OPENING = 1 << 14  # blocks that `check` reads, 1 GiB, or one of each shard: all of a smaller corpus
FORMAT = 3
Manifest = dict[str, Any]


def name_of(digest: str) -> str:
    """What stands in the name of a file with this SHA-256."""
    return digest[:16]


def checksums(shard: Path) -> np.ndarray:
    """uint64[blocks], XXH3 of each `BLOCK` bytes of a shard."""
    with shard.open("rb") as file:
        found = [xxhash.xxh3_64_intdigest(part) for part in iter(lambda: file.read(BLOCK), b"")]
    return np.array(found, np.uint64)


def path_of(folder: Path, version: str = "") -> Path:
    """The file of a version, given by the beginning of its id, or of the head's. Raises `ValueError` when there is
    none, or it is corrupt."""
    head = folder / "manifest.json"
    if not version and not head.exists():
        raise ValueError("data/manifest.json is missing: run notebook 10, or let its build end")
    found = sorted(folder.glob(f"versions/{version or runs.digest(head)[:16]}*.json"))
    if not found and not version:
        raise ValueError(f"manifest.json is corrupt, or the version it was is gone; roll back to one of {ids(folder)}")
    if len(found) != 1:
        raise ValueError(f"version {version!r} is {'ambiguous' if found else 'not there'}; there are {ids(folder)}")
    if runs.digest(found[0])[:16] != found[0].stem:
        raise ValueError(f"versions/{found[0].name} is corrupt: its content does not have its name's SHA-256")
    return found[0]


def read(folder: Path, version: str = "") -> Manifest:
    """The manifest of the head, or of a version; as `path_of`. Raises `ValueError` for one of another format."""
    return parse(path_of(folder, version))


def parse(path: Path) -> Manifest:
    manifest = runs.read_json(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path.name} is of format {manifest.get('format')}, this package reads {FORMAT}: run notebook 10, and "
            "remove the old one from versions/ once you need it no more"
        )
    return manifest


def ids(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("versions/*.json"))


def commit(folder: Path, manifest: Manifest) -> str:
    """Write a version and make it the head; returns its id. Committing the head again changes nothing."""
    return _move(folder, json.dumps(manifest, indent=1, sort_keys=True) + "\n", "commit")


def rollback(folder: Path, version: str) -> str:
    """Make an earlier version the head again. Raises `ValueError` naming what is missing or corrupt of it."""
    path = path_of(folder, version)
    if broken := verify(folder, path.stem):
        raise ValueError(f"version {version} is not whole: {', '.join(broken)}; rebuild these first")
    return _move(folder, path.read_text(encoding="utf-8"), "rollback")


def _move(folder: Path, text: str, action: str) -> str:
    """Version, history, head, in this order and each whole or not at all: a killed move is made good by the next."""
    temporary, history = runs.write_text(folder / "versions/.new", text), log(folder)
    version, before = runs.digest(temporary)[:16], history[0]["version"] if history else ""
    temporary.replace(folder / f"versions/{version}.json")
    if version != before:
        history.insert(0, {"at": runs.now(), "action": action, "version": version, "parent": before})
        runs.write_text(folder / "history.jsonl", "".join(f"{json.dumps(line)}\n" for line in reversed(history)))
    runs.write_text(folder / "manifest.json", text)
    return version


def log(folder: Path) -> list[dict[str, str]]:
    """What was committed and rolled back to, newest first: at, action, version, parent."""
    path = folder / "history.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in reversed(lines)]


def files(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(name below the folder, SHA-256) of every file of a version."""
    for entry in manifest["shards"]:
        yield f"shards/{entry['name']}.bin", entry["sha256"]
    yield from ((f"records/{entry['name']}.parquet", entry["sha256"]) for entry in manifest["records"])
    yield f"shards/{name_of(manifest['index_sha256'])}.index.arrow", manifest["index_sha256"]
    yield f"shards/{name_of(manifest['checksums_sha256'])}.xxh", manifest["checksums_sha256"]
    yield f"tokenizer/{name_of(manifest['tokenizer_sha256'])}.json", manifest["tokenizer_sha256"]


def records(folder: Path, version: str = "") -> list[Path]:
    """The record files of a version, in order."""
    return [folder / f"records/{entry['name']}.parquet" for entry in read(folder, version)["records"]]


def index(folder: Path, manifest: Manifest) -> Path:
    return folder / f"shards/{name_of(manifest['index_sha256'])}.index.arrow"


def blocks(folder: Path, manifest: Manifest) -> list[np.ndarray]:
    """uint64[blocks] for each shard, the checksums that the manifest vouches for."""
    size = BLOCK // np.dtype(manifest["dtype"]).itemsize
    ends = np.cumsum([-(-entry["tokens"] // size) for entry in manifest["shards"]])
    path = folder / f"shards/{name_of(manifest['checksums_sha256'])}.xxh"
    return np.split(np.fromfile(vouched(path, manifest["checksums_sha256"]), np.uint64), ends[:-1])


def tokenizer(folder: Path, manifest: Manifest) -> Path:
    return folder / f"tokenizer/{name_of(manifest['tokenizer_sha256'])}.json"


def verify(folder: Path, version: str = "", sample: int = 0) -> list[str]:
    """Names of files that are missing or not the version's; empty when all is well.

    Every byte of every file by SHA-256; with `sample`, of records the size, and of a shard its size and that many of
    its blocks.
    """
    manifest = read(folder, version)
    broken = [name for name, sha in files(manifest) if not (sample and _spared(name)) and not whole(folder / name, sha)]
    if not sample:
        return broken
    sizes = [(f"records/{entry['name']}.parquet", entry["bytes"]) for entry in manifest["records"]]
    width = np.dtype(manifest["dtype"]).itemsize
    sizes += [(f"shards/{entry['name']}.bin", entry["tokens"] * width) for entry in manifest["shards"]]
    broken += [name for name, size in sizes if not (folder / name).exists() or (folder / name).stat().st_size != size]
    if any(name.endswith(".xxh") for name in broken):
        return broken
    for entry, known in zip(manifest["shards"], blocks(folder, manifest), strict=True):
        name = f"shards/{entry['name']}.bin"
        if name not in broken and not _spot(folder / name, known, sample):
            broken.append(name)
    return broken


def check(folder: Path, version: str = "", spared: Collection[str] = (), blocks: int = 0) -> None:
    """What a job does before it reads: `verify` a sample of `blocks`, else of `OPENING`, but for the names in `spared`.
    Raises `ValueError` that names what is missing or corrupt."""
    share = -(-(blocks or OPENING) // len(read(folder, version)["shards"]))
    if broken := [name for name in verify(folder, version, sample=share) if name not in spared]:
        raise ValueError(f"corrupt or missing: {', '.join(broken)}; runbook CorruptedShardRollback")


def _spared(name: str) -> bool:
    """Whether a sample stands for this file."""
    return name.endswith((".bin", ".parquet"))


def whole(path: Path, sha256: str) -> bool:
    return path.exists() and runs.digest(path) == sha256


def vouched(path: Path, sha256: str) -> Path:
    """The path of an index or of checksums that is whole; `ValueError` with what mends it otherwise."""
    if not whole(path, sha256):
        raise ValueError(f"corrupt or missing: shards/{path.name}; notebook 10, run again, makes the same file")
    return path


def _spot(path: Path, known: np.ndarray, sample: int) -> bool:
    """Whether `sample` blocks of a shard, other ones each time, are what they were."""
    with path.open("rb") as file:
        for k in np.random.default_rng().permutation(len(known))[:sample]:
            file.seek(int(k) * BLOCK)
            if xxhash.xxh3_64_intdigest(file.read(BLOCK)) != int(known[k]):
                return False
    return True


def damaged(folder: Path, name: str) -> list[int]:
    """Numbers of the blocks of a shard of the head that changed: in shards/, or else in the newest copy in quarantine
    that has any. Empty when there is no damaged copy. Raises `ValueError` for a name that no shard has."""
    return _damage(folder, name)[1]


def changed(folder: Path, name: str) -> np.ndarray:
    """int64[n], the places of the tokens in which the damaged copy of a shard, in quarantine, is not the shard that was
    made again since; empty when one of the two is not there. Raises as `damaged`."""
    path, home, manifest = _damage(folder, name)[0], folder / f"shards/{name}.bin", read(folder)
    sha = next(entry["sha256"] for entry in manifest["shards"] if entry["name"] == name)
    if path is None or path == home or not whole(home, sha):
        return np.empty(0, np.int64)
    bad, right = (np.fromfile(file, manifest["dtype"]) for file in (path, home))
    both = min(len(bad), len(right))
    return np.concatenate([np.flatnonzero(bad[:both] != right[:both]), np.arange(both, len(right))])


def _damage(folder: Path, name: str) -> tuple[Path | None, list[int]]:
    """The damaged copy of a shard, and its blocks that changed."""
    manifest, home = read(folder), folder / "quarantine"
    known = {entry["name"]: sums for entry, sums in zip(manifest["shards"], blocks(folder, manifest), strict=True)}
    if name not in known:
        raise ValueError(f"shard {name!r} is none of {', '.join(known)}")
    kept = sorted(home.glob(f"{name}.bin-*"), key=lambda path: runs.by_number(path.name), reverse=True)
    for path in (path for path in (folder / f"shards/{name}.bin", *kept) if path.exists()):
        found = checksums(path)
        if bad := [k for k, right in enumerate(known[name]) if k >= len(found) or found[k] != right]:
            return path, bad
    return None, []


def quarantine(folder: Path, name: str) -> Path:
    """Move a file of a version, such as shards/0123456789abcdef.bin, to `quarantine/`, where nothing reads it; returns
    its path there."""
    path, home = folder / name, folder / "quarantine"
    home.mkdir(exist_ok=True)
    return path.rename(home / f"{path.name}-{len(list(home.glob(f'{path.name}-*')))}")


def prune(folder: Path) -> list[str]:
    """Remove what no version names: what killed builds left, or a version's files once its own, in versions/, is
    removed. What is in quarantine stays. Returns the names of what is gone."""
    wanted = {folder / name for version in ids(folder) for name, _ in files(read(folder, version))}
    found = {path for home in ("shards", "records", "tokenizer") for path in runs.files_below(folder / home)}
    gone = sorted(found - wanted)
    for path in gone:
        path.unlink()
    return [path.relative_to(folder).as_posix() for path in gone]
