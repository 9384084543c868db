"""Versions: of the architecture, semantic, by what differs from the architecture promoted before; of the state of the
routers and of the retriever, apart from the weights.

The first architecture is 1.0.0. Against the promoted one, the most serious difference decides:

major  whatever is not named below: weights of another shape or meaning, which nothing can take over
minor  the topology of attention (window, pattern, blocks, summaries, linear mode, retrieval), or the experts
patch  a number that enters the computation and no weight: an epsilon, a scale of the positions, a temperature
none   what neither training nor serving computes with
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stackpkg.objectives import routing
from stackpkg.params import Params
from stackpkg.runs import read_json
from stackpkg.training.snapshots import MANIFEST

ROUTER, RETRIEVER = "1.1", "1.0"  # the form of these files: major when an older reader would misread them
ROUTER_FILE, RETRIEVER_FILE = "router.safetensors", "retriever.json"
KINDS = ("none", "patch", "minor", "major")
# names of StackConfig and of the configurations of transformers
TOPOLOGY = {
    "attention_pattern", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "dilation",
    "block_size", "summaries_per_block", "summary_pooling", "summaries_per_level", "linear_from", "feature_map",
    "retrieval", "num_experts", "num_experts_per_tok", "num_local_experts", "n_routed_experts", "n_shared_experts",
    "decoder_sparse_step", "mlp_only_layers",
}  # fmt: skip
NUMBERS = {
    "rms_norm_eps", "layer_norm_eps", "rope_theta", "rope_alpha", "rope_parameters", "rope_scaling",
    "gate_temperature", "attention_dropout", "hidden_dropout", "max_position_embeddings", "norm_topk_prob",
    "routed_scaling_factor", "router_aux_loss_coef", "router_jitter_noise", "attention_multiplier",
}  # fmt: skip
SILENT = {
    "transformers_version", "dtype", "torch_dtype", "_name_or_path", "name_or_path", "architectures", "use_cache",
    "initializer_range", "output_router_logits", "output_attentions", "output_hidden_states", "return_dict",
    "id2label", "label2id", "problem_type", "chunk_size_feed_forward", "is_encoder_decoder", "auto_map",
    "router_spread", "_attn_implementation", "_experts_implementation", "distributed_config", "quantization_config",
}  # fmt: skip


def change(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The kind of change between two configurations (`config.json`), and what differs that decides it."""
    old, new = (json.loads(json.dumps(given, default=str)) for given in (dict(before), dict(after)))
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            kind = (
                "none" if name in SILENT else "patch" if name in NUMBERS else "minor" if name in TOPOLOGY else "major"
            )
            found[kind].append(f"{name} {old.get(name)} -> {new.get(name)}")
    worst = next((kind for kind in reversed(KINDS[1:]) if found[kind]), "none")
    return worst, found[worst] if worst != "none" else []


def bump(version: str, kind: str) -> str:
    """The next version after `version` for a change of that kind (https://semver.org, 6 to 8)."""
    major, minor, patch = map(int, version.split("."))
    return {
        "none": version, "patch": f"{major}.{minor}.{patch + 1}", "minor": f"{major}.{minor + 1}.0",
        "major": f"{major + 1}.0.0",
    }[kind]  # fmt: skip


def architecture(config: Mapping[str, Any], artifacts: Path) -> str:
    """The version of `config`, by the registry in `artifacts`: that of an architecture promoted before, if it is the
    same, else the next one after the current that nothing else has."""
    path = artifacts / "registry.json"
    registry = read_json(path) if path.exists() else {"current": None, "history": []}
    known = {
        event["version"]: event["versions"]["architecture"]
        for event in registry["history"]
        if event["event"] == "promoted"
        and "versions" in event
        and (artifacts / event["version"] / "config.json").exists()
    }
    kinds = {name: change(read_json(artifacts / name / "config.json"), config)[0] for name in known}
    if same := [known[name] for name in known if kinds[name] == "none"]:
        return same[-1]
    if not known:
        return "1.0.0"
    current = registry["current"] if registry["current"] in known else [*known][-1]
    version = bump(known[current], kinds[current])
    while version in known.values():
        version = bump(version, kinds[current])
    return version


def describe(
    p: Params, job: str, attempt: int, data: str, config: Mapping[str, Any], artifacts: Path
) -> dict[str, Any]:
    """What the manifest says of all snapshots of an attempt: `data` is the digest of the corpus' manifest."""
    return {
        "run": p.run,
        "job": job,
        "attempt": attempt,
        "data": data,
        "layout": p.layout.model_dump(mode="json"),
        "versions": {"architecture": architecture(config, artifacts), "router": ROUTER, "retriever": RETRIEVER},
        "config": {name: value for name, value in config.items() if name != "_name_or_path"},  # of this machine
    }


def compatible(path: Path, given: str, ours: str) -> None:
    """Raises `ValueError` where a file has another major version than this code reads."""
    if given.split(".")[0] != ours.split(".")[0]:
        raise ValueError(
            f"{path.parent.name}/{path.name} has version {given}, this code reads {ours.split('.')[0]}.x: take the "
            "file from a snapshot of that version, or the code that wrote it"
        )


def check(checkpoint: Path, config: Mapping[str, Any]) -> None:
    """Raises `ValueError` where a job of `config` can't take over the weights of a checkpoint: a breaking change."""
    about = read_json(checkpoint / MANIFEST)
    kind, why = change(about["config"], config)
    resized = [
        line for line in why if line.split()[0] in routing.EXPERTS
    ]  # a minor change; the weights have another shape
    if kind == "major" or resized:
        raise ValueError(
            f"{checkpoint.name} has architecture {about['versions']['architecture']}, and this job differs from it "
            f"by a breaking change: {'; '.join(why)}. Give the configuration of the checkpoint, or begin a new job"
        )
