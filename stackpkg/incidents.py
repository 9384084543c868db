"""What a person types when a job needs help: the commands of the runbooks, with those of `cli_data` about its text."""

from __future__ import annotations

import json
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import typer

from stackpkg import runs
from stackpkg.console import AsJson, Folder, Job, folder_at, stop

FIRST = "nothing was changed. End it first: stackpkg halt {} --wait --reason WHY"


def home_at(path: Path, job: str) -> Path:
    home = folder_at(path).path / "checkpoints" / job
    if not (home / "job.json").exists():
        stop(f"{path} has no training job {job!r}; run notebook 31 first, or give another --job")
    return home


def job(path: Folder, job: Job = "train", as_json: AsJson = False) -> None:
    """How a training job stands: its last row, attempts, rungs of the ladder, checkpoints, alerts. Only looks."""
    from stackpkg.telemetry import rows as telemetry
    from stackpkg.training import attempts, recovery, running, snapshots

    home = home_at(path, job)
    folder = home.parents[1] / "telemetry" / job
    told: dict[str, Any] = {"done": (home / "done.json").exists()}
    if [*folder.glob("rank-*.jsonl")]:
        last = telemetry.read(folder).sort_values("time").iloc[-1]
        told["last_row"] = {name: last.get(name) for name in ("step", "attempt", "time", "loss")}
    try:
        told["runs"] = running.runs(home)
    except (ValueError, RuntimeError) as error:  # its scheduler can't be asked from here
        told["runs"] = f"whether it runs is not known: {error}"
    told["attempts"], told["ladder"] = attempts.read(home), recovery.history(home)
    told["checkpoints"] = {each.name: snapshots.problems(each) for each in snapshots.listed(home).values()}
    told["alerts"] = [*runs.read_lines(folder.with_name(f"{job}.alerts.jsonl"))]
    typer.echo(runs.as_json(told) if as_json else "\n".join(_standing(told)))


def _standing(told: dict[str, Any]) -> list[str]:
    """How a job stands, for a reader."""
    lines = []
    if last := told.get("last_row"):
        silent = f"{time.time() - last['time']:.0f} s ago"
        lines.append(f"last row: step {last['step']}, attempt {last['attempt']}, {silent}, loss {last['loss']}")
    lines += ["done" if told["done"] else "not done", told["runs"] or "nothing of it runs"]
    for number, each in enumerate(told["attempts"], 1):
        notes = {name: each[name] for name in ("stopped", "hung", "aside") if each.get(name)}
        since = each["resumed_from"] or "the start"
        lines.append(f"attempt {number}  {each['at']}  from {since}  {notes or ''}".rstrip())
    for rung in told["ladder"]:
        reach = f"steps {rung['first']} to {rung['last']}, from {rung['good']}"
        lines.append(f"ladder  {rung['at']}  {rung['rung']}: {reach}")
    lines += [f"{name}  {'; '.join(broken) or 'whole'}" for name, broken in told["checkpoints"].items()]
    return lines + ([json.dumps(each) for each in told["alerts"][-5:]] or ["no alerts"])


