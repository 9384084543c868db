"""Small pieces of MyST Markdown; text from a run is escaped."""

from __future__ import annotations

import re
from typing import Any

SAFE = re.compile(r"([\\`*_{}\[\]()#+\-.!|<>$~:@^&%\"'/=])")


def text(value: Any) -> str:
    """Text from a run as Markdown that shows it literally, on one line."""
    return SAFE.sub(r"\\\1", " ".join(str(value).split()))


def code(value: Any) -> str:
    """Text from a run as inline code, in a fence longer than any it holds; a pipe would end a table cell."""
    body = " ".join(str(value).split()).replace("|", "¦")
    ticks = "`" * (max((len(found) for found in re.findall("`+", body)), default=0) + 1)
    return f"{ticks} {body} {ticks}" if body else ""


def badge(state: str, label: str = "") -> str:
    return f"{{span .badge .{state.split()[0]}}}`{label or state}`"


def div(names: str, *lines: str, fence: str = ":::") -> str:
    return "\n".join([f"{fence}{{div}}", f":class: {names}", "", "\n\n".join(lines), "", fence, ""])


def table(header: str, rows: list[list[str]]) -> str:
    lines = [
        header,
        "|".join(["---"] * (header.count("|") + 1)),
        *("|".join(cell or " " for cell in row) for row in rows),
    ]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def prose(value: str | None) -> str:
    """A docstring's paragraph: literal text, but `code` stays code."""
    pieces = re.split(r"(`+[^`]+`+)", " ".join((value or "").split()))
    return "".join(code(piece.strip("`")) if i % 2 else SAFE.sub(r"\\\1", piece) for i, piece in enumerate(pieces))
