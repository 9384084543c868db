"""What a person types about the text of a run: what was read when, what goes, what is broken."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from stackpkg.console import AsJson, Folder, Job, folder_at, stop, unsealed

RECORD = "a record id, its source, or the beginning of it, such as pypi:numpy"


def trace(
    path: Folder,
    step: Annotated[int | None, typer.Option(help="optimiser step, from 0: which documents were in it?")] = None,
    document: Annotated[str | None, typer.Option(help=f"which steps read it? {RECORD}")] = None,
    shard: Annotated[str | None, typer.Option(help="a shard's name: which step read it, or its damage, first?")] = None,
    due: Annotated[bool, typer.Option("--due", help="what may not be used any more: which steps had read it?")] = False,
    job: Job = "train",
    as_json: AsJson = False,
) -> None:
    """From a step to its documents, from documents or a shard to their steps, and to the snapshots that hold them."""
    if (step, document, shard, due or None).count(None) != 3:
        stop("give one of --step, --document, --shard and --due")
    from stackpkg.data import provenance
    from stackpkg.data.ledger import Ledger
    from stackpkg.telemetry import privacy

    folder = folder_at(path)

    def shown(sources: dict[str, str]) -> dict[str, str]:
        hide = ledger.p.telemetry.hash_sources
        return {record: privacy.hashed(name, folder.path) if hide else name for record, name in sources.items()}

    told: dict[str, Any] = {}
    try:
        ledger = Ledger(folder.path, job)
        if shard is not None:
            first, blocks, tokens = ledger.damage(shard)
            told |= {"damaged_blocks": blocks, "damaged_tokens": len(tokens)}
            reads = [{"step": first, "use": "first read"}] if first is not None else []
        elif step is not None:
            rows = ledger.step(step)
            sources = shown(ledger.sources(row["record_id"] for row in rows))
            reads = [row | {"source": sources.get(row["record_id"], "")} for row in rows]
        else:
            late = ledger.overdue(int(time.time())) if due else {}
            known = ledger.sources(late) if due else provenance.named(folder.path / "data", str(document))
            told["documents"] = [
                {"record_id": name, "source": source} | ({"why": late[name]} if due else {})
                for name, source in shown(known).items()
            ]
            reads = ledger.document(*known)
    except ValueError as error:
        stop(error)
    told["reads"] = reads
    if step is None and reads:
        from stackpkg.training import snapshots

        told |= snapshots.reach(folder.path / "checkpoints" / job, int(str(reads[0]["step"])))
    typer.echo(json.dumps(told, indent=1) if as_json else "\n".join(_traced(told)))


def _traced(told: dict[str, Any]) -> list[str]:
    """What `trace` found, for a reader."""
    lines, none = [f"document {'  '.join(each.values())}" for each in told.get("documents", ())], "none"
    if "damaged_blocks" in told:
        exact = f"; damaged tokens: {told['damaged_tokens']}" * bool(told["damaged_tokens"])
        blocks = ", ".join(map(str, told["damaged_blocks"]))
        lines.append(f"damaged blocks: {blocks}{exact}" if blocks else "no damaged copy; the whole shard")
        none = "no step has read what is damaged; nothing to roll back" if blocks else "no step has read it"
    reads = ("  ".join(f"{name} {value}" for name, value in row.items()) for row in told["reads"])
    lines += [*reads] or [none]
    if "snapshots" in told:
        lines.append(f"snapshots with it: {', '.join(told['snapshots']) or 'none'}")
        lines.append(f"newest checkpoint without it: {told['newest_without'] or 'none'}")
    return lines


def takedown(
    path: Folder,
    document: Annotated[str, typer.Option(help=RECORD)],
    as_json: AsJson = False,
) -> None:
    """What holds a document or a source: shards, labelled sets, steps and snapshots of every job. Only looks."""
    from stackpkg.governance import takedown as held

    try:
        told = held.holders(folder_at(path).path, document)
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
    except (OSError, ValueError, RuntimeError) as error:
        stop(error)
    typer.echo(f"wrote {written.name} and {written.name}.sig; run the profile again: notebook 60 reads the decision")
    unsealed(folder)


def withdraw(
    path: Folder,
    record: Annotated[list[str], typer.Option("--record", help=f"{RECORD}; may be given several times")],
    reason: Annotated[str, typer.Option(help="who asked, and why: it is kept")],
) -> None:
    """Take records out of what a run reads, from its next launch on. Shards stay as they are; no other record moves."""
    from stackpkg.data import provenance

    data = folder_at(path).path / "data"
    try:
        named = {each: source for name in record for each, source in provenance.named(data, name).items()}
        provenance.withdraw(data / "withdrawn.jsonl", named, int(time.time()), reason)
    except (OSError, ValueError) as error:
        stop(f"nothing was withdrawn: {error}")
    typer.echo(f"withdrawn: {', '.join(named)}; a job that is launched or goes on from now passes over them")
    unsealed(data.parent)


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
        unsealed(data.parent)


COMMANDS = (trace, takedown, privacy, withdraw, shards)
