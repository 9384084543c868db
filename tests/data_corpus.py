"""A small corpus on disk, built once for every test of the data room."""

import hashlib
import shutil
import tempfile
import time
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from stackpkg import params
from stackpkg.data import (
    conversations,
    engine,
    labelled,
    longrange,
    preferences,
    provenance,
    records,
    shards,
    tokenizer,
)
from stackpkg.data.corpus import Corpus

WORDS = ["alpha", "beta", "gamma", "delta", "order", "token", "shard", "stream", "window", "record", "licence", "mask"]


def sentence(seed: int, words: int) -> str:
    return " ".join(f"{WORDS[(seed * 7 + k * k) % len(WORDS)]}{(seed * 31 + k) % 97}" for k in range(words))


def module(seed: int) -> str:
    return "\n\n".join(
        f'def f{k}_{seed}(a, b):\n    """Compute number {k} of module {seed} here.\n\n    More {seed}.\n    """\n'
        f"    x = a + {k * 100 + seed}\n    y = x * b\n    return x - y\n"
        for k in range(5)
    )


def documents() -> list[dict[str, object]]:
    made = [(f"folder:t/code{k}.py", "code", module(k)) for k in range(30)]
    made += [(f"folder:t/doc{k}.md", "docs", sentence(k, 10 + 3 * k)) for k in range(40)]
    return [
        {
            "record_id": hashlib.sha256(source.encode()).hexdigest()[:16], "source": source, "domain": domain,
            "text": text, "licence": "MIT", "timestamp": int(time.time()) - 1000,
            "content_hash": hashlib.sha256(text.encode()).hexdigest(),
        }
        for source, domain, text in made
    ]  # fmt: skip


def profile(**changes: object) -> params.Params:
    base = {
        "data": {
            "vocab_size": 400,
            "shard_tokens": 3000,
            "validation_share": 0.1,
            "temperature": 0.5,
            "longest_document": 128,
            "max_epochs": 100,
            "workers": 1,
        },
        "curriculum": [
            {"steps": 9, "context": 64, "long_range": 0.25},
            {"steps": 11, "context": 128, "long_range": 0.1},
        ],
        "auxiliary": {
            "pairs": 60,
            "query_tokens": 8,
            "document_tokens": 16,
            "long_range_tasks": 24,
            "hard_negatives": 2,
            "conversations": 24,
            "conversation_tokens": 384,
        },
        "training": {"batch_tokens": 1024},
        "model": {"config": {"sliding_window": 16, "num_hidden_layers": 2}},
        "evaluation": {"pairs": 8},
    }
    return params.validate(base | changes)


@lru_cache(maxsize=1)
def corpus() -> Path:
    """The `data/` folder of a run, complete; tests copy it before they change it."""
    folder, p, made = Path(tempfile.mkdtemp(prefix="stackpkg-test-")) / "data", profile(), records.table(documents())
    part = engine.write(folder / "parts/00000.parquet", made.append_column("language", pa.repeat("en", len(made))))
    keep = pa.table({"record_id": made["record_id"], "trust": pa.repeat(0.9, len(made))})
    model = tokenizer.train_tokenizer(made["text"].to_pylist(), p.data.vocab_size)
    manifest = shards.build(folder, shards.partition([part], keep, folder, p.data), model, p.data)
    stamp = {tokenizer.STAMP: manifest[tokenizer.STAMP]}
    found = Corpus(folder)
    held = {str(record) for record in found.records[found.split == "validation"]}
    pairs = labelled.mine(made, held, p.auxiliary, 8)
    provenance.write(folder / "pairs.parquet", labelled.encode(pairs, model, p.auxiliary), **stamp)
    sizes = p.auxiliary.query_tokens, p.auxiliary.document_tokens
    chosen = preferences.encode(labelled.load(p.auxiliary, pairs).preferences, model, *sizes)
    provenance.write(folder / "preferences.parquet", chosen, **stamp)
    provenance.write(folder / "long_range.parquet", longrange.generate(p), **stamp)
    assert manifest["dtype"] == "uint16"
    return folder


def conversing(folder: Path) -> Path:
    """A run in `folder` whose copy of that data holds conversations and the rules they are read by."""
    data, p = Path(shutil.copytree(corpus(), folder / "data")), profile()
    rows = conversations.generate(p, Corpus(data), tokenizer.of_shards(data))
    provenance.write(data / "conversations.parquet", rows, **{tokenizer.STAMP: Corpus(data).manifest[tokenizer.STAMP]})
    shutil.copy(Path(__file__).parents[1] / "params/scopes.yaml", data)
    return folder
