"""A run as an RO-Crate: each stage an action with its notebook, what it read and what it made.

RO-Crate 1.1 (https://w3id.org/ro/crate/1.1), Process Run Crate 0.5 (https://w3id.org/ro/wfrun/process/0.5).
"""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from importlib import resources
from pathlib import Path
from typing import Any

from rocrate.model.contextentity import ContextEntity
from rocrate.model.entity import Entity
from rocrate.rocrate import ROCrate

from stackpkg import runs
from stackpkg.data import manifest

NAME = "ro-crate-metadata.json"
PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
KINDS = {  # ending -> what a reader opens it with
    ".json": "application/json", ".jsonl": "application/jsonl", ".yaml": "application/yaml", ".yml": "application/yaml",
    ".md": "text/markdown", ".html": "text/html", ".csv": "text/csv", ".parquet": "application/x-parquet",
    ".ipynb": "application/x-ipynb+json", ".log": "text/plain", ".jsonld": "application/ld+json",
}  # fmt: skip
PARTS = (  # what is there before the sign-off, and stays as it is then
    "config/params.yaml", "nb/[0-5]*.ipynb", "evidence/[0-5]*.json", "data/*.*", "data/records", "data/shards",
    "data/tokenizer", "data/versions", "telemetry/*", "eval/*", "sweep/*", "dashboards/*", "governance/*",
    "artifacts/*", "objectives.json",
)  # fmt: skip


def _parts(crate: ROCrate, folder: runs.RunFolder) -> dict[str, Entity]:
    """Name below the run -> the entity of every file and folder of `PARTS`."""
    made = dict[str, Entity]()
    for path in (path for pattern in PARTS for path in folder.matches(pattern)):
        name = path.relative_to(folder.path).as_posix()
        about: dict[str, Any] = {"name": name, "sha256": runs.digest(path)}
        if path.is_dir():
            made[name] = crate.add_directory(dest_path=name, properties=about)
            continue
        about |= {"contentSize": str(path.stat().st_size)}
        about |= {"encodingFormat": KINDS[path.suffix]} if path.suffix in KINDS else {}
        if path.suffix == ".ipynb":
            about |= {"@type": ["File", "SoftwareSourceCode"]}
        made[name] = crate.add_file(dest_path=name, properties=about)
    return made


def _actions(crate: ROCrate, folder: runs.RunFolder, parts: dict[str, Entity]) -> None:
    for path in folder.matches("lock/[0-5]*.json"):
        lock = runs.read_json(path)
        if lock["state"] != "ok" or f"nb/{path.stem}.ipynb" not in parts:
            continue
        begun = datetime.fromisoformat(lock["started"])
        action = ContextEntity(
            crate, f"#{path.stem}",
            properties={
                "@type": "CreateAction", "name": path.stem, "startTime": begun.isoformat(),
                "endTime": (begun + timedelta(seconds=lock["seconds"])).isoformat(),
                "actionStatus": {"@id": "http://schema.org/CompletedActionStatus"},
            },
        )  # fmt: skip
        action["instrument"] = parts[f"nb/{path.stem}.ipynb"]
        action["object"] = [parts[name] for name in lock["key"] if name in parts]
        action["result"] = [parts[name] for name in lock["outputs"] if name in parts]
        crate.root_dataset.append_to("mentions", crate.add(action))


def write(folder: runs.RunFolder, about: dict[str, Any]) -> Path:
    """`ro-crate-metadata.json` of the run as it is now: what is made later, the sign-off, is not in it. `about` has
    `licence`, names of licences, and `version`, the promoted one, or "".
    """
    crate = ROCrate(version="1.1")
    crate.metadata["conformsTo"] = [{"@id": "https://w3id.org/ro/crate/1.1"}]
    parts = _parts(crate, folder)
    profile = {"@type": "CreativeWork", "name": "Process Run Crate", "version": "0.5"}
    crate.root_dataset["conformsTo"] = crate.add(ContextEntity(crate, PROFILE, properties=profile))
    terms = {"@type": "CreativeWork", "name": f"Licences of the sources: {', '.join(about['licence'])}"}
    crate.root_dataset["license"] = crate.add(ContextEntity(crate, "#licences", properties=terms))
    crate.name = f"Run {folder.name}"
    crate.description = f"Stages of the training run {folder.name}, what each read and made, before its sign-off"
    crate.root_dataset["datePublished"] = manifest.log(folder.path / "data")[0]["at"]
    card = parts.get("governance/model_card.md")
    model = parts.get(f"artifacts/{about['version']}")
    if model and card:
        model["subjectOf"] = card
    if card:
        crate.root_dataset["mainEntity"] = model or card
    _actions(crate, folder, parts)
    return runs.write_text(folder / NAME, json.dumps(crate.metadata.generate(), indent=1) + "\n")


def problems(folder: Path) -> list[str]:
    """What is wrong with the crate of a run, a line each; empty for none. Read back with the library; what RO-Crate 1.1
    and the profile require is checked against the context that the library brings, without a network."""
    try:
        crate = ROCrate(folder)
    except (ValueError, KeyError, OSError) as error:
        return [f"{NAME}: the library does not read it: {error}"]
    context = json.loads((resources.files("rocrate") / "data/ro-crate.jsonld").read_text(encoding="utf-8"))["@context"]
    graph = {entity["@id"]: entity for entity in runs.read_json(folder / NAME)["@graph"]}
    root, found = graph["./"], list[str]()
    found += [
        f"./: no {name}" for name in ("name", "description", "datePublished", "license", "hasPart") if name not in root
    ]
    for name, entity in graph.items():
        kinds = entity["@type"] if isinstance(entity["@type"], list) else [entity["@type"]]
        found += [f"{name}: {term} is no term of RO-Crate" for term in [*kinds, *entity] if not _known(term, context)]
        found += [f"{name}: {each} is not in the crate" for each in _references(entity) if each not in graph]
        found += _against_file(folder, name, entity) if {"File", "Dataset"} & {*kinds} and name != "./" else []
        if "CreateAction" in kinds:
            found += [f"{name}: an action without {term}" for term in ("instrument", "name") if not entity.get(term)]
    unread = {*graph} - {entity.id for entity in crate.get_entities()}
    return found + [f"{name}: the library did not read it" for name in sorted(unread)]


def _known(term: str, context: dict[str, Any]) -> bool:
    return term.startswith("@") or term in context


def _references(entity: dict[str, Any]) -> list[str]:
    values = [value if isinstance(value, list) else [value] for key, value in entity.items() if key != "conformsTo"]
    named = [each["@id"] for value in values for each in value if isinstance(each, dict) and "@id" in each]
    return [name for name in named if not name.startswith("http://schema.org/")]


def _against_file(folder: Path, name: str, entity: dict[str, Any]) -> list[str]:
    path = folder / name
    if not path.exists():
        return [f"{name}: is not there"]
    return [] if runs.digest(path) == entity["sha256"] else [f"{name}: has another SHA-256 than the crate says"]
