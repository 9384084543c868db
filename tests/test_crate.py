"""A run described to machines that know nothing of this program, and the ways in which that may be wrong."""

import json
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from governed_run import home, run_in
from rocrate.rocrate import ROCrate

from stackpkg import runs
from stackpkg.governance import crate, crosswalk
from stackpkg.pipeline import Stage

ROOT = Path(__file__).parents[1]
ABOUT = {"licence": ["MIT"], "version": "v1"}


@pytest.fixture
def folder(tmp_path: Path) -> runs.RunFolder:
    made, _ = run_in(home(tmp_path))
    runs.write_text(made / "governance/model_card.md", "card")
    runs.write_text(made / "artifacts/v1/model.safetensors", "weights")
    crate.write(made, ABOUT)
    return made


def test_the_library_reads_what_was_written(folder: runs.RunFolder) -> None:
    assert crate.problems(folder.path) == []
    read = ROCrate(folder.path)
    (action,) = read.get_by_type("CreateAction")
    assert (
        action["instrument"].id == "nb/10_curate_corpus.ipynb"
        and action["endTime"] == "2026-11-29T08:00:03.500000+00:00"
    )
    assert [each.id for each in action["object"]] == ["evidence/40_evaluate.json"]
    assert [each.id for each in action["result"]] == ["data/records/"]
    assert read.get("artifacts/v1/")["subjectOf"].id == "governance/model_card.md"
    assert read.get("data/audit.parquet")["sha256"] == runs.digest(folder / "data/audit.parquet")
    assert read.root_dataset["license"]["name"].endswith("MIT")
    assert str(folder.path.parent) not in (folder.path / crate.NAME).read_text()


def changed(folder: runs.RunFolder, change: Callable[[dict[str, Any]], object]) -> list[str]:
    path = folder.path / crate.NAME
    found = json.loads(path.read_text())
    change({entity["@id"]: entity for entity in found["@graph"]})
    runs.write_json(path, found)
    return crate.problems(folder.path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda g: g["./"].pop("license"), "./: no license"),
        (lambda g: g["./"].pop("datePublished"), "./: no datePublished"),
        (lambda g: g["./"].update(nonsense=1), "./: nonsense is no term of RO-Crate"),
        (lambda g: g["#10_curate_corpus"].pop("instrument"), "an action without instrument"),
        (lambda g: g["#10_curate_corpus"].update(result={"@id": "none"}), "none is not in the crate"),
        (lambda g: g["data/audit.parquet"].update(sha256="0" * 64), "data/audit.parquet: has another SHA-256"),
    ],
)
def test_what_is_wrong_is_said(folder: runs.RunFolder, change: Callable[[dict[str, Any]], object], said: str) -> None:
    assert any(said in problem for problem in changed(folder, change)), changed(folder, lambda graph: None)


def test_a_file_that_changed_or_went_is_named(folder: runs.RunFolder) -> None:
    runs.write_text(folder / "governance/model_card.md", "another")
    (folder / "data/audit.parquet").unlink()
    gone, other = crate.problems(folder.path)
    assert gone == "data/audit.parquet: is not there"
    assert other == "governance/model_card.md: has another SHA-256 than the crate says"


def test_what_is_no_crate_is_said(folder: runs.RunFolder) -> None:
    runs.write_text(folder.path / crate.NAME, "{}")
    (said,) = crate.problems(folder.path)
    assert "the library does not read it" in said


def test_the_notebook_runs_again_when_a_file_it_names_changes() -> None:
    """Else a digest in the crosswalk or the crate would be one of yesterday. The profile is written by the runner,
    which watches every parameter itself, and a line of the history with each version, which is watched."""
    stage = Stage.read(ROOT / "notebooks/60_archive_governance.ipynb")
    watched = [*stage.inputs, *stage.outputs]
    named = [glob for each in crosswalk.definitions() for glob in each.evidence] + [*crate.PARTS]
    by_kind = {"data/*.*", "governance/*"}  # below
    for pattern in {*named} - by_kind - {"config/params.yaml", "data/history.jsonl"}:
        near = (pattern, pattern.partition("/")[0])
        assert pattern in watched or any(fnmatch(one, glob) for one in near for glob in watched), pattern
    kinds = ("json", "parquet", "csv", "html", "yaml", "jsonld")
    assert {f"data/*.{kind}" for kind in kinds} <= {*watched}
