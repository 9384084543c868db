"""The commands of `stackpkg` for reviewers and for whoever takes a run over: verify, sign, push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stackpkg.console import Folder, folder_at, stop


def verify(
    path: Folder,
    signers: Annotated[Path | None, typer.Option(help="allowed signers; default governance/allowed_signers")] = None,
) -> None:
    """Prove that no byte of the archive changed and that every role signed it; names each file that fails."""
    from stackpkg.governance import seal

    if not path.is_dir():
        stop(f"{path} is not a run's folder")
    try:
        default, demonstration = seal.signers_for(path.resolve())
        found = seal.verify(path.resolve(), signers or default)
    except (OSError, RuntimeError) as error:
        stop(error)
    if found:
        stop("\n".join([*found, f"NOT VERIFIED: {len(found)} problem(s)"]))
    if demonstration and not signers:
        typer.secho(seal.LOUD, fg="yellow", bold=True)
    typer.secho("VERIFIED", fg="green")


def sign(
    path: Folder,
    role: Annotated[str, typer.Option(help="architecture, infrastructure or safety")],
    key: Annotated[Path, typer.Option(help="private SSH key of the reviewer")],
    reviewer: Annotated[str, typer.Option(help="the reviewer's name in governance/allowed_signers")],
    decision: Annotated[str, typer.Option(help="approve, approve-with-conditions or reject")] = "approve",
    condition: Annotated[list[str] | None, typer.Option(help="may be given several times")] = None,
) -> None:
    """Sign the sealed run for one role."""
    from stackpkg.governance import seal

    folder = folder_at(path)
    try:
        written = seal.sign(folder.path, role, key, reviewer, decision, tuple(condition or ()))
    except (OSError, ValueError, RuntimeError) as error:
        stop(error)
    typer.echo(f"wrote {written.name} and {written.name}.sig")


def lm_eval(path: Folder, tasks: Annotated[Path, typer.Option(help="a task (YAML), or a folder of them")]) -> None:
    """Tasks of lm-evaluation-harness on the promoted version (extra `lm-eval`); written to eval/lm_eval.json."""
    from stackpkg.governance import release

    try:
        typer.echo("\n".join(release.examine(folder_at(path), tasks)))
    except (OSError, ValueError) as error:
        stop(error)


def push(
    path: Folder, repository: Annotated[str, typer.Argument(help="owner/name on the hub; made, private, if missing")]
) -> None:
    """Send the promoted version to a Hugging Face hub (HF_ENDPOINT, HF_TOKEN), and check what arrived."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError

    from stackpkg.governance import release

    folder = folder_at(path)
    try:
        commit = release.push(folder, repository)
    except (OSError, HTTPError) as error:
        stop(f"the hub at {constants.ENDPOINT}: {error}")
    except ValueError as error:
        stop(error)
    typer.echo(f"{repository} at {commit} is what was promoted")


COMMANDS = (verify, sign, lm_eval, push)
