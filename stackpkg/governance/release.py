"""A promoted version and its readers: the model card, made from measures and digests of evidence, and the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.hf_api import RepoFile

from stackpkg import runs
from stackpkg.evaluation import harness
from stackpkg.governance.datacards import render
from stackpkg.training import promotion

ATTRIBUTES = ".gitattributes"  # the hub's own, in every repository


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


def examine(folder: runs.RunFolder, tasks: Path) -> list[str]:
    """Measure the current version of a run on tasks of lm-evaluation-harness, into `eval/lm_eval.json`; a line each.

    Raises `ValueError` where nothing is promoted, and as `harness.measure` does.
    """
    version = promotion.registry(folder.path / "artifacts")["current"]
    if version is None:
        raise ValueError(f"nothing of outbox/{folder.name} is promoted; its notebook 32 tells what the gate missed")
    found = harness.measure(folder.path / "artifacts" / version, folder.path / "data", tasks)
    runs.write_json(folder / "eval/lm_eval.json", {"version": version, **found})
    shown = {name: {k: v for k, v in told.items() if isinstance(v, float)} for name, told in found["results"].items()}
    return [f"{name}  " + "  ".join(f"{k} {v:.4g}" for k, v in told.items()) for name, told in shown.items()]


def push(folder: runs.RunFolder, repository: str) -> str:
    """Send the current version of a run to `repository` (owner/name) of the hub that `HF_ENDPOINT` names, with the
    token of `HF_TOKEN`: one commit, checked file by file, then tagged with the version. A repository that is not there
    is made, private. Pushing the same again changes nothing. Returns the commit.

    Raises `ValueError` where nothing is promoted, the artifact changed since, or the hub has another such version, and
    what the hub's client raises where the hub does not answer or refuses.
    """
    artifacts = folder.path / "artifacts"
    version = promotion.registry(artifacts)["current"]
    if version is None:
        raise ValueError(f"nothing of outbox/{folder.name} is promoted; its notebook 32 tells what the gate missed")
    if not promotion.whole(artifacts, version):
        raise ValueError(f"{version} changed since it was promoted; run notebook 32 of outbox/{folder.name} again")
    api = HfApi(library_name="stackpkg")
    api.create_repo(repository, private=True, exist_ok=True)
    for tag in api.list_repo_refs(repository).tags:
        if tag.name == version:
            if differing := _differing(api, repository, tag.target_commit, artifacts / version):
                raise ValueError(
                    f"{repository} has another {version}, see {differing[0]}; a run has its own repository"
                )
            return tag.target_commit
    about = f"{folder.name} {version}, sha256 {runs.digest(artifacts / version)}"
    commit = api.upload_folder(
        repo_id=repository, folder_path=artifacts / version, commit_message=about, delete_patterns="*"
    ).oid
    if differing := _differing(api, repository, commit, artifacts / version):
        raise ValueError(f"{repository} does not hold {version} as it is here, see {differing[0]}; push again")
    api.create_tag(repository, tag=version, revision=commit)
    return commit


def _differing(api: HfApi, repository: str, commit: str, version: Path) -> list[str]:
    """The files that a commit of the hub and a folder have not in common, byte for byte."""
    here = {path.relative_to(version).as_posix(): path for path in runs.files_below(version)}
    tree = api.list_repo_tree(repository, recursive=True, revision=commit)
    there = {file.path: file for file in tree if isinstance(file, RepoFile) and file.path != ATTRIBUTES}
    same = {name for name in here.keys() & there.keys() if _same(here[name], there[name])}
    return sorted((here.keys() | there.keys()) - same)


def _same(path: Path, file: RepoFile) -> bool:
    if file.lfs:
        return file.lfs.sha256 == runs.digest(path)
    content = path.read_bytes()
    return file.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
