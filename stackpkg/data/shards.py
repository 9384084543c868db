"""Records -> immutable token shards under a versioned manifest; a build that is killed goes on where it was."""

import itertools
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.feather as feather
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from stackpkg import runs
from stackpkg.data import engine, mixing, records, tokenizer
from stackpkg.data import manifest as versions
from stackpkg.params import Data

BYTES = 3.5  # of text in a token, about: sets how many record files there are
BATCH = 256  # documents encoded at once
SPLITS = ("train", "validation")
INDEX = pa.schema([
    ("record_id", pa.large_string()), ("part", pa.int32()), ("domain", pa.string()), ("split", pa.string()),
    ("shard", pa.string()), ("offset", pa.int64()), ("tokens", pa.int64()),
])  # fmt: skip


def split_of(domains: dict[str, str], share: float) -> dict[str, str]:
    """record_id -> train or validation, by hash of the id; `domains` maps record_id -> domain.

    A domain of two or more documents has at least one on either side; the only one of a domain is trained on.
    """
    at = pd.Series(mixing.mix(codes(domains) ^ mixing.hashed(1, "validation")) / 2.0**64)
    grouped = at.groupby(list(domains.values()))
    held = ((at <= share) | (at == grouped.transform("min"))) & (at < grouped.transform("max"))
    return dict(zip(domains, np.where(held, "validation", "train").tolist(), strict=True))


def codes(ids: Iterable[str]) -> np.ndarray:
    """uint64[n], the numbers that record ids, of sixteen hexadecimal digits each, write."""
    return np.frombuffer(bytes.fromhex("".join(ids)), ">u8").astype(np.uint64)


def partition(parts: Sequence[Path], keep: pa.Table, folder: Path, data: Data) -> list[Path]:
    """The kept records as files `records/<sha>.parquet`, with the columns of `keep` (record_id, trust, ...) added.

    A record's file follows from its id, which is a hash, and files are sorted, so neither the order of the input nor
    the boundaries of its parts matter. In memory is one part, or one file. Raises `ValueError` when nothing is kept.
    """
    chosen, work, made = pd.Index(codes(keep["record_id"].to_pylist())), folder / "records/.work", list[Path]()

    def tables() -> Iterator[pa.Table]:
        for part in parts:
            table = records.kept(pq.read_table(part))
            where = chosen.get_indexer(codes(table["record_id"].to_pylist()))
            table, where = table.filter(pa.array(where >= 0)), pa.array(where[where >= 0])
            for name in keep.column_names[1:]:
                table = table.append_column(name, keep[name].take(where))
            yield table.drop_columns([name for name in ("kept", "decisions") if name in table.column_names])

    size = sum(pc.sum(pc.binary_length(table["text"])).as_py() or 0 for table in tables())
    if not size:
        raise ValueError("no record was kept that has a text: loosen the filters, or data.min_trust")
    buckets, schema = max(1, round(size / (BYTES * data.shard_tokens))), next(tables()).schema

    def placed() -> Iterator[pa.RecordBatch]:
        for table in tables():
            at = (codes(table["record_id"].to_pylist()) >> 32) * np.uint64(buckets) >> 32  # ranges of the ids
            yield from table.append_column("bucket", pa.array(at.astype(np.int32))).to_batches()

    shutil.rmtree(work, ignore_errors=True)
    options = ds.IpcFileFormat().make_write_options(compression="zstd")  # unlike Parquet no cost a row and open file
    how = {"file_options": options, "partitioning": ["bucket"], "max_partitions": buckets, "use_threads": False}
    ds.write_dataset(placed(), work, format="ipc", schema=schema.append(pa.field("bucket", pa.int32())), **how)
    for place in sorted(work.iterdir(), key=lambda place: int(place.name)):
        table = ds.dataset(place, format="ipc").to_table().sort_by("record_id")
        made.append(_named(engine.write(work / "file.parquet", table), folder / "records", ".parquet"))
    shutil.rmtree(work)
    return made


def _named(path: Path, home: Path, suffix: str) -> Path:
    """Move a finished file to the name its content gives it; one that is there, and whole, stays."""
    place = home / f"{versions.name_of(digest := runs.digest(path))}{suffix}"
    if versions.whole(place, digest):
        path.unlink()
        return place
    return path.replace(place)


