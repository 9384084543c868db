"""The tokenizer, and immutable token shards with a checksummed manifest; a corrupt one is rebuilt bit for bit."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from stackpkg import runs
from stackpkg.data import mixing, provenance
from stackpkg.data.provenance import Record
from stackpkg.params import Data

SPECIALS = ["<pad>", "<eos>", "<query>", "<key>", "<value>"]
PAD, EOS, QUERY, KEY, VALUE = range(len(SPECIALS))
STAMP = "tokenizer_sha256"  # the fingerprint that every file of token ids carries


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-pair encoding (Sennrich et al. 2016) over bytes (Radford et al. 2019); `vocab_size` counts the specials."""
    model, level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    model.pre_tokenizer, model.decoder = level(add_prefix_space=False), decoders.ByteLevel()
    settings: dict[str, Any] = {"special_tokens": SPECIALS, "initial_alphabet": sorted(level.alphabet())}
    model.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **settings))
    return model


def encode(model: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text. "<eos>" written in a text is text, never the control token."""
    model.encode_special_tokens = True
    return [item.ids for item in model.encode_batch_fast(texts, add_special_tokens=False)]


def check_stamp(name: str, found: str, expected: str) -> None:
    """Raises `ValueError` when a file was made with another tokenizer than the shards, or is another one."""
    if found != expected:
        raise ValueError(f"{name} has tokenizer {found[:16] or 'none'}, the shards {expected[:16]}: run 10 and 13")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer the shards below `folder` were made with."""
    file, manifest = folder / "tokenizer.json", runs.read_json(folder / "manifest.json")
    check_stamp(file.name, runs.digest(file), manifest[STAMP])
    return Tokenizer.from_file(str(file))


def read_ids(path: Path, expected: str) -> list[dict[str, Any]]:
    """Rows of a Parquet file that holds token ids; `expected` is the fingerprint of the shards' tokenizer."""
    table = pq.read_table(path)
    check_stamp(path.name, (table.schema.metadata or {}).get(STAMP.encode(), b"").decode(), expected)
    return table.to_pylist()


def split_of(records: Iterable[Record], share: float) -> dict[str, str]:
    """record_id -> train or validation, by hash of the id; a domain of two or more documents holds out at least one."""
    places: dict[str, dict[str, float]] = defaultdict(dict)
    for record in records:
        place = int(mixing.hashed(1, "validation", record.record_id)[0]) / 2.0**64
        places[record.domain][record.record_id] = place
    limits = {domain: max(share, min(found.values())) * (len(found) > 1) for domain, found in places.items()}
    return {n: "validation" if at <= limits[d] else "train" for d, found in places.items() for n, at in found.items()}


def build(folder: Path, records: Sequence[Record], model: Tokenizer, data: Data) -> dict[str, Any]:
    """Write `records.parquet`, `tokenizer.json`, `shards/`, and last of all `manifest.json`, which it returns.

    The old manifest goes first, so a build that is killed leaves none and nothing opens what it left.
    """
    (folder / "manifest.json").unlink(missing_ok=True)
    for stale in [*folder.glob("shards/*.bin"), *folder.glob("shards/.*")]:
        stale.unlink()
    ordered, splits = sorted(records, key=lambda record: record.record_id), split_of(records, data.validation_share)
    index, shards, tokens = [], [], {split: Counter[str]() for split in ("train", "validation")}
    width = "uint16" if data.vocab_size <= 65536 else "uint32"
    for split, counts in tokens.items():
        members = [record for record in ordered if splits[record.record_id] == split]
        for number, group in enumerate(_groups(members, model, data.shard_tokens)):
            name, offset = f"{split}-{number:05d}.bin", 0
            for record, ids in group:
                about = {"record_id": record.record_id, "domain": record.domain, "split": split}
                index.append(about | {"shard": name, "offset": offset, "tokens": len(ids)})
                counts[record.domain] += len(ids)
                offset += len(ids)
            digest = runs.digest(_write(folder / "shards" / name, [ids for _, ids in group], width))
            shards.append({"name": name, "sha256": digest, "tokens": offset, "documents": len(group)})
    rows = map(provenance.row, ordered)
    manifest = {
        "version": 1, "dtype": width, "vocab_size": model.get_vocab_size(), "pad_id": PAD, "eos_id": EOS,
        "tokens": tokens, "mixture": mixing.shares(tokens["train"], data.temperature), "shards": shards,
        STAMP: runs.digest(runs.write_text(folder / "tokenizer.json", model.to_str(pretty=True))),
        "records_sha256": runs.digest(provenance.write(folder / "records.parquet", rows)),
        "index_sha256": runs.digest(provenance.write(folder / "shards/index.parquet", index)),
    }  # fmt: skip
    runs.write_json(folder / "manifest.json", manifest)
    return manifest


def _groups(records: Sequence[Record], model: Tokenizer, limit: int) -> Iterator[list[tuple[Record, list[int]]]]:
    """Documents with their tokens and `<eos>`, a shard at a time: at most `limit` tokens, or one document."""
    group: list[tuple[Record, list[int]]] = []
    for start in range(0, len(records), 256):
        batch = records[start : start + 256]
        for record, ids in zip(batch, encode(model, [item.text for item in batch]), strict=True):
            if group and sum(len(made) for _, made in group) + len(ids) + 1 > limit:
                yield group
                group = []
            group.append((record, [*ids, EOS]))
    if group:
        yield group


def _write(path: Path, parts: Iterable[list[int]], width: str, expected: str = "") -> Path:
    with runs.replacing(path) as temporary:
        np.concatenate([np.array(part, width) for part in parts]).tofile(temporary)
        if expected and runs.digest(temporary) != expected:
            raise ValueError(f"{path.name} rebuilt from the records differs from the manifest: they have changed")
    return path


def verify(folder: Path) -> list[str]:
    """Names below `folder` of files that are missing or not the manifest's by SHA-256; empty when all is well."""
    manifest = runs.read_json(folder / "manifest.json")
    expected = {f"shards/{entry['name']}": entry["sha256"] for entry in manifest["shards"]}
    expected |= {"records.parquet": manifest["records_sha256"], "tokenizer.json": manifest[STAMP]}
    expected |= {"shards/index.parquet": manifest["index_sha256"]}
    return [name for name, sha in expected.items() if not (folder / name).exists() or runs.digest(folder / name) != sha]


def quarantine(folder: Path, name: str) -> Path:
    """Rename a shard so that nothing reads it; it is never deleted. Returns its new path."""
    path = folder / "shards" / name
    return path.rename(f"{path}.quarantined-{len(list(path.parent.glob(name + '.quarantined-*')))}")


def rebuild(folder: Path, name: str) -> Path:
    """Make one shard again from the records. Raises `ValueError` when it would not be the same bytes as before."""
    manifest = runs.read_json(folder / "manifest.json")
    expected = next(entry["sha256"] for entry in manifest["shards"] if entry["name"] == name)
    index = pq.read_table(folder / "shards/index.parquet", filters=[("shard", "=", name)]).sort_by("offset")
    wanted = index["record_id"].to_pylist()
    rows = pq.read_table(folder / "records.parquet", filters=[("record_id", "in", wanted)])
    texts = dict(zip(rows["record_id"].to_pylist(), rows["text"].to_pylist(), strict=True))
    made = encode(load_tokenizer(folder), [texts[record] for record in wanted])
    return _write(folder / "shards" / name, ([*ids, EOS] for ids in made), manifest["dtype"], expected)
