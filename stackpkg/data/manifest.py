"""Versions of a corpus: an immutable manifest each, a head, a history; verify, roll back, quarantine, rebuild.

Files are named by what is in them and never written over, so every version stays readable until it is `prune`d. A
version's id is the beginning of the SHA-256 of its manifest, which holds no clock: the same content has the same id.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from stackpkg import runs

BLOCK = 1 << 20  # bytes that share a checksum
Manifest = dict[str, Any]


def name_of(digest: str) -> str:
    """What stands in the name of a file with this SHA-256."""
    return digest[:16]


def write_sums(shard: Path) -> Path:
    """Write the checksums of a shard beside it, uint64[blocks], XXH3 of each `BLOCK` bytes; returns their path."""
    with runs.replacing(path := shard.with_suffix(".xxh")) as temporary, shard.open("rb") as file:
        found = [xxhash.xxh3_64_intdigest(part) for part in iter(lambda: file.read(BLOCK), b"")]
        np.array(found, np.uint64).tofile(temporary)
    return path


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
    """The manifest of the head, or of a version; as `path_of`."""
    return runs.read_json(path_of(folder, version))


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
        yield f"shards/{entry['name']}.xxh", entry["blocks_sha256"]
    yield from ((f"records/{entry['name']}.parquet", entry["sha256"]) for entry in manifest["records"])
    yield f"shards/{name_of(manifest['index_sha256'])}.index.parquet", manifest["index_sha256"]
    yield f"tokenizer/{name_of(manifest['tokenizer_sha256'])}.json", manifest["tokenizer_sha256"]


def records(folder: Path, version: str = "") -> list[Path]:
    """The record files of a version, in order."""
    return [folder / f"records/{entry['name']}.parquet" for entry in read(folder, version)["records"]]


def index(folder: Path, manifest: Manifest) -> Path:
    return folder / f"shards/{name_of(manifest['index_sha256'])}.index.parquet"


def tokenizer(folder: Path, manifest: Manifest) -> Path:
    return folder / f"tokenizer/{name_of(manifest['tokenizer_sha256'])}.json"


def verify(folder: Path, version: str = "", sample: int = 0) -> list[str]:
    """Names of files that are missing or not the version's; empty when all is well.

    Every byte of every file by SHA-256; with `sample`, of records the size, and of a shard its size, its checksums and
    that many of its blocks.
    """
    manifest = read(folder, version)
    sampled = {f"shards/{entry['name']}.bin": entry for entry in manifest["shards"]} if sample else {}
    sizes = {f"records/{entry['name']}.parquet": entry["bytes"] for entry in manifest["records"]} if sample else {}

    def well(name: str, sha: str) -> bool:
        if name in sizes:
            return (folder / name).exists() and (folder / name).stat().st_size == sizes[name]
        entry = sampled.get(name)
        return _spot(folder / name, entry, manifest, sample) if entry else whole(folder / name, sha)

    return [name for name, sha in files(manifest) if not well(name, sha)]


def whole(path: Path, sha256: str) -> bool:
    return path.exists() and runs.digest(path) == sha256


def _spot(path: Path, entry: dict[str, Any], manifest: Manifest, sample: int) -> bool:
    """Whether a shard is what it was, by its size and `sample` of its blocks, other ones each time."""
    if not path.exists() or path.stat().st_size != entry["tokens"] * np.dtype(manifest["dtype"]).itemsize:
        return False
    known, drawn = sums(path), np.random.default_rng().permutation
    with path.open("rb") as file:
        for k in drawn(len(known))[:sample]:
            file.seek(int(k) * BLOCK)
            if xxhash.xxh3_64_intdigest(file.read(BLOCK)) != int(known[k]):
                return False
    return True


def sums(shard: Path) -> np.ndarray:
    """uint64[blocks], the checksums that stand beside a shard."""
    return np.fromfile(shard.with_suffix(".xxh"), np.uint64) if shard.with_suffix(".xxh").exists() else np.empty(0)


def quarantine(folder: Path, name: str) -> Path:
    """Rename a file of a version, such as shards/0123456789abcdef.bin, so that nothing reads it; returns its path."""
    path = folder / name
    return path.rename(f"{path}.quarantined-{len(list(path.parent.glob(path.name + '.quarantined-*')))}")


def prune(folder: Path) -> list[str]:
    """Remove what no version names: what killed builds left, or a version's files once its own, in versions/, is
    removed. What is in quarantine stays. Returns the names of what is gone."""
    wanted = {folder / name for version in ids(folder) for name, _ in files(read(folder, version))}
    found = {path for home in ("shards", "records", "tokenizer") for path in runs.files_below(folder / home)}
    gone = [path for path in sorted(found - wanted) if ".quarantined-" not in path.name]
    for path in gone:
        path.unlink()
    return [path.relative_to(folder).as_posix() for path in gone]
