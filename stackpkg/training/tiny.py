"""Tiny jobs: the models, the profile and the corpus that parity, golden losses and drills train in seconds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stackpkg import params
from stackpkg.data import conversations, labelled, longrange, preferences, provenance, shards, sources, tokenizer
from stackpkg.data.corpus import Corpus
from stackpkg.params import Params
from stackpkg.training import support

STEPS = 3
_COMMON = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
_MOE = _COMMON | {"num_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, dict[str, Any]] = {
    "stackpkg": _MOE | {
        "head_dim": 8, "moe_intermediate_size": 24, "sliding_window": 8, "block_size": 8, "retrieval": True,
    },
    "llama": _COMMON | {"intermediate_size": 48},
    "qwen3": _COMMON | {"intermediate_size": 48, "head_dim": 8},
    "mixtral": _COMMON | {"head_dim": 8, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _MOE | {"head_dim": 8, "intermediate_size": 48, "moe_intermediate_size": 24},
    "olmoe": _MOE | {"intermediate_size": 24},
    "deepseek_v3": _COMMON | {
        "num_key_value_heads": 4, "intermediate_size": 48, "moe_intermediate_size": 24, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
    "gpt_oss": _COMMON | {"head_dim": 8, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2,
                          "sliding_window": 16},
}  # fmt: skip
MODELS |= {model + support.TIED: MODELS[model] | {"tie_word_embeddings": True} for model in ("stackpkg", "llama")}
DENSE = ("llama", "qwen3", "llama" + support.TIED)


def profile(model: str, sizes: dict[str, Any], every_steps: int = STEPS, **training: Any) -> Params:
    """All objectives of the default profile from the first step on, in two micro-batches."""
    config, kind = MODELS[model], model.removesuffix(support.TIED)
    stack = {"kind": "stack", "config": config}
    auto = {"kind": "auto", "config": {"model_type": kind, **config}}
    ramps: dict[str, Any] = {"ramp_steps": {}, "norms_every": 0, "z_loss": 0.001, "preference": 0.1}
    values: dict[str, Any] = {
        "data": {
            "sources": [{"kind": "folder", "path": str(support.TABLE.parents[1] / path), "domain": domain}
                        for path, domain in (("stackpkg", ""), ("book/runbooks", "documentation"))],
            "vocab_size": 512, "shard_tokens": 50_000, "validation_share": 0.1, "longest_document": 128,
            "max_epochs": 100, "workers": 1,
        },
        "curriculum": [{"steps": STEPS, "context": 64, "long_range": 0.25, "preferences": 1.0, "conversations": 1.0}],
        "auxiliary": {"pairs": 80, "query_tokens": 8, "document_tokens": 16, "long_range_tasks": 32,
                      "conversations": 32, "conversation_tokens": 192},
        "model": stack if kind == "stackpkg" else auto,
        "objectives": ramps,
        "optimization": {"learning_rate": 1e-3, "warmup_steps": 1, "floor": 1e-4, "ema_decay": 0.9},
        "training": {"batch_tokens": 1024, "accumulation": 2, "epoch_steps": STEPS} | training,
        "snapshots": {"every_steps": every_steps},
        "layout": {"processes": 1, "fsdp": 1} | sizes,
        "evaluation": {"rows": 2, "pairs": 8},
    }  # fmt: skip
    return params.validate(values)


def prepare(folder: Path, p: Params) -> None:
    """A small corpus from the package's own text, with pairs, preferences, conversations and long-range tasks."""
    audit = list[dict[str, Any]]()
    data = folder / "data"
    parts = sources.write_parts(p.data.sources, data / "parts", p.data.part_mb, audit)
    found = pa.concat_tables([pq.read_table(part) for part in parts])
    keep = pa.table({"record_id": found["record_id"], "trust": pa.repeat(1.0, len(found))})
    words = tokenizer.train_tokenizer(found["text"].to_pylist(), p.data.vocab_size)
    manifest = shards.build(data, shards.partition(parts, keep, data, p.data), words, p.data)
    stamp, corpus = {tokenizer.STAMP: manifest[tokenizer.STAMP]}, Corpus(data)
    held = {str(record) for record in corpus.records[corpus.split == "validation"]}
    mined = labelled.mine(found, held, p.auxiliary, p.evaluation.pairs)
    provenance.write(data / "pairs.parquet", labelled.encode(mined, words, p.auxiliary), **stamp)
    chosen = preferences.encode(labelled.load(p.auxiliary, mined).preferences, words, 8, 16)
    provenance.write(data / "preferences.parquet", chosen, **stamp)
    provenance.write(data / "conversations.parquet", conversations.generate(p, corpus, words), **stamp)
    shutil.copy(support.TABLE.parents[1] / "params/scopes.yaml", data)
    provenance.write(data / "long_range.parquet", longrange.generate(p), **stamp)