def rows(
    path: Folder,
    series: Annotated[list[str], typer.Argument(help="columns of the telemetry, such as loss or 'router_*'")],
    job: Job = "train",
    last: Annotated[int, typer.Option(min=1, help="rows to show")] = 20,
    whole: Annotated[bool, typer.Option("--whole", help="spread over the whole run instead of its end")] = False,
) -> None:
    """Rows of the telemetry, every attempt and rank. Only looks."""
    from stackpkg.telemetry import rows as telemetry

    try:
        table = telemetry.read(folder_at(path).path / "telemetry" / job).sort_values(["step", "attempt", "rank"])
    except FileNotFoundError as error:
        stop(error)
    if absent := [one for one in series if not any(fnmatch(name, one) for name in table)]:
        typer.echo(f"no row has {', '.join(absent)}")
    shown = [name for name in table if any(fnmatch(name, one) for one in series)]
    part = table.iloc[:: -(-len(table) // last)] if whole else table.tail(last)
    typer.echo(part[["step", "attempt", "rank", *shown]].to_string(index=False))


def halt(
    path: Folder,
    reason: Annotated[str, typer.Option(help="kept with the attempt")],
    now: Annotated[bool, typer.Option("--now", help="kill it: without a checkpoint, for good")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="return when nothing of it runs any more")] = False,
    job: Job = "train",
) -> None:
    """Ask a running job to save and end after its present step; launched again, it goes on from there."""
    from stackpkg.training import stop as stopping

    home = home_at(path, job)
    if now:
        stopping.kill(home, reason)
        typer.echo(f"every rank ends within seconds; {stopping.killed(home)}")
    else:
        typer.echo(f"{stopping.request(home, reason).name} file written; the job ends after its present step")
    if wait:
        _await(home)


def _await(home: Path) -> None:
    """Until nothing of the job runs and, when it stopped, its pipeline has ended too."""
    from stackpkg import locks
    from stackpkg.training import running
    from stackpkg.training import stop as stopping

    try:
        while running.runs(home):
            time.sleep(1)
    except (RuntimeError, ValueError) as error:  # its scheduler can't be asked from here; what was asked of it stands
        stop(error)
    end = stopping.stopped(home)
    while end:
        try:
            with locks.exclusive(home.parents[1].name):
                break
        except BlockingIOError:  # it keeps the executed copy
            time.sleep(1)
    typer.echo(f"nothing of it runs; its last attempt {f'stopped: {end}' if end else 'was not stopped'}")
    if (left := home / stopping.FILE).exists():
        left.unlink()
        typer.echo("it ended without looking: the stop file is removed, or the next launch would obey it")


def save(path: Folder, job: Job = "train") -> None:
    """Ask a running job for a checkpoint after its present step; it goes on."""
    from stackpkg.training import stop as stopping

    typer.echo(f"{stopping.ask_save(home_at(path, job)).name} file written; the job saves after its present step")


def rollback(
    path: Folder,
    step: Annotated[int, typer.Option(min=0, help="the last step to keep; checkpoints are named by their step")],
    job: Job = "train",
) -> None:
    """Let a job that is not running go on from an earlier checkpoint: later ones are set aside, none is deleted."""
    from stackpkg.training import running, snapshots

    home = home_at(path, job)
    try:
        with running.idle(home):
            good, aside = snapshots.roll_back(home, step)
    except (BlockingIOError, RuntimeError, ValueError) as error:
        stop(f"{error}; {FIRST.format(path)}")
    typer.echo(f"set aside: {', '.join(aside) or 'nothing'}\nit goes on from {good.name if good else 'the start'}")


def skip(
    path: Folder,
    step: Annotated[int, typer.Option("--step", min=0, help="first optimiser step, from 0, that reads later data")],
    steps: Annotated[int, typer.Option("--steps", min=1, help="steps of data to pass over")],
    job: Job = "train",
) -> None:
    """Pass over a range of data when a stopped training job goes on; recorded, so that every resume repeats it."""
    from stackpkg.data import curriculum
    from stackpkg.training import running, snapshots

    home = home_at(path, job)
    if late := max((at for at in snapshots.listed(home) if at > step), default=0):
        stop(f"checkpoint-{late} has trained past step {step}: set it aside first, stackpkg rollback --step {step}")
    try:
        with running.idle(home):
            curriculum.record(home / "decisions.jsonl", [{"kind": "skip", "step": step, "steps": steps}])
    except (BlockingIOError, RuntimeError, ValueError) as error:
        stop(f"{error}; {FIRST.format(path)}")
    typer.echo(f"from step {step} on, {steps} steps of data are passed over; run the profile again to go on")


def note(path: Folder, text: Annotated[str, typer.Argument(help="what was seen, done and lost")]) -> None:
    """Add a dated entry to the logbook of a run, outbox/<run>/logbook.md."""
    from stackpkg.telemetry import logbook

    typer.echo(f"added to {logbook.add(folder_at(path).path, 'note', [text]).name}")


COMMANDS = (job, rows, halt, save, rollback, skip, note)
