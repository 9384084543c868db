"""The commands of `stackpkg` that look at a job through its telemetry, or listen for it: query, live, inbox."""

from __future__ import annotations

import json
import signal
from typing import Annotated

import typer

from stackpkg import runs
from stackpkg.console import Folder, Job, folder_at, stop


def query(
    path: Folder,
    sql: Annotated[str, typer.Argument(help="one SELECT (DuckDB); DESCRIBE rows tells its columns")],
    job: Job = "train",
    as_json: Annotated[bool, typer.Option("--json", help="a JSON object a line instead of a table")] = False,
) -> None:
    """Ask a job in SQL: tables rows, effective, batches, events, evaluations, documents. Only looks."""
    from stackpkg.telemetry import store

    try:
        columns, found = store.ask(folder_at(path).path, job, sql)
    except (OSError, ValueError) as error:
        stop(error)
    if as_json:
        for row in found:
            typer.echo(json.dumps(runs.strict(dict(zip(columns, row, strict=True))), default=str))
        return
    cells = [columns, *([_cell(value) for value in row] for row in found)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        typer.echo("  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: object) -> str:
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("\n", " ").replace("\x1b", "")


def live(
    path: Folder,
    job: Job = "train",
    address: Annotated[str, typer.Option(help="of this machine, host:port; port 0: a free one")] = "127.0.0.1:0",
) -> None:
    """A page that follows a job while it runs, for the browser of this machine; ends with Ctrl-C."""
    from stackpkg.telemetry import page

    try:
        server = page.serve(folder_at(path).path, job, address)
    except (OSError, ValueError) as error:
        stop(error)
    typer.echo(f"http://{address.rpartition(':')[0]}:{server.server_port}/ follows {job}; Ctrl-C ends it")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


def inbox(
    path: Folder,
    port: Annotated[int, typer.Option(min=0, max=65535, help="of this machine; 0: a free one")] = 9095,
) -> None:
    """Write what Alertmanager tells of a run's jobs into the run's logbook, an entry a firing; ends with Ctrl-C."""
    from stackpkg.telemetry import live

    folder = folder_at(path)
    try:
        clerk = live.clerk(folder.path, port)
    except OSError as error:
        stop(f"port {port}: {error}; does another inbox listen there? give another --port, and to alertmanager.yml too")
    typer.echo(f"{clerk.at}/logbook writes into outbox/{folder.name}/logbook.md; Ctrl-C ends it")
    try:
        signal.pause()
    except KeyboardInterrupt:
        clerk.close()


COMMANDS = (query, live, inbox)
