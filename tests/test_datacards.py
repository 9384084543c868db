import json
from pathlib import Path

import pandas as pd
import pytest

from stackpkg import params, runs
from stackpkg.governance import datacards

P = params.validate({"run": "demo"})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> runs.RunFolder:
    monkeypatch.setattr(runs.RunFolder, "__init__", lambda self, name: setattr(self, "path", tmp_path / name))
    run = runs.RunFolder("demo")
    run.name = "demo"
    common = {"timestamp": 1_700_000_000, "trust": 0.9, "hash_status": "verified", "may_use_tools": True}
    rows = [
        {"source": "pypi:a==1/x.py", "domain": "code", "licence": "MIT", "text": "mail a.b@example.org"},
        {"source": "pypi:a==1/y.md", "domain": "documentation", "licence": "", "text": "at 10.0.0.1"},
        {"source": "jsonl:<b>#3", "domain": "code", "licence": "MIT | <script>", "text": "nothing"},
    ]
    records = pd.DataFrame([common | row | {"may_copy": bool(row["licence"])} for row in rows])
    records.to_parquet(run / "data/records.parquet")
    shard = {"name": "train-00000.bin", "sha256": "ab" * 32, "tokens": 9}
    manifest = {"version": 1, "vocab_size": 1024, "tokens": {"train": {"code": 7, "documentation": 2}}}
    manifest |= {"mixture": {"code": 0.75, "documentation": 0.25}, "shards": [shard], "records_sha256": "cd" * 32}
    runs.write_json(run / "data/manifest.json", manifest)
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
    assert known["may"] == {"may_copy": 2, "may_use_tools": 3}
    assert known["personal"]["corpus"] == {"e-mail addresses": 1, "IPv4 addresses": 1}
    assert known["personal"]["archive"] == {"e-mail addresses": 2, "IPv4 addresses": 0}


def test_cards_state_the_facts_and_escape_the_data(folder: runs.RunFolder) -> None:
    croissant, provenance, model = datacards.write(folder, datacards.facts(folder, P))
    card = json.loads(croissant.read_text())
    assert card["@type"] == "sc:Dataset" and card["conformsTo"].endswith("croissant/1.0")
    assert card["license"] == ["MIT", "MIT | <script>", "unknown"]
    assert {entry["sha256"] for entry in card["distribution"]} == {"ab" * 32, "cd" * 32}
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


def test_no_absolute_path_reaches_a_card(folder: runs.RunFolder) -> None:
    for path in datacards.write(folder, datacards.facts(folder, P)):
        assert str(folder.path.parent) not in path.read_text()
