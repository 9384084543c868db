"""The tokenizer: trained here or loaded, with a fingerprint that everything made of token ids carries."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from stackpkg import runs
from stackpkg.data import manifest

SPECIALS = ["<pad>", "<eos>", "<query>", "<key>", "<value>"]
PAD, EOS, QUERY, KEY, VALUE = range(len(SPECIALS))  # ids in a tokenizer trained here; `specials` tells any other's
STAMP = "tokenizer_sha256"  # the fingerprint that every file of token ids carries


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-pair encoding (Sennrich et al. 2016) over bytes (Radford et al. 2019); `vocab_size` counts the specials."""
    model, level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    model.pre_tokenizer, model.decoder = level(add_prefix_space=False), decoders.ByteLevel()
    settings: dict[str, Any] = {"special_tokens": SPECIALS, "initial_alphabet": sorted(level.alphabet())}
    model.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **settings))
    return model


def load(name: str) -> Tokenizer:
    """A `tokenizer.json` file, or a hub id; special tokens it lacks are added. Raises `ValueError` when neither is
    there, or when what is a control token is a piece of text too."""
    file = runs.root() / name
    try:
        local = file.exists() or name.endswith(".json")  # else the hub's own client, which heeds HF_HUB_OFFLINE
        model = Tokenizer.from_file(str(file) if local else hf_hub_download(name, "tokenizer.json"))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"data.tokenizer {name!r} is no tokenizer file and no hub id that answers: {error}") from None
    model.no_truncation()  # a file may ask for either
    model.no_padding()
    model.add_special_tokens(SPECIALS)
    ids = {*specials(model).values()}
    if ids & {*encode(model, [" ".join(SPECIALS)])[0]} or sum(k in ids for k in model.get_vocab().values()) > len(ids):
        raise ValueError(f"data.tokenizer {name!r} has text among its control tokens {sorted(ids)}: mend its ids")
    return model


def specials(model: Tokenizer) -> dict[str, int]:
    """Id of each of `SPECIALS`."""
    known = model.get_vocab()
    return {token: known[token] for token in SPECIALS}


def encode(model: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text. "<eos>" written in a text is text, never the control token."""
    model.encode_special_tokens = True
    return [item.ids for item in model.encode_batch_fast(texts, add_special_tokens=False)]


def check_stamp(name: str, found: str, expected: str) -> None:
    """Raises `ValueError` when a file was made with another tokenizer than the shards, or is another one."""
    if found != expected:
        raise ValueError(f"{name} has tokenizer {found[:16] or 'none'}, the shards {expected[:16]}: run 10 and 13")


def of_shards(folder: Path) -> Tokenizer:
    """The tokenizer the shards below `folder` were made with."""
    found = manifest.read(folder)
    file = manifest.tokenizer(folder, found)
    check_stamp(f"tokenizer/{file.name}", runs.digest(file) if file.exists() else "", found[STAMP])
    return Tokenizer.from_file(str(file))


def read_ids(path: Path, expected: str) -> list[dict[str, Any]]:
    """Rows of a Parquet file that holds token ids; `expected` is the fingerprint of the shards' tokenizer."""
    table = pq.read_table(path)
    check_stamp(path.name, (table.schema.metadata or {}).get(STAMP.encode(), b"").decode(), expected)
    return table.to_pylist()
