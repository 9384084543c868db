import shutil
import subprocess
import sys

import numpy as np
import pytest
from data_corpus import corpus, profile, records
from transformers import PreTrainedTokenizerFast

from stackpkg import runs
from stackpkg.data import provenance, shards
from stackpkg.data.stream import Corpus


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(corpus(), tmp_path / "data")
    return tmp_path / "data"


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_shards_hold_the_documents_and_nothing_else(folder):
    read, model = Corpus(folder), shards.load_tokenizer(folder)
    texts = {record.record_id: record.text for record in records()}
    assert sorted(read.records) == sorted(texts)
    for d, name in enumerate(read.records):
        ids = read.read(iter([(d, 0, int(read.tokens[d]))]))
        assert ids[-1] == shards.EOS and (ids[:-1] > shards.VALUE).all() and model.decode(ids[:-1]) == texts[name]
    manifest = read.manifest
    assert sum(map(len, read.maps)) == sum(entry["tokens"] for entry in manifest["shards"])
    assert len(manifest["shards"]) > 3 and max(entry["tokens"] for entry in manifest["shards"]) <= 3000
    assert sum(manifest["mixture"].values()) == pytest.approx(1)


def test_each_domain_holds_documents_out(folder):
    splits = shards.split_of(records(), 1e-9)
    held = [record.domain for record in records() if splits[record.record_id] == "validation"]
    assert sorted(held) == ["code", "docs"]
    assert shards.split_of(records()[:1], 0.3) == {records()[0].record_id: "train"}


def test_building_twice_gives_the_same_bytes_in_another_process(tmp_path, folder):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from data_corpus import *\n"
        "made = records()[::-1]; model = shards.train_tokenizer((r.text for r in records()), 400)\n"
        "shards.build(Path(sys.argv[2]), made, model, profile().data)"
    )
    here = str(runs.root() / "tests")
    subprocess.run([sys.executable, "-c", code, here, str(tmp_path / "again")], check=True, cwd=runs.root())
    assert runs.digest(tmp_path / "again/manifest.json") == runs.digest(folder / "manifest.json")


def test_control_tokens_in_a_text_stay_text(folder):
    model = shards.load_tokenizer(folder)
    ids = shards.encode(model, ["a <eos> <query> <pad> b"])[0]
    assert min(ids) > shards.VALUE and model.decode(ids) == "a <eos> <query> <pad> b"


def test_transformers_reads_the_tokenizer(folder):
    fast = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>", eos_token="<eos>")
    assert (fast.pad_token_id, fast.eos_token_id) == (shards.PAD, shards.EOS)
    assert fast("def f(a, b):")["input_ids"] == shards.encode(shards.load_tokenizer(folder), ["def f(a, b):"])[0]


def test_another_tokenizer_is_refused(folder):
    shards.train_tokenizer(["other text"], 300).save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        shards.load_tokenizer(folder)
    provenance.write(folder / "ids.parquet", [{"a": 1}], **{shards.STAMP: "x"})
    with pytest.raises(ValueError, match=r"ids\.parquet"):
        shards.read_ids(folder / "ids.parquet", "y")


def test_a_flipped_bit_is_named_refused_and_mended(folder):
    assert shards.verify(folder) == []
    name = runs.read_json(folder / "manifest.json")["shards"][1]["name"]
    before = runs.digest(folder / "shards" / name)
    flip(folder / "shards" / name)
    assert shards.verify(folder) == [f"shards/{name}"]
    with pytest.raises(ValueError, match=name):
        Corpus(folder)
    aside = shards.quarantine(folder, name)
    assert aside.exists() and not (folder / "shards" / name).exists()
    shards.rebuild(folder, name)
    assert runs.digest(folder / "shards" / name) == before and shards.verify(folder) == []
    flip(folder / "shards" / name)
    assert shards.quarantine(folder, name) != aside and aside.exists()


@pytest.mark.parametrize("name", ["records.parquet", "tokenizer.json", "shards/index.parquet"])
def test_every_file_of_the_corpus_is_under_the_checksums(folder, name):
    flip(folder / name)
    assert shards.verify(folder) == [name]


def test_a_rebuild_from_changed_records_is_refused(folder):
    changed = [provenance.row(record) for record in provenance.load(folder / "records.parquet")]
    provenance.write(folder / "records.parquet", [row | {"text": row["text"] + " x"} for row in changed])
    name = runs.read_json(folder / "manifest.json")["shards"][0]["name"]
    before = runs.digest(folder / "shards" / name)
    with pytest.raises(ValueError, match="differs from the manifest"):
        shards.rebuild(folder, name)
    assert runs.digest(folder / "shards" / name) == before


def test_a_build_that_dies_leaves_no_manifest_and_no_half_shard(folder, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "concatenate", dies)
    with pytest.raises(KeyboardInterrupt):
        shards.build(folder, records(), shards.load_tokenizer(folder), profile().data)
    assert not (folder / "manifest.json").exists() and not list(folder.glob("shards/*.bin"))
    assert not list(folder.glob("shards/.*"))
    with pytest.raises(ValueError, match=r"manifest\.json is missing"):
        Corpus(folder)


def test_a_large_vocabulary_takes_four_bytes(tmp_path, folder):
    data = profile().data.model_copy(update={"vocab_size": 70_000})
    assert shards.build(tmp_path / "wide", records(), shards.load_tokenizer(folder), data)["dtype"] == "uint32"
    assert shards.verify(tmp_path / "wide") == []
