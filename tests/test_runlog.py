"""The log of runs: chained, never continued over a break, whole when several write."""

import hashlib
import json
import multiprocessing
from pathlib import Path

import pytest

from stackpkg import runs
from stackpkg.governance import runlog


def made(place: Path, name: str = "one") -> Path:
    runs.write_text(place / name / "SHA256SUMS", f"{name}\n")
    runlog.enter(place / name, "SHA256SUMS", runs.digest(place / name / "SHA256SUMS"))
    return place / name


def test_each_line_names_the_digest_of_the_line_before(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        made(tmp_path, name)
    lines = (tmp_path / "LOG.jsonl").read_bytes().splitlines(keepends=True)
    told = [json.loads(line)["previous"] for line in lines]
    assert told == ["0" * 64, *(hashlib.sha256(line).hexdigest() for line in lines[:-1])]
    assert [entry["run"] for entry in runlog.entries(tmp_path)] == ["one", "two", "three"]
    assert runlog.problems(tmp_path / "two") == []
    assert runlog.until(tmp_path / "two") == b"".join(lines[:2]).decode()


@pytest.mark.parametrize(
    "change", [lambda line: line[:-2], lambda line: line.replace(b'"run"', b'"rum"'), lambda _: b"\n"]
)
def test_a_broken_chain_is_named_and_not_continued(tmp_path: Path, change) -> None:
    folder = made(tmp_path)
    made(tmp_path, "two")
    path = tmp_path / "LOG.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + change(second))
    before = path.read_bytes()
    assert runlog.problems(folder) == ["LOG.jsonl: line 2 breaks the chain"]
    with pytest.raises(ValueError, match="line 2 breaks the chain; bring back a copy"):
        runlog.enter(folder, "SHA256SUMS", "0" * 64)
    assert path.read_bytes() == before


def test_a_run_that_was_never_entered_and_a_log_that_is_gone(tmp_path: Path) -> None:
    folder = made(tmp_path)
    runs.write_text(tmp_path / "two/SHA256SUMS", "")
    assert runlog.problems(tmp_path / "two") == ["LOG.jsonl: the last seal entered for two is another"]
    (tmp_path / "LOG.jsonl").unlink()
    assert runlog.problems(folder)[0].startswith("LOG.jsonl: missing") and runlog.sealed(folder) == ""


def _write(folder: Path, count: int) -> None:
    for n in range(count):
        runlog.enter(folder, "SHA256SUMS", f"{n:064d}")


def test_processes_that_write_at_once_lose_no_line(tmp_path: Path) -> None:
    writers = [multiprocessing.Process(target=_write, args=(tmp_path / name, 10)) for name in ("a", "b", "c")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(runlog.entries(tmp_path)) == 30
