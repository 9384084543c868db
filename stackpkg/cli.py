"""`stackpkg`: run, launch, params, trace, withdraw, skip, status, verify, sign, lm-eval, push, book."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from stackpkg import params
from stackpkg.runs import RunFolder, root
from stackpkg.schema import allowed

app = typer.Typer(no_args_is_help=True, add_completion=False, help="A training stack: run, inspect, sign, publish.")
WHOLE = "Give a record id, or the whole source that it was read from"
COLOUR = {"green": "green", "amber": "yellow", "red": "red"}
Folder = Annotated[Path, typer.Argument(help="a run's folder, such as outbox/smoke")]
Job = Annotated[str, typer.Option("--job", help="training job, a folder under checkpoints/")]


def _stop(message: object) -> NoReturn:
    typer.secho(str(message), fg="red", err=True)
    raise typer.Exit(1)


def _profile(path: Path) -> params.Params:
    try:
        return params.load(path)
    except (OSError, ValueError) as error:
        _stop(error)


def _folder(path: Path) -> RunFolder:
    """The run at `path`, which must be a folder of this repository's outbox."""
    if not path.is_dir():
        there = sorted(found.name for found in (root() / "outbox").iterdir() if found.is_dir())
        _stop(
            f"{path} is not a run's folder; runs here: {', '.join(name for name in there if name[0] != '.') or 'none'}"
        )
    if path.resolve().parent != (root() / "outbox").resolve():
        _stop(f"{path} is not in {root().name}/outbox")
    return RunFolder(path.resolve().name)


