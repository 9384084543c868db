"""Executed notebook cells: badges, the run's parameters as a table, durations, outputs, failures in red."""

from __future__ import annotations

import ast
import re
from html import escape
from typing import TYPE_CHECKING, Any

from listing import listing
from sanitise import SCROLL, sanitise

if TYPE_CHECKING:
    from nodes import Renderer

Node = dict[str, Any]
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
PICTURES = ("image/png", "image/jpeg", "image/gif")
BADGES = {"parameters": "parameters", "injected-parameters": "parameters of this run", "accept": "acceptance check"}


def code_cell(r: Renderer, node: Node) -> str:
    data = node.get("data", {})
    tags = data.get("tags", [])
    record = data.get("papermill", {})
    source = next(child for child in node["children"] if child["type"] == "code")
    failed = any(output["jupyter_data"]["output_type"] == "error" for output in _outputs(node))
    waiting = record.get("status") == "pending"
    badges = [f'<span class="badge">{BADGES[tag]}</span>' for tag in tags if tag in BADGES]
    if failed:
        badges.append('<span class="badge failed">failed here</span>')
    elif waiting:
        badges.append('<span class="badge not">not run</span>')
    elif "accept" in tags and record:
        badges.append('<span class="badge ok">passed</span>')
    if (record.get("duration") or 0) >= 0.1:
        badges.append(f'<span class="took" title="duration of this cell">{_seconds(record["duration"])}</span>')
    head = f'<div class="bar">{"".join(badges)}</div>' if badges else ""
    if "parameters" in tags:
        r.declared = set(_assigned(source["value"]))
    code = (
        _values(source["value"], r.declared, r.defaults)
        if "injected-parameters" in tags
        else listing(source["value"], "python")
    )
    if "hide" in (source.get("visibility"), node.get("visibility")):
        code = f"<details><summary>Code</summary>{code}</details>"
    code = "" if source.get("visibility") == "remove" else code
    kinds = " ".join(["cell", *(["failed"] if failed else []), *(tag for tag in tags if tag in BADGES)])
    shown = "".join(outputs(r, child) for child in node["children"] if child["type"] == "outputs")
    return f'<section class="{kinds}" id="{escape(node["html_id"])}">{head}{code}{shown}</section>'


def outputs(r: Renderer, node: Node) -> str:
    shown = "".join(output(r, child) for child in node.get("children", []))
    if node.get("visibility") == "remove" or not shown:
        return ""
    if node.get("visibility") == "hide":
        shown = f"<details><summary>Output</summary>{shown}</details>"
    return f'<div class="outputs">{shown}</div>'


def output(r: Renderer, node: Node) -> str:
    data = node["jupyter_data"]
    if data["output_type"] == "stream":
        return _text(_content(r, data, "text"), f"stream {data['name']}")
    if data["output_type"] == "error":
        trace = data.get("traceback") or ""
        trace = _content(r, data, "traceback") if isinstance(trace, str) else "\n".join(trace)
        error = ANSI.sub("", f"{data['ename']}: {data['evalue']}")
        folded = f"<details><summary>Traceback</summary>{_text(trace, 'stream')}</details>"
        return f'<div class="error"><strong>{escape(error)}</strong>{folded}</div>'
    found = data["data"]
    if "text/html" in found:
        return f'<div class="html">{sanitise(_content(r, found["text/html"], "content"), r.report)}</div>'
    for kind in PICTURES:
        if kind in found:
            return picture(
                r.resolve(found[kind]["path"]), _content(r, found.get("text/plain", {"content": ""}), "content")
            )
    for kind in ("text/markdown", "text/latex", "text/plain"):
        if kind in found:
            return _text(_content(r, found[kind], "content"), "result")
    raise ValueError(f"the theme shows no output of the kinds {sorted(found)}; add one to book/theme/cells.py")


def picture(name: str, words: str) -> str:
    """A figure on a white sheet; `words` is what the plotting library says of it, its own text where that is a type."""
    words = "Figure made by the cell above" if not words or words.startswith("<") else words
    return f'<figure class="picture"><img src="{escape(name)}" alt="{escape(words)}"></figure>'


def _outputs(node: Node) -> list[Node]:
    return [output for child in node["children"] if child["type"] == "outputs" for output in child.get("children", [])]


def _content(r: Renderer, data: Node, key: str) -> str:
    """The text itself, or what the file holds that a long text was moved to."""
    return data[key] if "path" not in data else r.read(data["path"])


def _text(text: str, kind: str) -> str:
    return f'<pre class="{kind}" tabindex="0">{escape(ANSI.sub("", text).rstrip())}</pre>'


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 10 else f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min"


def _assigned(source: str) -> dict[str, Any]:
    pairs = [line for line in ast.parse(source).body if isinstance(line, ast.Assign)]
    return {line.targets[0].id: ast.literal_eval(line.value) for line in pairs if isinstance(line.targets[0], ast.Name)}


def _values(source: str, used: set[str], defaults: dict[str, Any]) -> str:
    """The injected cell as a table: of a nested value what the profile set, the rest folded, as is what others read."""
    rows: dict[bool, list[str]] = {True: [], False: []}
    for name, value in _assigned(source).items():
        usual = defaults.get(name)
        given, rest = {}, {}
        if isinstance(value, dict):
            for key, part in value.items():
                same = isinstance(usual, dict) and key in usual and usual[key] == part
                (rest if same else given)[key] = part
            cells = _lines(given)
            if rest:
                cells += f"<details><summary>{len(rest)} as by default</summary>{_lines(rest)}</details>"
        else:
            cells = f"<code>{escape(repr(value))}</code>"
        rows[name in used].append(f'<tr><th scope="row"><code>{escape(name)}</code></th><td>{cells}</td></tr>')
    shown, rest_rows = (
        f'<div {SCROLL}><table class="values"><tbody>{"".join(part)}</tbody></table></div>' for part in rows.values()
    )
    others = f"<details><summary>{len(rows[False])} parameters of other notebooks</summary>{rest_rows}</details>"
    return shown + (others if rows[False] else "")


def _lines(values: dict[str, Any]) -> str:
    return "<br>".join(f"<code>{escape(f'{key}: {part!r}')}</code>" for key, part in values.items())
