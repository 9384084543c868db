"""The sign-off as one file: verdict, checklist and signatures on a page that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from nodes import Renderer

Node = dict[str, Any]
PAGES = ("index", "signoff.checklist", "signoff.archive")


def bodies(load: Callable[[str], Node], read: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    """Title and HTML of each page. Everything folded is open, for there may be nothing but paper to unfold it on."""
    for slug in PAGES:
        page = load(slug)
        tree = verdict(page["mdast"]) if slug == PAGES[0] else page["mdast"]
        renderer = Renderer(resolve=lambda url: url, report=lambda source: "", read=read)
        html = renderer.page(alone(tree)).replace("<details", "<details open")
        yield page["frontmatter"]["title"], html


def verdict(tree: Node) -> Node:
    """Of the overview what was made from the run, without the prose around it."""
    found = [child for block in tree["children"] for child in block.get("children", []) if child["type"] == "include"]
    return {"type": "root", "children": found}


def alone(node: Node) -> Node:
    """The tree without links to other pages; one to a page of this file becomes a link within it."""
    children = [alone(child) for child in node["children"]] if "children" in node else None
    node = node if children is None else {**node, "children": children}
    if node["type"] == "crossReference" and node.get("remote"):
        here = node["url"].strip("/").replace("/", ".") in PAGES
        return {**node, "remote": False} if here else {"type": "span", "children": children}
    if node["type"] == "link" and not node["url"].startswith("http"):
        return {"type": "span", "children": children or [{"type": "text", "value": node["url"]}]}
    return node
