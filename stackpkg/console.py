"""What the modules of commands share: how a run is named, and how a command stops."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from stackpkg import runs

Folder = Annotated[Path, typer.Argument(help="a run's folder, such as outbox/smoke")]
AsJson = Annotated[bool, typer.Option("--json", help="for scripts")]
Job = Annotated[str, typer.Option("--job", help="training job, a folder under checkpoints/")]


def unsealed(run: Path) -> None:
    """Say that what was just done to a sealed run made another of it."""
    if (run / "SHA256SUMS").exists():
        typer.echo("this run was sealed, and is another now: run its profile again, which seals it anew")


def stop(message: object, status: int = 1) -> NoReturn:
    typer.secho(str(message), fg="red", err=True)
    raise typer.Exit(status)


def folder_at(path: Path) -> runs.RunFolder:
    """The run at `path`, which must be a folder of this repository's outbox."""
    outbox = runs.root() / "outbox"
    if not path.is_dir():
        there = sorted(found.name for found in outbox.iterdir() if found.is_dir() and found.name[0] != ".")
        stop(f"{path} is not a run's folder; runs here: {', '.join(there) or 'none'}")
    if path.resolve().parent != outbox.resolve():
        stop(f"{path} is not in {runs.root().name}/outbox")
    return runs.RunFolder(path.resolve().name)
