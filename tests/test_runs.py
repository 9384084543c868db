"""Files appear whole or not at all, evidence keeps non-finite numbers, digests see every change."""

import getpass
import json
import math
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackpkg import runs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> runs.RunFolder:
    monkeypatch.setattr(runs, "root", lambda: tmp_path)
    return runs.RunFolder("demo")


# --- replacing


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = runs.write_text(tmp_path / "a.json", "old")

    def half_written() -> None:
        with runs.replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half_written()
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("a.json", "old")]


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = runs.write_text(tmp_path / "a.json", "old")
    with runs.replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent and temporary.name.startswith(".")
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("a.json", "new")]


def test_a_reader_that_has_the_old_file_open_keeps_it(tmp_path: Path) -> None:
    path = runs.write_text(tmp_path / "a.json", "old")
    with path.open() as reader:
        runs.write_text(path, "new and longer")
        assert reader.read() == "old"


def test_folders_are_made_and_the_file_is_readable_by_others(tmp_path: Path) -> None:
    path = runs.write_text(tmp_path / "one/two/a.txt", "é")
    assert path.read_bytes() == "é".encode()
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_hidden_temporary_file_is_never_an_input(folder: runs.RunFolder) -> None:
    with runs.replacing(folder / "data/a.json") as temporary:
        temporary.write_text("{}")
        assert folder.matches("data/*") == [] and folder.matches("*") == [folder.path / "data"]


# --- JSON

