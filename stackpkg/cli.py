"""`stackpkg`: run, launch, params, status, book, and what `incidents`, `cli_*` and `doctor` add."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from stackpkg import cli_data, cli_governance, cli_telemetry, incidents, params
from stackpkg.console import AsJson, Folder, Job, folder_at, stop
from stackpkg.doctor import doctor
from stackpkg.runs import RunFolder, root
from stackpkg.schema import allowed

app = typer.Typer(no_args_is_help=True, help="A training stack: run, inspect, sign, publish.")
OPEN = ("green", "waived")  # what lets a run through a gate
COLOUR = {"green": "green", "amber": "yellow", "red": "red", "waived": "yellow"}

for _command in (doctor, *incidents.COMMANDS, *cli_data.COMMANDS, *cli_telemetry.COMMANDS, *cli_governance.COMMANDS):
    app.command()(_command)


def _profile(path: Path) -> params.Params:
    try:
        return params.load(path)
    except (OSError, ValueError) as error:
        stop(error)


@app.command()
def run(
    profile: Annotated[Path, typer.Argument(help="a profile, such as params/dry_run.yaml")],
    first: Annotated[str | None, typer.Option("--from", help="start at this notebook, by number or name")] = None,
    last: Annotated[str | None, typer.Option("--to", help="stop after this notebook; nothing is sealed then")] = None,
    only: Annotated[str | None, typer.Option("--only", help="run this notebook alone")] = None,
    name: Annotated[str | None, typer.Option("--run", help="folder under outbox/ instead of the profile's")] = None,
    force: Annotated[bool, typer.Option("--force", help="run stages even when nothing changed")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would run and why, run nothing")] = False,
) -> None:
    """Execute the notebooks of a profile in order; skip what has not changed; seal the run."""
    from stackpkg.training.sigterm import Heed
    from stackpkg.training.stop import AGAIN

    p, heed = _profile(profile), Heed()
    try:
        p = params.validate(p.model_dump() | {"run": name or p.run})
        from stackpkg import pipeline

        with heed:
            sealed = pipeline.run(p, sys.stdout, first=first, only=only, last=last, force=force, dry_run=dry_run)
    except KeyboardInterrupt:
        stop("interrupted; run the same command again to go on where it stopped", AGAIN if heed.got else 1)
    except (OSError, RuntimeError, ValueError) as error:  # a stage that failed says where, why and what next
        stop(error, AGAIN if heed.got else 1)
    if sealed:
        typer.echo(f"sealed outbox/{p.run}, manifest {sealed['manifest_sha256'][:16]}")
        typer.secho(sealed["notice"], fg="yellow", bold=True)
        typer.echo("\n".join(sealed["problems"]))


@app.command()
def launch(
    profile: Annotated[Path, typer.Argument(help="a profile, such as params/dry_run.yaml, whose data is built")],
    job: Job = "train",
    render: Annotated[bool, typer.Option(help="print what would be started or submitted, and stop")] = False,
) -> None:
    """Train: here, or on the cluster that the profile names. The same call goes on with a job that was interrupted."""
    from stackpkg.training import clusters
    from stackpkg.training import launch as launcher
    from stackpkg.training.stop import AGAIN, TERMINATED, Stopped

    p = _profile(profile)
    command = ["python", *launcher.command(f"outbox/{p.run}/checkpoints/{job}/job.json", p)[1:]]
    try:
        if render:
            away = p.cluster.scheduler != "none"
            typer.echo(clusters.render(p, job, command) if away else " ".join(command), nl=not away)
            return
        done = launcher.launch(job, p, RunFolder(p.run))
    except Stopped as stopped:
        stop(stopped, AGAIN if stopped.reason == TERMINATED else 1)
    except (OSError, RuntimeError, ValueError) as error:  # what is missing, what failed, or what to run by hand
        stop(error)
    typer.echo("  ".join(f"{name} {value}" for name, value in done.items() if name != "files"))


@app.command("params")
def reference(
    section: Annotated[str, typer.Argument(help="such as Data; none: all of them")] = "",
    as_json: AsJson = False,
) -> None:
    """What a profile may say: every parameter with its default, its range and its meaning."""
    known = params.reference()
    chosen = {name: known[name] for name in known if name.lower() == section.lower() or not section}
    if not chosen:
        stop(f"no section {section!r}; {allowed(section, known)}")
    if as_json:
        told = {
            name: {"purpose": why, "parameters": [f._asdict() for f in fields]}
            for name, (why, fields) in chosen.items()
        }
        typer.echo(json.dumps(told, indent=1))
        return
    for name, (purpose, fields) in chosen.items():
        typer.secho(f"{name}: {' '.join(purpose.split())}", bold=True)
        for field in fields:
            said = [f"{field.kind}{field.below}", *field.allowed, *[f"default {field.default}"] * bool(field.default)]
            typer.echo(f"  {field.name:<24} {'; '.join(said)}\n{'':27}{field.meaning}".rstrip())


@app.command()
def status(
    path: Folder,
    as_json: AsJson = False,
    require_green: Annotated[
        bool,
        typer.Option("--require-green", help="exit status 1 unless each line is green or waived, and the run verifies"),
    ] = False,
) -> None:
    """Stages, checklist and sign-offs of a run."""
    from stackpkg import pipeline
    from stackpkg.governance import standing

    folder = folder_at(path)
    locks = [pipeline.lock_of(folder, stage.name) for stage in pipeline.stages()]
    items, found = standing.live(folder.path)
    if as_json:
        stage, line = (
            ("stage", "state", "started", "seconds", "cell", "error"),
            ("id", "status", "text", "reasons", "files"),
        )
        told: dict[str, object] = {"run": folder.name, "problems": found, "notice": standing.notice(folder.path)}
        told["stages"] = [{key: lock.get(key) for key in stage} for lock in locks]
        told["checklist"] = [{key: item.get(key) for key in line} for item in items]
        typer.echo(json.dumps(told, indent=1))
        _gate(items, found, require_green)
        return
    for lock in locks:
        error = lock.get("error", "").strip().splitlines()  # the last line of a traceback says what was raised
        typer.echo(f"{lock['stage']:<26} {lock['state']:<9} {lock.get('seconds', ''):>7}  {' '.join(error[-1:])[:160]}")
    typer.echo("" if items else "\nno checklist yet: 90_sign_off writes it")
    for item in items:
        typer.secho(f"{item['id']:<3} {item['status']:<6} {item['text']}", fg=COLOUR[item["status"]])
        for reason in item["reasons"]:
            typer.echo(f"{'':11}{reason}")
    typer.echo(f"\nsign-offs: {found[0] if found else standing.notice(folder.path) or 'valid'}")
    _gate(items, found, require_green)


def _gate(items: list[dict[str, Any]], problems: list[str], required: bool) -> None:
    """Where it is required, stop unless every line of the checklist is green or waived and the run verifies."""
    if not required:
        return
    waived = [item["id"] for item in items if item["status"] == "waived"]
    lines = [f"{item['id']} is {item['status']}: {item['text']}" for item in items if item["status"] not in OPEN]
    lines += ["there is no checklist yet"] * (not items) + problems
    if lines:
        stop("\n".join([*lines, "NOT GREEN"]))
    typer.echo(f"green, {len(waived)} of {len(items)} waived: {', '.join(waived)}" if waived else "green", err=True)


@app.command()
def book(
    path: Folder,
    others: Annotated[list[Path] | None, typer.Argument(help="more runs: compared, and one click away")] = None,
) -> None:
    """Build the book of a run, or one of several: opens from its folder, needs no server and no network."""
    from stackpkg import book as books

    folder, more = folder_at(path), [folder_at(other).name for other in others or ()]
    try:
        index = books.build(folder.name, *more)
    except (OSError, ValueError, RuntimeError) as error:
        stop(error)
    typer.echo(f"the book: {index.relative_to(root())}")
