"""The book of a run: stage its sources beside the executed notebooks, build with Jupyter Book, swap it in whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path

import nbformat

from stackpkg import interactive, runs
from stackpkg.governance import checklist

CARRIED = ("evidence/*.json", "signoffs/*", "checklist.yaml", "SHA256SUMS")
LARGEST = 2**20  # bytes of a file of evidence that the book carries beside its digest
MARK = "<!-- other runs -->"  # where `book/theme/page.html` leaves room for the switch between runs


def build(run: str, *others: str) -> Path:
    """Build `book/_build/<run>/html` and return its `index.html`; the books of `others` lie in it below `runs/`.

    The last good book stays when a build fails. Raises `FileNotFoundError` for a run that does not exist and
    `RuntimeError` with the end of the build's output when it fails.
    """
    names = list(dict.fromkeys((run, *others)))
    for name in names:
        if not (runs.root() / "outbox" / name / "nb").is_dir():
            raise FileNotFoundError(
                f"outbox/{name}/nb does not exist: execute the run first, or give the name of another run"
            )
    made = {name: _build(name, names) for name in names}
    target = runs.root() / "book/_build" / run
    for name in names[1:]:
        (made[run] / "runs").mkdir(exist_ok=True)
        made[name] = made[name].rename(made[run] / "runs" / name)
    if others:
        _switch(made)
    html, old = target / "html", target / "html.old"
    shutil.rmtree(old, ignore_errors=True)
    if html.exists():
        html.rename(old)
    made[run].rename(html)
    shutil.rmtree(old, ignore_errors=True)
    return html / "index.html"


def _build(run: str, names: list[str]) -> Path:
    """The pages of one run, which tell of the others in `names`; still beside their sources."""
    book, folder = runs.root() / "book", runs.root() / "outbox" / run
    target = book / "_build" / run
    source = target / "src"
    _stage(book, folder, source)
    others = [str(folder.parent / name) for name in names if name != run]
    _call([sys.executable, "pages.py", str(folder), *others], source, target)
    _call([str(Path(sys.executable).with_name("jupyter-book")), "build", "--html", "--strict"], source, target)
    return source / "_build/html"


def _switch(made: dict[str, Path]) -> None:
    """In every page of every run a list that leads to the same page of the other runs, or to their first page."""
    for here in made.values():
        nested = [other for other in made.values() if other != here and other.is_relative_to(here)]
        for path in here.rglob("*.html"):
            if any(path.is_relative_to(other) for other in nested) or MARK not in (text := path.read_text("utf-8")):
                continue
            page = path.relative_to(here)
            lines = []
            for name, other in sorted(made.items()):
                there = other / page if (other / page).is_file() else other / "index.html"
                url = escape(Path(os.path.relpath(there, path.parent)).as_posix())
                lines.append(f'<li><a href="{url}"{" aria-current=true" * (other == here)}>{escape(name)}</a></li>')
            path.write_text(text.replace(MARK, f"<ul>{''.join(lines)}</ul>"), "utf-8")


def _stage(book: Path, folder: Path, source: Path) -> None:
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(book, source, ignore=shutil.ignore_patterns("_build", "__pycache__"))
    notebooks = {path.name: path for path in sorted((runs.root() / "notebooks").glob("*.ipynb"))}
    notebooks |= {path.name: path for path in sorted((folder / "nb").glob("*.ipynb"))}  # executed copies win
    shutil.copytree(runs.root() / "benchmarks/results", source / "benchmarks")
    (source / "notebooks").mkdir()
    for name, path in notebooks.items():
        notebook = nbformat.read(path, as_version=4)
        banner = "papermill-error-cell-tag"  # its anchor is the same in every notebook; the theme marks the cell itself
        notebook.cells = [cell for cell in notebook.cells if banner not in cell.metadata.get("tags", [])]
        for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
            output.get("data", {}).pop(interactive.KIND, None)  # the page shows the picture beside it
        nbformat.write(notebook, source / "notebooks" / name)
    copies = {path: source / "archive" for pattern in CARRIED for path in folder.glob(pattern)}
    named = {folder / name for item in checklist.read(folder) for name in item["files"]}
    copies |= {path: source / "archive" for path in named if path.is_file() and path.stat().st_size <= LARGEST}
    copies |= dict.fromkeys(folder.rglob("*.html"), source / "reports")
    for path, place in copies.items():
        copy = place / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)


def _call(command: list[str], source: Path, target: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])  # node, jupyter
    env = {**os.environ, "PATH": path, "DO_NOT_TRACK": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(command, cwd=source, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    log = runs.write_text(target / "build.log", done.stdout + done.stderr)
    if done.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-30:])
        raise RuntimeError(f"the book was not built: {Path(command[0]).name} ended with {done.returncode}\n{tail}")
