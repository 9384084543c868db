"""The book: a hostile output meets a page, a broken page meets the build, and a browser opens it all."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from stackpkg import book, interactive, runs
from stackpkg.governance import checklist
from stackpkg.params import Params
from stackpkg.telemetry import logbook

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY / "book/theme"), str(REPOSITORY / "book")]

import cells  # noqa: E402
from myst import text  # noqa: E402
from nodes import Renderer  # noqa: E402
from reference import parameters  # noqa: E402
from sanitise import ALLOWED, VOID, sanitise  # noqa: E402

EVIL = "<img src=x onerror=alert(1)><script>window.broken=1</script>"
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


class Page(HTMLParser):
    """Elements of a page: (tag, attributes), and the tags left open or closed out of order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.stack: list[str] = []
        self.crossed: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID | {"meta", "link", "input", "path"}:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.stack or self.stack.pop() != tag:
            self.crossed.append(tag)

    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]


# --- outputs of a notebook are not to be trusted

ATTACKS = [
    EVIL,
    "<svg onload=alert(1)><script>alert(1)</script></svg>",
    "<a href='javascript:alert(1)'>x</a>",
    "<a href=' java\nscript:alert(1)'>x</a>",
    "<a href='data:text/html,<script>alert(1)</script>'>x</a>",
    "<iframe src='javascript:alert(1)'></iframe>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<iframe src='https://example.org/'></iframe>",
    "<img src='https://example.org/x.png'>",
    "<img src='data:image/svg+xml;base64,PHN2Zz4='>",
    "<meta http-equiv=refresh content='0;url=https://example.org'>",
    "<base href='https://example.org/'><link rel=stylesheet href=//example.org/x.css>",
    "<form action='https://example.org'><input autofocus onfocus=alert(1)><button formaction=x>b</button></form>",
    "<p style='background:url(https://example.org/x)'>x</p><style>@import 'https://example.org'</style>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=alert(1)&gt;'>",
    "</table></div></main><p onmouseover=alert(1)>out</p>",
    "<table><tr><td>never closed",
    "<p title='\"><script>alert(1)</script>'>x</p>",
]


FRAGMENTS = ("<b>", "</b>", "<td>", "</table>", "<!--", "'", '"', "<", "&lt;")


def assert_harmless(html: str) -> None:
    page = Page(html)
    assert not page.crossed and not page.stack, f"unbalanced {page.crossed} {page.stack}: {html}"
    for tag, attributes in page.elements:
        assert tag in ALLOWED or tag == "iframe", f"{tag} in {html}"
        assert not [key for key in attributes if key.startswith("on") or key in {"style", "srcdoc", "srcset", "id"}]
        assert re.match(r"https?://|#|\.\./reports/", attributes.get("href", "#")), html
        assert re.match(r"\.\./reports/|data:image/png", attributes.get("src", "../reports/")), html
        assert tag != "iframe" or attributes["sandbox"] == "allow-scripts"


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_in_an_output_is_disarmed(attack: str) -> None:
    assert_harmless(sanitise(attack, lambda source: ""))


@given(st.lists(st.sampled_from([*ATTACKS, *FRAGMENTS]), max_size=6))
def test_no_mixture_of_attacks_gets_through_or_unbalances_the_page(parts: list[str]) -> None:
    assert_harmless(sanitise("".join(parts), lambda source: ""))


def test_a_table_of_pandas_keeps_its_cells_and_scrolls_in_its_own_box() -> None:
    row = '<tr style="text-align: right;"><td>1 &lt; 2</td></tr>'
    html = sanitise(f'<style scoped>th {{}}</style><table border="1" class="dataframe">{row}</table>', str)
    table = '<table class="dataframe"><tr class="right"><td>1 &lt; 2</td></tr></table>'
    assert html == f'<div class="scroll" tabindex="0">{table}</div>'


