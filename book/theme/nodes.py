"""MyST syntax tree to HTML. A node type without a rule stops the build and is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape
from typing import Any

from cells import code_cell, outputs
from listing import listing
from sanitise import SCROLL

Node = dict[str, Any]
TAGS = {
    "paragraph": "p", "strong": "strong", "emphasis": "em", "delete": "del", "inlineCode": "code", "keyboard": "kbd",
    "subscript": "sub", "superscript": "sup", "underline": "u", "blockquote": "blockquote", "tableRow": "tr",
    "summary": "summary", "definitionList": "dl", "definitionDescription": "dd",
    "definitionTerm": "dt", "caption": "figcaption", "captionNumber": "b", "legend": "div", "smallcaps": "small",
}  # fmt: skip
TRANSPARENT = {"root", "include", "glossary", "header", "footer", "mystRole", "mystDirective"}


class Renderer:
    """Renders one page. `resolve(url)` turns a site URL into a relative file name, `report(name)` finds a report."""

    def __init__(
        self,
        resolve: Callable[[str], str],
        report: Callable[[str], str],
        read: Callable[[str], str],
        defaults: dict[str, Any] | None = None,
    ) -> None:
        self.resolve, self.report, self.read = resolve, report, read
        self.defaults = defaults or {}  # of every parameter, by the schema
        self.headings: list[tuple[int, str, str]] = []
        self.footnotes: list[str] = []
        self.declared: set[str] = set()  # names that the notebook's own parameters cell assigns

    def page(self, tree: Node) -> str:
        body = self.one(tree)
        notes = "".join(self.footnotes)
        return body + (f'<hr><ol class="footnotes">{notes}</ol>' if notes else "")

    def many(self, node: Node) -> str:
        return "".join(self.one(child) for child in node.get("children", []))

    def one(self, node: Node) -> str:
        kind = node["type"]
        if kind in TRANSPARENT and "children" in node:
            return self.many(node)
        if kind in TAGS:
            inner = self.many(node) if "children" in node else escape(node["value"])
            return f"<{TAGS[kind]}{attributes(node)}>{inner}</{TAGS[kind]}>"
        if kind not in RULES:
            raise ValueError(f"the theme has no rule for a node of type {kind!r}; add one to book/theme/nodes.py")
        return RULES[kind](self, node)


def attributes(node: Node, *classes: str) -> str:
    names = " ".join([*classes, *([node["class"]] if node.get("class") else [])])
    ident = f' id="{escape(node["html_id"])}"' if node.get("html_id") and node["type"] != "captionNumber" else ""
    return ident + (f' class="{escape(names)}"' if names else "")


def plain(node: Node) -> str:
    return node.get("value") or "".join(plain(child) for child in node.get("children", []))


def heading(r: Renderer, node: Node) -> str:
    depth, ident = node["depth"], escape(node.get("html_id", ""))
    r.headings.append((depth, ident, plain(node)))
    anchor = f'<a class="anchor" href="#{ident}" aria-label="Link to this section">#</a>'
    return f'<h{depth} id="{ident}">{r.many(node)}{anchor}</h{depth}>'


def link(r: Renderer, node: Node) -> str:
    url = node["url"]
    if re.match(r"(https?|mailto):", url):
        return f'<a class="external" rel="noopener noreferrer" href="{escape(url)}">{r.many(node)}</a>'
    inner = r.many(node) or escape(url)
    return f'<a href="{escape(r.resolve(url))}">{inner}</a>'


def reference(r: Renderer, node: Node) -> str:
    if not node.get("resolved"):
        raise ValueError(f"the reference to {node.get('label')!r} leads nowhere")
    page = r.resolve(node["url"]) if node.get("remote") else ""
    return f'<a href="{escape(page)}#{escape(node["html_id"])}">{r.many(node)}</a>'


def math(r: Renderer, node: Node) -> str:
    """KaTeX has put MathML beside its own markup; browsers draw MathML without a font or a script of ours."""
    found = re.search(r"<math.*</math>", node.get("html", ""), re.DOTALL)
    if not found:
        raise ValueError(f"mathematics that does not parse: {node['value']!r}")
    if node["type"] == "inlineMath":
        return found.group()
    number = f'<span class="number">({escape(node["enumerator"])})</span>' if node.get("enumerator") else ""
    return f"<div{attributes(node, 'math')}><div {SCROLL}>{found.group()}</div>{number}</div>"


def image(r: Renderer, node: Node) -> str:
    width = f' width="{escape(str(node["width"]).removesuffix("px"))}"' if node.get("width") else ""
    return f'<img src="{escape(r.resolve(node["url"]))}" alt="{escape(node.get("alt") or "")}"{width}>'


def items(r: Renderer, node: Node) -> str:
    tag = "ol" if node.get("ordered") else "ul"
    start = f' start="{node["start"]}"' if node.get("start", 1) != 1 else ""
    return f"<{tag}{start}{attributes(node)}>{r.many(node)}</{tag}>"


def item(r: Renderer, node: Node) -> str:
    if "checked" not in node or node["checked"] is None:
        return f"<li>{r.many(node)}</li>"
    state, mark = ("done", "☑") if node["checked"] else ("to do", "☐")
    return f'<li class="task"><span role="img" aria-label="{state}">{mark}</span><div>{r.many(node)}</div></li>'


def table(r: Renderer, node: Node) -> str:
    """Leading rows of nothing but headers become the head."""
    rows = node.get("children", [])
    count = next((i for i, row in enumerate(rows) if not all(c.get("header") for c in row["children"])), len(rows))
    head, body = ("".join(r.one(row) for row in part) for part in (rows[:count], rows[count:]))
    head = f"<thead>{head}</thead>" if head else ""
    return f"<div {SCROLL}><table{attributes(node)}>{head}<tbody>{body}</tbody></table></div>"


def span(r: Renderer, node: Node) -> str:
    """A span of class `report` names a report of the run's folder and leads to the copy of it."""
    if node.get("class") == "report" and (url := r.report(plain(node))):
        return f'<a href="{escape(url)}"><code>{r.many(node)}</code></a>'
    return box("span")(r, node)


