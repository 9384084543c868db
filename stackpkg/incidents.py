"""What a person types when a run needs help: the commands of the runbooks. Those that only look come first."""

from __future__ import annotations

import json
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated

import typer

from stackpkg.console import Folder, Job, folder_at, stop

FIRST = "nothing was changed. End it first: stackpkg halt {} --wait --reason WHY"
RECORD = "a record id, its source, or the beginning of sources and a *"
WHOLE = f"Give {RECORD}"


def home_at(path: Path, job: str) -> Path:
    home = folder_at(path).path / "checkpoints" / job
    if not (home / "job.json").exists():
        stop(f"{path} has no training job {job!r}; run notebook 31 first, or give another --job")
    return home


def job(path: Folder, job: Job = "train") -> None:
    """How a training job stands: its last row, attempts, rungs of the ladder, checkpoints, alerts. Only looks."""
    from stackpkg.telemetry import rows as telemetry
    from stackpkg.training import attempts, recovery, snapshots

    home = home_at(path, job)
    told = home.parents[1] / "telemetry" / job
    if [*told.glob("rank-*.jsonl")]:
        last = telemetry.read(told).sort_values("time").iloc[-1]
        silent = time.time() - last.time
        typer.echo(f"last row: step {last.step}, attempt {last.attempt}, {silent:.0f} s ago, loss {last.get('loss')}")
    typer.echo("done" if (home / "done.json").exists() else "not done")
    for number, each in enumerate(attempts.read(home), 1):
        notes = {name: each[name] for name in ("stopped", "hung", "aside") if each.get(name)}
        typer.echo(
            f"attempt {number}  {each['at']}  from {each['resumed_from'] or 'the start'}  {notes or ''}".rstrip()
        )
    for rung in recovery.history(home):
        typer.echo(
            f"ladder  {rung['at']}  {rung['rung']}: steps {rung['first']} to {rung['last']}, from {rung['good']}"
        )
    for checkpoint in snapshots.listed(home).values():
        typer.echo(f"{checkpoint.name}  {'; '.join(snapshots.problems(checkpoint)) or 'whole'}")
    alerts = told.with_name(f"{job}.alerts.jsonl")
    typer.echo("\n".join(alerts.read_text(encoding="utf-8").splitlines()[-5:]) if alerts.exists() else "no alerts")


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


def trace(
    path: Folder,
    step: Annotated[int | None, typer.Option(help="optimiser step, from 0: which documents were in it?")] = None,
    document: Annotated[str | None, typer.Option(help=f"which steps read it? {RECORD}")] = None,
    shard: Annotated[str | None, typer.Option(help="a shard's name: which step read it, or its damage, first?")] = None,
    due: Annotated[bool, typer.Option("--due", help="what may not be used any more: which steps had read it?")] = False,
    job: Job = "train",
) -> None:
    """From a step to its documents, from documents or a shard to their steps, and to the snapshots that hold them."""
    if (step, document, shard, due or None).count(None) != 3:
        stop("give one of --step, --document, --shard and --due")
    from stackpkg.data import provenance
    from stackpkg.data.ledger import Ledger
    from stackpkg.telemetry import privacy

    folder = folder_at(path)
    try:
        ledger = Ledger(folder.path, job)
        if shard is not None:
            first, blocks, tokens = ledger.damage(shard)
            exact = f"; damaged tokens: {len(tokens)}" if len(tokens) else ""
            seen = f"damaged blocks: {', '.join(map(str, blocks))}{exact}"
            typer.echo(seen if blocks else "no damaged copy; the whole shard")
            lines = [{"step": first, "use": "first read"}] if first is not None else []
        elif step is not None:
            rows = ledger.step(step)
            sources = ledger.sources(row["record_id"] for row in rows)
            if ledger.p.telemetry.hash_sources:
                sources = {record: privacy.hashed(name, folder.path) for record, name in sources.items()}
            lines = [row | {"source": sources.get(row["record_id"], "")} for row in rows]
        else:
            late = ledger.overdue(int(time.time())) if due else {}
            known = ledger.sources(late) if due else provenance.named(folder.path / "data", str(document))
            if not known and not due:
                stop(f"no record {document!r} in the corpus. {WHOLE}")
            for name, source in known.items():
                typer.echo(f"document {name}  {source}  {late.get(name, '')}".rstrip())
            lines = ledger.document(*known)
    except ValueError as error:
        stop(error)
    typer.echo("\n".join("  ".join(f"{name} {value}" for name, value in row.items()) for row in lines) or "none")
    if step is None and lines:
        from stackpkg.training import snapshots

        home, first = folder.path / "checkpoints" / job, int(str(lines[0]["step"]))
        before = max((at for at in snapshots.listed(home) if at <= first), default=0)
        typer.echo(f"snapshots with it: {', '.join(snapshots.touched(home, first)) or 'none'}")
        typer.echo(f"newest checkpoint without it: {f'checkpoint-{before}' if before else 'none'}")


