"""What is broken is set aside with its reason; its neighbours survive. One line of the table is one kind of fault."""

import gzip
import json
import os
import socket
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stackpkg.data import distributions, engine, items, records, sources
from stackpkg.params import Source

GOOD = [{"text": "the first neighbour"}, {"text": "the second neighbour"}]
LONG = f"longer than {items.LARGEST} bytes"
RANGE = ": give a finite number from 0 to 7.25812e+09"
TOO_LARGE = "int too large to convert to float"
REPEATS = "a record of this source came before: ids repeat"
TORN = "Invalid or truncated PLAIN-encoded BYTE_ARRAY data"
SMALL = "Parquet file size is 5 bytes, smaller than the minimum file footer"
NO_TIME = "timestamp is after the year 2200: "


def audited(source, tmp_path):
    """(texts that were kept, reasons that were given), through the parts and the audit's schema."""
    audit = []
    made = sources.write_parts([source], tmp_path / "parts", 1.0, audit)
    rows = pa.Table.from_pylist(audit, records.AUDIT).to_pylist()
    assert {(row["decision"], row["value"], row["threshold"]) for row in rows} <= {("drop", 0.0, 1.0)}
    assert all(str(tmp_path) not in row["filter"] + row["source"] for row in rows)
    texts = [text for path in made for text in pq.read_table(path)["text"].to_pylist()]
    return texts, [row["filter"].removeprefix("unreadable: ") for row in rows]


def line(**row) -> bytes:
    return json.dumps({"text": "of a broken row"} | row).encode()


# --- a row of JSONL between two good ones

ROWS = {
    "not UTF-8": (b'{"text": "caf\xe9"}', "not UTF-8: invalid continuation byte"),
    "cut off": (b'{"text": "half', "not JSON: Unterminated string starting at"),
    "no JSON": (b"hello", "not JSON: Expecting value"),
    "a list": (b'["text"]', "a row is list, not an object"),
    "nested too deeply": (b'{"text": ' + b"[" * 100_000, "nested too deeply"),
    "a number of too many digits": (b'{"text": "x", "timestamp": ' + b"9" * 400 + b"}", TOO_LARGE),
    "a huge line": (b'{"text": "' + b"x" * 3 * items.LARGEST + b'"}', LONG),
    "a raw NUL": (b'{"text": "a\x00b"}', "holds a NUL byte: not text"),
    "an escaped NUL": (b'{"text": "a\\u0000b"}', "holds a NUL byte: not text"),
    "half a surrogate pair": (b'{"text": "a\\ud800b"}', "not UTF-8: surrogates not allowed"),
    "no text column": (b'{"body": "x"}', "no column 'text' among body: set text_field"),
    "text is null": (b'{"text": null}', "no text"),
    "text is blank": (b'{"text": " \\n"}', "no text"),
    "text is a number": (b'{"text": 5}', "text is int, not text"),
    "text is a list": (b'{"text": ["a"]}', "text is list, not text"),
    "the licence is an object": (line(licence={"spdx": "MIT"}), "licence is dict, not text"),
    "the domain is a number": (line(domain=3), "domain is int, not text"),
    "the id is a list": (line(id=[1]), "id is list, not text"),
    "the id has no end": (line(id="x" * 9000), "id is longer than 256 characters"),
    "the time is NaN": (line(timestamp=float("nan")), "timestamp is nan" + RANGE),
    "the time is infinite": (line(timestamp=float("inf")), "timestamp is inf" + RANGE),
    "the time is negative": (line(timestamp=-5), "timestamp is -5" + RANGE),
    "the time is in milliseconds": (line(timestamp=1_700_000_000_000), NO_TIME + "milliseconds? give seconds"),
    "the time is in nanoseconds": (line(timestamp=1_700_000_000_000_000_000), NO_TIME + "nanoseconds? give seconds"),
    "the time is no time": (line(timestamp="soon"), "Invalid isoformat string: 'soon'"),
    "the time is true": (line(timestamp=True), "timestamp is bool, not a number"),
    "a negative time-to-live": (line(ttl_seconds=-1), "ttl_seconds is -1: give a finite number from 0 to 1e+12"),
    "a score of NaN": (line(score=float("nan")), "score is nan: give a finite number"),
    "a negative trust": (line(trust=-0.5), "trust is -0.5: give a finite number from 0 to 1"),
    "a language score above one": (line(language_score=7), "language_score is 7: give a finite number from 0 to 1"),
    "an id that repeats": (b'{"text": "x", "id": 0}\n{"text": "y", "id": "0"}', REPEATS),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_a_broken_row_is_set_aside(kind, tmp_path):
    broken, why = ROWS[kind]
    first, second = (json.dumps(row).encode() for row in GOOD)
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([first, broken, second]))
    texts, reasons = audited(Source(kind="jsonl", path=str(tmp_path / "rows.jsonl")), tmp_path)
    assert reasons == [why]
    assert [text for text in texts if len(text) > 1] == [row["text"] for row in GOOD]


