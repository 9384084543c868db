"""Versions of a corpus: what changed is named, what was is still read, and the history says so."""

import json
import shutil

import numpy as np
import pytest
from data_corpus import corpus
from test_data_shards import build, contents, rows, sentence

from stackpkg import runs
from stackpkg.data import manifest, shards, tokenizer
from stackpkg.data.corpus import Corpus

KINDS = ["shards/*.bin", "shards/*.xxh", "records/*.parquet", "shards/*.index.arrow", "tokenizer/*.json"]


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(corpus(), tmp_path / "data")


def two_versions(folder):
    """Ids of a version and of a second one, the head, whose files lie beside those of the first."""
    for count in (30, 40):
        build(folder, rows([sentence(k, 20) for k in range(count)]))
    return [entry["version"] for entry in reversed(manifest.log(folder))]


def flip(path, at=None):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 if at is None else at] ^= 1
    path.write_bytes(raw)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def of_version(folder, kind):
    wanted = {folder / name for name, _ in manifest.files(manifest.read(folder))}
    return sorted(wanted & set(folder.glob(kind)))


def version(number):
    return {"format": manifest.FORMAT, "number": number}


def test_a_corpus_of_another_format_is_refused(tmp_path):
    manifest.commit(tmp_path, {"format": 2})
    with pytest.raises(ValueError, match="of format 2, this package reads 3: run notebook 10, and remove the old one"):
        Corpus(tmp_path)


# ---- damage
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", [flip, truncate, empty, lambda path: path.unlink()])
def test_damage_of_any_kind_to_any_kind_of_file_is_named(folder, kind, damage):
    assert manifest.verify(folder) == [] == manifest.verify(folder, sample=8)
    for path in of_version(folder, kind)[:2]:
        kept, name = path.read_bytes(), path.relative_to(folder).as_posix()
        damage(path)
        assert manifest.verify(folder) == [name]
        if kind != "records/*.parquet" or damage is not flip:  # nobody trains on records: their size counts
            assert manifest.verify(folder, sample=8) == [name]
            with pytest.raises(ValueError, match=rf"corrupt or missing: {name}"):
                manifest.check(folder)
        if kind in ("shards/*.xxh", "shards/*.index.arrow"):
            with pytest.raises(ValueError, match=rf"corrupt or missing: {name}"):
                Corpus(folder)
        path.write_bytes(kept)
    assert manifest.verify(folder) == []


@pytest.mark.parametrize("place", [0, 0.3, 0.5, 0.999])
def test_any_byte_of_a_shard_counts(folder, place):
    path = of_version(folder, "shards/*.bin")[-1]
    flip(path, int(place * path.stat().st_size))
    assert manifest.verify(folder) == manifest.verify(folder, sample=1) == [f"shards/{path.name}"]


@pytest.mark.parametrize("damage", [flip, truncate, empty])
def test_a_damaged_head_is_said_and_mended_by_rolling_back(folder, damage):
    version = manifest.log(folder)[0]["version"]
    damage(folder / "manifest.json")
    for use in (manifest.read, manifest.verify, Corpus, tokenizer.of_shards, manifest.records):
        with pytest.raises(ValueError, match=rf"manifest\.json is corrupt.*roll back to one of \['{version}'\]"):
            use(folder)
    assert manifest.rollback(folder, version) == version and manifest.verify(folder) == []
    assert len(manifest.log(folder)) == 1, "the head is where it was"


@pytest.mark.parametrize("damage", [flip, truncate, empty])
def test_a_damaged_version_file_is_named(folder, damage):
    (path,) = folder.glob("versions/*.json")
    damage(path)
    for version in ("", path.stem, path.stem[:4]):
        with pytest.raises(ValueError, match=rf"versions/{path.name} is corrupt"):
            Corpus(folder, version)
    with pytest.raises(ValueError, match=rf"versions/{path.name} is corrupt"):
        manifest.rollback(folder, path.stem)
    path.unlink()
    with pytest.raises(ValueError, match=r"manifest\.json is corrupt, or the version it was is gone"):
        manifest.verify(folder)
    manifest.commit(folder, runs.read_json(folder / "manifest.json"))
    assert manifest.verify(folder) == []


