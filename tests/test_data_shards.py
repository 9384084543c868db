"""Record files, divided documents and the build: the same bytes from any order, after any kill."""

import errno
import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_corpus import documents, profile, sentence
from hypothesis import example, given
from hypothesis import strategies as st

from stackpkg import runs
from stackpkg.data import engine, manifest, records, shards, tokenizer
from stackpkg.data.corpus import Corpus

DATA = profile().data
DOCUMENTS = documents()  # once: they carry the time
MODEL = tokenizer.train_tokenizer((str(row["text"]) for row in DOCUMENTS), 400)


def rows(texts, domain="docs"):
    names = [f"folder:t/{domain}{k}" for k in range(len(texts))]
    return [
        {"record_id": hashlib.sha256(name.encode()).hexdigest()[:16], "source": name, "domain": domain, "text": text}
        for name, text in zip(names, texts, strict=True)
    ]


def record_files(folder, made, data=DATA, sizes=()):
    """`made`, in parts of `sizes` rows, partitioned into record files."""
    cuts = [0, *np.cumsum(sizes, dtype=int).tolist(), len(made)]
    pieces = [records.table(made[a:b]) for a, b in itertools.pairwise(cuts)]
    parts = [engine.write(folder / f"parts/{k:05d}.parquet", piece) for k, piece in enumerate(pieces)]
    ids = sorted(str(row["record_id"]) for row in made)
    keep = pa.table({"record_id": ids, "trust": [int(name, 16) / 2**64 for name in ids]})
    return shards.partition(parts, keep, folder, data)


def build(folder, made=None, model=MODEL, **changes):
    data = DATA.model_copy(update=changes)
    return shards.build(folder, record_files(folder, made or DOCUMENTS, data), model, data)


def contents(folder):
    found = manifest.read(folder)
    return {name: (folder / name).read_bytes() for name, _ in manifest.files(found)}


# ---- records
def test_record_files_follow_from_the_records_alone(tmp_path):
    made = DOCUMENTS
    expected = [path.name for path in record_files(tmp_path / "a", made)]
    assert len(expected) > 3
    mixed = random.Random(1).sample(made, len(made))
    assert [path.name for path in record_files(tmp_path / "b", mixed, sizes=(1, 0, 30, 12))] == expected
    assert [path.name for path in record_files(tmp_path / "c", mixed, sizes=(50,))] == expected
    assert sorted(path.name for path in (tmp_path / "c/records").iterdir()) == sorted(expected), "nothing else is left"
    found = pa.concat_tables([pq.read_table(tmp_path / "c/records" / name) for name in expected])
    ids = found["record_id"].to_pylist()
    assert ids == sorted(str(row["record_id"]) for row in made), "in order, in files and over them"
    assert dict(zip(ids, found["text"].to_pylist(), strict=True)) == {row["record_id"]: row["text"] for row in made}
    assert found["trust"].to_pylist() == [int(name, 16) / 2**64 for name in ids], "the columns of keep, row by row"


def test_what_is_dropped_or_not_asked_for_is_in_no_record_file(tmp_path):
    made = records.table(DOCUMENTS)
    ids = made["record_id"].to_pylist()
    marked = made.append_column("kept", pa.array([k % 3 > 0 for k in range(len(made))]))
    part = engine.write(tmp_path / "parts/00000.parquet", marked.append_column("decisions", pa.nulls(len(made))))
    files = shards.partition([part], pa.table({"record_id": ids[:40]}), tmp_path, DATA)
    found = pa.concat_tables([pq.read_table(file) for file in files])
    assert sorted(found["record_id"].to_pylist()) == sorted(name for k, name in enumerate(ids[:40]) if k % 3)
    assert found.column_names == records.SCHEMA.names


# ---- splits
@given(st.integers(2, 40), st.floats(1e-9, 0.49), st.integers(0, 10**6))
def test_both_sides_of_a_domain_have_documents(count, share, seed):
    ids = [hashlib.sha256(f"{seed}-{k}".encode()).hexdigest()[:16] for k in range(count + 1)]
    splits = shards.split_of(dict.fromkeys(ids[1:], "many") | {ids[0]: "one"}, share)
    assert splits[ids[0]] == "train" and {splits[name] for name in ids[1:]} == {"train", "validation"}


