"""The book of a run: stage its sources beside the executed notebooks, build with Jupyter Book, swap it in whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

from stackpkg import runs

CARRIED = ("evidence/*.json", "signoffs/*", "checklist.yaml", "SHA256SUMS")


def build(run: str) -> Path:
    """Build `book/_build/<run>/html` and return its `index.html`.

    The last good book stays when a build fails. Raises `FileNotFoundError` for a run that does not exist and
    `RuntimeError` with the end of the build's output when it fails.
    """
    folder, book = runs.root() / "outbox" / run, runs.root() / "book"
    if not (folder / "nb").is_dir():
        raise FileNotFoundError(
            f"outbox/{run}/nb does not exist: execute the run first, or give the name of another run"
        )
    target = book / "_build" / run
    source = target / "src"
    _stage(book, folder, source)
    _call([sys.executable, "pages.py", str(folder)], source, target)
    _call([str(Path(sys.executable).with_name("jupyter-book")), "build", "--html", "--strict"], source, target)
    html, old = target / "html", target / "html.old"
    shutil.rmtree(old, ignore_errors=True)
    if html.exists():
        html.rename(old)
    (source / "_build/html").rename(html)
    shutil.rmtree(old, ignore_errors=True)
    return html / "index.html"


def _stage(book: Path, folder: Path, source: Path) -> None:
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(book, source, ignore=shutil.ignore_patterns("_build", "__pycache__"))
    notebooks = {path.name: path for path in sorted((runs.root() / "notebooks").glob("*.ipynb"))}
    notebooks |= {path.name: path for path in sorted((folder / "nb").glob("*.ipynb"))}  # executed copies win
    (source / "notebooks").mkdir()
    for name, path in notebooks.items():
        notebook = nbformat.read(path, as_version=4)
        banner = "papermill-error-cell-tag"  # its anchor is the same in every notebook; the theme marks the cell itself
        notebook.cells = [cell for cell in notebook.cells if banner not in cell.metadata.get("tags", [])]
        nbformat.write(notebook, source / "notebooks" / name)
    copies = {path: source / "archive" for pattern in CARRIED for path in folder.glob(pattern)}
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