def test_a_sample_draws_other_blocks_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "BLOCK", 64)
    build(tmp_path, shard_tokens=1_000_000)
    path = max(of_version(tmp_path, "shards/*.bin"), key=lambda path: path.stat().st_size)
    count = -(-path.stat().st_size // 64)
    assert count > 100 and manifest.verify(tmp_path, sample=1) == []
    flip(path)
    found = [manifest.verify(tmp_path, sample=count // 2) for _ in range(60)]
    assert found.count([]) > 0 < len(found) - found.count([]), "each is found half the time"
    assert manifest.verify(tmp_path, sample=count) == [f"shards/{path.name}"]


# ---- versions
def test_time_travel_reads_the_tokens_of_then(tmp_path):
    build(tmp_path, rows([sentence(k, 20) for k in range(30)]))
    old = Corpus(tmp_path)
    before = {name: old.read(d, 0, int(old.tokens[d])).copy() for d, name in enumerate(old.records)}
    build(tmp_path, rows([sentence(k, 20) for k in range(40)]))
    again, head = Corpus(tmp_path, old.version), Corpus(tmp_path)
    assert (len(old.records), len(again.records), len(head.records)) == (30, 30, 40)
    for d, name in enumerate(again.records):
        assert np.array_equal(again.read(d, 0, int(again.tokens[d])), before[name])
    assert again.digest == old.digest != head.digest == runs.digest(tmp_path / "manifest.json")
    assert manifest.read(tmp_path, old.version[:6]) == old.manifest != manifest.read(tmp_path)
    assert [path.exists() for path in manifest.records(tmp_path, old.version)] == [True] * len(old.manifest["records"])


def test_rolling_back_and_forth_is_in_the_history(tmp_path):
    first, second = two_versions(tmp_path)
    assert manifest.ids(tmp_path) == sorted([first, second])
    assert manifest.rollback(tmp_path, first[:8]) == first and len(Corpus(tmp_path).records) == 30
    assert manifest.rollback(tmp_path, second) == second and len(Corpus(tmp_path).records) == 40
    told = [(line["action"], line["version"], line["parent"]) for line in manifest.log(tmp_path)]
    assert told == [
        ("rollback", second, first), ("rollback", first, second), ("commit", second, first), ("commit", first, ""),
    ]  # fmt: skip
    times = [line["at"] for line in manifest.log(tmp_path)]
    assert times == sorted(times, reverse=True)


def test_committing_the_same_content_adds_nothing(tmp_path):
    version = two_versions(tmp_path)[1]
    before = (runs.digest(tmp_path / "manifest.json"), manifest.log(tmp_path), manifest.ids(tmp_path))
    assert manifest.commit(tmp_path, manifest.read(tmp_path)) == version
    assert manifest.rollback(tmp_path, version) == version
    build(tmp_path, rows([sentence(k, 20) for k in range(40)]))
    assert (runs.digest(tmp_path / "manifest.json"), manifest.log(tmp_path), manifest.ids(tmp_path)) == before


def test_a_version_that_is_not_whole_is_not_rolled_back_to(tmp_path):
    first, second = two_versions(tmp_path)
    others = {name for name, _ in manifest.files(manifest.read(tmp_path, second))}
    name = next(name for name, _ in manifest.files(manifest.read(tmp_path, first)) if name not in others)
    manifest.quarantine(tmp_path, name)
    with pytest.raises(ValueError, match=rf"{first} is not whole: {name}; rebuild"):
        manifest.rollback(tmp_path, first)
    assert len(Corpus(tmp_path).records) == 40 and len(manifest.log(tmp_path)) == 2
    shards.rebuild(tmp_path, name.split("/")[1].removesuffix(".bin"), first)
    assert manifest.rollback(tmp_path, first) == first and len(Corpus(tmp_path).records) == 30


def test_a_version_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"manifest\.json is missing: run notebook 10"):
        manifest.read(tmp_path)
    assert manifest.log(tmp_path) == manifest.ids(tmp_path) == []
    versions = [manifest.commit(tmp_path, version(k)) for k in range(20)]
    with pytest.raises(ValueError, match=r"version 'xyz' is not there; there are \['"):
        manifest.read(tmp_path, "xyz")
    shared = next(start for start in "0123456789abcdef" if sum(name[0] == start for name in versions) > 1)
    with pytest.raises(ValueError, match=f"version '{shared}' is ambiguous"):
        manifest.read(tmp_path, shared)
    assert [manifest.read(tmp_path, name)["number"] for name in versions] == list(range(20))


def test_a_move_killed_half_way_is_made_good_by_the_next(tmp_path, monkeypatch):
    first = manifest.commit(tmp_path, version(1))
    write = runs.write_text
    for place in ("history.jsonl", "manifest.json"):

        def dies(path, text, place=place):
            if path.name == place:
                raise KeyboardInterrupt
            return write(path, text)

        monkeypatch.setattr(runs, "write_text", dies)
        with pytest.raises(KeyboardInterrupt):
            manifest.commit(tmp_path, version(2))
        monkeypatch.undo()
        assert manifest.read(tmp_path) == version(1)
    second = manifest.commit(tmp_path, version(2))
    assert manifest.read(tmp_path) == version(2)
    assert [(line["version"], line["parent"]) for line in manifest.log(tmp_path)] == [(second, first), (first, "")]
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["version"] for line in lines] == [first, second], "newest last in the file"


# ---- quarantine
def test_each_quarantine_keeps_what_it_set_aside(tmp_path):
    entry, before = build(tmp_path)["shards"][0], contents(tmp_path)
    name, kept = f"shards/{entry['name']}.bin", []
    for byte in (0, 1):
        flip(tmp_path / name, byte)
        damaged = (tmp_path / name).read_bytes()
        kept.append((manifest.quarantine(tmp_path, name), damaged))
        assert manifest.verify(tmp_path) == [name]
        shards.rebuild(tmp_path, entry["name"])
    assert len({path for path, _ in kept}) == 2 and all(path.read_bytes() == damaged for path, damaged in kept)
    assert contents(tmp_path) == before and len(Corpus(tmp_path).records)


def test_prune_removes_what_no_version_names(tmp_path):
    old, new = two_versions(tmp_path)
    aside = manifest.quarantine(tmp_path, f"shards/{manifest.read(tmp_path)['shards'][0]['name']}.bin")
    shards.rebuild(tmp_path, manifest.read(tmp_path)["shards"][0]["name"])
    left = ["records/.x.parquet.ab", "shards/.0123456789abcdef.bin.x1", "shards/0123456789abcdef.bin"]
    for name in left:
        runs.write_text(tmp_path / name, "half")
    assert manifest.prune(tmp_path) == left and manifest.prune(tmp_path) == []
    assert manifest.verify(tmp_path) == manifest.verify(tmp_path, old) == [] and aside.exists()
    alone = {name for name, _ in manifest.files(manifest.read(tmp_path, old))} - {*contents(tmp_path)}
    (tmp_path / f"versions/{old}.json").unlink()
    assert set(manifest.prune(tmp_path)) == alone and alone and manifest.verify(tmp_path, new) == []