@app.command()
def run(
    profile: Annotated[Path, typer.Argument(help="a profile, such as params/dry_run.yaml")],
    first: Annotated[str | None, typer.Option("--from", help="start at this notebook, by number or name")] = None,
    only: Annotated[str | None, typer.Option("--only", help="run this notebook alone")] = None,
    name: Annotated[str | None, typer.Option("--run", help="folder under outbox/ instead of the profile's")] = None,
    force: Annotated[bool, typer.Option("--force", help="run stages even when nothing changed")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would run and why, run nothing")] = False,
) -> None:
    """Execute the notebooks of a profile in order; skip what has not changed; seal the run."""
    p = _profile(profile)
    try:
        p = params.validate(p.model_dump() | {"run": name or p.run})
        from stackpkg import pipeline

        sealed = pipeline.run(p, sys.stdout, first=first, only=only, force=force, dry_run=dry_run)
    except KeyboardInterrupt:
        _stop("interrupted; run the same command again to go on where it stopped")
    except (OSError, ValueError) as error:  # before a notebook ran, or after the last one
        _stop(error)
    except Exception as error:
        kept = f"The executed notebook is kept in outbox/{p.run}/nb/"
        _stop(f"{error}\n\n{kept}; the same command goes on at the failed stage.")
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
    from stackpkg.training import clusters, stop
    from stackpkg.training import launch as launcher

    p = _profile(profile)
    command = ["python", *launcher.command(f"outbox/{p.run}/checkpoints/{job}/job.json", p)[1:]]
    try:
        if render:
            away = p.cluster.scheduler != "none"
            typer.echo(clusters.render(p, job, command) if away else " ".join(command), nl=not away)
            return
        home = RunFolder(p.run).path / "checkpoints" / job
        if p.cluster.scheduler == "none":  # a job that runs here ends whole, then this does
            signal.signal(signal.SIGTERM, lambda *_: stop.request(home, "SIGTERM"))
        done = launcher.launch(job, p, RunFolder(p.run))
    except (OSError, RuntimeError, ValueError) as error:  # what is missing, what failed, or what to run by hand
        _stop(error)
    typer.echo("  ".join(f"{name} {value}" for name, value in done.items()))


@app.command()
def trace(
    path: Folder,
    step: Annotated[int | None, typer.Option(help="optimiser step, from 0: which documents were in it?")] = None,
    document: Annotated[str | None, typer.Option(help="record id, or its source: which steps read it?")] = None,
    job: Job = "train",
) -> None:
    """From a step to its documents, or from a document to its steps."""
    if (step is None) == (document is None):
        _stop("give one of --step and --document")
    from stackpkg.data.items import record_id
    from stackpkg.data.ledger import Ledger

    try:
        ledger = Ledger(_folder(path).path, job)
        known = 0 in ledger.stream.corpus.find([str(document)])
        named = str(document) if known else record_id(str(document))
        rows = ledger.step(step) if step is not None else ledger.document(named)
        if step is not None:
            sources = ledger.sources(row["record_id"] for row in rows)
            rows = [row | {"source": sources.get(row["record_id"], "")} for row in rows]
        if not rows and document and 0 not in ledger.stream.corpus.find([named]):
            _stop(f"no record {document!r} in the corpus. {WHOLE}")
    except ValueError as error:
        _stop(error)
    typer.echo("\n".join("  ".join(f"{name} {value}" for name, value in row.items()) for row in rows) or "none")


@app.command()
def withdraw(
    path: Folder,
    record: Annotated[list[str], typer.Option("--record", help="record id, or its source; may be given several times")],
    reason: Annotated[str, typer.Option(help="who asked, and why: it is kept")],
) -> None:
    """Take records out of what a run reads, from its next launch on. Shards stay as they are; no other record moves."""
    from stackpkg.data import provenance
    from stackpkg.data.corpus import Corpus
    from stackpkg.data.items import record_id

    data = _folder(path).path / "data"
    try:
        corpus = Corpus(data)
        named = [name if 0 in corpus.find([name]) else record_id(name) for name in record]
        if unknown := [name for name, found in zip(record, named, strict=True) if 0 not in corpus.find([found])]:
            _stop(f"no record {', '.join(map(repr, unknown))} in the corpus; nothing was withdrawn. {WHOLE}")
        for name in named:
            provenance.withdraw(data / "withdrawn.jsonl", name, int(time.time()), reason)
    except (OSError, ValueError) as error:
        _stop(error)
    typer.echo(f"withdrawn: {', '.join(named)}; a job that is launched or goes on from now passes over them")
    if (data.parent / "SHA256SUMS").exists():
        typer.echo("this run was sealed, and is another now: run its profile again, which seals it anew")


@app.command("params")
def reference(
    section: Annotated[str, typer.Argument(help="such as Data; none: all of them")] = "",
) -> None:
    """What a profile may say: every parameter with its default, its range and its meaning."""
    known = params.reference()
    chosen = {name: known[name] for name in known if name.lower() == section.lower() or not section}
    if not chosen:
        _stop(f"no section {section!r}; {allowed(section, known)}")
    for name, (purpose, fields) in chosen.items():
        typer.secho(f"{name}: {' '.join(purpose.split())}", bold=True)
        for field in fields:
            said = [f"{field.kind}{field.below}", *field.allowed, *[f"default {field.default}"] * bool(field.default)]
            typer.echo(f"  {field.name:<24} {'; '.join(said)}\n{'':27}{field.meaning}".rstrip())


@app.command()
def skip(
    path: Folder,
    step: Annotated[int, typer.Option("--step", min=0, help="first optimiser step, from 0, that reads later data")],
    steps: Annotated[int, typer.Option("--steps", min=1, help="steps of data to pass over")],
    job: Job = "train",
) -> None:
    """Pass over a range of data when a stopped training job goes on; recorded, so that every resume repeats it."""
    from stackpkg.data import curriculum

    home = _folder(path).path / "checkpoints" / job
    if not (home / "job.json").exists():
        _stop(f"{path} has no training job {job!r}; run notebook 31 first, or give another --job")
    late = max((int(c.name[11:]) for c in home.glob("checkpoint-*") if c.name[11:].isdigit()), default=0)
    if late > step:
        _stop(f"checkpoint-{late} has trained past step {step}: move it and later ones aside, as the runbook says")
    curriculum.record(home / "decisions.jsonl", [{"kind": "skip", "step": step, "steps": steps}])
    typer.echo(f"from step {step} on, {steps} steps of data are passed over; run the profile again to go on")


@app.command()
def status(path: Folder) -> None:
    """Stages, checklist and sign-offs of a run."""
    from stackpkg import pipeline
    from stackpkg.governance import checklist, seal

    folder = _folder(path)
    for stage in pipeline.stages():
        lock = pipeline.lock_of(folder, stage.name)
        error = lock.get("error", "").strip().splitlines()  # the last line of a traceback says what was raised
        typer.echo(f"{stage.name:<26} {lock['state']:<9} {lock.get('seconds', ''):>7}  {' '.join(error[-1:])[:160]}")
    items = checklist.read(folder)
    typer.echo("" if items else "\nno checklist yet: 90_sign_off writes it")
    for item in items:
        typer.secho(f"{item['id']:<3} {item['status']:<6} {item['text']}", fg=COLOUR[item["status"]])
        for reason in item["reasons"]:
            typer.echo(f"{'':11}{reason}")
    signers, demonstration = seal.signers_for(folder.path)
    found = seal.verify(folder.path, signers)
    typer.echo(f"\nsign-offs: {found[0] if found else seal.LOUD if demonstration else 'valid'}")


@app.command()
def verify(
    path: Folder,
    signers: Annotated[Path | None, typer.Option(help="allowed signers; default governance/allowed_signers")] = None,
) -> None:
    """Prove that no byte of the archive changed and that every role signed it; names each file that fails."""
    from stackpkg.governance import seal

    if not path.is_dir():
        _stop(f"{path} is not a run's folder")
    try:
        default, demonstration = seal.signers_for(path.resolve())
        found = seal.verify(path.resolve(), signers or default)
    except (OSError, RuntimeError) as error:
        _stop(error)
    if found:
        _stop("\n".join([*found, f"NOT VERIFIED: {len(found)} problem(s)"]))
    if demonstration and not signers:
        typer.secho(seal.LOUD, fg="yellow", bold=True)
    typer.secho("VERIFIED", fg="green")


@app.command()
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

    folder = _folder(path)
    try:
        written = seal.sign(folder.path, role, key, reviewer, decision, tuple(condition or ()))
    except (OSError, ValueError, RuntimeError) as error:
        _stop(error)
    typer.echo(f"wrote {written.name} and {written.name}.sig")


@app.command("lm-eval")
def lm_eval(path: Folder, tasks: Annotated[Path, typer.Option(help="a task (YAML), or a folder of them")]) -> None:
    """Tasks of lm-evaluation-harness on the promoted version (extra `lm-eval`); written to eval/lm_eval.json."""
    from stackpkg.governance import release

    try:
        typer.echo("\n".join(release.examine(_folder(path), tasks)))
    except (OSError, ValueError) as error:
        _stop(error)


@app.command()
def push(
    path: Folder, repository: Annotated[str, typer.Argument(help="owner/name on the hub; made, private, if missing")]
) -> None:
    """Send the promoted version to a Hugging Face hub (HF_ENDPOINT, HF_TOKEN), and check what arrived."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError

    from stackpkg.governance import release

    folder = _folder(path)
    try:
        commit = release.push(folder, repository)
    except (OSError, HTTPError) as error:
        _stop(f"the hub at {constants.ENDPOINT}: {error}")
    except ValueError as error:
        _stop(error)
    typer.echo(f"{repository} at {commit} is what was promoted")


@app.command()
def book(path: Folder) -> None:
    """Build the book of a run: opens from its folder, needs no server and no network."""
    from stackpkg import book as books

    folder = _folder(path)
    try:
        index = books.build(folder.name)
    except (OSError, ValueError, RuntimeError) as error:
        _stop(error)
    typer.echo(f"the book: {index.relative_to(root())}")