def test_splits_are_the_share_and_stay_when_documents_join():
    names = [hashlib.sha256(f"{k}".encode()).hexdigest()[:16] for k in range(20_000)]
    few = shards.split_of(dict.fromkeys(names[:10_000], "a"), 0.1)
    held = sum(side == "validation" for side in few.values())
    assert abs(held - 1000) < 4 * np.sqrt(10_000 * 0.1 * 0.9)
    many = shards.split_of(dict.fromkeys(names[::-1], "a"), 0.1)
    assert few.items() <= many.items()


# ---- documents
@example([0] * 4 + [5] + [0] * 20, 12, {5})  # a line ends in the first half alone
@example([0] * 5 + [5] + [0] * 20, 12, {5})
@example([0] * 6 + [5] + [0] * 20, 12, {5})
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=300), st.integers(1, 40), st.sets(st.integers(0, 5), max_size=3)
)
def test_pieces_joined_are_the_document(ids, longest, ends):
    made = np.array(ids, np.uint32)
    pieces = shards.divide(made, longest, np.array(sorted(ends), np.int64))
    assert np.concatenate(pieces).tolist() == ids and all(1 <= len(piece) <= longest for piece in pieces)
    for piece, after in itertools.pairwise(pieces):
        window = np.append(piece, after)[:longest].tolist()
        best = max((k for k in range(longest // 2 + 1, len(window) + 1) if window[k - 1] in ends), default=longest)
        assert len(piece) == best, "the last line end of the second half, else the limit"


def test_a_line_ends_with_its_newline_and_the_indentation_after_it(tmp_path):
    """Byte-level BPE joins a newline with the spaces that follow: without these, code is cut inside its lines."""
    text = "".join(f"    x{k} = {k}\n" for k in range(200))
    model = tokenizer.train_tokenizer([text], 400)
    model.save(str(tmp_path / "t.json"))
    table = shards.tokenise(records.table(rows([text])), tmp_path / "t.json", 64)
    pieces = [model.decode(ids) for ids in table["tokens"].to_pylist()]
    assert "".join(pieces) == text and len(pieces) > 10
    assert any("\n " in token for token in map(model.decode, ([k] for k in range(400)))), "the test needs such a token"
    assert all(piece.rstrip(" ").endswith("\n") for piece in pieces)


def test_a_divided_document_is_read_as_it_was_written(tmp_path):
    long = "\n".join(sentence(k, 20) for k in range(40))
    made = rows([long, "x" * 3000, "\n" * 700, "", "short"])
    found = build(tmp_path, made, longest_document=64)
    read, texts = Corpus(tmp_path), {row["record_id"]: row["text"] for row in made}
    assert found["divided"] == 3 and set(read.records) == set(texts) and read.tokens.max() <= 64
    for name, text in texts.items():
        pieces = np.flatnonzero(read.records == name)
        assert read.part[pieces].tolist() == list(range(len(pieces)))
        ids = np.concatenate([read.read(d, 0, int(read.tokens[d])) for d in pieces]).tolist()
        assert ids[-1] == tokenizer.EOS and MODEL.decode(ids[:-1]) == text
        for d in pieces[:-1] if name == made[0]["record_id"] else ():
            assert MODEL.decode(read.read(d, 0, int(read.tokens[d]))).endswith("\n")


def test_control_tokens_in_a_document_stay_text(tmp_path):
    texts = ["a <eos> b <pad>", "<query> <key> 1 <value> 2", *(sentence(k, 9) for k in range(8))]
    build(tmp_path, rows(texts))
    read = Corpus(tmp_path)
    for d in range(len(read.tokens)):
        ids = read.read(d, 0, int(read.tokens[d]))
        assert ids[-1] == tokenizer.EOS and (ids[:-1] > tokenizer.VALUE).all()
        assert MODEL.decode(ids[:-1].tolist()) in texts


def test_batches_of_documents_do_not_show(tmp_path, monkeypatch):
    file = runs.write_text(tmp_path / "model.json", MODEL.to_str())
    part = records.table(DOCUMENTS)
    whole = shards.tokenise(part, file, 100)
    monkeypatch.setattr(shards, "BATCH", 7)
    assert shards.tokenise(pa.concat_tables([part[:11], part[11:]]), file, 100).equals(whole)
    assert len(shards.tokenise(part[:0], file, 100)) == 0


# ---- shards
def test_shards_count_what_is_in_them(tmp_path):
    found, read = build(tmp_path), Corpus(tmp_path)
    for split in shards.SPLITS:
        for domain, tokens in found["tokens"][split].items():
            assert read.tokens[read.members[split, domain]].sum() == tokens
    assert sum(entry["tokens"] for entry in found["shards"]) == read.tokens.sum()
    assert sum(entry["documents"] for entry in found["shards"]) == len(read.tokens)
    assert sum(entry["documents"] for entry in found["records"]) == len(DOCUMENTS)
    assert sum(found["mixture"].values()) == pytest.approx(1) and len(found["shards"]) > 3


def test_a_domain_of_one_document_is_trained_on_and_an_empty_split_is_no_fault(tmp_path):
    found = build(tmp_path, rows(["the only document"]))
    assert found["tokens"] == {"train": {"docs": Corpus(tmp_path).tokens[0]}, "validation": {}}
    both = build(tmp_path / "both", rows(["one"], "code") + rows([sentence(k, 9) for k in range(9)]))
    assert set(both["tokens"]["train"]) == {"code", "docs"} and set(both["tokens"]["validation"]) == {"docs"}


def test_nothing_to_build_of_is_said(tmp_path):
    with pytest.raises(ValueError, match="no record was kept"):
        shards.build(tmp_path, record_files(tmp_path, []), MODEL, DATA)


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    wide = tokenizer.train_tokenizer([sentence(1, 50)], 300)
    wide.add_tokens([f"word{k}" for k in range(70_000)])
    made = rows([f"word{69_000 + k} word{k}" for k in range(30)])
    found = build(tmp_path, made, wide)
    assert found["dtype"] == "uint32" and found["vocab_size"] == wide.get_vocab_size() > 70_000
    read, texts = Corpus(tmp_path), {row["record_id"]: row["text"] for row in made}
    for d, name in enumerate(read.records):
        ids = read.read(d, 0, int(read.tokens[d]))
        assert ids.max() > 65_536 and wide.decode(ids[:-1].tolist()) == texts[name]


# ---- builds that end early
SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_data_shards import *

calls, encode = [], tokenizer.encode
def slow(model, texts):
    calls.append(1)
    time.sleep(600 * (len(calls) > 2))
    return encode(model, texts)
tokenizer.encode = slow
folder = Path(sys.argv[2])
shards.build(folder, sorted(folder.glob("records/*.parquet")), MODEL, DATA)
"""


def test_a_killed_build_goes_on_where_it_was(tmp_path, monkeypatch):
    record_files(tmp_path / "killed", DOCUMENTS)
    shards.build(tmp_path / "whole", sorted(record_files(tmp_path / "whole", DOCUMENTS)), MODEL, DATA)
    arguments = [sys.executable, "-c", SCRIPT, str(runs.root() / "tests"), str(tmp_path / "killed")]
    process = subprocess.Popen(arguments, cwd=runs.root())
    tokens, until = tmp_path / "killed/shards/.tokens", time.monotonic() + 60
    while len(list(tokens.glob("*.key"))) < 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tokens.glob("0*")}
    assert len(before) == 4, "two parts and their keys"
    with pytest.raises(ValueError, match=r"manifest\.json is missing"):
        Corpus(tmp_path / "killed")
    files = sorted((tmp_path / "killed/records").glob("*.parquet"))
    assert len(files) > 3
    commit, after = manifest.commit, {}
    stats = {path: path.stat for path in before}
    monkeypatch.setattr(
        manifest, "commit", lambda *given: after.update({p: s() for p, s in stats.items()}) or commit(*given)
    )
    shards.build(tmp_path / "killed", files, MODEL, DATA)
    assert {path: (found.st_ino, found.st_mtime_ns) for path, found in after.items()} == before
    assert not tokens.exists()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert manifest.ids(tmp_path / "killed") == manifest.ids(tmp_path / "whole")


def test_building_again_writes_no_shard_again(tmp_path):
    build(tmp_path)
    files = [*tmp_path.glob("shards/*.bin"), *tmp_path.glob("records/*.parquet")]
    before = [path.stat().st_ino for path in files]
    build(tmp_path)
    assert [path.stat().st_ino for path in files] == before and len(before) > 10


PLACES = [".shard", ".xxh", ".index", "tokenizer/.new", "versions/.new", "history.jsonl", "manifest.json"]


@pytest.mark.parametrize("place", [*PLACES, "records/.work/file.parquet", ".tokens/00001.parquet"])
def test_a_full_disk_leaves_the_head_as_it_was(tmp_path, monkeypatch, place):
    build(tmp_path, rows([sentence(k, 20) for k in range(40)]))
    before, head = contents(tmp_path), runs.digest(tmp_path / "manifest.json")
    whole = runs.replacing

    @contextmanager
    def full(path):
        with whole(path) as temporary:
            yield temporary
            if str(path).endswith(place):
                os.truncate(temporary, temporary.stat().st_size // 2)
                raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs, "replacing", full)
    with pytest.raises((OSError, RuntimeError), match="No space left on device"):
        build(tmp_path)
    monkeypatch.undo()
    assert runs.digest(tmp_path / "manifest.json") == head and manifest.verify(tmp_path) == []
    assert contents(tmp_path) == before and len(Corpus(tmp_path).records) == 40
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()], "no half-written file is left"
    build(tmp_path)
    build(tmp_path / "other")
    assert contents(tmp_path) == contents(tmp_path / "other") and len(manifest.log(tmp_path)) == 2


def test_building_again_mends_what_is_damaged(tmp_path):
    found, before = build(tmp_path), contents(tmp_path)
    files = manifest.records(tmp_path)
    for name in before:
        if name.startswith("shards/"):
            (tmp_path / name).write_bytes(before[name][:-1] + b"?")
    assert len(manifest.verify(tmp_path)) > 3
    assert shards.build(tmp_path, files, tokenizer.of_shards(tmp_path), DATA) == found
    assert contents(tmp_path) == before and manifest.verify(tmp_path) == [] and len(manifest.log(tmp_path)) == 1


# ---- one shard again
def test_a_shard_is_made_again_to_the_byte(tmp_path):
    found, before = build(tmp_path, longest_document=64), contents(tmp_path)
    for entry in found["shards"]:
        name = f"shards/{entry['name']}.bin"
        aside = manifest.quarantine(tmp_path, name)
        assert aside.exists() and manifest.verify(tmp_path) == [name]
        assert shards.rebuild(tmp_path, entry["name"]) == tmp_path / name
    assert manifest.verify(tmp_path) == [] and contents(tmp_path) == before


def test_twins_on_both_sides_of_the_split_are_made_again_apart(tmp_path):
    found = build(tmp_path, rows(["the same text"] * 2), shard_tokens=1_000_000)
    names = {entry["name"] for entry in found["shards"]}
    assert len(found["shards"]) == 2 and len(names) == 1
    manifest.quarantine(tmp_path, f"shards/{(name := names.pop())}.bin")
    shards.rebuild(tmp_path, name)
    assert manifest.verify(tmp_path) == [] and len(Corpus(tmp_path).records) == 2


def test_a_rebuild_from_what_changed_is_refused(tmp_path):
    found = build(tmp_path)
    entry = found["shards"][0]
    shard, part = tmp_path / f"shards/{entry['name']}.bin", tmp_path / f"records/{entry['records']}.parquet"
    before, kept = shard.read_bytes(), part.read_bytes()
    table = pq.read_table(part)
    changed = pa.array([f"{text} x" for text in table["text"].to_pylist()], pa.large_string())
    engine.write(part, table.set_column(table.column_names.index("text"), "text", changed))
    with pytest.raises(ValueError, match=rf"{entry['name']} is made from records/{part.name}, which changed"):
        shards.rebuild(tmp_path, entry["name"])
    part.unlink()
    with pytest.raises(ValueError, match=rf"records/{part.name}, which changed or is gone"):
        shards.rebuild(tmp_path, entry["name"])
    part.write_bytes(kept)
    with pytest.raises(ValueError, match=f"shard 'nothing' is none of {entry['name']}"):
        shards.rebuild(tmp_path, "nothing")
    assert shard.read_bytes() == before


def test_a_rebuild_that_gives_other_bytes_is_refused(tmp_path, monkeypatch):
    entry, encode = build(tmp_path)["shards"][0], tokenizer.encode
    shard = tmp_path / f"shards/{entry['name']}.bin"
    before = shard.read_bytes()
    monkeypatch.setattr(tokenizer, "encode", lambda model, texts: [ids[::-1] for ids in encode(model, texts)])
    with pytest.raises(ValueError, match=rf"{shard.name}, made again, differs from the manifest"):
        shards.rebuild(tmp_path, entry["name"])
    assert shard.read_bytes() == before