def test_a_clock_that_runs_ahead_is_stored_as_it_is(tmp_path):
    ahead = int(time.time()) + 5 * 86_400
    (tmp_path / "rows.jsonl").write_bytes(line(timestamp=ahead))
    source = Source(kind="jsonl", path=str(tmp_path / "rows.jsonl"))
    assert [row["timestamp"] for row in sources.read([source], [])] == [ahead]


# --- a file of rows between two good ones


def packed(rows=4000) -> bytes:
    return b"".join(b'{"text": "line %d"}\n' % k for k in range(rows))


def parquet(path: Path, **columns) -> bytes:
    pq.write_table(
        pa.table(columns), path, row_group_size=2, compression="none", use_dictionary=False, write_statistics=False
    )
    return path.read_bytes()


def cut(path: Path) -> bytes:
    whole = parquet(path, text=["a" * 4000, "b" * 4000, "c" * 4000, "d" * 4000])
    return whole[:9000] + b"\xff" * 5000 + whole[14000:]


def stream(path: Path) -> bytes:
    table = pa.table({"text": [f"row {k} " * 50 for k in range(1000)]})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return path.read_bytes()


BYTES = {
    "an empty file": ("jsonl", lambda p: b"", "holds no rows", 0),
    "UTF-16": ("jsonl", lambda p: packed(3).decode().encode("utf-16"), "UTF-16: convert it to UTF-8", 0),
    "a gzip that is cut off": (
        "jsonl",
        lambda p: gzip.compress(packed())[:-100],
        "after {n} rows: Compressed file ended before the end-of-stream marker was reached",
        3000,
    ),
    "a gzip with something after it": (
        "jsonl",
        lambda p: gzip.compress(packed(5)) + b"more",
        "after 5 rows: Not a gzipped file (b'mo')",
        5,
    ),
    "a gzip with flipped bytes": (
        "jsonl",
        lambda p: gzip.compress(packed())[:10] + b"\xff" * 30,
        "Error -3 while decompressing data: invalid block type",
        0,
    ),
    "a zstd that is cut off": (
        "jsonl",
        lambda p: pa.Codec("zstd").compress(packed(40_000)).to_pybytes()[:-9],
        "after {n} rows: Truncated compressed stream",
        30_000,
    ),
    "a Parquet file that is cut off": (
        "parquet",
        lambda p: parquet(p, text=["a"] * 99)[:-40],
        "Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file.",
        0,
    ),
    "a Parquet file with a broken page": (
        "parquet",
        cut,
        "after {n} rows: " + TORN,
        2,
    ),
    "no text column": ("parquet", lambda p: parquet(p, body=["a"]), "no column 'text' among body: set text_field", 0),
    "text of another type": ("parquet", lambda p: parquet(p, text=[1]), "column 'text' is int64, not text", 0),
    "a Parquet row that is not UTF-8": (
        "parquet",
        lambda p: parquet(
            p, text=pa.array([b"good one", b"caf\xe9", b"good two"]).cast(pa.string(), safe=False).view(pa.string())
        ),
        "not UTF-8: unexpected end of data",
        2,
    ),
    "an Arrow stream that is cut off": ("arrow", lambda p: stream(p)[:-9000], "after {n} rows: ", 500),
    "an Arrow file that is none": ("arrow", lambda p: b"ARROW1 and nothing", "Not an Arrow file", 0),
    "a file of another format": (
        "parquet",
        lambda p: b"hello",
        "Parquet file size is 5 bytes, smaller than the minimum file footer",
        0,
    ),
}


