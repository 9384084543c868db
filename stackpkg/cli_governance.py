"""The commands of `stackpkg` for reviewers and for whoever takes a run or its model over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from stackpkg.console import AsJson, Folder, folder_at, stop, unsealed

Role = Annotated[str, typer.Option(help="architecture, infrastructure or safety")]
Key = Annotated[Path, typer.Option(help="private SSH key of the reviewer")]
Reviewer = Annotated[str, typer.Option(help="the reviewer's name in governance/allowed_signers")]


def verify(
    path: Folder,
    trust: Annotated[Path | None, typer.Option(help="folder with keys and policy; default governance")] = None,
    as_json: AsJson = False,
) -> None:
    """Prove that no byte of the archive changed and that every role signed it; names each file that fails, and why."""
    from stackpkg.governance import seal

    if not path.is_dir():
        stop(f"{path} is not a run's folder")
    try:
        default, demonstration = seal.trust_for(path.resolve())
        found, signers = seal.verify(path, trust or default), seal.signers(path, trust or default) if as_json else []
    except (OSError, RuntimeError) as error:
        stop(error)
    if as_json:
        told = {"run": path.resolve().name, "verified": not found, "problems": found, "signers": signers}
        typer.echo(json.dumps(told | {"notice": seal.LOUD if demonstration else ""}, indent=1))
        raise typer.Exit(bool(found))
    if found:
        stop("\n".join([*found, f"NOT VERIFIED: {len(found)} problem(s)"]))
    if demonstration:
        typer.secho(seal.LOUD, fg="yellow", bold=True)
    typer.secho("VERIFIED", fg="green")


def sign(
    path: Folder,
    role: Role,
    key: Key,
    reviewer: Reviewer,
    decision: Annotated[str, typer.Option(help="approve, approve-with-conditions or reject")] = "approve",
    asked: Annotated[Path | None, typer.Option("--terms", help="conditions and waivers, a YAML file")] = None,
) -> None:
    """Sign the sealed run for one role, enter it in the log, and tag it in git; nothing is pushed."""
    from stackpkg.governance import runlog, seal, terms

    folder = folder_at(path)
    try:
        said = terms.Terms.read(asked) if asked else None
        written = seal.sign(folder.path, role, key, reviewer, decision, said)
    except (OSError, ValueError, RuntimeError) as error:
        stop(error)
    typer.echo(f"wrote {written.name} and {written.name}.sig")
    if not reviewer.endswith(seal.DEMONSTRATION):
        typer.echo(runlog.tag(folder.path, role, reviewer))


def met(
    path: Folder,
    condition: Annotated[str, typer.Option(help="the condition's id")],
    text: Annotated[str, typer.Option(help="what shows that it is met")],
    role: Role,
    key: Key,
    reviewer: Reviewer,
) -> None:
    """Sign a note that a condition without a machine check is met; the next seal of a run reads it."""
    from stackpkg.governance import terms

    try:
        written = terms.meet(folder_at(path).path, condition, role, key, reviewer, text)
    except (OSError, ValueError, RuntimeError) as error:
        stop(error)
    typer.echo(f"wrote {written.name}; run the profile again, which seals the run anew")


def archive(path: Folder) -> None:
    """Pack a sealed run into outbox/RUN.tar.zst for cold storage; the same run gives the same bytes."""
    from stackpkg.governance import cold
    from stackpkg.locks import exclusive

    folder = folder_at(path)
    try:
        with exclusive(folder.name):
            written = cold.archive(folder.path)
    except (OSError, ValueError) as error:
        stop(error)
    typer.echo(f"wrote {written.name}, {written.stat().st_size:,} bytes, and {written.name}.sha256")


def restore(
    path: Annotated[Path, typer.Argument(help="a .tar.zst that archive wrote, its .sha256 beside it")],
    to: Annotated[Path, typer.Option(help="a folder that is not there yet")],
) -> None:
    """Unpack an archived run, prove its digest, seal and log, and say what the sign-offs are worth today."""
    from stackpkg.governance import cold, standing

    try:
        folder, found = cold.restore(path, to)
    except (OSError, ValueError, RuntimeError) as error:
        stop(error)
    typer.echo(f"restored {folder}: every byte is what was sealed")
    loud = standing.notice(folder)
    typer.echo("\n".join([*found, "the sign-offs do not hold today"]) if found else f"{loud}\nVERIFIED".strip())


def demote(path: Folder, reason: Annotated[str, typer.Option(help="who decided, and why: it is kept")]) -> None:
    """Take the promoted version out of use: the one before it is current again, without any that learned from what is
    withdrawn or expired. Deletes nothing."""
    from stackpkg.training import promotion

    run = folder_at(path).path
    try:
        back = promotion.demote(run / "artifacts", reason)
    except ValueError as error:
        stop(error)
    event = [each for each in promotion.registry(run / "artifacts")["history"] if each["event"] == "demoted"][-1]
    for version, why in event.get("passed_over", {}).items():
        typer.echo(f"passed over: {version}, {why}")
    typer.echo(f"{event['version']} is demoted; in use: {back or 'none'}. `stackpkg reinstate` brings one back")
    unsealed(run)


def reinstate(
    path: Folder,
    version: Annotated[str, typer.Option(help="such as v2, promoted once")],
    reason: Annotated[str, typer.Option(help="who decided, and why: it is kept")],
) -> None:
    """Make a version that was promoted once the current one again, if every byte of it is as it was and nothing that it
    learned from is withdrawn or expired."""
    from stackpkg.training import promotion

    run = folder_at(path).path
    try:
        promotion.roll_back(run / "artifacts", version, reason)
    except ValueError as error:
        stop(error)
    typer.echo(f"in use: {version}")
    unsealed(run)


def sign_weights(
    path: Folder,
    key: Annotated[Path, typer.Option(help="private key, PEM, elliptic curve")],
) -> None:
    """Sign the promoted version with the OpenSSF's model-signing (extra `signing`); no network."""
    from stackpkg.governance import weights

    try:
        written = weights.sign(folder_at(path), key)
    except (OSError, ValueError) as error:
        stop(error)
    typer.echo(f"wrote {written.name}")


def verify_weights(
    path: Folder,
    key: Annotated[Path, typer.Option(help="public key, PEM")],
) -> None:
    """Prove that the promoted version is what was signed (extra `signing`)."""
    from stackpkg.governance import weights

    try:
        version = weights.verify(folder_at(path), key)
    except (OSError, ValueError) as error:
        stop(error)
    typer.secho(f"{version.name} is what was signed", fg="green")


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


COMMANDS = (verify, sign, met, archive, restore, demote, reinstate, sign_weights, verify_weights, lm_eval, push)
