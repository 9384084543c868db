"""Runs the notebooks of a profile in order through papermill into `outbox/<run>/`.

A stage is skipped when its code cells, the parameters it declares, its inputs, its outputs and the package sources it
uses are what they were when it last ended well. Prose, timestamps and papermill's own metadata decide nothing.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sqlite3
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import nbformat
import yaml
from nbformat.sign import NotebookNotary

from stackpkg import failure, locks
from stackpkg.data.listing import listing
from stackpkg.governance.seal import finish
from stackpkg.params import Params, assigned
from stackpkg.progress import Lines, Told, display
from stackpkg.runs import RunFolder, digest, environment, now, portable, read_json, root, write_json, write_text

SOURCE = re.compile(r"(params|book|governance)/[\w./-]+|requirements\.lock\.txt")
SHOWN = 3  # names of what changed
MODULE = re.compile(r"stackpkg(\.\w+)*")


@dataclass(frozen=True)
class Stage:
    """One notebook, as far as its source tells without running it."""

    name: str
    path: Path
    code: str
    parameters: frozenset[str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Stage:
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
        code = "\n".join(cell.source for cell in cells)
        names = frozenset(name for source in tagged for name in assigned(source))
        outputs = (*_patterns(code, "outputs"), f"evidence/{path.stem}.json")
        return cls(path.stem, path, code, names, _patterns(code, "inputs"), outputs)


def _patterns(code: str, method: str) -> tuple[str, ...]:
    """The literal arguments of every `folder.inputs(...)` or `folder.outputs(...)` call."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    calls = [node for node in calls if isinstance(node.func, ast.Attribute) and node.func.attr == method]
    return tuple(ast.literal_eval(argument) for node in calls for argument in node.args)


def stages() -> list[Stage]:
    return [Stage.read(path) for path in sorted((root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))]


@cache
def _uses(code: str) -> frozenset[Path]:
    """Package files that `code` imports or names, and repository files it names, without following them further."""
    names: set[str] = set()
    files: set[Path] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if MODULE.fullmatch(node.value):
                names.add(node.value)
            elif SOURCE.fullmatch(node.value) and (root() / node.value).exists():
                files.add(root() / node.value)
    package = Path(__file__).parent
    for name in names:
        if MODULE.fullmatch(name):
            parts = name.split(".")[1:]
            parents = [package.joinpath(*parts[:n], "__init__.py") for n in range(len(parts) + 1)]
            files |= {path for path in (*parents, package.joinpath(*parts).with_suffix(".py")) if path.is_file()}
    return frozenset(files)


def sources(code: str) -> list[Path]:
    """Every package source and repository file that `code` reaches, through any number of imports."""
    found: set[Path] = set()
    waiting = set(_uses(code))
    while waiting:
        path = waiting.pop()
        found.add(path)
        if path.suffix == ".py":
            waiting |= _uses(path.read_text(encoding="utf-8")) - found
    return sorted(found)


def key(stage: Stage, p: Params, folder: RunFolder) -> dict[str, str]:
    """A digest of everything that decides what the stage computes, each by what it is called when it changed."""
    values, texts = p.model_dump(mode="json"), [*p.data.sources, *p.data.earlier, *p.data.evaluation_sets]
    parts = {
        "its code": stage.code,
        **{f"parameter {name}": values[name] for name in sorted(stage.parameters)},
        **{path.relative_to(root()).as_posix(): digest(path) for path in sources(stage.code)},
        **_digests(folder, stage.inputs),
        "the text at data.sources": listing(texts) if "p.data.sources" in stage.code else "",
    }
    return {name: _short(value) for name, value in parts.items()}


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _digests(folder: RunFolder, patterns: tuple[str, ...]) -> dict[str, str]:
    paths = (path for pattern in patterns for path in folder.matches(pattern))
    return {path.relative_to(folder.path).as_posix(): digest(path) for path in paths}


def lock_of(folder: RunFolder, stage: str) -> dict[str, Any]:
    """What is known of a stage; `state` is never ran, running, cut off, failed or ok."""
    path = folder.path / "lock" / f"{stage}.json"
    lock: dict[str, Any] = read_json(path) if path.exists() else {"stage": stage, "state": "never ran"}
    return lock | {"state": "cut off"} if lock["state"] == "running" and not locks.held(folder.name) else lock


def reason_to_run(stage: Stage, p: Params, folder: RunFolder) -> str:
    """Why the stage must run; empty when what it left is still valid."""
    lock = lock_of(folder, stage.name)
    if lock["state"] in ("cut off", "running"):  # running: this process holds the run, and the one that ran it died
        return "was cut off"
    if lock["state"] != "ok":
        return {"failed": "failed before"}.get(lock["state"], lock["state"])
    if not (folder.path / "nb" / f"{stage.name}.ipynb").exists():
        return "its executed notebook is gone"
    if not isinstance(lock["key"], dict):
        return "an earlier stackpkg ran it"
    if names := _changed(lock["key"], key(stage, p, folder)):
        return f"{names} changed"
    names = _changed(lock["outputs"], _digests(folder, stage.outputs))
    return f"its outputs changed or are gone: {names}" if names else ""