@pytest.mark.parametrize("kind", BYTES)
def test_a_broken_file_is_set_aside_after_what_it_gave(kind, tmp_path):
    form, content, why, least = BYTES[kind]
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, row in zip("ac", GOOD, strict=True):
        if form == "jsonl":
            (folder / f"{name}.jsonl").write_text(json.dumps(row))
        elif form == "parquet":
            parquet(folder / f"{name}.parquet", **{key: [value] for key, value in row.items()})
        else:
            table = pa.Table.from_pylist([row])
            with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
    made = content(tmp_path / "made")
    (folder / f"b.{form}").write_bytes(made)
    texts, (reason,) = audited(Source(kind=form, path=str(folder)), tmp_path)
    given = texts[1:-1]
    assert [texts[0], texts[-1]] == [row["text"] for row in GOOD] and len(given) >= least
    assert reason.startswith(why.format(n=len(given))) and len(reason) > 10
    if form == "jsonl":
        assert given == [f"line {k}" for k in range(len(given))]


# --- a file or folder between two good ones


def link_out(folder: Path) -> None:
    (folder.parent / "outside.md").write_text("secret")
    (folder / "bad.md").symlink_to(folder.parent / "outside.md")


def loop_of_folders(folder: Path) -> None:
    (folder / "bad").symlink_to(folder)


def listening(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(folder / "bad.md"))


FILES = {
    "Latin-1": (lambda f: (f / "bad.md").write_bytes("é1".encode("latin-1")), "not UTF-8: invalid continuation byte"),
    "UTF-16": (lambda f: (f / "bad.md").write_text("hello", "utf-16"), "UTF-16: convert it to UTF-8"),
    "a NUL byte": (lambda f: (f / "bad.md").write_bytes(b"a\x00b"), "holds a NUL byte: not text"),
    "an empty file": (lambda f: (f / "bad.md").touch(), "no text"),
    "only a mark of byte order": (lambda f: (f / "bad.md").write_bytes(b"\xef\xbb\xbf"), "no text"),
    "a huge file": (lambda f: (f / "bad.md").write_bytes(b"a" * (items.LARGEST + 1)), LONG),
    "a time before 1970": (
        lambda f: ((f / "bad.md").write_text("x"), os.utime(f / "bad.md", (-9e8, -9e8))),
        "timestamp is -9e+08" + RANGE,
    ),
    "a name that is not UTF-8": (
        lambda f: Path(os.fsdecode(os.fsencode(f) + b"/caf\xe9.md")).write_text("x"),
        "not UTF-8: surrogates not allowed",
    ),
    "a link to nothing": (lambda f: (f / "bad.md").symlink_to(f / "nowhere"), "No such file or directory"),
    "a link to itself": (lambda f: (f / "bad.md").symlink_to(f / "bad.md"), "Too many levels of symbolic links"),
    "a link out of the folder": (link_out, "a link out of the folder"),
    "a loop of folders": (loop_of_folders, "a link to a folder"),
    "a pipe": (lambda f: os.mkfifo(f / "bad.md"), "not a regular file"),
    "a socket": (listening, "not a regular file"),
}


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "texts"
    made.mkdir()
    for name, row in zip(("a.md", "z.md"), GOOD, strict=True):
        (made / name).write_text(row["text"])
    return made


