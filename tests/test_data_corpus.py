"""Reading: the tokens of each document, from any process, and never silently others."""

import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from data_corpus import corpus, documents
from test_data_shards import build, rows, sentence

from stackpkg import runs
from stackpkg.data import corpus as reading
from stackpkg.data import manifest, tokenizer
from stackpkg.data.corpus import Corpus


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(corpus(), tmp_path / "data")


@pytest.fixture
def blocks(tmp_path, monkeypatch):
    """A corpus whose shards have many blocks, of 128 bytes."""
    monkeypatch.setattr(manifest, "BLOCK", 128)
    build(tmp_path, shard_tokens=1_000_000)
    return tmp_path


def change(read, shard, token):
    """Change a token on disk, under the open corpus."""
    path = read.folder / f"shards/{read.names[shard]}.bin"
    with path.open("r+b") as file:
        file.seek(token * 2)
        byte = file.read(1)
        file.seek(token * 2)
        file.write(bytes([byte[0] ^ 1]))


def test_every_document_is_read_whole_and_in_pieces(folder):
    read, model = Corpus(folder), tokenizer.of_shards(folder)
    texts = {row["record_id"]: row["text"] for row in documents()}
    assert set(read.records) == set(texts)
    for name, text in texts.items():
        pieces = np.flatnonzero(read.records == name)
        pieces = pieces[np.argsort(read.part[pieces])]
        ids = np.concatenate([read.read(d, 0, int(read.tokens[d])) for d in pieces])
        assert ids[-1] == tokenizer.EOS and model.decode(ids[:-1].tolist()) == text
        d, half = pieces[0], int(read.tokens[pieces[0]]) // 2
        halves = [read.read(d, 0, half), read.read(d, half, int(read.tokens[d]) - half)]
        assert np.array_equal(np.concatenate(halves), ids[: read.tokens[d]])


def test_the_columns_agree_with_the_members(folder):
    read = Corpus(folder)
    numbers = np.sort(np.concatenate(list(read.members.values())))
    assert numbers.tolist() == list(range(len(read.records)))
    for (split, domain), found in read.members.items():
        assert set(read.split[found]) == {split} and set(read.domain[found]) == {domain}
    for shard, entry in enumerate(read.manifest["shards"]):
        inside = np.flatnonzero(read.shard == shard)
        assert read.tokens[inside].sum() == entry["tokens"]
        assert np.array_equal(read.offset[inside], np.cumsum(read.tokens[inside]) - read.tokens[inside])


def test_shards_cannot_be_written_through_the_reader(folder):
    with pytest.raises(ValueError, match="read-only"):
        Corpus(folder).read(0, 0, 4)[0] = 1


def test_a_changed_block_is_refused_by_name_and_no_other(blocks):
    read = Corpus(blocks)
    shard, size = 1, 64  # tokens of a block
    change(read, shard, 3 * size + 5)
    tokens = read.tokens_of(shard)
    assert len(tokens) > 5 * size and not read.tokens_of(shard).flags.writeable
    for k in (0, 1, 2, 4):
        read.check(shard, k)
    message = rf"corrupt block 3 of shards/{read.names[shard]}\.bin"
    with pytest.raises(ValueError, match=message):
        read.check(shard, 3)
    for d in np.flatnonzero(read.shard == shard):
        first, last = int(read.offset[d]), int(read.offset[d] + read.tokens[d]) - 1
        if first // size <= 3 <= last // size:
            with pytest.raises(ValueError, match=message):
                read.read(d, 0, int(read.tokens[d]))
        else:
            assert len(read.read(d, 0, int(read.tokens[d]))) == read.tokens[d]
    with pytest.raises(ValueError, match=f"corrupt or missing: shards/{read.names[shard]}.bin"):
        manifest.check(blocks)


