"""The tokenizer trained here and the one loaded: control tokens, fingerprint, refusals."""

import json
import shutil
import socket
import subprocess
import sys

import pytest
from data_corpus import corpus
from hypothesis import given
from hypothesis import strategies as st
from test_data_shards import MODEL, build, rows, sentence
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stackpkg import runs
from stackpkg.data import manifest, provenance, tokenizer
from stackpkg.data.corpus import Corpus

TEXTS = [sentence(k, 30) for k in range(20)]


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(corpus(), tmp_path / "data")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Names of tokenizer files are below it, and no hub is there."""
    monkeypatch.setattr(runs, "root", lambda: tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # what the variable sets at import
    return tmp_path


def foreign(*special):
    """A byte-level tokenizer made elsewhere: its ids begin with other control tokens than ours, or none."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(TEXTS, trainer)
    return model


# ---- trained here
@given(st.text())
def test_any_text_comes_back_and_has_no_control_token(text):
    (ids,) = tokenizer.encode(MODEL, [text])
    assert MODEL.decode(ids) == text and all(k > tokenizer.VALUE for k in ids)


def test_control_tokens_have_the_first_ids():
    named = dict(zip(tokenizer.SPECIALS, range(5), strict=True))
    assert tokenizer.specials(MODEL) == named and (tokenizer.PAD, tokenizer.EOS) == (0, 1)
    (ids,) = tokenizer.encode(MODEL, [" ".join(tokenizer.SPECIALS)])
    assert min(ids) > tokenizer.VALUE and MODEL.decode(ids) == " ".join(tokenizer.SPECIALS)
    assert MODEL.get_vocab_size() == 400


def test_training_twice_gives_the_same_fingerprint():
    code = (
        "import sys, json; from stackpkg.data import tokenizer\n"
        "print(tokenizer.train_tokenizer(json.load(sys.stdin), 350).to_str())"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(TEXTS), capture_output=True, text=True, check=True
    )
    assert said.stdout == tokenizer.train_tokenizer(iter(TEXTS), 350).to_str() + "\n"


def test_transformers_reads_the_tokenizer_of_the_shards(folder):
    file = manifest.tokenizer(folder, manifest.read(folder))
    fast = PreTrainedTokenizerFast(tokenizer_file=str(file), pad_token="<pad>", eos_token="<eos>")
    assert (fast.pad_token_id, fast.eos_token_id) == (tokenizer.PAD, tokenizer.EOS)
    assert fast("def f(a, b):")["input_ids"] == tokenizer.encode(tokenizer.of_shards(folder), ["def f(a, b):"])[0]


# ---- loaded
def test_a_tokenizer_without_our_control_tokens_gets_them(home):
    foreign("<s>", "<eos>").save(str(home / "given.json"))
    model = tokenizer.load("given.json")
    named = tokenizer.specials(model)
    assert named["<eos>"] == 1 and sorted(set(named.values()) - {1}) == [320, 321, 322, 323]
    made = rows([*TEXTS, "<s> and <pad> and <eos> are words"])
    found = build(home / "data", made, model)
    assert found["specials"] == named and (found["pad_id"], found["eos_id"]) == (named["<pad>"], 1)
    assert found["vocab_size"] == 324 and tokenizer.load(str(home / "given.json")).to_str() == model.to_str()
    read, texts = Corpus(home / "data"), {row["record_id"]: row["text"] for row in made}
    again = tokenizer.of_shards(home / "data")
    for d, name in enumerate(read.records):
        ids = read.read(d, 0, int(read.tokens[d])).tolist()
        assert ids[-1] == 1 and not {0, *named.values()} & set(ids[:-1]) and again.decode(ids[:-1]) == texts[name]


def test_a_file_that_cuts_and_pads_does_neither_here(home):
    model = foreign()
    model.enable_truncation(4)
    model.enable_padding(length=50)
    model.save(str(home / "given.json"))
    loaded = tokenizer.load("given.json")
    for text, ids in zip(["", *TEXTS], tokenizer.encode(loaded, ["", *TEXTS]), strict=True):
        assert loaded.decode(ids) == text and (len(ids) > 4 or not text)


@pytest.mark.parametrize("name", ["nobody/has-this", "missing.json", "some/missing.json", "broken.json", "folder"])
def test_what_is_no_tokenizer_is_refused(home, name):
    (home / "broken.json").write_text('{"model": ')
    (home / "folder").mkdir()
    with pytest.raises(ValueError, match=rf"data\.tokenizer '{name}' is no tokenizer file and no hub id that answers"):
        tokenizer.load(name)


def test_the_hub_is_asked_for_an_id_only_and_not_when_offline(home, monkeypatch):
    asked, reached = [], []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *where, **_: reached.append(where))
    with pytest.raises(ValueError, match="no hub id that answers"):
        tokenizer.load("nobody/has-this")

    def hub(name, file):
        asked.append((name, file))
        return str(home / "from_hub.json")

    foreign().save(str(home / "from_hub.json"))
    monkeypatch.setattr(tokenizer, "hf_hub_download", hub)
    for name in ("missing.json", "models/missing.json"):
        with pytest.raises(ValueError, match="no tokenizer file"):
            tokenizer.load(name)
    assert tokenizer.load("some/name").to_str() == tokenizer.load("from_hub.json").to_str()
    assert asked == [("some/name", "tokenizer.json")] and reached == []


@pytest.mark.parametrize("words", [{"a": 0, "b": 2, "c": 3}, {"a": 0, "b": 1, "<eos>": 2}])
def test_control_tokens_that_text_writes_too_are_refused(home, words):
    """Appended ids meet words where a vocabulary has gaps; and a word may be called as a control token is."""
    model = Tokenizer(models.WordLevel(words, unk_token="a"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save(str(home / "words.json"))
    with pytest.raises(ValueError, match=r"'words\.json' has text among its control tokens"):
        tokenizer.load("words.json")


def test_ids_behind_a_gap_are_counted(home):
    words = {"<unk>": 0, **{token: k for k, token in enumerate(tokenizer.SPECIALS, 1)}, "far": 70_000}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save(str(home / "gap.json"))
    found = build(home / "data", rows(["far far", "far", "near far"]), tokenizer.load("gap.json"))
    assert (found["dtype"], found["vocab_size"]) == ("uint32", 70_001)
    read = Corpus(home / "data")
    assert all(70_000 in read.read(d, 0, int(count)) for d, count in enumerate(read.tokens))


# ---- fingerprint
def test_another_tokenizer_is_refused(folder):
    found = manifest.read(folder)
    file = manifest.tokenizer(folder, found)
    assert found[tokenizer.STAMP] == runs.digest(file)
    foreign().save(str(file))
    with pytest.raises(ValueError, match=rf"tokenizer/{file.name} has tokenizer .*, the shards {file.stem}"):
        tokenizer.of_shards(folder)
    file.unlink()
    with pytest.raises(ValueError, match="has tokenizer none, the shards"):
        tokenizer.of_shards(folder)


def test_ids_of_another_tokenizer_are_refused(home):
    provenance.write(home / "ids.parquet", [{"a": 1}], **{tokenizer.STAMP: "x"})
    assert tokenizer.read_ids(home / "ids.parquet", "x") == [{"a": 1}]
    with pytest.raises(ValueError, match=r"ids\.parquet has tokenizer x, the shards y"):
        tokenizer.read_ids(home / "ids.parquet", "y")
    provenance.write(home / "bare.parquet", [{"a": 1}])
    with pytest.raises(ValueError, match=r"bare\.parquet has tokenizer none"):
        tokenizer.read_ids(home / "bare.parquet", "y")