def takedown(
    path: Folder,
    document: Annotated[str, typer.Option(help="record id, or the whole source that it was read from")] = "",
    source: Annotated[str, typer.Option(help="a source's name, such as pypi:numpy: every document of it")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="for a script: everything, as JSON")] = False,
) -> None:
    """What holds a document or a source: shards, labelled sets, steps and snapshots of every job. Only looks."""
    if bool(document) == bool(source):
        stop("give one of --document and --source")
    from stackpkg.governance import takedown as held

    try:
        told = held.holders(folder_at(path).path, document, source)
    except (OSError, ValueError) as error:
        stop(error)
    typer.echo(json.dumps(told, indent=1) if as_json else "\n".join(held.lines(told)))
    if not as_json:
        typer.echo("`stackpkg withdraw` stops its use; a snapshot with it stays as it is until it is set aside")


def privacy(
    path: Folder,
    reviewer: Annotated[str, typer.Option(help="your name in governance/allowed_signers")],
    key: Annotated[Path, typer.Option(help="your private SSH key")],
    reason: Annotated[str, typer.Option(help="why, for who reads it in a year")],
    decision: Annotated[str, typer.Option(help="approve, approve-with-conditions or reject")] = "approve",
    condition: Annotated[list[str] | None, typer.Option(help="may be given several times")] = None,
) -> None:
    """Decide, as a person, about the privacy review of a run: written and signed into its governance/."""
    from stackpkg.governance import privacy as review

    folder = folder_at(path).path
    try:
        written = review.decide(folder, reviewer, key, decision, condition or (), reason)
    except (OSError, ValueError) as error:
        stop(error)
    typer.echo(f"wrote {written.name} and {written.name}.sig; run the profile again: notebook 60 reads the decision")
    _unsealed(folder)


def withdraw(
    path: Folder,
    record: Annotated[list[str], typer.Option("--record", help=f"{RECORD}; may be given several times")],
    reason: Annotated[str, typer.Option(help="who asked, and why: it is kept")],
) -> None:
    """Take records out of what a run reads, from its next launch on. Shards stay as they are; no other record moves."""
    from stackpkg.data import provenance

    data = folder_at(path).path / "data"
    try:
        found = {name: provenance.named(data, name) for name in record}
        if unknown := [name for name, records in found.items() if not records]:
            stop(f"no record {', '.join(map(repr, unknown))} in the corpus; nothing was withdrawn. {WHOLE}")
        named = {each: source for records in found.values() for each, source in records.items()}
        provenance.withdraw(data / "withdrawn.jsonl", named, int(time.time()), reason)
    except (OSError, ValueError) as error:
        stop(error)
    typer.echo(f"withdrawn: {', '.join(named)}; a job that is launched or goes on from now passes over them")
    _unsealed(data.parent)


def _unsealed(run: Path) -> None:
    if (run / "SHA256SUMS").exists():
        typer.echo("this run was sealed, and is another now: run its profile again, which seals it anew")


def shards(
    path: Folder,
    mend: Annotated[bool, typer.Option("--mend", help="quarantine each broken shard and make it again")] = False,
    skip: Annotated[str, typer.Option(help="quarantine this shard and withdraw its records instead")] = "",
    reason: Annotated[str, typer.Option(help="with --skip: who decided, and why")] = "",
) -> None:
    """Are the files of the corpus those of its manifest? Looks, unless --mend or --skip is given; deletes nothing."""
    from stackpkg.data import manifest, provenance
    from stackpkg.data import shards as tokens

    data = folder_at(path).path / "data"
    try:
        for name in manifest.verify(data):
            shard = Path(name).stem
            typer.echo(f"{name}: corrupt or missing")
            if not (name.endswith(".bin") and (mend or skip == shard)):
                continue
            if (data / name).exists():
                typer.echo(f"set aside: quarantine/{manifest.quarantine(data, name).name}")
            if mend:
                typer.echo(f"made again, the same bytes: {tokens.rebuild(data, shard).name}")
        if skip:
            gone = provenance.withdraw_shard(data, skip, int(time.time()), reason)
            typer.echo(f"{gone} records withdrawn; a job that is launched or goes on from now passes over them")
        left = set(manifest.verify(data)) - provenance.passed_over(data)
    except (OSError, ValueError) as error:
        stop(error)
    if left:
        stop(f"a job would not begin: {', '.join(sorted(left))}")
    typer.echo("all that a job reads is whole")
    if mend or skip:
        _unsealed(data.parent)


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
    from stackpkg import pipeline
    from stackpkg.training import running
    from stackpkg.training import stop as stopping

    while running.runs(home):
        time.sleep(1)
    end = stopping.stopped(home)
    while end:
        try:
            with pipeline.exclusive(home.parents[1].name):
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
    except BlockingIOError as error:
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
    except BlockingIOError as error:
        stop(f"{error}; {FIRST.format(path)}")
    typer.echo(f"from step {step} on, {steps} steps of data are passed over; run the profile again to go on")


def note(path: Folder, text: Annotated[str, typer.Argument(help="what was seen, done and lost")]) -> None:
    """Add a dated entry to the logbook of a run, outbox/<run>/logbook.md."""
    from stackpkg.telemetry import logbook

    typer.echo(f"added to {logbook.add(folder_at(path).path, 'note', [text]).name}")


COMMANDS = (job, rows, trace, shards, save, halt, rollback, skip, withdraw, takedown, privacy, note)