@pytest.mark.parametrize("kind", FILES)
def test_a_broken_file_of_a_folder_is_set_aside(kind, folder, tmp_path):
    make, why = FILES[kind]
    make(folder)
    texts, reasons = audited(Source(kind="folder", path=str(folder)), tmp_path)
    assert (texts, reasons) == ([row["text"] for row in GOOD], [why])


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied"),
        FileNotFoundError(2, "No such file or directory"),
        OSError(5, "Input/output error"),
    ],
)
def test_a_file_that_cannot_be_opened_or_vanished_is_set_aside(error, folder, tmp_path, monkeypatch):
    (folder / "bad.md").write_text("x")
    opened = Path.open

    def refuse(path, *arguments, **options):
        if path.name == "bad.md":
            raise error
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    texts, reasons = audited(Source(kind="folder", path=str(folder)), tmp_path)
    assert (texts, reasons) == ([row["text"] for row in GOOD], [error.strerror])


def test_a_folder_that_may_not_be_listed_is_set_aside(folder, tmp_path, monkeypatch):
    (folder / "m").mkdir()
    listed = os.scandir

    def refuse(path):
        if Path(path).name == "m":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    texts, reasons = audited(Source(kind="folder", path=str(folder)), tmp_path)
    assert (texts, reasons) == ([row["text"] for row in GOOD], ["Permission denied"])


def test_a_stray_file_among_rows_is_said(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text(json.dumps(GOOD[0]))
    (tmp_path / "rows" / "b.jsonl.bz2").write_bytes(b"BZh9")
    texts, (reason,) = audited(Source(kind="jsonl", path=str(tmp_path / "rows")), tmp_path)
    assert texts == [GOOD[0]["text"]] and reason.startswith("its name ends in none of .jsonl, .jsonl.gz")


def test_a_hub_that_fails_in_the_middle_is_set_aside(tmp_path, monkeypatch):
    import datasets

    def rows(*_, **__):
        yield GOOD[0]
        raise datasets.exceptions.DatasetGenerationError("the connection was lost")

    monkeypatch.setattr(datasets, "load_dataset", rows)
    monkeypatch.setattr("stackpkg.data.rows._changed", lambda *_: 7)
    texts, reasons = audited(Source(kind="datasets", path="someone/something"), tmp_path)
    assert (texts, reasons) == ([GOOD[0]["text"]], ["after 1 rows: datasets: the connection was lost"])


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("RECORD", "thing.py,sha256=A,6\n", "Invalid base64-encoded string"),
        ("RECORD", "thing.py\n", "not enough values to unpack (expected 3, got 1)"),
        ("RECORD", "thing.py,,many\n", "invalid literal for int() with base 10: 'many'"),
        ("METADATA", "Version: 1\n\n", "its METADATA has no Name"),
    ],
)
def test_a_broken_distribution_is_set_aside(name, content, why, tmp_path, monkeypatch):
    for package in ("good", "thing"):
        info = tmp_path / f"{package}-1.dist-info"
        info.mkdir()
        (tmp_path / f"{package}.py").write_text(f"the text of {package}")
        (info / "METADATA").write_text(f"Name: {package}\nVersion: 1\n\n")
        (info / "RECORD").write_text(f"{package}.py,,\n")
    (tmp_path / "thing-1.dist-info" / name).write_text(content)
    found = list(distributions.metadata.distributions(path=[str(tmp_path)]))
    monkeypatch.setattr(distributions.metadata, "distributions", lambda: found)
    texts, (reason,) = audited(Source(), tmp_path)
    assert texts == ["the text of good"] and reason.startswith(why)


# --- the disk


def test_a_full_disk_ends_the_reading_and_leaves_whole_parts(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_bytes(b"".join(line(text=f"{k} " * 3000) + b"\n" for k in range(9)))
    written = engine.pq.write_table

    def full(table, path, **options):
        if "00002" in str(path):
            Path(path).write_bytes(b"half of a part")
            raise OSError(28, "No space left on device")
        written(table, path, **options)

    monkeypatch.setattr(engine.pq, "write_table", full)
    with pytest.raises(OSError, match=r"parts/00002.parquet was not written \(No space left on device\)"):
        sources.write_parts([Source(kind="jsonl", path=str(tmp_path / "rows.jsonl"))], tmp_path / "parts", 0.01, [])
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["00000.parquet", "00001.parquet"]
