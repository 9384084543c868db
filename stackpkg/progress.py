"""How a run shows itself: one calm display with the time left on a terminal, one line a stage in a pipe or a file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from stackpkg.runs import read_json

COLOUR = {"ok": "green", "failed": "red"}


def clock(seconds: float) -> str:
    """Such as `45 s`, `12 min`, `3 h 05 min`."""
    minutes = round(seconds / 60)
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{minutes} min"
        if minutes < 90
        else f"{minutes // 60} h {minutes % 60:02} min"
    )


class Forecast:
    """Seconds that stages will take, from how long they took in the run of this outbox that knows most of them.

    What this run has done so far says how much slower or faster it is than that one.
    """

    def __init__(self, outbox: Path, run: str, names: list[str]) -> None:
        found: dict[str, dict[str, float]] = {}
        for path in outbox.glob("*/lock/*.json"):
            lock = read_json(path)
            if path.stem in names and lock.get("state") == "ok":
                found.setdefault(path.parents[1].name, {})[path.stem] = lock["seconds"]
        self.names = list(names)
        self.usual = max(found.items(), key=lambda item: (len(item[1]), item[0] == run), default=("", {}))[1]

    def left(self, done: Mapping[str, float], now: str = "", gone: float = 0.0) -> float | None:
        """Seconds until the last stage has ended; None where no run tells. `gone`: seconds of the stage that runs."""
        if not self.usual:
            return None
        shared = [name for name in done if self.usual.get(name)]
        rate = sum(done[name] for name in shared) / sum(self.usual[name] for name in shared) if shared else 1.0
        mean = sum(self.usual.values()) / len(self.usual)
        rest = [name for name in self.names if name not in done]
        return sum(max(self.usual.get(n, mean) * rate - gone * (n == now), 0.0) for n in rest)


class Lines:
    """One line for each stage, when it has ended."""

    def __init__(self, stream: TextIO, total: int) -> None:
        self.stream, self.total, self.number, self.name, self.why = stream, total, 0, "", ""

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *raised: object) -> None:
        """Nothing stays behind."""

    def passed(self, name: str, text: str) -> None:
        """A stage that does not run, and why."""
        self.number += 1
        self._write(f"[{self.number:>2}/{self.total}] {name:<26} {text}")

    def started(self, name: str, why: str) -> None:
        self.number, self.name, self.why = self.number + 1, name, why

    def told(self, line: str) -> None:
        """A line of progress from within the stage."""

    def ended(self, state: str, seconds: float) -> None:
        self._write(f"[{self.number:>2}/{self.total}] {self.name:<26} {state} in {seconds:.1f} s ({self.why})")

    def _write(self, line: str) -> None:
        self.stream.write(line + "\n")
        self.stream.flush()


class _Left(ProgressColumn):
    """Time gone and time left, told anew at each refresh."""

    def __init__(self, shown: Live) -> None:
        super().__init__()
        self.shown = shown

    def render(self, task: Task) -> Text:
        gone = time.monotonic() - self.shown.began
        left = self.shown.forecast.left(self.shown.done, self.shown.name, time.monotonic() - self.shown.since)
        told = "time left unknown: no finished run to go by" if left is None else f"about {clock(left)} left"
        return Text(f"{clock(gone)}, {told}", style="dim")


class Live(Lines):
    """What has ended stays above; below it one bar with the stage, its last word and the time left."""

    def __init__(self, stream: TextIO, total: int, forecast: Forecast) -> None:
        super().__init__(stream, total)
        self.forecast, self.done = forecast, dict[str, float]()
        self.began = self.since = time.monotonic()
        plain = TextColumn("{task.fields[word]}", markup=False, style="dim", table_column=Column(no_wrap=True))
        columns = (TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.completed:.0f}/{task.total:.0f}"))
        self.bar = Progress(
            *columns, _Left(self), plain, console=Console(file=stream), refresh_per_second=2, transient=True
        )
        self.task = self.bar.add_task("", total=total, word="")

    def __enter__(self) -> Live:
        self.bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.bar.stop()

    def passed(self, name: str, text: str) -> None:
        super().passed(name, text)
        self.forecast.names.remove(name)
        self.bar.update(self.task, completed=self.number)

    def started(self, name: str, why: str) -> None:
        super().started(name, why)
        self.since = time.monotonic()
        self.bar.update(self.task, description=name, word=why)

    def told(self, line: str) -> None:
        self.bar.update(self.task, word=line[:100])

    def ended(self, state: str, seconds: float) -> None:
        self.done[self.name] = seconds
        super().ended(state, seconds)
        self.bar.update(self.task, completed=self.number, word="")

    def _write(self, line: str) -> None:
        state = next((word for word in COLOUR if f" {word} in " in line), "")
        self.bar.console.print(Text(line, style=COLOUR.get(state, "dim")), soft_wrap=True)


class Told:
    """Passes on the lines that report progress (they start with a bracket) and drops the rest of a cell's output."""

    def __init__(self, shown: Lines) -> None:
        self.shown, self.rest = shown, ""

    def write(self, text: str) -> None:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            if line.startswith("["):
                self.shown.told(line)

    def flush(self) -> None:
        """Nothing is held back."""


def display(stream: TextIO, outbox: Path, run: str, names: list[str]) -> Lines:
    """The one that suits `stream`; a context manager."""
    if stream.isatty():
        return Live(stream, len(names), Forecast(outbox, run, names))
    return Lines(stream, len(names))
