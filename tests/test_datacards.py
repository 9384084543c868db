"""What the pages state is counted from the run, and what a source is called can not break a page."""

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from governed_run import HOSTILE, home, run_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markupsafe import escape

from stackpkg import params, runs
from stackpkg.governance import croissant, crosswalk, datacards, report

SEEN = {
    "detector": {"presidio-analyzer": "2"}, "records": 3, "compared": 2, "left": 1, "per_million": 2.5,
    "before": {"EMAIL_ADDRESS": {"found": 4, "left": 3}}, "after": {}, "all": {"PHONE_NUMBER": {"found": 2, "left": 1}},
    "masked_by_scrubber": {"personal_email": 3}, "not_looked_for": "Names",
}  # fmt: skip
MORE = {"version": "v1", "sets": {"pairs": 5}}
MARKDOWN = MarkdownIt("commonmark").enable("table")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runs, "root", lambda: tmp_path)
    return home(tmp_path)


@pytest.fixture
def known(place: Path) -> tuple[runs.RunFolder, params.Params, dict[str, Any]]:
    folder, p = run_in(place)
    return folder, p, datacards.facts(folder, p, SEEN)


def test_facts_are_counted_from_the_run(known: Any) -> None:
    _, _, told = known
    assert told["documents"] == 3 and told["unlicensed"] == 0
    assert told["counts"]["licence"] == [("MIT", 3)] and dict(told["counts"]["language"]) == {"en": 2, "not told": 1}
    assert ("min_words", 1) in told["rejected"] and len(told["rejected"]) == 2, "what was masked was not rejected"
    (source,) = told["sources"]
    assert source["name"] == "jsonl:a.jsonl" and source["documents"] == 3 and source["rejected"] == told["rejected"]
    assert (told["trust"]["min"], told["trust"]["max"]) == (0.7, 0.9)
    assert told["stamps"] == ["2026-09-21", "2026-09-21"] and told["expiry"] == ["2027-09-21", "2027-09-21"]
    assert told["may"] == {"may_copy": 3, "may_use_tools": 3}


def test_an_unknown_licence_is_counted_and_said_loudly(place: Path) -> None:
    folder, p = run_in(place, licence="")
    told = datacards.facts(folder, p, SEEN)
    assert told["unlicensed"] == 3 and told["counts"]["licence"] == [("unknown", 3)]
    assert "The licence of 3 documents is unknown." in report.write(folder, p, told).read_text()
    card = datacards.write(folder, told | MORE)[1].read_text()
    assert "Licences of 3 documents are unknown." in card


def test_the_pages_state_the_facts(known: Any) -> None:
    folder, _, told = known
    provenance, model, summary = (path.read_text() for path in datacards.write(folder, told | MORE))
    assert "| min_words | 1 |" in provenance and "| EMAIL_ADDRESS | 3 | 0 | 0 | 0 |" in provenance
    assert "| PHONE_NUMBER | 0 | 0 | 2 | 1 |" in provenance
    assert "| precision_at_k | 0.25 |" in model and "No evidence in this run." in model
    sections = re.findall(r"^#+ (\d[\d.]*)", summary, re.M)
    assert sections == [
        "1.",
        "1.1",
        "1.2",
        "1.3",
        "2.",
        "2.1",
        "2.2",
        "2.3",
        "2.4",
        "2.5",
        "2.6",
        "3.",
        "3.1",
        "3.2",
        "3.3",
    ]
    assert "less than 1 billion tokens (9 in the corpus)" in summary and "pairs (5 rows)" in summary
    assert "OPEN" in summary.partition("### 2.2")[2].partition("### 2.5")[0], "a file: where it is from is not known"


def test_a_public_source_leaves_no_question_about_crawling(place: Path) -> None:
    folder, p = run_in(place)
    told = datacards.facts(folder, p, SEEN)
    told["sources"][0]["kind"] = "distributions"
    text = datacards.render("training_summary.md.j2", told | MORE)
    assert "OPEN" not in text.partition("### 2.1")[2].partition("### 3.1")[0] and "| jsonl:a.jsonl |" in text


# --- what comes from data is shown as it is


def cells(markdown: str) -> set[str]:
    """The text of every table cell of a page, as a reader sees it."""
    found = re.findall(r"<t[dh](?: [^>]*)?>(.*?)</t[dh]>", MARKDOWN.render(markdown), re.S)
    return {html.unescape(re.sub(r"</?strong>", "", cell)) for cell in found}


def plain(markdown: str) -> None:
    shown = MARKDOWN.render(markdown)
    assert not re.search(r"<(script|a |img|iframe|style|form|input)", shown), "markup out of data"


def test_a_hostile_name_is_shown_in_every_page_and_does_nothing(known: Any) -> None:
    folder, p, told = known
    name = HOSTILE.partition("#")[0]
    reason = f"unreadable: {HOSTILE}"
    for path in datacards.write(folder, told | MORE):
        plain(path.read_text())
        assert not re.search(r"<(script|a |img|h[1-3])", datacards.as_html(path.read_text()))
    assert {name, reason} <= cells((folder.path / "governance/provenance.md").read_text())
    page = report.write(folder, p, told).read_text()
    assert "<script" not in page and html.escape(reason).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in page
    assert page.count('role="img" aria-label="') == 4 and not re.search(r"(src|(?<!xlink:)href)=\"(?!#)", page)
    rows = [{"framework": name, "clause": reason, "asks": HOSTILE, "evidence": {HOSTILE: "ab" * 32}, "missing": [],
             "outside": ""}]  # fmt: skip
    text = datacards.render("crosswalk.md.j2", {"run": "demo", "rows": rows})
    plain(text)
    assert {reason, HOSTILE} <= cells(text)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip))