def cell(r: Renderer, node: Node) -> str:
    tag = "th" if node.get("header") else "td"
    align = f' class="{escape(node["align"])}"' if node.get("align") else ""
    spans = "".join(f' {key}="{int(node[key])}"' for key in ("colspan", "rowspan") if node.get(key))
    return f"<{tag}{align}{spans}>{r.many(node)}</{tag}>"


def admonition(r: Renderer, node: Node) -> str:
    kind = node.get("kind") or node.get("class") or "note"
    return f'<aside class="admonition {escape(kind)}">{r.many(node)}</aside>'


def footnote(r: Renderer, node: Node) -> str:
    name, back = escape(node["identifier"]), '<a href="#fnref-{0}" aria-label="Back to the text">↩</a>'
    r.footnotes.append(f'<li id="fn-{name}" value="{node["enumerator"]}">{r.many(node)}{back.format(name)}</li>')
    return ""


def footnote_mark(r: Renderer, node: Node) -> str:
    name = escape(node["identifier"])
    return f'<sup id="fnref-{name}"><a href="#fn-{name}">{escape(node["enumerator"])}</a></sup>'


def block(r: Renderer, node: Node) -> str:
    if node.get("visibility") == "remove":
        return ""
    return code_cell(r, node) if node.get("kind") == "notebook-code" else r.many(node)


def box(tag: str, *classes: str) -> Callable[[Renderer, Node], str]:
    return lambda r, node: f"<{tag}{attributes(node, *classes)}>{r.many(node)}</{tag}>"


def card(r: Renderer, node: Node) -> str:
    more = f'<a href="{escape(r.resolve(node["url"]))}">Open</a>' if node.get("url") else ""
    return f'<div class="card">{r.many(node)}{more}</div>'


def tab(r: Renderer, node: Node) -> str:
    return f'<section class="tab"><p class="title">{escape(node["title"])}</p>{r.many(node)}</section>'


RULES: dict[str, Callable[[Renderer, Node], str]] = {
    "text": lambda r, node: escape(node["value"]),
    "break": lambda r, node: "<br>",
    "thematicBreak": lambda r, node: "<hr>",
    "comment": lambda r, node: "",
    "code": lambda r, node: listing(node["value"], node.get("lang") or "text"),
    "abbreviation": lambda r, node: f'<abbr title="{escape(node["title"])}">{r.many(node)}</abbr>',
    "heading": heading, "link": link, "crossReference": reference, "math": math, "inlineMath": math, "image": image,
    "list": items, "listItem": item, "table": table, "tableCell": cell, "admonition": admonition, "block": block,
    "admonitionTitle": box("p", "title"), "cardTitle": box("p", "title"), "details": box("details"), "div": box("div"),
    "span": span, "aside": box("aside"), "container": box("figure"), "grid": box("div", "grid"), "card": card,
    "tabSet": box("div", "tabs"), "tabItem": tab, "footnoteDefinition": footnote, "footnoteReference": footnote_mark,
    "outputs": outputs,
}  # fmt: skip
