"""A run's folder `outbox/<run>/`: its paths, its evidence, its environment record. Files appear whole or not at all."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackpkg import __version__

if TYPE_CHECKING:
    from pandas import DataFrame

_PACKAGE = Path(__file__).resolve().parent


def root() -> Path:
    """The repository when the package runs from one, else the working directory."""
    return _PACKAGE.parent if (_PACKAGE.parent / "notebooks").is_dir() else Path.cwd()


def now() -> str:
    """UTC time, ISO 8601, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and digests of every file below a folder."""
    if path.is_dir():
        lines = (f"{digest(file)}  {file.relative_to(path).as_posix()}\n" for file in files_below(path))
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def portable(text: str) -> str:
    """`text` without the paths of this machine: the archive is read elsewhere."""
    for path, name in ((root(), "."), (sys.prefix, "ENVIRONMENT"), (sys.base_prefix, "PYTHON"), (Path.home(), "~")):
        if str(path) != os.sep:
            text = text.replace(f"{path}{os.sep}", f"{name}{os.sep}")
    return text


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it, flushed to disk, when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def as_json(value: Any) -> str:
    """Strict JSON: a non-finite number is written as the string "NaN", "Infinity" or "-Infinity", never lost."""
    return json.dumps(strict(value), indent=1, sort_keys=True, default=_plain)


def write_json(path: Path, value: Any) -> Path:
    """Writes `as_json(value)`."""
    return write_text(path, as_json(value) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> Iterator[Any]:
    """The value of each line of a file of JSON lines, none where there is no file; a line torn by a crash is passed."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def strict(value: Any) -> Any:
    """A value that strict JSON can hold: what is not finite as the string "NaN", "Infinity" or "-Infinity"."""
    if isinstance(value, float) and not math.isfinite(value):
        return {True: "NaN"}.get(math.isnan(value), "Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    return [strict(item) for item in value] if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    """Scalars of NumPy and torch as numbers, for which JSON has a form; paths and dates as text."""
    try:
        return strict(value.item())
    except AttributeError:
        return str(value)


def by_number(name: str) -> list[tuple[int, str]]:
    """A key to sort names by in which epoch_1000 comes after epoch_999."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def chain(run: str, here: str) -> str:
    """Where one stands, as HTML: the notebooks in order, those that recorded their numbers in this run ticked, `here`
    bold, and what is still due before it."""
    names = sorted(path.stem for path in (root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    done = {name for name in names if (root() / "outbox" / run / "evidence" / f"{name}.json").exists()}
    links = []
    for name in names:
        tick = " \N{CHECK MARK}" * (name in done)
        links.append(f'<a href="{name}.ipynb">{f"<b>{name}</b>" if name == here else name}{tick}</a>')
    due = [name for name in names[: names.index(here)] if name not in done] if here in names else []
    told = f"<br>due before this one: {', '.join(due)}" if due else ""
    return f"<p>Run <code>{run}</code>: " + " \N{RIGHTWARDS ARROW} ".join(links) + told + "</p>"


class RunFolder:
    """`outbox/<name>/`, made when first asked for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = root() / "outbox" / name
        self.path.mkdir(parents=True, exist_ok=True)

    def __truediv__(self, relative: str) -> Path:
        path = self.path / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def matches(self, pattern: str) -> list[Path]:
        """Files and folders below the run that match a glob pattern, sorted, numbers by size."""
        found = glob.glob(pattern, root_dir=self.path)  # noqa: PTH207  never hidden files
        return [self.path / name for name in sorted(found, key=by_number)]

    def inputs(self, *patterns: str) -> DataFrame:
        """What a stage reads. Literal patterns only: the runner reads them from the source to know when to re-run.
        Executed copies, in `nb/`, are kept by the runner alone: who steps through the notebooks may have none."""
        due = [name for name in patterns if not name.startswith("nb/") or self.matches(name)]
        return self._table(due, "is missing: run the notebook that makes it first (its number is lower)")

    def outputs(self, *patterns: str) -> DataFrame:
        """What a stage wrote. Literal patterns only: the runner re-runs the stage when one changed or is gone."""
        return self._table(patterns, "was not written by this notebook")

    def _table(self, patterns: Iterable[str], complaint: str) -> DataFrame:
        rows = []
        for pattern in patterns:
            found = self.matches(pattern)
            if not found:
                raise FileNotFoundError(f"outbox/{self.name}/{pattern} {complaint}")
            for path in found:
                files = files_below(path) if path.is_dir() else [path]
                size = sum(file.stat().st_size for file in files)
                name = path.relative_to(self.path).as_posix()
                rows.append((name, len(files), f"{size:,}", digest(path)[:16]))
        from pandas import DataFrame  # only notebooks show tables

        return DataFrame(rows, columns=["path", "files", "bytes", "sha256"])

    def record(self, stage: str, **numbers: Any) -> None:
        """Write `evidence/<stage>.json`: the numbers the checklist checks. Call it in the acceptance section."""
        write_json(self / f"evidence/{stage}.json", numbers)

    def evidence(self, stage: str) -> dict[str, Any]:
        return read_json(self.path / "evidence" / f"{stage}.json")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root(), capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def memory_gib() -> float:
    """What this machine has of it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def environment() -> dict[str, Any]:
    """What this machine and this checkout are: enough to tell two runs apart, no user or host name."""
    lock = root() / "requirements.lock.txt"
    names = ("torch", "transformers", "accelerate", "datasets", "numpy", "pandas", "papermill", "evidently")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_gib": round(memory_gib(), 1),
        "packages": {name: metadata.version(name) for name in names} | {"stackpkg": __version__},
        "lock_sha256": digest(lock) if lock.exists() else "",
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
    }
