import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stackpkg import params, runs
from stackpkg.data import manifest as versions
from stackpkg.data import records
from stackpkg.governance import datacards

P = params.validate({"run": "demo"})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> runs.RunFolder:
    monkeypatch.setattr(runs.RunFolder, "__init__", lambda self, name: setattr(self, "path", tmp_path / name))
    run = runs.RunFolder("demo")
    run.name = "demo"
    common = {"timestamp": 1_700_000_000, "ttl_seconds": 86_400, "hash_status": "verified"}
    rows = [
        {"source": "pypi:a==1/x.py", "domain": "code", "licence": "MIT", "text": "mail a.b@example.org"},
        {"source": "pypi:a==1/y.md", "domain": "documentation", "licence": "", "text": "at 10.0.0.1"},
        {"source": "jsonl:<b>#3", "domain": "code", "licence": "MIT | <script>", "text": "nothing"},
    ]
    rows[2]["timestamp"] = 1_700_086_400
    for number, group in enumerate((rows[:2], rows[2:])):  # as the final records are: several files
        part = records.table(common | row for row in group)
        languages = pa.array(["en", None][: len(part)])
        part = part.append_column("language", languages).append_column("trust", pa.array([0.9, 0.7][: len(part)]))
        pq.write_table(part, run / f"data/records/{number:05d}.parquet")
    shard = {"name": "0123456789abcdef", "sha256": "ab" * 32, "tokens": 9}
    manifest = {"format": versions.FORMAT, "vocab_size": 1024, "tokens": {"train": {"code": 7, "documentation": 2}}}
    manifest |= {"mixture": {"code": 0.75, "documentation": 0.25}, "shards": [shard]}
    manifest["records"] = [{"name": f"{number:05d}"} for number in range(2)]
    versions.commit(run / "data", manifest)
    runs.write_json(run / "evidence/40_evaluate.json", {"precision_at_k": 0.25})
    runs.write_text(run / "nb/10.ipynb", "by x@example.org and y@example.org")
    return run


@pytest.mark.parametrize(
    ("text", "mails", "addresses"),
    [
        ("", 0, 0),
        ("a@b.org, c.d+e@f.example.com.", 2, 0),
        ("decorator @property a@b", 0, 0),
        ("10.0.0.1 and 255.255.255.255", 0, 2),
        ("256.1.1.1 1.2.3 1.2.3.4.5", 0, 0),
    ],
)
def test_patterns_of_personal_data(text: str, mails: int, addresses: int) -> None:
    assert datacards.personal_data([text]) == {"e-mail addresses": mails, "IPv4 addresses": addresses}


def test_facts_are_counted_from_the_run(folder: runs.RunFolder) -> None:
    known = datacards.facts(folder, P)
    assert known["counts"]["source"] == [("jsonl:<b>", 1), ("pypi:a==1", 2)]
    assert dict(known["counts"]["licence"]) == {"MIT": 1, "MIT | <script>": 1, "unknown": 1}
    assert dict(known["counts"]["language"]) == {"en": 2, "not told": 1}
    assert (known["trust"]["min"], known["trust"]["max"]) == (0.7, 0.9)
    assert known["stamps"] == ["2023-11-14", "2023-11-15"] and known["expiry"] == ["2023-11-15", "2023-11-16"]
    assert known["may"] == {"may_copy": 1, "may_use_tools": 2}, "as the licences permit"
    assert known["personal"]["corpus"] == {"e-mail addresses": 1, "IPv4 addresses": 1}
    assert known["personal"]["archive"] == {"e-mail addresses": 2, "IPv4 addresses": 0}


def test_cards_state_the_facts_and_escape_the_data(folder: runs.RunFolder) -> None:
    croissant, provenance, model = datacards.write(folder, datacards.facts(folder, P))
    card = json.loads(croissant.read_text())
    assert card["@type"] == "sc:Dataset" and card["conformsTo"].endswith("croissant/1.0")
    assert card["license"] == ["MIT", "MIT | <script>", "unknown"]
    files = {name: runs.digest(folder / f"data/records/{name}") for name in ("00000.parquet", "00001.parquet")}
    *objects, whole = card["distribution"]
    assert {entry["name"]: entry["sha256"] for entry in objects} == {"0123456789abcdef": "ab" * 32} | files
    assert [path.name for path in folder.matches(whole["includes"])] == list(files)
    assert {field["source"]["fileSet"]["@id"] for field in card["recordSet"][0]["field"]} == {whole["@id"]}
    columns = {field["source"]["extract"]["column"] for field in card["recordSet"][0]["field"]}
    assert columns <= set(pq.read_schema(folder / "data/records/00000.parquet").names)
    assert all(card[f"rai:{field}"] for field in ("dataCollection", "dataBiases", "personalSensitiveInformation"))
    text = provenance.read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text and "jsonl:&lt;b&gt;" in text
    assert "| code | 2 | 7 | 0.750 |" in text and "| unknown | 1 |" in text
    assert "| e-mail addresses | 1 | 2 |" in text
    assert "| precision_at_k | 0.25 |" in model.read_text()
    assert "No evidence in this run." in model.read_text()  # training recorded nothing here


def test_a_fact_that_is_missing_stops_the_card(folder: runs.RunFolder) -> None:
    known = datacards.facts(folder, P)
    del known["trust"]
    with pytest.raises(Exception, match="trust"):
        datacards.render("provenance.md.j2", known)


def test_the_digest_of_the_records_follows_their_content(folder: runs.RunFolder) -> None:
    before = datacards.facts(folder, P)["records_sha256"]
    shutil.copy(folder / "data/records/00000.parquet", folder / "data/records/00001.parquet")
    assert datacards.facts(folder, P)["records_sha256"] != before


def test_a_run_without_records_says_what_to_run(folder: runs.RunFolder) -> None:
    (folder / "data/manifest.json").unlink()
    with pytest.raises(ValueError, match=r"data/manifest\.json is missing: run notebook 10"):
        datacards.facts(folder, P)


def test_a_record_that_never_ends_still_has_a_card(folder: runs.RunFolder) -> None:
    part = pq.read_table(folder / "data/records/00001.parquet")
    at = part.column_names.index("ttl_seconds")
    pq.write_table(part.set_column(at, "ttl_seconds", [[2**63 - 1]]), folder / "data/records/00001.parquet")
    assert datacards.facts(folder, P)["expiry"] == ["2023-11-15", "2100-01-01"]


def test_no_absolute_path_reaches_a_card(folder: runs.RunFolder) -> None:
    for path in datacards.write(folder, datacards.facts(folder, P)):
        assert str(folder.path.parent) not in path.read_text()