def test_the_last_block_which_is_short_is_checked_too(blocks):
    read = Corpus(blocks)
    last = int(read.manifest["shards"][1]["tokens"]) - 1
    assert (last + 1) % 64, "it is short"
    read.check(1, last // 64)
    change(read, 1, last)
    with pytest.raises(ValueError, match="corrupt block"):
        read.check(1, last // 64)


def test_what_was_corrupt_before_opening_is_never_handed_out(folder):
    read = Corpus(folder)
    d = int(np.flatnonzero(read.shard == 0)[0])
    change(read, 0, int(read.offset[d]))
    for again in (read, Corpus(folder)):
        with pytest.raises(ValueError, match=rf"corrupt block 0 of shards/{read.names[0]}\.bin"):
            again.read(d, 0, 1)


def test_reading_on_finds_what_changed_after_it_was_checked(folder):
    read = Corpus(folder)
    d = int(np.flatnonzero(read.shard == 0)[0])
    read.read(d, 0, 1)
    change(read, 0, int(read.offset[d]))
    done = 0
    with pytest.raises(ValueError, match=rf"corrupt block 0 of shards/{read.names[0]}\.bin"):
        for done in range(reading.EVERY):  # noqa: B007
            read.read(d, 0, 1)
    assert done == reading.EVERY - 2
    with pytest.raises(ValueError, match="corrupt block 0"):  # and never hands it out again
        read.read(d, 0, 1)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-2])])
def test_a_shard_that_is_gone_or_cut_is_refused_when_it_is_read(folder, damage):
    read = Corpus(folder)
    damage(folder / f"shards/{read.names[0]}.bin")
    for d in np.flatnonzero(read.shard == 0)[:2]:
        with pytest.raises(ValueError, match=f"corrupt or missing: shards/{read.names[0]}.bin"):
            read.read(int(d), 0, 1)
    assert len(read.read(int(np.flatnonzero(read.shard == 1)[0]), 0, 2)) == 2


def test_changes_of_a_private_copy_are_found_as_well(folder):
    read, path = Corpus(folder), None
    path = folder / f"shards/{read.names[0]}.bin"
    private = np.memmap(path, read.manifest["dtype"], "c")
    read._maps[0] = np.asarray(private)
    read.check(0, 0)
    private[7] ^= 1
    with pytest.raises(ValueError, match="corrupt block 0"):
        read.check(0, 0)
    assert manifest.verify(folder) == [], "the file is what it was"


def test_a_pickled_corpus_stays_at_its_version(tmp_path):
    build(tmp_path, rows([sentence(k, 20) for k in range(30)]))
    first = Corpus(tmp_path)
    raw = pickle.dumps(first)
    assert len(raw) < 1000, "no tokens travel"
    build(tmp_path, rows([sentence(k, 20) for k in range(40)]))
    again = pickle.loads(raw)
    assert (again.version, again.digest, len(again.records)) == (first.version, first.digest, 30)
    assert all(np.array_equal(again.read(d, 0, 9), first.read(d, 0, 9)) for d in range(30))
    assert len(Corpus(tmp_path).records) == 40


CODE = """
import sys, zlib
from pathlib import Path
from stackpkg.data.corpus import Corpus
read = Corpus(Path(sys.argv[1]))
print(read.digest, zlib.crc32(b"".join(read.read(d, 0, int(n)).tobytes() for d, n in enumerate(read.tokens))))
"""


def test_ranks_open_at_once_and_read_the_same(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    arguments = [sys.executable, "-c", CODE, str(folder)]
    ranks = [subprocess.Popen(arguments, cwd=runs.root(), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {rank.communicate(timeout=120)[0] for rank in ranks}
    assert len(said) == 1 and said.pop().split()[0] == runs.digest(folder / "manifest.json")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before, "readers write nothing"


@pytest.mark.parametrize(("limit", "share"), [(1024, 171), (7, 2), (1, 1)])
def test_a_job_checks_no_more_blocks_than_it_may(tmp_path, monkeypatch, limit, share):
    """The cost of a start does not grow with the corpus: so many blocks in all, or one of each shard."""
    asked, verify = [], manifest.verify
    build(tmp_path, shard_tokens=4_000)
    assert len(manifest.read(tmp_path)["shards"]) == 6
    monkeypatch.setattr(
        manifest, "verify", lambda *given, sample: asked.append(sample) or verify(*given, sample=sample)
    )
    monkeypatch.setattr(manifest, "OPENING", limit)
    manifest.check(tmp_path)
    assert asked == [share]
