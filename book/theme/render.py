"""Render the pages that `jupyter book build` has parsed to static HTML; mystmd runs this as `build.render`."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from jinja2 import Environment, FileSystemLoader
from nodes import Renderer
from single import PAGES, bodies

HERE = Path(__file__).resolve().parent


def address(url: str) -> str:
    """Site URL `/notebooks/train` to the file it is written to."""
    return f"{url.strip('/') or 'index'}.html"


class Site:
    """What mystmd left in `_build/site`, the run's status, and where everything goes."""

    def __init__(self, site: Path, out: Path, run: dict[str, Any], reports: list[str]) -> None:
        self.site, self.out, self.run, self.reports, self.used = site, out, run, reports, set[str]()
        self.project = json.loads((site / "config.json").read_text(encoding="utf-8"))["projects"][0]
        self.entries = [{"slug": self.project["index"], "level": 1, "title": "Overview"}, *self.project["pages"]]
        slugs = [entry["slug"] for entry in self.entries if "slug" in entry]
        self.files = {slug: "index.html" if slug == slugs[0] else address(slug.replace(".", "/")) for slug in slugs}
        self.slugs = {file: slug for slug, file in self.files.items()}
        self.single, self.single_file = PAGES[-1], f"signoff/sign-off-{run['run']}.html"

    def load(self, slug: str) -> dict[str, Any]:
        return json.loads((self.site / "content" / f"{slug}.json").read_text(encoding="utf-8"))

    def resolve(self, url: str, up: str) -> str:
        """Relative address of a page or a copied file. Raises `ValueError` for a URL that leads nowhere."""
        path, _, fragment = url.partition("#")
        name = address(path)
        if (self.site / "public" / path.strip("/")).is_file():
            self.used.add(path.strip("/"))
            name = f"files/{path.strip('/')}"
        elif name not in self.slugs:
            raise ValueError(f"the link {url!r} leads to no page and no file of this book")
        return up + name + (f"#{fragment}" if fragment else "")

    def report(self, source: str, up: str) -> str:
        """Address of the copied report whose path ends most like `source`; empty when there is none."""
        wanted = PurePosixPath(source.partition("#")[0]).parts[::-1]
        best = max(self.reports, key=lambda name: _common(PurePosixPath(name).parts[::-1], wanted), default="")
        return f"{up}reports/{best}" if best and _common(PurePosixPath(best).parts[::-1], wanted) else ""

    def read(self, path: str) -> str:
        return (self.site / "public" / path.strip("/")).read_text(encoding="utf-8")

    def stage(self, slug: str) -> dict[str, Any] | None:
        """The runner's record of a notebook; None for any other page."""
        name = Path(self.load(slug)["location"]).stem
        return {"number": name.partition("_")[0], **self.run["stages"][name]} if slug.startswith("notebooks.") else None


def _common(left: tuple[str, ...], right: tuple[str, ...]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


JINJA = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)


def write_pages(site: Site) -> None:
    template = JINJA.get_template("page.html")
    stages = {slug: site.stage(slug) for slug in site.files}
    order = list(site.files)
    titles = {entry["slug"]: entry["title"] for entry in site.entries if "slug" in entry}
    for position, slug in enumerate(order):
        page, file = site.load(slug), site.files[slug]
        up = "../" * file.count("/")
        renderer = Renderer(
            resolve=lambda url, up=up: site.resolve(url, up),
            report=lambda source, up=up: site.report(source, up),
            read=site.read,
            defaults=site.run["defaults"],
        )
        body = renderer.page(page["mdast"])
        around = {"before": position - 1, "after": position + 1}
        html = template.render(
            site=site, page=page, slug=slug, up=up, body=body, stages=stages, stage=stages[slug],
            contents=[item for item in renderer.headings if item[0] in (2, 3)],
            failed=re.search(r'class="cell failed[^"]*" id="([^"]+)"', body),
            download=page["frontmatter"]["exports"][0]["url"] if page["kind"] == "Notebook" else "",
            **{key: (order[at], titles[order[at]]) for key, at in around.items() if 0 <= at < len(order)},
        )  # fmt: skip
        (site.out / file).parent.mkdir(parents=True, exist_ok=True)
        (site.out / file).write_text(html, encoding="utf-8")


def search_index(site: Site) -> str:
    """A script that holds one row per section: page title, section, address, text."""
    rows: dict[str, list[str]] = {}
    for record in json.loads((site.site / "myst.search.json").read_text(encoding="utf-8"))["records"]:
        path, _, fragment = record["url"].partition("#")
        levels = list(record["hierarchy"].values())
        place = address(path) + (f"#{fragment}" if fragment else "")
        row = rows.setdefault(place, [levels[0], " › ".join(levels[1:]), place, ""])
        row[3] += " " + re.sub(r"\s+", " ", record.get("content", "").replace("\u200b", ""))
    return f"window.bookIndex = {json.dumps(list(rows.values()), ensure_ascii=False, separators=(',', ':'))};\n"


def main() -> None:
    out = Path(os.environ["BUILD_DIRECTORY"])
    build, source = out.parent, out.parent.parent
    reports = source / "reports"
    names = [path.relative_to(reports).as_posix() for path in sorted(reports.rglob("*.html"))]
    site = Site(build / "site", out, json.loads((source / "run.json").read_text(encoding="utf-8")), names)
    write_pages(site)
    style = (HERE / "book.css").read_text(encoding="utf-8")
    whole = JINJA.get_template("single.html").render(site=site, style=style, bodies=bodies(site.load, site.read))
    (out / site.single_file).write_text(whole, encoding="utf-8")
    (out / "files").mkdir()
    for name in sorted(site.used):  # mystmd also keeps raw outputs there: those stay out
        shutil.copy(site.site / "public" / name, out / "files")
    if names:
        shutil.copytree(reports, out / "reports")
    (out / "assets").mkdir()
    for name in ("book.css", "book.js", "early.js", "icon.svg"):
        shutil.copy(HERE / name, out / "assets" / name)
    (out / "assets/search-index.js").write_text(search_index(site), encoding="utf-8")


if __name__ == "__main__":
    main()
