"""Records -> immutable token shards under a versioned manifest; a build that is killed goes on where it was."""

import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from stackpkg import runs
from stackpkg.data import engine, mixing, records, tokenizer
from stackpkg.data import manifest as versions
from stackpkg.params import Data

BYTES = 3.5  # of text in a token, about: sets how many record files there are
SPLITS = ("train", "validation")
INDEX = pa.schema([
    ("record_id", pa.string()), ("part", pa.int32()), ("domain", pa.string()), ("split", pa.string()),
    ("shard", pa.string()), ("offset", pa.int64()), ("tokens", pa.int64()),
])  # fmt: skip


def split_of(domains: dict[str, str], share: float) -> dict[str, str]:
    """record_id -> train or validation, by hash of the id; `domains` maps record_id -> domain, and a domain of two or
    more documents holds out at least one."""
    places: dict[str, dict[str, float]] = defaultdict(dict)
    for record, domain in domains.items():
        places[domain][record] = int(mixing.hashed(1, "validation", record)[0]) / 2.0**64
    limits = {domain: max(share, min(found.values())) * (len(found) > 1) for domain, found in places.items()}
    return {n: "validation" if at <= limits[d] else "train" for d, found in places.items() for n, at in found.items()}


def partition(parts: Sequence[Path], keep: pa.Table, folder: Path, data: Data) -> list[Path]:
    """The kept records as files `records/<sha>.parquet`, with the columns of `keep` (record_id, trust, ...) added.

    A record's file follows from the hash of its id alone and files are sorted, so neither the order of the input nor
    the boundaries of its parts matter. In memory is one file, or one part.
    """
    ids, size = keep["record_id"].combine_chunks(), 0
    for part in parts:
        here = pq.read_table(part, columns=["record_id", "text"])
        size += pc.sum(pc.binary_length(here["text"].filter(pc.is_in(here["record_id"], ids)))).as_py() or 0
    buckets = max(1, round(size / (BYTES * data.shard_tokens)))
    work = folder / "records/.work"
    shutil.rmtree(work, ignore_errors=True)
    for number, part in enumerate(parts):
        table = records.kept(pq.read_table(part))
        table = table.filter(pc.is_in(table["record_id"], ids)).drop_columns(
            [name for name in ("kept", "decisions") if name in table.column_names]
        )
        codes = np.array([int(name, 16) * buckets >> 64 for name in table["record_id"].to_pylist()], np.int64)
        for bucket in np.unique(codes).tolist():
            engine.write(work / f"{bucket:05d}/{number:05d}.parquet", table.filter(pa.array(codes == bucket)))
    made = []
    for place in sorted(work.glob("*")):
        table = pa.concat_tables([pq.read_table(file) for file in sorted(place.glob("*.parquet"))]).sort_by("record_id")
        where = pc.index_in(table["record_id"], ids)
        for name in keep.column_names[1:]:
            table = table.append_column(name, keep[name].take(where))
        made.append(_named(engine.write(work / "file.parquet", table), folder / "records", ".parquet"))
    shutil.rmtree(work, ignore_errors=True)
    return made


def _named(path: Path, home: Path, suffix: str) -> Path:
    """Move a finished file to the name its content gives it."""
    return path.replace(home / f"{versions.name_of(runs.digest(path))}{suffix}")


def tokenise(part: pa.Table, model: Path, longest: int) -> pa.Table:
    """A stage: record_id, part, domain and tokens (uint32 lists, `<eos>` last) of every document.

    One of more than `longest` tokens is divided: after the last token that ends a line, or else at the limit.
    """
    loaded = Tokenizer.from_file(str(model))
    eos, rows = tokenizer.specials(loaded)["<eos>"], []
    names, domains = (part[name].to_pylist() for name in ("record_id", "domain"))
    ends = {number for text, number in loaded.get_vocab().items() if text.endswith(("\n", "Ċ"))}  # "Ċ": byte-level \n
    for name, domain, ids in zip(names, domains, tokenizer.encode(loaded, part["text"].to_pylist()), strict=True):
        for number, piece in enumerate(divide([*ids, eos], longest, ends)):
            rows.append({"record_id": name, "part": number, "domain": domain, "tokens": piece})
    schema = pa.schema([*list(INDEX)[:3], ("tokens", pa.large_list(pa.uint32()))])
    return pa.Table.from_pylist(rows, schema)


