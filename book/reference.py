"""The generated part of the reference: parameters from the schema, the package from its docstrings."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from myst import code, prose, table, text

import stackpkg
from stackpkg import params


def parameters() -> str:
    """One table per section of the schema: name, type, default, allowed values, meaning."""
    parts = []
    for name, (purpose, fields) in params.reference().items():
        rows = [[code(field.name), *_parameter(field)] for field in fields]
        parts.append(f"## {text(name)}\n\n{prose(purpose)}\n")
        parts.append(table("name | type | default | allowed | meaning", rows))
    return "\n".join(parts)


def _parameter(field: params.Described) -> list[str]:
    kind = f"{field.kind}[{field.below}](#{field.below.lower()})" if field.below else code(field.kind)
    default = code(field.default) if field.default else ""
    return [kind, default, ", ".join(map(code, field.allowed)), prose(field.meaning)]


def api() -> dict[str, str]:
    """One page per room: signatures and docstrings parsed from the source, so nothing heavy is imported."""
    root, rooms = Path(stackpkg.__file__).parent, dict[str, list[str]]()
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        members = [member for node in tree.body for member in described(node)]
        if members:
            room = place.parts[0] if len(place.parts) > 1 else "stackpkg"
            name = ".".join(["stackpkg", *place.with_suffix("").parts]).removesuffix(".__init__")
            rooms.setdefault(room, []).append(
                "\n".join([f"## {text(name)}\n", docstring(ast.get_docstring(tree)), *members])
            )
    return {
        room: f"# {room if room == 'stackpkg' else f'stackpkg.{room}'}\n\n" + "\n".join(modules)
        for room, modules in rooms.items()
    }


def described(node: ast.AST, owner: str = "") -> list[str]:
    if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_") or not ast.get_docstring(node):
        return []
    if isinstance(node, ast.ClassDef):
        line = f"class {node.name}({', '.join(ast.unparse(base) for base in node.bases)})".removesuffix("()")
    else:
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        line = f"def {owner}{node.name}({ast.unparse(node.args)}){returns}"
    below = (
        [part for child in node.body for part in described(child, f"{node.name}.")]
        if isinstance(node, ast.ClassDef)
        else []
    )
    return [f"```python\n{line}\n```\n", docstring(ast.get_docstring(node)), *below]


def docstring(value: str | None) -> str:
    """Prose as paragraphs, `code` kept; an indented or formula paragraph stays as it was typed."""
    parts = []
    for part in re.split(r"\n\s*\n", value or ""):
        if re.search(r"^ {2,}", part, re.MULTILINE):
            parts.append(f"```text\n{part}\n```")
        else:
            parts.append(prose(part))
    return "\n\n".join(parts) + "\n"