NUMBERS = st.recursive(
    st.floats() | st.integers() | st.booleans() | st.none() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def expected(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: expected(item) for key, item in value.items()}
    return [expected(item) for item in value] if isinstance(value, list) else value


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@given(value=NUMBERS)
def test_json_is_strict_and_loses_nothing(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = runs.write_json(tmp_path_factory.getbasetemp() / "strict.json", value)
    read = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert read == expected(value) == runs.read_json(path)


def test_json_of_numpy_numbers_is_numbers(tmp_path: Path) -> None:
    """A number that turned into text would make a checklist item red."""
    value = {"a": np.float64("nan"), "b": np.float64(0.5), "c": (np.float64("-inf"), 1)}
    assert runs.read_json(runs.write_json(tmp_path / "a.json", value)) == {"a": "NaN", "b": 0.5, "c": ["-Infinity", 1]}
    numbers = {"a": np.int64(3), "b": np.float32(0.5), "c": np.bool_(True), "d": np.float32("nan")}
    read = runs.read_json(runs.write_json(tmp_path / "b.json", numbers))
    assert read == {"a": 3, "b": 0.5, "c": True, "d": "NaN"}
    with pytest.raises(ValueError, match="size 1"):
        runs.write_json(tmp_path / "b.json", {"a": np.zeros(2)})
    assert runs.read_json(tmp_path / "b.json") == read


def test_the_same_value_gives_the_same_bytes(tmp_path: Path) -> None:
    one = runs.write_json(tmp_path / "one.json", {"b": 1, "a": {"d": [1], "c": 2}})
    two = runs.write_json(tmp_path / "two.json", {"a": {"c": 2, "d": [1]}, "b": 1})
    assert one.read_bytes() == two.read_bytes()


# --- digests


def test_a_file_has_the_digest_coreutils_give(tmp_path: Path) -> None:
    path = runs.write_text(tmp_path / "a", "content")
    done = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
    assert runs.digest(path) == done.stdout.split()[0]


def test_a_folder_s_digest_sees_every_name_and_byte(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("a.bin", "b/c.bin", "b/d.bin", ".hidden"):
        runs.write_text(tree / name, name)
    copy = Path(shutil.copytree(tree, tmp_path / "elsewhere"))
    seen = [runs.digest(tree)]
    assert runs.digest(copy) == seen[0], "the place of the folder must not count"
    for change in (
        lambda: runs.write_text(tree / "b/c.bin", "b/c.biN"),
        lambda: (tree / "a.bin").rename(tree / "e.bin"),
        lambda: (tree / "b").rename(tree / "c"),
        lambda: (tree / "c").rename(tree / "f"),
        lambda: runs.write_text(tree / "new", ""),
        lambda: (tree / ".hidden").unlink(),
    ):
        change()
        seen.append(runs.digest(tree))
    one, two = (tree / "f/c.bin").read_text(), (tree / "f/d.bin").read_text()
    runs.write_text(tree / "f/c.bin", two)
    runs.write_text(tree / "f/d.bin", one)
    seen.append(runs.digest(tree))
    assert len(set(seen)) == len(seen), "a change left the digest as it was"


# --- inputs and outputs


def test_inputs_shows_files_and_folders_with_their_digests(folder: runs.RunFolder) -> None:
    runs.write_text(folder / "data/b.json", "12345")
    runs.write_text(folder / "data/a.json", "1" * 1234)
    runs.write_text(folder / "data/shards/x.bin", "12")
    runs.write_text(folder / "data/shards/deep/y.bin", "3")
    table = folder.inputs("data/*.json", "data/shards")
    assert table["path"].tolist() == ["data/a.json", "data/b.json", "data/shards"]
    assert table["bytes"].tolist() == ["1,234", "5", "3"] and table["files"].tolist() == [1, 1, 2]
    assert table["sha256"].tolist() == [runs.digest(folder.path / name)[:16] for name in table["path"]]
    assert table.equals(folder.outputs("data/*.json", "data/shards"))


def test_a_missing_input_says_which_and_what_to_do(folder: runs.RunFolder) -> None:
    runs.write_text(folder / "data/a.json", "1")
    with pytest.raises(FileNotFoundError, match=r"^outbox/demo/data/\*\.bin is missing: run the notebook that makes"):
        folder.inputs("data/a.json", "data/*.bin")
    with pytest.raises(FileNotFoundError, match=r"^outbox/demo/data/b\.json was not written by this notebook"):
        folder.outputs("data/b.json")


def test_executed_copies_are_read_where_the_runner_kept_them_and_missed_by_nobody(folder: runs.RunFolder) -> None:
    runs.write_text(folder / "data/a.json", "1")
    assert folder.inputs("nb/[0-5]*.ipynb", "data/a.json")["path"].tolist() == ["data/a.json"]
    runs.write_text(folder / "nb/10_x.ipynb", "{}")
    assert folder.inputs("nb/[0-5]*.ipynb", "data/a.json")["path"].tolist() == ["nb/10_x.ipynb", "data/a.json"]


def test_evidence_is_read_back(folder: runs.RunFolder) -> None:
    folder.record("10_x", documents=3, share=float("nan"))
    assert folder.evidence("10_x") == {"documents": 3, "share": "NaN"}
    assert folder.matches("evidence/*") == [folder.path / "evidence/10_x.json"]


# --- environment


def test_the_environment_tells_two_runs_apart_and_nobody_s_name() -> None:
    known = runs.environment()
    text = json.dumps(known)
    words = re.split(r"[^\w.-]+", text)
    assert getpass.getuser() not in words and socket.gethostname() not in words
    assert str(Path.home()) not in text and str(runs.root()) not in text
    assert "/" not in text and "@" not in text
    assert known["packages"]["torch"].startswith("2.13") and known["cores"] == os.cpu_count()
    assert known["lock_sha256"] == runs.digest(runs.root() / "requirements.lock.txt")


def test_the_environment_of_a_folder_that_is_no_checkout(folder: runs.RunFolder) -> None:
    known = runs.environment()
    assert (known["git_commit"], known["git_dirty"], known["lock_sha256"]) == ("", False, "")


def test_the_chain_ticks_what_is_done_and_names_what_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "root", lambda: tmp_path)
    for name in ("10_make", "20_use", "30_end"):
        runs.write_text(tmp_path / f"notebooks/{name}.ipynb", "{}")
    runs.RunFolder("lab").record("10_make", documents=3)
    said = runs.chain("lab", "30_end")
    assert '<a href="10_make.ipynb">10_make \N{CHECK MARK}</a>' in said and "<b>30_end</b>" in said
    assert said.endswith("<br>due before this one: 20_use</p>") and said.count("\N{CHECK MARK}") == 1
    assert "due" not in runs.chain("lab", "20_use") and "due" not in runs.chain("lab", "some other notebook")