def divide(ids: list[int], longest: int, ends: Iterable[int]) -> list[list[int]]:
    """Pieces of at most `longest` tokens; each but the last ends a line where a line ends in its second half."""
    pieces, line_ends = [], set(ends)
    while len(ids) > longest:
        cut = next((k for k in range(longest, longest // 2, -1) if ids[k - 1] in line_ends), longest)
        pieces.append(ids[:cut])
        ids = ids[cut:]
    return [*pieces, ids]


def build(folder: Path, parts: Sequence[Path], model: Tokenizer, data: Data) -> dict[str, Any]:
    """Tokenise the record files `parts`, write the shards, commit the version; returns its manifest.

    The head stays what it was until everything else is on disk. What a killed build had finished is not done again.
    """
    text = runs.write_text(folder / "tokenizer/.new", model.to_str(pretty=True))
    made_with = _named(text, folder / "tokenizer", ".json")
    place, longest = folder / "shards/.tokens", data.longest_document
    encoded = engine.run(tokenise, parts, place, made_with, longest, engine=data.engine, workers=data.workers)
    owners = [pq.read_table(part, columns=["record_id", "domain"]).to_pydict() for part in parts]
    domains = {name: d for table in owners for name, d in zip(table["record_id"], table["domain"], strict=True)}
    splits = split_of(domains, data.validation_share)
    width = "uint16" if model.get_vocab_size() <= 65536 else "uint32"
    shards, index, counts = [], [INDEX.empty_table()], {split: Counter[str]() for split in SPLITS}
    for part, file in zip(parts, encoded, strict=True):
        table = pq.read_table(file)
        here = np.array([splits[name] for name in table["record_id"].to_pylist()])
        for split in SPLITS:
            mine = table.filter(pa.array(here == split))
            if len(mine):
                entry, rows = _shard(folder, mine, split, width)
                shards.append(entry | {"records": part.stem})
                index.append(rows)
                for domain, tokens in zip(rows["domain"].to_pylist(), rows["tokens"].to_pylist(), strict=True):
                    counts[split][domain] += tokens
    shards.sort(key=lambda entry: (entry["split"], entry["name"]))
    rows = pa.concat_tables(index).sort_by([("split", "ascending"), ("shard", "ascending"), ("offset", "ascending")])
    listed = _named(engine.write(folder / "shards/.index.parquet", rows), folder / "shards", ".index.parquet")
    special = tokenizer.specials(model)
    divided = rows.filter(pc.greater(rows["part"], 0))["record_id"]
    files = zip(parts, owners, strict=True)
    manifest = {
        "format": 2, "dtype": width, "vocab_size": model.get_vocab_size(), "specials": special,
        "pad_id": special["<pad>"], "eos_id": special["<eos>"], "longest_document": data.longest_document,
        "tokens": {split: dict(sorted(found.items())) for split, found in counts.items()},
        "mixture": mixing.shares(counts["train"], data.temperature, data.max_share),
        "divided": pc.count_distinct(divided).as_py(), "shards": shards,
        "records": [{"name": f.stem, "sha256": runs.digest(f), "documents": len(t["domain"])} for f, t in files],
        tokenizer.STAMP: runs.digest(made_with), "index_sha256": runs.digest(listed),
    }  # fmt: skip
    versions.commit(folder, manifest)
    return manifest


def _shard(folder: Path, table: pa.Table, split: str, width: str) -> tuple[dict[str, Any], pa.Table]:
    """Write one shard and its checksums; its entry of the manifest, and its rows of the index."""
    tokens = table["tokens"].combine_chunks()
    lengths = pc.list_value_length(tokens).to_numpy().astype(np.int64)
    home, raw = folder / "shards", pc.list_flatten(tokens).to_numpy().astype(width)
    with runs.replacing(home / ".shard") as temporary:
        raw.tofile(temporary)
    path = _named(home / ".shard", home, ".bin")
    with runs.replacing(path.with_suffix(".xxh")) as temporary:
        versions.blocks(path).tofile(temporary)
    entry = {
        "name": path.stem,
        "split": split,
        "sha256": runs.digest(path),
        "tokens": len(raw),
        "documents": len(table),
    }
    entry["blocks_sha256"] = runs.digest(path.with_suffix(".xxh"))
    size, offsets = len(table), np.cumsum(lengths) - lengths
    columns = [*(table[name] for name in INDEX.names[:3]), pa.repeat(split, size), pa.repeat(path.stem, size)]
    return entry, pa.table([*columns, offsets, lengths], schema=INDEX)


def rebuild(folder: Path, name: str, version: str = "") -> Path:
    """Make one shard again from its records. Raises `ValueError` when it would not be the same bytes as before."""
    manifest = versions.read(folder, version)
    entry = next(entry for entry in manifest["shards"] if entry["name"] == name)
    part = folder / f"records/{entry['records']}.parquet"
    index = pq.read_table(versions.index(folder, manifest), filters=[("shard", "=", name)]).sort_by("offset")
    table = tokenise(pq.read_table(part), versions.tokenizer(folder, manifest), manifest["longest_document"])
    mine = table.filter(pc.is_in(table["record_id"], index["record_id"].combine_chunks()))
    raw = pc.list_flatten(mine["tokens"].combine_chunks()).to_numpy().astype(manifest["dtype"])
    with runs.replacing(folder / f"shards/{name}.bin") as temporary:
        raw.tofile(temporary)
        if runs.digest(temporary) != entry["sha256"]:
            raise ValueError(f"{name} rebuilt from {part.name} differs from the manifest: the records have changed")
    path = folder / f"shards/{name}.bin"
    with runs.replacing(path.with_suffix(".xxh")) as temporary:
        versions.blocks(path).tofile(temporary)
    return path
