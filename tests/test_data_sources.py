import hashlib
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stackpkg.data import sources
from stackpkg.params import Source


def read(source, audit=None):
    return list(sources.read([source], [] if audit is None else audit))


@pytest.fixture(scope="module")
def installed():
    audit = []
    return read(Source(max_mb=1.5), audit), audit


def test_distributions_hold_all_domains_and_real_provenance(installed):
    records, _ = installed
    assert set(Counter(r.domain for r in records)) == set(sources.SHARES)
    assert 1.0e6 < sum(len(r.text.encode()) for r in records) <= 1.5e6
    assert len({r.source.split("==")[0] for r in records}) > 20
    assert sum(bool(r.licence) for r in records) > 0.9 * len(records)
    assert sum(r.hash_status == "verified" for r in records) > 0.9 * len(records)
    assert all(r.source.startswith("pypi:") and "==" in r.source and "/../" not in r.source for r in records)
    assert len({r.record_id for r in records}) == len(records)


def test_order_depends_on_names_alone(installed, monkeypatch):
    found = list(sources.metadata.distributions())
    monkeypatch.setattr(sources.metadata, "distributions", lambda: reversed(found))
    assert [r.source for r in read(Source(max_mb=0.3))] == [r.source for r in installed[0]][
        : len(read(Source(max_mb=0.3)))
    ]


def test_a_changed_file_of_a_distribution_is_a_mismatch(tmp_path, monkeypatch):
    (tmp_path / "thing.py").write_text("x = 2\n")
    info = tmp_path / "thing-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thing\nVersion: 1.0\nLicense: MIT\n\nAbout it.\n")
    (info / "RECORD").write_text(f"thing.py,sha256={'A' * 43},6\nthing-1.0.dist-info/METADATA,,\n../../bin/x.py,,\n")
    found = list(sources.metadata.distributions(path=[str(tmp_path)]))
    monkeypatch.setattr(sources.metadata, "distributions", lambda: found)
    made = {r.source: r for r in read(Source())}
    assert made["pypi:thing==1.0/thing.py"].hash_status == "mismatch"
    about = made["pypi:thing==1.0/thing-1.0.dist-info/METADATA"]
    assert (about.text, about.licence, about.hash_status, about.domain) == (
        "About it.\n",
        "MIT",
        "unpublished",
        "documentation",
    )
    assert len(made) == 2


def test_folder_rejects_broken_files_with_the_reason(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "good.md").write_text("fine")
    (tmp_path / "latin.py").write_bytes("é".encode("latin-1"))
    (tmp_path / "binary.txt").write_bytes(b"a\x00b")
    (tmp_path / "huge.txt").write_bytes(b"a" * (sources.LARGEST + 1))
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "image.png").write_bytes(b"")
    audit = []
    records = read(Source(kind="folder", path=str(tmp_path), licence="MIT"), audit)
    assert [r.source for r in records] == [f"folder:{tmp_path.name}/sub/good.md"]
    reasons = {row.source.rpartition("/")[2]: row.filter for row in audit}
    assert set(reasons) == {"latin.py", "binary.txt", "huge.txt"} and {row.decision for row in audit} == {"drop"}
    assert "utf-8" in reasons["latin.py"] and "NUL" in reasons["binary.txt"] and "longer" in reasons["huge.txt"]


def test_jsonl_checks_the_published_hash_and_keeps_going(tmp_path):
    good = {"text": "hello", "licence": "MIT", "domain": "d", "timestamp": 5, "signature": "s"}
    good["content_hash"] = hashlib.sha256(b"hello").hexdigest()
    lines = [json.dumps(good), "{broken", json.dumps({"other": 1}), json.dumps(good | {"text": "hellO"})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    audit = []
    first, last = read(Source(kind="jsonl", path=str(tmp_path / "rows.jsonl")), audit)
    assert (first.source, first.hash_status, first.timestamp, first.signature) == (
        "jsonl:rows.jsonl#0",
        "verified",
        5,
        "s",
    )
    assert last.hash_status == "mismatch"
    assert [row.source for row in audit] == ["jsonl:rows.jsonl#1", "jsonl:rows.jsonl#2"]


def test_parquet_and_datasets_read_the_same_rows(tmp_path):
    pq.write_table(pa.table({"body": ["one text", "another text"]}), tmp_path / "rows.parquet")
    source = Source(kind="parquet", path=str(tmp_path / "rows.parquet"), text_field="body", domain="d", licence="MIT")
    rows = read(source)
    loaded = read(source.model_copy(update={"kind": "datasets", "path": str(tmp_path)}))
    assert [r.text for r in rows] == [r.text for r in loaded] == ["one text", "another text"]
    assert loaded[1].source == f"datasets:{tmp_path.name}#1" and rows[0].licence == "MIT" and rows[0].domain == "d"


def test_the_limit_stops_the_reading(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": "x" * 400}) for _ in range(10)))
    assert len(read(Source(kind="jsonl", path=str(tmp_path / "rows.jsonl"), max_mb=0.001))) == 2


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet"])
def test_a_path_that_is_not_there_is_said(kind):
    with pytest.raises(ValueError, match="nowhere"):
        read(Source(kind=kind, path="nowhere/at-all"))