def test_an_unknown_node_type_stops_the_build_and_is_named() -> None:
    renderer = Renderer(resolve=str, report=str, read=str)
    with pytest.raises(ValueError, match="'mermaid'"):
        renderer.page({"type": "root", "children": [{"type": "mermaid", "value": "graph"}]})


def test_an_output_no_reader_could_see_stops_the_build() -> None:
    output = {"type": "output", "jupyter_data": {"output_type": "display_data", "data": {"application/x-odd": {}}}}
    with pytest.raises(ValueError, match="application/x-odd"):
        Renderer(resolve=str, report=str, read=str).page({"type": "outputs", "children": [output]})


@pytest.mark.parametrize(
    "value", ["a | b", "*x* _y_ `z`", "$x$", "{role}`x`", "<b>", "[a](b)", "&amp;", "# h", "1. x", ":::x"]
)
def test_text_from_a_run_is_escaped_for_markdown(value: str) -> None:
    assert re.sub(r"\\(.)", r"\1", text(value)) == value
    assert not re.search(r"(?<!\\)[|*_`$<\[{&#:]", text(value))


def test_every_parameter_of_the_schema_is_on_the_page() -> None:
    page = parameters()
    assert "` learning_rate `|` number `|` 0.0002 `|` > 0 `, ` ≤ 1 `|" in page
    for section in re.findall(r"\]\(#(\w+)\)", page):
        assert re.search(rf"^## {section}$", page, re.MULTILINE | re.IGNORECASE), section


# --- a run made here, built once


def executed(title: str, *cells: nbformat.NotebookNode) -> nbformat.NotebookNode:
    first = new_code_cell("# Parameters\nrun = 'lab'  # folder", metadata={"tags": ["parameters"]})
    given_cell = new_code_cell(f"# Parameters\nrun = {EVIL!r}\n", metadata={"tags": ["injected-parameters"]})
    head = new_markdown_cell(
        f"# {title}\n> A promise.\n\n## Purpose\nMass $E = mc^2$, see [](#steps-here).\n\n(steps-here)=\n## Steps"
    )
    notebook = new_notebook(cells=[head, first, given_cell, *cells])
    for i, cell in enumerate(notebook.cells):
        cell.id = f"{title[0].lower()}-{i:02d}"
        cell.metadata["papermill"] = {"duration": 0.5, "status": "completed"}
    return notebook