def test_any_name_is_one_cell_of_a_table(name: str) -> None:
    text = "| a | b |\n| --- | --- |\n| " + str(escape(datacards.literal(name))) + " | 1 |\n"
    shown = MARKDOWN.render(text)
    assert cells(text) == {"a", "b", " ".join(name.split()), "1"} and not re.search(
        r"<(?!/?(table|t[rhd]|thead|tbody))", shown
    )


def test_a_fact_that_is_missing_stops_the_page(known: Any) -> None:
    _, _, told = known
    del told["trust"]
    with pytest.raises(Exception, match="trust"):
        datacards.render("provenance.md.j2", told)


def test_the_digest_of_the_records_follows_their_content(known: Any) -> None:
    folder, p, told = known
    shutil.copy(folder / "data/records/00000.parquet", folder / "data/records/00001.parquet")
    assert datacards.facts(folder, p, SEEN)["records_sha256"] != told["records_sha256"]


def test_a_run_without_records_says_what_to_run(known: Any) -> None:
    folder, p, _ = known
    (folder / "data/manifest.json").unlink()
    with pytest.raises(ValueError, match=r"data/manifest\.json is missing: run notebook 10"):
        datacards.facts(folder, p, SEEN)


def test_a_record_that_never_ends_still_has_a_card(known: Any) -> None:
    folder, p, _ = known
    part = pq.read_table(folder / "data/records/00001.parquet")
    at = part.column_names.index("ttl_seconds")
    pq.write_table(part.set_column(at, "ttl_seconds", [[2**63 - 1]]), folder / "data/records/00001.parquet")
    assert datacards.facts(folder, p, SEEN)["expiry"] == ["2027-09-21", "2100-01-01"]


def test_no_absolute_path_reaches_a_page(known: Any) -> None:
    folder, p, told = known
    pages = [*datacards.write(folder, told | MORE), report.write(folder, p, told), *croissant.write(folder, told)]
    told["parameters"]["data"]["sources"] = []
    for path in pages:
        assert str(folder.path.parent) not in path.read_text(), path.name


# --- Croissant


def test_every_data_set_has_a_card_that_its_library_reads(known: Any) -> None:
    folder, _, told = known
    cards = croissant.write(folder, told)
    assert [card.name for card in cards] == ["corpus.jsonld", "source_0.jsonld", "long_range.jsonld"]
    assert croissant.problems(cards) == []
    card = json.loads(cards[0].read_text())
    assert card["conformsTo"] == "http://mlcommons.org/croissant/1.1" and card["license"] == "MIT"
    stated = {entry["contentUrl"]: entry["sha256"] for entry in card["distribution"] if "sha256" in entry}
    assert stated == {name: runs.digest(folder.path / "data" / name) for name in stated} and len(stated) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda card: card.pop("rai:dataBiases"), "rai:dataBiases is missing"),
        (lambda card: card["distribution"][0].update(sha256="0" * 64), "is not the file that the card describes"),
        (lambda card: card["distribution"][0].update(contentUrl="records/none.parquet"), "is not the file"),
        (lambda card: card.pop("name"), "name is missing"),
        (lambda card: card.update(conformsTo="http://mlcommons.org/croissant/9"), "ValidationError"),
        (lambda card: card["recordSet"][0]["field"][0]["source"]["extract"].update(column="none"), "Error"),
    ],
)
def test_what_is_wrong_with_a_card_is_said(known: Any, change: Any, said: str) -> None:
    folder, _, told = known
    path = croissant.write(folder, told)[0]
    card = json.loads(path.read_text())
    change(card)
    runs.write_json(path, card)
    assert any(said in problem for problem in croissant.problems([path])), croissant.problems([path])


# --- the crosswalk


def test_each_requirement_names_evidence_or_why_there_is_none(place: Path) -> None:
    folder, _ = run_in(place)
    rows = crosswalk.write(folder)
    assert {row["framework"] for row in rows} == {
        "NIST AI RMF 1.0", "ISO/IEC 42001:2023, Annex A", "EU AI Act Annex IV"}  # fmt: skip
    (quality,) = (row for row in rows if row["clause"] == "A.7.5")
    assert quality["evidence"] == {"data/trust.parquet": runs.digest(folder / "data/trust.parquet")}
    assert quality["missing"] == ["governance/provenance.md"]
    text = (folder / "governance/crosswalk.md").read_text()
    assert "**NO EVIDENCE IN THIS RUN:** governance/provenance.md" in text
    silent = sum(bool(row["missing"]) for row in rows)
    assert f"{silent} WITHOUT THE EVIDENCE THEY NAME" in text and silent
    assert json.loads((folder / "governance/crosswalk.json").read_text()) == rows


@pytest.mark.parametrize("row", ["", "evidence: [x], outside: y"])
def test_a_row_that_answers_nothing_or_twice_is_refused(place: Path, row: str) -> None:
    runs.write_text(place / crosswalk.TABLE, f"- {{framework: F, clause: '1', asks: a, {row}}}\n")
    with pytest.raises(ValueError, match="F 1: give `evidence`, or say in `outside`"):
        crosswalk.definitions()
