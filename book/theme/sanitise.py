"""HTML that a notebook put out, reduced to what is safe in a page: an allow-list of tags and attributes."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape
from html.parser import HTMLParser

SCROLL = 'class="scroll" tabindex="0"'
DROPPED = {"script", "style", "object", "svg", "math", "template", "noscript", "title", "textarea", "select"}
VOID = {"br", "hr", "img", "col"}
TEXT = {"a", "abbr", "b", "br", "code", "del", "em", "i", "kbd", "s", "small", "span", "strong", "sub", "sup", "u"}
BLOCKS = {"blockquote", "div", "details", "figcaption", "figure", "p", "pre", "progress", "summary"}
LISTS = {"dd", "dl", "dt", "li", "ol", "ul"}
TABLES = {"caption", "col", "colgroup", "table", "tbody", "td", "tfoot", "th", "thead", "tr"}
ALLOWED = TEXT | BLOCKS | LISTS | TABLES | {"h2", "h3", "h4", "h5", "h6", "hr", "img"}
PLAIN = {"class", "colspan", "rowspan", "span", "scope", "alt", "title", "width", "height", "value", "max", "open"}
IMAGE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=\s]+$")


class Sanitiser(HTMLParser):
    def __init__(self, report: Callable[[str], str]) -> None:
        super().__init__(convert_charrefs=True)
        self.report, self.out, self.open, self.dropping = report, list[str](), list[str](), list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.dropping or tag in DROPPED:
            self.dropping += [tag] if not self.dropping or self.dropping[-1] == tag else []
            return
        given = {key: value or "" for key, value in attrs}
        if tag == "iframe":
            height = given["height"] if given.get("height", "").isdigit() else "620"
            self.out.append(frame(self.report(given.get("src", "")), given.get("src", ""), height))
        if tag not in ALLOWED or (tag == "img" and not IMAGE.match(given.get("src", ""))):
            return
        kept = {key: value for key, value in given.items() if key in PLAIN}
        if tag == "img":
            kept["src"] = given["src"]
        if tag == "a" and (href := self.address(given.get("href", ""))):
            kept["href"] = href
        if align := re.search(r"text-align:\s*(left|right|center)", given.get("style", "")):
            kept["class"] = f"{kept.get('class', '')} {align.group(1)}".strip()
        self.out.append(f"<div {SCROLL}>" if tag == "table" else "")
        written = "".join(f' {key}="{escape(value)}"' for key, value in kept.items())
        self.out.append(f"<{tag}{written}>")
        self.open += [] if tag in VOID else [tag]

    def address(self, href: str) -> str:
        return href if re.match(r"(https?://|#)", href) else self.report(href)

    def handle_endtag(self, tag: str) -> None:
        if self.dropping:
            self.dropping = self.dropping[:-1] if tag == self.dropping[-1] else self.dropping
        elif tag in self.open:
            while True:  # close what was left open inside, so that the output cannot break the page
                last = self.open.pop()
                self.out.append(f"</{last}>" + ("</div>" if last == "table" else ""))
                if last == tag:
                    return

    def handle_data(self, data: str) -> None:
        self.out.append("" if self.dropping else escape(data))


def frame(address: str, asked: str, height: str) -> str:
    """A report in a frame of its own: its scripts run, but cannot reach this page."""
    if not address:
        return f'<p class="missing">The report <code>{escape(asked)}</code> is not in this run\'s folder.</p>'
    name = escape(address)
    view = f'<iframe src="{name}" height="{height}" title="Report" sandbox="allow-scripts" loading="lazy"></iframe>'
    return f'{view}<p class="small"><a href="{name}">Open the report on a page of its own</a></p>'


def sanitise(html: str, report: Callable[[str], str]) -> str:
    """`report(source)` gives the address of the copied report a frame or link asks for, or ""."""
    parser = Sanitiser(report)
    parser.feed(html)
    parser.close()
    parser.dropping.clear()  # what a never-closed script began
    for tag in list(parser.open[::-1]):
        parser.handle_endtag(tag)
    return "".join(parser.out)