def tokenise(part: pa.Table, model: Path, longest: int) -> pa.Table:
    """A stage: record_id, part, domain and tokens (uint32 lists, `<eos>` last) of every document.

    One of more than `longest` tokens is divided: after the last token that ends a line, or else at the limit.
    """
    loaded, pieces, owner, number = Tokenizer.from_file(str(model)), [np.empty(0, np.uint32)], list[int](), list[int]()
    eos, vocabulary = tokenizer.specials(loaded)["<eos>"], loaded.get_vocab().items()
    # byte-level tokenizers write a newline Ċ, a space Ġ and a tab ĉ, SentencePiece <0x0A> and ▁; the indentation of
    # the next line is often part of the token
    ends = np.array([k for text, k in vocabulary if text.rstrip(" \tĠĉ▁").endswith(("\n", "Ċ", "<0x0A>"))], np.int64)
    batches = (part["text"][at : at + BATCH].to_pylist() for at in range(0, len(part), BATCH))
    for row, ids in enumerate(itertools.chain.from_iterable(tokenizer.encode(loaded, texts) for texts in batches)):
        ids.append(eos)
        found = divide(np.fromiter(ids, np.uint32, len(ids)), longest, ends)
        pieces += found
        owner += [row] * len(found)
        number += range(len(found))
    tokens = pa.LargeListArray.from_arrays(np.cumsum([len(piece) for piece in pieces]), np.concatenate(pieces))
    whose = part.select(["record_id", "domain"]).take(pa.array(owner, pa.int64()))
    return whose.add_column(1, "part", pa.array(number, pa.int32())).append_column("tokens", tokens)


