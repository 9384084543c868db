import gzip
import hashlib
import itertools
import json
import tracemalloc
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackpkg.data import distributions, items, listing, records, rows, sources
from stackpkg.params import Source


def read(source, audit=None):
    return list(sources.read([source], [] if audit is None else audit))


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(kind="jsonl", path=str(path))


@pytest.fixture(scope="module")
def installed():
    audit = []
    return read(Source(max_mb=1.5), audit), audit


def test_distributions_hold_all_domains_and_real_provenance(installed):
    found, _ = installed
    assert set(Counter(r["domain"] for r in found)) == set(distributions.SHARES)
    assert 1.0e6 < sum(len(r["text"].encode()) for r in found) <= 1.5e6
    assert len({r["source"].split("==")[0] for r in found}) > 20
    assert sum(bool(r["licence"]) for r in found) > 0.9 * len(found)
    assert sum(r["hash_status"] == "verified" for r in found) > 0.9 * len(found)
    assert all(r["source"].startswith("pypi:") and "==" in r["source"] and "/../" not in r["source"] for r in found)
    assert len({r["record_id"] for r in found}) == len(found)


def test_order_depends_on_names_alone(installed, monkeypatch):
    found = list(distributions.metadata.distributions())
    monkeypatch.setattr(distributions.metadata, "distributions", lambda: reversed(found))
    again = [r["source"] for r in read(Source(max_mb=0.3))]
    assert again == [r["source"] for r in installed[0]][: len(again)] and len(again) > 10


def test_a_changed_file_of_a_distribution_is_a_mismatch(tmp_path, monkeypatch):
    (tmp_path / "thing.py").write_text("x = 2\n")
    info = tmp_path / "thing-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thing\nVersion: 1.0\nLicense: MIT\n\nAbout it.\n")
    (info / "RECORD").write_text(f"thing.py,sha256={'A' * 43},6\nthing-1.0.dist-info/METADATA,,\n../../bin/x.py,,\n")
    found = list(distributions.metadata.distributions(path=[str(tmp_path)]))
    monkeypatch.setattr(distributions.metadata, "distributions", lambda: found)
    made = {r["source"]: r for r in read(Source())}
    assert made["pypi:thing==1.0/thing.py"]["hash_status"] == "mismatch"
    about = made["pypi:thing==1.0/thing-1.0.dist-info/METADATA"]
    assert (about["text"], about["licence"]) == ("About it.\n", "MIT")
    assert (about["hash_status"], about["domain"]) == ("unpublished", "documentation")
    assert len(made) == 2


def test_jsonl_states_provenance_and_the_published_hash_is_checked(tmp_path):
    good = {"text": "hello", "licence": "MIT", "domain": "d", "timestamp": 5, "signature": "s", "ttl_seconds": 60}
    good["content_hash"] = hashlib.sha256(b"hello").hexdigest()
    first, last, named = read(
        jsonl(tmp_path / "rows.jsonl", [good, good | {"text": "hellO"}, {"text": "x", "id": "a/b"}])
    )
    stated = [first[key] for key in ("source", "hash_status", "timestamp", "signature", "ttl_seconds", "licence")]
    assert stated == ["jsonl:rows.jsonl#0", "verified", 5, "s", 60, "MIT"]
    assert first["content_hash"] == good["content_hash"] and last["hash_status"] == "mismatch"
    assert named["source"] == "jsonl:rows.jsonl#id=a/b" and named["domain"] == "text"
    assert named["timestamp"] == int((tmp_path / "rows.jsonl").stat().st_mtime)


@pytest.mark.parametrize(
    ("stated", "seconds"),
    [(1.5e9, 1_500_000_000), ("2020-01-01T00:00:00Z", 1_577_836_800), ("2020-01-01", 1_577_836_800)],
)
def test_times_are_numbers_or_iso_8601(stated, seconds):
    assert items.seconds(stated) == seconds


def table():
    made = {"body": ["one text", "another text"], "domain": ["d", None], "timestamp": [7, 8], "more": [1, 2]}
    return pa.table(made).set_column(1, "domain", pa.array(["d", None]).dictionary_encode())