def display(**data: str) -> nbformat.NotebookNode:
    return new_output("display_data", {key.replace("_", "/"): value for key, value in data.items()})


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of what a book is made from, which the package takes for its repository."""
    pytest.importorskip("jupyter_book")
    place = tmp_path_factory.mktemp("repository")
    hidden = shutil.ignore_patterns("_build", "runbooks", "__pycache__")
    shutil.copytree(REPOSITORY / "book", place / "book", ignore=hidden)
    shutil.copytree(REPOSITORY / "benchmarks/results", place / "benchmarks/results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "root", lambda: place)
        yield place


@pytest.fixture(scope="module")
def place(repository: Path) -> Path:
    """One run: a good stage, a failed one, one whose kernel died, one that did not run; hostile text everywhere."""
    place = repository
    runs.write_text(place / "book/runbooks/page.md", "# A runbook\n\nSee [](../notebooks/10_good.ipynb).\n")
    runs.write_text(place / "book/runbooks/Drilled.md", "# Drilled\n\nA promise.\n\n## Signal\n\nNo alert.\n")
    run = place / "outbox/tiny"
    letter = {"alert": "Drilled", "delay_seconds": 2.4}
    runs.write_json(run / "telemetry/receipts.json", {"at": runs.now(), "letters": [letter]})
    for title in ("Drilled (warning)", f"note {EVIL}"):
        logbook.add(run, title, [f"{EVIL} ```{{include}} index.md```", "- Found: {include}`index.md`"])
    boom = new_output(
        "error", ename="AssertionError", evalue=f"loss 3 {EVIL}", traceback=["\x1b[31mAssertionError\x1b[0m"]
    )
    frame = "<iframe src='../outbox/tiny/eval/epoch_001.html' width='100%' height='300'></iframe>"
    wide = "<table><tr><td>" + EVIL + "wide " * 9000 + "</td></tr></table>"
    twin = {interactive.KIND: {"data": [{"x": [1] * 9000}]}, "image/png": PIXEL, "text/plain": "loss over step"}
    banner = {"metadata": {"tags": ["papermill-error-cell-tag"]}}
    stopped = [new_markdown_cell(f"<span id='papermill-error-cell'>stopped {i}</span>", **banner) for i in range(2)]
    stages = {
        "10_good": executed(
            "Good",
            new_code_cell("x = 1\n" * 30, outputs=[new_output("stream", name="stdout", text=EVIL)]),
            new_code_cell("zebra", outputs=[display(text_html=wide)]),
            new_code_cell("plot", outputs=[display(image_png=PIXEL), display(text_html=frame + EVIL)]),
            new_code_cell("twin", outputs=[new_output("display_data", twin)]),
            new_code_cell("assert True", metadata={"tags": ["accept"]}),
        ),
        "20_bad": executed("Bad", stopped[0], new_code_cell("assert loss < 2", outputs=[boom])),
        "21_worse": executed("Dead", stopped[1], new_code_cell("die()")),
    }
    for name, notebook in stages.items():
        runs.write_text(run / "nb" / f"{name}.ipynb", nbformat.writes(notebook))
        error = "" if name == "10_good" else f"DeadKernelError: Kernel died {EVIL}"
        lock = {
            "stage": name,
            "state": "failed" if error else "ok",
            "started": runs.now(),
            "seconds": 2.5,
            "error": error,
        }
        runs.write_json(run / "lock" / f"{name}.json", lock)
    runs.write_text(place / "notebooks/30_later.ipynb", nbformat.writes(executed("Later")))
    runs.write_text(
        run / "eval/epoch_001.html",
        "<!doctype html><title>r</title><p id=r></p><script>r.append('report ran')</script>",
    )
    runs.write_json(run / "evidence/10_good.json", {"duplicates": 0.03})
    check = {"evidence": "10_good", "value": "duplicates", "op": "<=", "limit": 0.05}
    green = {"id": "D1", "workstream": "Data & more", "text": EVIL, "notebooks": ["10_good"], "checks": [check]}
    amber = green | {"id": "D2", "pending": f"a | b {EVIL}"}
    red = green | {"id": "D3", "checks": [check | {"limit": 0.01}], "files": ["eval/*.html", "absent/*"]}
    runs.write_text(place / "params/checklist.yaml", yaml.safe_dump([green, amber, red]))
    folder = runs.RunFolder("tiny")
    checklist.write(folder, checklist.evaluate(folder, Params()))
    said = {
        "role": "safety",
        "reviewer": "s@demonstration.invalid",
        "decision": "approve",
        "at": runs.now(),
        "demonstration": True,
    }
    runs.write_json(run / "signoffs/safety.json", {"predicate": said})
    runs.write_text(run / "SHA256SUMS", f"{'ab' * 32}  checklist.yaml\n")
    return place


@pytest.fixture(scope="module")
def html(place: Path) -> Path:
    return book.build("tiny").parent


@pytest.fixture(scope="module")
def parsed(html: Path) -> dict[Path, Page]:
    return {
        path: Page(path.read_text(encoding="utf-8")) for path in html.rglob("*.html") if "reports" not in path.parts
    }


def test_every_link_and_anchor_leads_somewhere(html: Path, parsed: dict[Path, Page]) -> None:
    assert len(parsed) > 12
    assert_linked(html, parsed)


def assert_linked(html: Path, parsed: dict[Path, Page]) -> None:
    for path, page in parsed.items():
        assert len(page.ids()) == len(set(page.ids())), f"{path.name} repeats an id"
        assert not page.crossed and not page.stack, f"{path.name} is not well formed: {page.crossed} {page.stack}"
        for tag, attributes in page.elements:
            for url in (urlsplit(attributes[key]) for key in ("href", "src") if key in attributes):
                if url.scheme in ("http", "https", "data"):
                    continue
                target = (path.parent / unquote(url.path)).resolve() if url.path else path
                assert target.is_relative_to(html) and target.is_file(), f"{path.name}: <{tag}> to {url.geturl()}"
                assert not url.fragment or unquote(url.fragment) in parsed[target].ids(), f"{path.name}: {url.geturl()}"


def test_every_search_result_leads_somewhere(html: Path, parsed: dict[Path, Page]) -> None:
    script = (html / "assets/search-index.js").read_text(encoding="utf-8")
    rows = json.loads(script.removeprefix("window.bookIndex = ").removesuffix(";\n"))
    assert {row[0] for row in rows} >= {"Good", "Dead", "Glossary", "A runbook", "stackpkg.data"}
    for row in rows:
        name, _, fragment = row[2].partition("#")
        assert not fragment or fragment in parsed[html / name].ids(), row[2]


def test_nothing_is_loaded_from_elsewhere_and_no_script_is_inline(parsed: dict[Path, Page], html: Path) -> None:
    for path, page in parsed.items():
        for tag, attributes in page.elements:
            if tag not in {"a"}:
                assert not re.match(r"(https?:)?//", attributes.get("src", attributes.get("href", ""))), (
                    f"{path.name}: {tag}"
                )
            assert not [key for key in attributes if key.startswith("on") or key == "srcset"], f"{path.name}: {tag}"
            assert tag != "script" or re.fullmatch(r"(\.\./)*assets/\w+\.js", attributes.get("src", "")), path.name
            assert tag != "img" or not attributes["src"].endswith("x"), f"{path.name}: an output's image got through"
    assert not re.search(r"url\(|@import|http", (html / "assets/book.css").read_text(encoding="utf-8"))


def test_of_a_figure_drawn_twice_the_book_has_the_picture_and_its_words(html: Path) -> None:
    assert 'alt="loss over step"' in (html / "notebooks/good.html").read_text(encoding="utf-8")
    for path in (path for path in html.rglob("*") if path.is_file()):
        assert b"vnd.plotly" not in path.read_bytes(), f"{path.name} holds what only JupyterLab draws"


def test_the_state_of_a_stage_comes_from_its_lock_and_is_loud(html: Path) -> None:
    bad, dead, later = (
        (html / f"notebooks/{name}.html").read_text(encoding="utf-8") for name in ("bad", "worse", "later")
    )
    cell = re.search(r'class="cell failed" id="([^"]+)"', bad)
    assert cell and f'href="#{cell.group(1)}">Go to the cell that failed' in bad
    assert "This notebook failed" in dead and "DeadKernelError" in dead and "stopped" not in dead
    assert '<span class="badge not run">not run</span>' in later
    index = (html / "index.html").read_text(encoding="utf-8")
    assert "Not ready" in index and "2 failed" in index and "1 of 3 green" in index and "Demonstration keys" in index
    lines = (html / "signoff/checklist.html").read_text(encoding="utf-8")
    assert [lines.count(f'badge {colour}"') for colour in ("green", "amber", "red", "failed")] == [2, 2, 2, 1]
    assert "absent/*: missing" in lines and "a | b &lt;img" in lines


def test_a_page_shows_its_last_drill_or_that_there_was_none(html: Path) -> None:
    drilled, never = ((html / f"runbooks/{name}.html").read_text(encoding="utf-8") for name in ("drilled", "page"))
    today = runs.now()[:10]
    assert f'<span class="badge ok">{today}</span> detected after 2.4 s (tiny, ' in drilled
    assert 'class="drilled never"' in never and "Never drilled." in never and "Never drilled." not in drilled
    table = (html / "drills.html").read_text(encoding="utf-8")
    assert table.index('<span class="badge red">never</span>') < table.index("detected after 2.4 s")


def test_the_logbook_is_in_the_book_literally_and_leads_to_the_pages(html: Path) -> None:
    page = (html / "logbook.html").read_text(encoding="utf-8")
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") >= 3 and "```{include} index.md```" in page
    assert 'href="runbooks/drilled.html"' in page and "Is this run ready?" not in page.partition("<main")[2]
    assert 'href="logbook.html"' in (html / "index.html").read_text(encoding="utf-8").partition("<main")[2]


def test_the_overview_says_what_failed_and_leads_to_each_line_and_its_evidence(html: Path) -> None:
    index, lines = ((html / name).read_text(encoding="utf-8") for name in ("index.html", "signoff/checklist.html"))
    assert 'class="verdict no"' in index and "does not verify" in index, "the seal of this run is made up"
    for number, mark in (("1", "✓"), ("2", "◐"), ("3", "✗")):
        assert f'<a href="signoff/checklist.html#line-d{number}"><span class="chip' in index
        assert f">D{number} {mark}</span>" in index
    files = re.findall(r'<a href="(\.\./files/[^"]+)"><code>evidence/10_good\.json</code></a>', lines)
    digest = runs.digest(html.parents[2] / "../outbox/tiny/evidence/10_good.json")
    assert (html / "signoff" / files[0]).read_text() == '{\n "duplicates": 0.03\n}\n' and digest in lines
    assert '<a href="../reports/eval/epoch_001.html"><code>' in lines, "a report opens where the book has it"


def test_the_sign_off_is_one_file_that_needs_nothing_beside_it(html: Path, parsed: dict[Path, Page]) -> None:
    page = parsed[html / "signoff/sign-off-tiny.html"]
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "img", "iframe"} and "src" not in attributes
        assert attributes.get("href", "#").startswith("#"), "a link out of the file"
        assert tag != "details" or "open" in attributes, "folded, on paper for good"
    text = (html / "signoff/sign-off-tiny.html").read_text(encoding="utf-8")
    assert (
        "Not ready" in text and "D3" in text and f"{'ab' * 32}  checklist.yaml" in text and "Demonstration keys" in text
    )
    archive = (html / "signoff/archive.html").read_text(encoding="utf-8")
    assert '<a href="../signoff/sign-off-tiny.html" download>' in archive


def test_a_parameter_that_the_profile_set_is_told_from_the_defaults() -> None:
    source = "# Parameters\ndata = {'workers': 9, 'part_mb': 8.0}\nseed = 3\nlayout = {'tp': 1}\n"
    shown, _, rest = cells._values(source, {"data", "seed"}, {"data": {"workers": 2, "part_mb": 8.0}}).partition(
        "</table>"
    )
    first, folded = shown.split("<details><summary>1 as by default</summary>")
    assert "workers: 9" in first and "part_mb: 8.0" in folded and ">3<" in folded
    assert "1 parameters of other notebooks" in rest and "tp: 1" in rest


def test_a_figure_says_what_it_shows() -> None:
    data = {"image/png": {"path": "/x.png"}, "text/plain": {"content": "loss: a < b"}}
    node = {"type": "output", "jupyter_data": {"output_type": "display_data", "data": data}}
    assert 'alt="loss: a &lt; b"' in cells.output(Renderer(resolve=str, report=str, read=str), node)
    data["text/plain"]["content"] = "<Figure size 700x300 with 1 Axes>"
    assert 'alt="Figure made by the cell above"' in cells.output(Renderer(resolve=str, report=str, read=str), node)


def test_a_failed_build_names_the_fault_and_leaves_the_old_book(place: Path, html: Path) -> None:
    runbook = place / "book/runbooks/broken.md"
    before = (html / "index.html").read_bytes()
    for broken, fault in (
        ("# Broken\n\n[x](nowhere.md)\n", "nowhere.md"),
        ("# Odd\n\n```{mermaid}\ngraph\n```\n", "mermaid"),
    ):
        runs.write_text(runbook, broken)
        with pytest.raises(RuntimeError, match=fault):
            book.build("tiny")
    runbook.unlink()
    assert (html / "index.html").read_bytes() == before


def test_a_run_that_does_not_exist_is_named(place: Path) -> None:
    with pytest.raises(FileNotFoundError, match="outbox/absent/nb"):
        book.build("absent")


@pytest.fixture(scope="module")
def two(place: Path, html: Path) -> Path:
    """The site of a run that has nothing yet, with the first run beside it."""
    bare = place / "outbox/bare"
    shutil.copytree(place / "outbox/tiny/nb", bare / "nb")
    for name, rate, loss in (("tiny", 2e-4, 7.1), ("bare", 1e-3, 6.5)):
        profile = {"run": name, "seed": 17, "optimization": {"learning_rate": rate}}
        runs.write_text(place / f"outbox/{name}/config/params.yaml", yaml.safe_dump(profile))
        for step in (10, 20):
            report = {"step": step, "validation_loss": loss - step / 100}
            runs.write_json(place / f"outbox/{name}/eval/train/epoch_{step}.json", report)
    return book.build("bare", "tiny").parent


def test_a_fresh_run_has_a_book_that_says_what_is_missing(two: Path) -> None:
    index = (two / "index.html").read_text(encoding="utf-8")
    assert "Not ready yet" in index and "not signed yet" in index and "there is no checklist yet" in index
    assert "not sealed yet" in (two / "signoff/archive.html").read_text(encoding="utf-8")


def test_two_runs_are_one_site_that_compares_them_and_switches(two: Path) -> None:
    pages = {
        path: Page(path.read_text(encoding="utf-8")) for path in two.rglob("*.html") if "reports" not in path.parts
    }
    assert_linked(two, pages)
    compared = (two / "compare.html").read_text(encoding="utf-8")
    row = r"<td><code>optimization.learning_rate</code></td><td><code>0.001</code></td><td><code>0.0002</code></td>"
    assert re.search(row, compared) and "<code>seed</code>" not in compared, "only what differs, runs by name"
    assert "bare from 6.400 at step 10 to 6.300 at step 20; tiny from 7.000 at step 10 to 6.900 at step 20" in compared
    assert "No checklist yet: bare" in compared and "<code>10_good.duplicates</code>" in compared
    page = (two / "notebooks/good.html").read_text(encoding="utf-8")
    assert '<li><a href="../runs/tiny/notebooks/good.html">tiny</a></li>' in page and book.MARK not in page
    for archive in (two / "signoff/archive.html", two / "runs/tiny/signoff/archive.html"):
        table = (
            archive.read_text(encoding="utf-8").partition('<h2 id="all-runs-of-this-site">')[2].partition("</table>")[0]
        )
        assert re.findall(r"<tr><td><code>(\w+)</code></td>", table) == ["bare", "tiny"]
    back = (two / "runs/tiny/notebooks/good.html").read_text(encoding="utf-8")
    assert '<li><a href="../../../notebooks/good.html">bare</a></li>' in back and "<!-- other" not in back


# --- in a browser, from the folder


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        pytest.skip("no chromium or google-chrome on this machine")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        yield p.chromium.launch(executable_path=found, args=["--no-sandbox"])


@pytest.fixture
def tab(browser, request) -> Iterator[object]:  # type: ignore[no-untyped-def]
    """A page that fails the test on any console message, script error, failed or outside request."""
    context = browser.new_context(**getattr(request, "param", {"viewport": {"width": 1300, "height": 900}}))
    page, faults = context.new_page(), []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("requestfailed", lambda sent: faults.append(sent.url))
    page.on("request", lambda sent: None if sent.url.startswith(("file:", "data:")) else faults.append(sent.url))
    yield page
    context.close()
    assert not faults


PHONE = {"viewport": {"width": 390, "height": 800}, "has_touch": True, "is_mobile": True}


@pytest.mark.book
@pytest.mark.parametrize("tab", [{"color_scheme": "light"}, {"color_scheme": "dark"}, PHONE], indirect=True)
def test_every_page_opens_without_an_error_and_fits_its_window(tab, html: Path, parsed: dict[Path, Page]) -> None:  # type: ignore[no-untyped-def]
    for path in parsed:
        tab.goto(path.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{path.name} scrolls sideways"
        assert tab.evaluate("window.broken === undefined")
        assert tab.locator("main h1").count() == 1


@pytest.mark.book
def test_search_works_from_the_folder_with_the_keyboard_alone(tab, html: Path) -> None:  # type: ignore[no-untyped-def]
    tab.goto((html / "notebooks/bad.html").as_uri())
    tab.keyboard.press("/")
    tab.keyboard.type("hard negative")
    first = tab.locator("#found a").first
    first.wait_for()
    assert "Glossary" in first.inner_text()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/reference/glossary.html*")
    tab.keyboard.press("/")
    tab.keyboard.type("zzzqq")
    assert tab.locator("#found").inner_text() == "Nothing found"
    tab.keyboard.press("Escape")
    assert tab.locator("#found").is_hidden()


@pytest.mark.book
@pytest.mark.parametrize("tab", [{"viewport": {"width": 1300, "height": 500}}], indirect=True)
def test_the_name_of_the_page_is_in_sight_in_a_long_list_of_pages(tab, html: Path) -> None:  # type: ignore[no-untyped-def]
    for name in ("index.html", "reference/package/objectives.html"):
        tab.goto((html / name).as_uri())
        box = tab.locator("#pages [aria-current]").bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= 500, (name, box)


@pytest.mark.book
def test_the_first_tab_stop_skips_to_the_text_and_focus_shows(tab, html: Path) -> None:  # type: ignore[no-untyped-def]
    tab.goto((html / "index.html").as_uri())
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "main"


@pytest.mark.book
def test_the_choice_of_dark_is_kept_from_page_to_page(tab, html: Path) -> None:  # type: ignore[no-untyped-def]
    background = "getComputedStyle(document.body).backgroundColor"
    tab.goto((html / "index.html").as_uri())
    light = tab.evaluate(background)
    tab.locator("#theme").click()
    dark = tab.evaluate(background)
    tab.goto((html / "reference/glossary.html").as_uri())
    assert light != dark == tab.evaluate(background)


@pytest.mark.book
def test_code_is_copied_and_the_report_runs_in_its_frame(tab, html: Path) -> None:  # type: ignore[no-untyped-def]
    tab.goto((html / "notebooks/good.html").as_uri())
    assert tab.locator("details.fold").first.get_attribute("open") is None
    tab.locator(".cell.parameters .copy").click()
    tab.locator(".cell.parameters .copy", has_text="Copied").wait_for()
    tab.locator("#query").focus()
    tab.keyboard.press("Control+v")
    assert tab.locator("#query").input_value().startswith("# Parameters")
    tab.locator("iframe").scroll_into_view_if_needed()
    tab.frame_locator("iframe").get_by_text("report ran").wait_for()


@pytest.mark.book
@pytest.mark.parametrize(("days", "state"), [(1, "ok"), (89, "ok"), (92, "amber")])
def test_a_drill_turns_yellow_while_the_book_lies(tab, html: Path, days: int, state: str) -> None:  # type: ignore[no-untyped-def]
    tab.clock.set_fixed_time(datetime.now(UTC) + timedelta(days=days))
    tab.goto((html / "runbooks/drilled.html").as_uri())
    box = tab.locator(".drilled")
    assert box.locator(".badge").get_attribute("class") == f"badge {state}"
    assert ("more than 90 days ago" in box.inner_text()) == (state == "amber")


@pytest.mark.book
@pytest.mark.parametrize("tab", [PHONE], indirect=True)
def test_on_a_phone_the_list_of_pages_opens_and_leads_on(tab, html: Path) -> None:  # type: ignore[no-untyped-def]
    tab.goto((html / "index.html").as_uri())
    assert tab.locator("#pages").is_hidden()
    tab.locator("#menu").click()
    assert tab.locator("#menu").get_attribute("aria-expanded") == "true"
    box, first = (tab.locator(name).first.bounding_box() for name in ("#pages", "#pages a"))
    assert first["y"] > 56 and box["y"] + box["height"] <= 801, "the list lies under the header or below the screen"
    tab.locator("#pages").get_by_text("Glossary").click()
    tab.wait_for_url("**/reference/glossary.html")
    tab.locator("a[rel=next]").click()
    tab.wait_for_url("**/reference/parameters.html")


@pytest.mark.book
def test_a_table_sorts_by_the_keyboard_and_comes_back(tab, html: Path) -> None:  # type: ignore[no-untyped-def]
    tab.goto((html / "index.html").as_uri())
    table = tab.locator("table").last  # the stages
    head = table.locator("th").first

    def order() -> tuple[str | None, list[str]]:
        return head.get_attribute("aria-sort"), table.locator("tbody td:first-child").all_inner_texts()

    _, before = order()
    head.locator("button").focus()
    tab.keyboard.press("Enter")
    assert order() == ("ascending", sorted(before)) and sorted(before) != before
    tab.keyboard.press("Space")
    assert order() == ("descending", sorted(before)[::-1])
    tab.keyboard.press("Enter")
    assert order() == (None, before)


@pytest.mark.book
def test_a_long_cell_of_a_table_folds_and_opens(tab, html: Path) -> None:  # type: ignore[no-untyped-def]
    tab.goto((html / "notebooks/good.html").as_uri())
    box, more = tab.locator(".long").first, tab.locator(".more").first
    height = box.bounding_box()["height"]
    more.click()
    assert more.get_attribute("aria-expanded") == "true" and box.bounding_box()["height"] > 5 * height


LOOKED_AT = ("index.html", "signoff/checklist.html", "signoff/sign-off-tiny.html", "notebooks/good.html")


LANDMARK = re.compile(r"landmark-|region$")
AXE = {"resultTypes": ["violations"], "iframes": False, "preload": False}  # it fetches nothing, as a page may not


def violations(tab, path: Path) -> list[str]:  # type: ignore[no-untyped-def]
    """What axe-core finds that keeps a reader out: serious and critical, and, whatever it weighs them, text outside of
    landmarks and landmarks in disorder, by which a screen reader moves. Frames of reports are not our pages."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    tab.goto(path.as_uri())
    found = axe.run(tab, options=AXE).response["violations"]
    grave = [rule for rule in found if rule["impact"] in ("serious", "critical") or LANDMARK.match(rule["id"])]
    return [f"{path.name}: {rule['id']} at {node['target']}" for rule in grave for node in rule["nodes"]]


@pytest.mark.book
def test_axe_finds_nothing_grave_on_any_page(tab, html: Path, two: Path, parsed: dict[Path, Page]) -> None:  # type: ignore[no-untyped-def]
    assert [line for path in [*parsed, two / "compare.html"] for line in violations(tab, path)] == []


@pytest.mark.book
def test_axe_tells_of_a_bad_button_and_of_bad_landmarks(tab, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    body = "<p>out</p><nav></nav><nav></nav><main><h1>x</h1><button></button></main><main></main>"
    page = runs.write_text(tmp_path / "bad.html", f"<html lang=en><title>x</title>{body}")
    found = {line.split()[1] for line in violations(tab, page)}
    assert found >= {"button-name", "region", "landmark-unique", "landmark-no-duplicate-main"}


@pytest.mark.book
@pytest.mark.parametrize("tab", [{"color_scheme": "dark"}, PHONE], indirect=True)
def test_axe_finds_nothing_grave_in_the_dark_and_on_a_phone(tab, html: Path, two: Path) -> None:  # type: ignore[no-untyped-def]
    pages = [*(html / name for name in LOOKED_AT), two / "compare.html", two / "runs/tiny/index.html"]
    assert [line for path in pages for line in violations(tab, path)] == []
