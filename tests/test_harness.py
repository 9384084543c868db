"""lm-evaluation-harness on a small model, with a task that lies in a folder; the harness itself is an extra."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from data_corpus import corpus
from optional import missing
from tiny_models import STACK
from typer.testing import CliRunner

from stackpkg import cli, params, runs
from stackpkg.data.corpus import Corpus
from stackpkg.evaluation import harness
from stackpkg.model import build
from stackpkg.runs import read_json, write_json

TASK = """task: which_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    rows = [
        {"question": f"alpha{k} beta", "choices": ["gamma1", "zz zz zz zz zz zz zz"], "answer": 0} for k in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "which_word.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> runs.RunFolder:
    """A run whose promoted version is a small model, untrained."""
    monkeypatch.setattr(runs, "root", lambda: tmp_path)
    monkeypatch.setattr(cli, "root", lambda: tmp_path)
    folder = runs.RunFolder("lab")
    (folder.path / "data").symlink_to(corpus())
    about = Corpus(corpus()).manifest
    model = build(params.Model(config=STACK), about["vocab_size"], about["pad_id"], 3)
    model.save_pretrained(folder / "artifacts/v1")
    write_json(folder / "artifacts/registry.json", {"current": "v1", "history": []})
    return folder


def test_tasks_are_named_by_their_files(tasks: Path, tmp_path: Path) -> None:
    assert harness.tasks_in(tasks) == harness.tasks_in(tasks / "which_word.yaml")
    assert harness.tasks_in(tasks) == {"which_word": tasks / "which_word.yaml"}
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "empty", tmp_path / "missing.yaml", tmp_path / "rows.jsonl"):
        with pytest.raises(ValueError, match="has no task of the harness: give a YAML file"):
            harness.tasks_in(nothing)


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="the extra is installed")
def test_without_the_extra_it_says_what_to_install(run: runs.RunFolder, tasks: Path) -> None:
    said = CliRunner().invoke(cli.app, ["lm-eval", str(run.path), "--tasks", str(tasks)])
    assert said.exit_code == 1 and "pip install 'stackpkg[lm-eval]'" in said.output


def test_a_run_without_a_promoted_version_is_refused(run: runs.RunFolder, tasks: Path) -> None:
    write_json(run / "artifacts/registry.json", {"current": None, "history": []})
    said = CliRunner().invoke(cli.app, ["lm-eval", str(run.path), "--tasks", str(tasks)])
    assert said.exit_code == 1 and "nothing of" in said.output


@pytest.mark.skipif(missing("lm_eval"), reason="lm-evaluation-harness is an extra")
def test_a_local_task_is_measured_on_the_promoted_version(run: runs.RunFolder, tasks: Path) -> None:
    arguments = ["lm-eval", str(run.path), "--tasks", str(tasks)]
    said = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert said.exit_code == 0 and "which_word  acc,none 1" in said.stdout, said.output
    found = read_json(run.path / "eval/lm_eval.json")
    assert found["version"] == "v1" and found["model_sha256"] == runs.digest(run.path / "artifacts/v1")
    # nearly uniform: fourteen tokens are less likely than two
    assert found["results"]["which_word"]["acc,none"] == 1.0
    assert found["results"]["which_word"]["sha256"] == runs.digest(tasks / "which_word.yaml")