def test_every_format_gives_the_same_records(tmp_path):
    made, plain = table(), "".join(json.dumps(row) + "\n" for row in table().to_pylist()).encode()
    pq.write_table(made, tmp_path / "rows.parquet")
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, made.schema) as writer:
        writer.write_table(made)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, made.schema) as writer:
        writer.write_table(made)
    (tmp_path / "rows.jsonl").write_bytes(plain)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(plain[:20]) + gzip.compress(plain[20:]))
    (tmp_path / "rows.jsonl.zst").write_bytes(pa.Codec("zstd").compress(plain).to_pybytes())
    (tmp_path / "renamed.jsonl").write_bytes(gzip.compress(plain))
    (tmp_path / "crlf.jsonl").write_bytes(b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n\r\n"))
    found = {}
    for path in sorted(tmp_path.iterdir()):
        kind = {".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix, "jsonl")
        got = read(Source(kind=kind, path=str(path), text_field="body", licence="MIT"))
        found[path.name] = [(r["text"], r["domain"], r["timestamp"], r["licence"]) for r in got]
        assert [r["source"] for r in got] == [f"{kind}:{path.name}#0", f"{kind}:{path.name}#1"]
    assert len(found) == 8
    assert set(map(tuple, found.values())) == {(("one text", "d", 7, "MIT"), ("another text", "text", 8, "MIT"))}


def test_a_datasets_id_gives_the_rows_of_its_files(tmp_path):
    pq.write_table(table(), tmp_path / "rows.parquet")
    got = read(Source(kind="datasets", path=str(tmp_path), text_field="body"))
    assert [r["text"] for r in got] == ["one text", "another text"]
    assert got[1]["source"] == f"datasets:{tmp_path.name}#1"


def test_a_folder_of_files_is_read_in_the_order_of_names(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        jsonl(tmp_path / name, [{"text": name}])
    source = Source(kind="jsonl", path=str(tmp_path))
    got = read(source)
    assert [r["text"] for r in got] == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert all(r["source"].startswith(sources.prefix(source)) for r in got)
    assert got[2]["source"] == f"jsonl:{tmp_path.name}/sub/c.jsonl#0"


def test_the_limit_stops_the_reading(tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", [{"text": "x" * 400}] * 10)
    assert len(read(source.model_copy(update={"max_mb": 0.001}))) == 2


@given(st.lists(st.text(max_size=40)), st.integers(1, 30), st.integers(8, 60))
def test_lines_are_the_lines_at_any_reading(lines, step, longest):
    raw, patch = "\n".join(line.replace("\n", "") for line in lines).encode(), pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(rows, "LARGEST", longest)
        chunks = iter([raw[k : k + step] for k in range(0, len(raw), step)] + [b""])
        got = list(rows._lines(lambda: next(chunks)))
    expected = raw.split(b"\n")[: None if not raw or raw.rpartition(b"\n")[2] else -1]
    assert got == [None if len(line) > longest else line for line in expected if raw]


# --- parts


def parts(tmp_path, source, mb=0.01, audit=None):
    return sources.write_parts([source], tmp_path / "parts", mb, [] if audit is None else audit)


def test_parts_hold_every_record_once_in_order_within_their_size(tmp_path):
    texts = [f"{k} " * (100 + k % 700) for k in range(300)]
    source = jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    made = parts(tmp_path, source)
    tables = [pq.read_table(path) for path in made]
    assert [path.name for path in made] == [f"{k:05d}.parquet" for k in range(len(made))] and len(made) > 20
    assert all(table.schema.equals(records.SCHEMA) for table in tables)
    assert [text for table in tables for text in table["text"].to_pylist()] == texts
    sizes = [sum(map(len, table["text"].to_pylist())) for table in tables]
    assert max(sizes) <= 10_000 and all(a + b > 10_000 for a, b in itertools.pairwise(sizes))


def test_the_same_input_gives_the_same_bytes_and_removes_what_an_earlier_one_left(tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", [{"text": f"{k} " * 400} for k in range(40)])
    first = [path.read_bytes() for path in parts(tmp_path, source)]
    (tmp_path / "parts" / "00099.parquet").write_text("old")
    assert [path.read_bytes() for path in parts(tmp_path, source)] == first
    assert len(list((tmp_path / "parts").iterdir())) == len(first) > 2


def test_a_document_larger_than_a_part_has_one_of_its_own(tmp_path):
    made = parts(tmp_path, jsonl(tmp_path / "rows.jsonl", [{"text": "a" * n} for n in (5, 50_000, 5)]))
    assert [pq.read_metadata(path).num_rows for path in made] == [1, 1, 1]


def test_ids_that_repeat_across_parts_and_sources_are_set_aside(tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", [{"text": f"{k} " * 900, "id": k % 25} for k in range(50)])
    audit = []
    made = sources.write_parts([source, source], tmp_path / "parts", 0.01, audit)
    assert sum(pq.read_metadata(path).num_rows for path in made) == 25
    assert Counter(row["filter"] for row in audit) == {
        "unreadable: a record of this source came before: ids repeat": 75
    }
    assert pa.Table.from_pylist(audit, records.AUDIT).num_rows == 75


def test_when_nothing_can_be_read_the_reasons_are_said(tmp_path):
    with pytest.raises(
        ValueError, match=r"nothing could be read from \['jsonl:rows.jsonl#'\]: .*no column .text. among body.*\(3\)"
    ):
        parts(tmp_path, jsonl(tmp_path / "rows.jsonl", [{"body": "x"}] * 3))


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet", "arrow"])
def test_a_path_that_is_not_there_is_said(kind):
    with pytest.raises(ValueError, match="nowhere"):
        read(Source(kind=kind, path="nowhere/at-all"))


def test_memory_is_bounded_by_a_part(tmp_path):
    """Reading twenty-four megabytes in parts of one allocates no more than a few megabytes at once."""
    source = jsonl(tmp_path / "rows.jsonl", ({"text": f"{k} " * 5000} for k in range(1000)))
    tracemalloc.start()
    made = sources.write_parts([source], tmp_path / "parts", 1.0, [])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(made) > 15 and peak < 12e6, peak


# ---- what each source gave
def test_the_tally_names_a_source_that_gave_nothing(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/page.md").write_text("A page of words.\n")
    (tmp_path / "docs/table.xlsx").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    good = jsonl(tmp_path / "rows.jsonl", [{"text": "x", "license": "MIT"}, {"text": "y"}, {"body": "z"}])
    folders = [Source(kind="folder", path=str(tmp_path / name)) for name in ("docs", "empty")]
    audit = []
    found = read(folders[0], audit) + read(folders[1], audit) + read(good, audit)
    table = records.table(found).select(["source", "licence"])
    told = {row["source"]: row for row in sources.tally([*folders, good], table, audit).to_pylist()}
    counts = {name: (row["read"], row["unreadable"], row["unlicensed"]) for name, row in told.items()}
    assert counts == {"folder:docs/": (1, 1, 1), "folder:empty/": (0, 0, 0), "jsonl:rows.jsonl#": (2, 1, 1)}
    why = "unreadable: no domain is told by *.xlsx: give the source a `domain`"
    assert told["folder:docs/"]["set_aside"] == why and audit[0]["source"] == "folder:docs/table.xlsx"


def test_a_licence_is_read_in_either_spelling(tmp_path):
    rows = [{"text": "x", "license": "MIT"}, {"text": "y", "licence": "ISC", "license": "MIT"}]
    assert [row["licence"] for row in read(jsonl(tmp_path / "rows.jsonl", rows))] == ["MIT", "ISC"]
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "rows.parquet")
    (row,) = read(Source(kind="parquet", path=str(tmp_path / "rows.parquet")))
    assert row["licence"] == "MIT"


def test_the_listing_of_a_source_tells_that_it_changed(tmp_path, monkeypatch):
    source = jsonl(tmp_path / "rows.jsonl", [{"text": "x"}])
    (tmp_path / "docs").mkdir()
    both = [source, Source(kind="folder", path=str(tmp_path / "docs"))]
    seen = {listing.listing(both)}
    assert listing.listing(both) in seen
    (tmp_path / "docs/new.md").write_text("more")
    seen.add(listing.listing(both))
    (tmp_path / "rows.jsonl").write_text('{"text": "z"}\n')
    seen.add(listing.listing(both))
    (tmp_path / "docs/new.md").unlink()
    seen.add(listing.listing(both))
    assert len(seen) == 4
    before = listing.listing([Source()])
    fewer = [*distributions.metadata.distributions()][1:]
    monkeypatch.setattr(listing.metadata, "distributions", lambda: fewer)
    assert listing.listing([Source()]) != before
