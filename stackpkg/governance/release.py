"""The model card of a promoted version, made from what was measured and from the digests of the evidence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from stackpkg import runs
from stackpkg.governance.datacards import render


def card(
    folder: runs.RunFolder,
    version: str,
    chosen: str,
    measured: Mapping[str, Mapping[str, Any]],
    limits: Mapping[str, tuple[str, float]],
    about: Mapping[str, Any],
    evidence: list[str],
) -> str:
    """Markdown under the YAML head of the hub (https://huggingface.co/docs/hub/model-cards).

    `measured` holds the numbers of each candidate, of which `chosen` was promoted; `limits` those of the gate; `about`
    the manifest of its snapshot. `evidence` are glob patterns below the run; each file goes in with its digest.
    Raises `ValueError` for a pattern that matches nothing.
    """
    found: dict[str, Path] = {}
    for pattern in evidence:
        paths = folder.matches(pattern)
        if not paths:
            raise ValueError(f"outbox/{folder.name}/{pattern} is no evidence: nothing matches it")
        found |= {path.relative_to(folder.path).as_posix(): path for path in paths}
    dataset = f"held-out documents of corpus {about['data'][:16]}"
    results = [
        EvalResult("text-generation", "held-out", dataset, name, value)
        for name, value in measured[chosen].items()
        if isinstance(value, int | float)
    ]
    head = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", model_name=f"{folder.name} {version}",
        tags=[str(about["config"]["model_type"]), f"architecture-{about['versions']['architecture']}"],
        eval_results=results,
    )  # fmt: skip
    gate = [
        {"name": name, "comparison": sign, "limit": limit}
        | {candidate: values.get(name) for candidate, values in measured.items()}
        for name, (sign, limit) in limits.items()
    ]
    known = {
        "run": folder.name, "version": version, "chosen": chosen, "candidates": list(measured), "gate": gate,
        "about": dict(about), "digests": {name: runs.digest(path) for name, path in found.items()},
    }  # fmt: skip
    return f"---\n{head.to_yaml()}\n---\n\n{render('release_card.md.j2', known)}"