def _changed(before: dict[str, str], now: dict[str, str]) -> str:
    """The first few names that differ."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def execute(stage: Stage, p: Params, folder: RunFolder, shown: Lines) -> dict[str, Any]:
    """Run one notebook; its record goes to `lock/<stage>.json` whatever happens, the executed copy is kept.

    The record is ours because papermill's metadata calls a timeout or a dead kernel completed (papermill 2.7).
    Raises `StageFailed` with notebook, cell, cause and next step.
    """
    import papermill  # a second of imports that `status` and a run with nothing to do need not pay
    from traitlets.config import Config

    values = p.model_dump(mode="json")
    output = folder / f"nb/{stage.name}.ipynb"
    record: dict[str, Any] = {"stage": stage.name, "state": "running", "started": now(), "pid": os.getpid()}
    record["key"] = key(stage, p, folder)
    lock = folder / f"lock/{stage.name}.json"
    write_json(lock, record)
    start = time.monotonic()
    encrypted = {"transport_encryption": "auto"}
    try:
        papermill.execute_notebook(
            stage.path,
            output,
            {name: values[name] for name in sorted(stage.parameters)},
            kernel_name="python3",
            progress_bar=False,
            coalesce_streams=True,
            cwd=str(root()),
            stdout_file=Told(shown),
            config=Config({"KernelManager": encrypted, "AsyncKernelManager": encrypted}),
        )
        record |= {"state": "ok", "outputs": _digests(folder, stage.outputs)}
    except BaseException as error:
        record |= {"state": "failed", "error": portable(f"{type(error).__name__}: {error}")[-4000:]}
        record["cell"] = failure.cell(output)
        if not isinstance(error, Exception):  # an interrupt is no fault of the notebook
            raise
        raise failure.StageFailed(portable(failure.explain(stage.name, output, error))) from error
    finally:
        if output.exists():
            _scrub(output, stage.path)
        del record["pid"]
        record["seconds"] = round(time.monotonic() - start, 1)
        write_json(lock, record)
        shown.ended(record["state"], record["seconds"])
    return record


def _scrub(output: Path, source: Path) -> None:
    """Paths of this machine out of papermill's metadata and of what the cells printed; JupyterLab is to trust it."""
    notebook = nbformat.read(output, as_version=4)
    notebook.metadata["papermill"] |= {"input_path": source.name, "output_path": output.name}
    write_text(output, portable(nbformat.writes(notebook)) + "\n")
    with suppress(OSError, sqlite3.Error):  # its store may be another's just now: then the reader trusts it by hand
        NotebookNotary().sign(nbformat.read(output, as_version=4))


def select(first: str | None, only: str | None, last: str | None = None) -> list[Stage]:
    """The stages from `first` to `last`, or `only` one; each by number or name, as far as it is unique.

    Raises `ValueError` for a name that no notebook or several have, and when `only` is given beside another.
    """
    known = stages()
    if only and (first or last):
        raise ValueError(f"--only {only} and --{'from' if first else 'to'} {first or last}: give one of them")
    start, end = _place(only or first, known, 0), _place(only or last, known, len(known) - 1)
    if start > end:
        raise ValueError(f"--from {first} lies behind --to {last}")
    return known[start : end + 1]


def _place(wanted: str | None, known: list[Stage], default: int) -> int:
    found = [number for number, stage in enumerate(known) if wanted and stage.name.startswith(wanted)]
    if wanted and len(found) != 1:
        names = ", ".join(known[number].name for number in found or range(len(known)))
        raise ValueError(f"{len(found)} notebooks start with {wanted!r}; give one of: {names}")
    return found[0] if found else default


def run(
    p: Params,
    stream: TextIO,
    *,
    first: str | None = None,
    only: str | None = None,
    last: str | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> dict[str, Any] | None:
    """Execute what must be; after the last stage seal the run. Returns the seal's summary, None if nothing was sealed.

    Raises what a notebook raised, after keeping its executed copy and its record.
    """
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found,ignore:Mismatch dtype")  # told to nobody
    chosen = select(first, only, last)
    folder = RunFolder(p.run)
    with locks.exclusive(p.run):
        executed = stale = False
        with display(stream, folder.path.parent, p.run, [stage.name for stage in chosen]) as shown:
            for stage in chosen:
                why = "forced" if force else reason_to_run(stage, p, folder)
                if dry_run or not why:
                    doubt = ", unless a stage above remakes its inputs" if stale and stage.inputs else ""
                    shown.passed(stage.name, f"would run: {why}" if why else f"unchanged{doubt}")
                    stale |= bool(why)
                    continue
                if not executed:
                    profile = yaml.safe_dump(p.model_dump(mode="json"), sort_keys=False)
                    write_text(folder / "config/params.yaml", profile)
                    write_json(folder / "config/environment.json", environment())
                    executed = True
                shown.started(stage.name, why)
                execute(stage, p, folder, shown)
        known = stages()
        settled = dry_run or (not executed and len(chosen) == len(known))  # the loop has just found every one unchanged
        left = [] if settled else [stage.name for stage in known if reason_to_run(stage, p, folder)]
        if dry_run:
            with suppress(OSError):
                folder.path.rmdir()  # where there was none before
        if dry_run or left:
            stream.write(f"not sealed; these stages have to run first: {', '.join(left)}\n" if left else "")
            return None
        return finish(folder, p)
