"""A small corpus on disk, built once for every test of the data room."""

import tempfile
from functools import lru_cache
from pathlib import Path

from stackpkg import params, runs
from stackpkg.data import labelled, longrange, provenance, shards
from stackpkg.data.provenance import Record

WORDS = ["alpha", "beta", "gamma", "delta", "order", "token", "shard", "stream", "window", "record", "licence", "mask"]


def sentence(seed: int, words: int) -> str:
    return " ".join(f"{WORDS[(seed * 7 + k * k) % len(WORDS)]}{(seed * 31 + k) % 97}" for k in range(words))


def module(seed: int) -> str:
    return "\n\n".join(
        f'def f{k}_{seed}(a, b):\n    """Compute number {k} of module {seed} here.\n\n    More {seed}.\n    """\n'
        f"    x = a + {k * 100 + seed}\n    y = x * b\n    return x - y\n"
        for k in range(5)
    )


def records() -> list[Record]:
    made = [Record(f"folder:t/code{k}.py", "code", "MIT", 1_700_000_000, module(k)) for k in range(30)]
    made += [Record(f"folder:t/doc{k}.md", "docs", "MIT", 1_700_000_000, sentence(k, 40 + 9 * k)) for k in range(40)]
    return provenance.assess(made, ["folder:t/"], 10**9)


def profile(**changes: object) -> params.Params:
    base = {
        "data": {"vocab_size": 400, "shard_tokens": 3000, "validation_share": 0.1, "temperature": 0.5},
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
        },
        "model": {"config": {"sliding_window": 16}},
        "evaluation": {"pairs": 8},
    }
    return params.validate(base | changes)


@lru_cache(maxsize=1)
def corpus() -> Path:
    """The `data/` folder of a run, complete; tests copy it before they change it."""
    folder, p, made = Path(tempfile.mkdtemp(prefix="stackpkg-test-")) / "data", profile(), records()
    model = shards.train_tokenizer((record.text for record in made), p.data.vocab_size)
    stamp = {shards.STAMP: shards.build(folder, made, model, p.data)[shards.STAMP]}
    held = {name for name, split in shards.split_of(made, 0.1).items() if split == "validation"}
    pairs = labelled.encode(labelled.mine(made, held, p.auxiliary, 8), model, p.auxiliary)
    provenance.write(folder / "pairs.parquet", pairs, **stamp)
    provenance.write(folder / "long_range.parquet", longrange.generate(p), **stamp)
    assert runs.read_json(folder / "manifest.json")["dtype"] == "uint16"
    return folder