def divide(ids: np.ndarray, longest: int, ends: np.ndarray) -> list[np.ndarray]:
    """Pieces of at most `longest` tokens; each but the last ends a line where a line ends in its second half."""
    if len(ids) <= longest:
        return [ids]
    places, cuts = np.append(0, np.flatnonzero(np.isin(ids, ends)) + 1), [0]
    while len(ids) - cuts[-1] > longest:
        last = int(places[np.searchsorted(places, cuts[-1] + longest, "right") - 1])
        cuts.append(last if last > cuts[-1] + longest // 2 else cuts[-1] + longest)
    return np.split(ids, cuts[1:])


def build(folder: Path, parts: Sequence[Path], model: Tokenizer, data: Data) -> dict[str, Any]:
    """Tokenise the record files `parts`, write the shards, commit the version; returns its manifest.

    The head stays what it was until everything else is on disk. What a killed build had finished is not done again.
    Building from the records, tokenizer and settings of a version mends every other file of it that is damaged.
    """
    home, special = folder / "shards", tokenizer.specials(model)
    text = runs.write_text(folder / "tokenizer/.new", model.to_str(pretty=True))
    settings = _named(text, folder / "tokenizer", ".json"), data.longest_document
    encoded = engine.run(tokenise, parts, home / ".tokens", *settings, engine=data.engine, workers=data.workers)
    tables = (pq.read_table(part, columns=["record_id", "domain"]).to_pydict() for part in parts)
    domains = (zip(table["record_id"], table["domain"], strict=True) for table in tables)
    splits = split_of(dict(itertools.chain.from_iterable(domains)), data.validation_share)
    vocabulary = max(model.get_vocab().values()) + 1  # ids of a loaded tokenizer may have gaps
    width = "uint16" if vocabulary <= 65536 else "uint32"
    shards, sums, index = list[dict[str, Any]](), dict[str, np.ndarray](), [INDEX.empty_table()]
    for part, file in zip(parts, encoded, strict=True):
        table = pq.read_table(file)
        here = np.array([splits[name] for name in table["record_id"].to_pylist()])
        for split in SPLITS:
            mine = table.filter(pa.array(here == split))
            if len(mine):
                entry, rows = _shard(home, mine, split, width)
                shards.append(entry | {"records": part.stem})
                sums[entry["name"]] = versions.checksums(home / f"{entry['name']}.bin")
                index.append(rows)
    shards.sort(key=lambda entry: (entry["split"], entry["name"]))
    rows = pa.concat_tables(index).sort_by([("split", "ascending"), ("shard", "ascending"), ("offset", "ascending")])
    for name in ("domain", "split", "shard"):  # numbers as they lie on disk are what the reader maps
        rows = rows.set_column(INDEX.get_field_index(name), name, rows[name].combine_chunks().dictionary_encode())
    with runs.replacing(home / ".index") as temporary:
        feather.write_feather(rows.combine_chunks(), temporary, compression="uncompressed", chunksize=max(1, len(rows)))
    listed = _named(home / ".index", home, ".index.arrow")
    with runs.replacing(home / ".xxh") as temporary:
        np.concatenate([sums[entry["name"]] for entry in shards]).tofile(temporary)
    summed = _named(home / ".xxh", home, ".xxh")
    counts = [(part, pq.read_metadata(part).num_rows) for part in parts]
    sources = [{"name": part.stem, "documents": count, "bytes": part.stat().st_size} for part, count in counts]
    tokens: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    counted = pa.concat_tables(index).group_by(["split", "domain"]).aggregate([("tokens", "sum")])
    for row in counted.sort_by("domain").to_pylist():
        tokens[row["split"]][row["domain"]] = row["tokens_sum"]
    manifest = {
        "format": versions.FORMAT, "dtype": width, "vocab_size": vocabulary, "specials": special,
        "longest_document": settings[1],
        "pad_id": special["<pad>"], "eos_id": special["<eos>"], tokenizer.STAMP: runs.digest(settings[0]),
        "mixture": mixing.shares(tokens["train"], data.temperature, data.max_share), "shards": shards,
        "records": [entry | {"sha256": runs.digest(file)} for entry, file in zip(sources, parts, strict=True)],
        "tokens": tokens, "divided": pc.sum(pc.equal(rows["part"], 1)).as_py(), "index_sha256": runs.digest(listed),
        "checksums_sha256": runs.digest(summed),
    }  # fmt: skip
    versions.commit(folder, manifest)
    shutil.rmtree(home / ".tokens")
    return manifest


def _shard(home: Path, table: pa.Table, split: str, width: str) -> tuple[dict[str, Any], pa.Table]:
    """Write one shard; its entry of the manifest, and its rows of the index."""
    tokens, size = table["tokens"].combine_chunks(), len(table)
    lengths = pc.list_value_length(tokens).to_numpy().astype(np.int64)
    path = _named(_raw(home / ".shard", tokens, width), home, ".bin")
    entry = {"name": path.stem, "split": split, "tokens": int(lengths.sum()), "documents": size}
    entry |= {"sha256": runs.digest(path)}
    columns = [*(table[name] for name in INDEX.names[:3]), pa.repeat(split, size), pa.repeat(path.stem, size)]
    return entry, pa.table([*columns, np.cumsum(lengths) - lengths, lengths], schema=INDEX)


def _raw(path: Path, tokens: pa.Array, width: str, sha256: str = "") -> Path:
    """Write tokens as they lie in a shard. Raises `ValueError` when they ought to have another SHA-256."""
    with runs.replacing(path) as temporary:
        pc.list_flatten(tokens).to_numpy().astype(width).tofile(temporary)
        if sha256 and runs.digest(temporary) != sha256:
            raise ValueError(f"{path.name}, made again, differs from the manifest: another version of the tokenizers?")
    return path


def rebuild(folder: Path, name: str, version: str = "") -> Path:
    """Make one shard again from its records. Raises `ValueError` when it would not be the same bytes as before."""
    manifest = versions.read(folder, version)
    known = {shard["name"]: shard for shard in manifest["shards"]}
    if not (entry := known.get(name)):
        raise ValueError(f"shard {name!r} is none of {', '.join(known)}")
    part = folder / f"records/{entry['records']}.parquet"
    index, model = versions.index(folder, manifest), versions.tokenizer(folder, manifest)
    for file, sha in versions.files(manifest):
        if folder / file in (part, index, model) and not versions.whole(folder / file, sha):
            raise ValueError(f"shard {name} is made from {file}, which changed or is gone: restore that first")
    listed = ds.dataset(index, format="ipc").to_table()
    mine = listed.filter((ds.field("shard") == name) & (ds.field("split") == entry["split"]))["record_id"]
    table = tokenise(pq.read_table(part), model, manifest["longest_document"])
    tokens = table.filter(pc.is_in(table["record_id"], mine.cast(pa.string()).combine_chunks()))[
        "tokens"
    ].combine_chunks()
    return _raw(folder / f"shards/{name}.bin", tokens, manifest["dtype"], entry["sha256"])
