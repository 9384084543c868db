"""What a person types when a run needs help: a shard that broke, a job to stop or set back, the logbook."""

import json
import re
from pathlib import Path

import pytest
from data_corpus import conversing
from typer.testing import CliRunner, Result

from stackpkg.cli import app
from stackpkg.data import manifest, provenance
from stackpkg.runs import RunFolder, write_json
from stackpkg.telemetry import logbook
from stackpkg.telemetry.rows import RowWriter


def typed(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


@pytest.fixture
def run(repository: Path, request: pytest.FixtureRequest) -> Path:
    """A run whose corpus is there, and a job."""
    folder = RunFolder(f"lab-{abs(hash(request.node.name))}").path
    conversing(folder)
    write_json(folder / "checkpoints/train/job.json", {})
    return folder


def broken(run: Path) -> str:
    """Flips a bit of the largest shard; its name."""
    shard = max((run / "data/shards").glob("*.bin"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(bytes(content))
    return shard.stem


def test_a_broken_shard_is_named_set_aside_and_made_again(run: Path) -> None:
    assert typed("shards", str(run)).exit_code == 0
    name = broken(run)
    looked = typed("shards", str(run))
    assert (
        looked.exit_code == 1 and f"shards/{name}.bin: corrupt" in looked.output and "would not begin" in looked.output
    )
    assert manifest.damaged(run / "data", name), "the damage is in a block"
    mended = typed("shards", str(run), "--mend")
    assert mended.exit_code == 0 and "made again, the same bytes" in mended.output, mended.output
    assert [path.name.split(".")[0] for path in (run / "data/quarantine").iterdir()] == [name], "never deleted"
    assert manifest.verify(run / "data") == []


def test_a_shard_can_be_skipped_instead_and_then_nothing_reads_it(run: Path) -> None:
    name = broken(run)
    done = typed("shards", str(run), "--skip", name, "--reason", "source is gone")
    assert done.exit_code == 0 and "records withdrawn" in done.output, done.output
    assert provenance.passed_over(run / "data") == {f"shards/{name}.bin"}
    manifest.check(run / "data", spared=provenance.passed_over(run / "data"))
    with pytest.raises(ValueError, match="corrupt or missing"):
        manifest.check(run / "data", blocks=10_000)
    kept = [json.loads(line) for line in (run / "data/withdrawn.jsonl").read_text().splitlines()]
    assert {each["reason"] for each in kept} == {"source is gone"}


def test_an_unknown_shard_is_answered_with_those_there_are(run: Path) -> None:
    with pytest.raises(ValueError, match=r"shard 'nothing' is none of [0-9a-f]{16}"):
        manifest.damaged(run / "data", "nothing")
    assert "no document is in a shard" in typed("shards", str(run), "--skip", "nothing", "--reason", "x").output


def test_a_job_tells_how_it_stands_and_only_looks(run: Path) -> None:
    writer = RowWriter(run / "telemetry/train", run.name, 1, 0, 1)
    writer.write(3, loss=2.5, router_entropy=0.5)
    writer.flush()
    before = sorted(path for path in run.rglob("*"))
    told = typed("job", str(run))
    assert told.exit_code == 0 and "last row: step 3, attempt 1" in told.output and "not done" in told.output
    asked = json.loads(typed("job", str(run), "--json").stdout)
    assert asked["last_row"]["step"] == 3 and asked["last_row"]["loss"] == 2.5 and asked["done"] is False
    assert asked["alerts"] == [] and asked["runs"] == ""
    shown = typed("rows", str(run), "router_*", "nowhere")
    assert "0.5" in shown.output and "no row has nowhere" in shown.output and "loss" not in shown.output
    assert sorted(path for path in run.rglob("*")) == before


def test_a_job_is_asked_to_end_and_an_unknown_one_is_named(run: Path) -> None:
    assert typed("halt", str(run), "--reason", "maintenance").exit_code == 0
    assert "maintenance" in (run / "checkpoints/train/stop").read_text()
    unknown = typed("halt", str(run), "--reason", "x", "--job", "nothing")
    assert unknown.exit_code == 1 and "no training job 'nothing'" in unknown.output


def test_a_roll_back_sets_aside_and_deletes_nothing(run: Path) -> None:
    home = run / "checkpoints/train"
    for step in (2, 4):
        write_json(home / f"checkpoint-{step}/complete.json", {})
    write_json(home / "done.json", {"steps": 4})
    done = typed("rollback", str(run), "--step", "2")
    assert done.exit_code == 0 and "goes on from checkpoint-2" in done.output
    assert not (home / "checkpoint-4").exists() and not (home / "done.json").exists()
    assert len([path for path in home.rglob("*") if "checkpoint-4" in path.name]) == 1


def test_the_logbook_is_only_added_to(run: Path) -> None:
    alert = {"alert": "TrainLossSpike", "severity": "warning", "series": "loss", "value": 9.5, "threshold": 6,
             "hold": 1, "summary": "the loss is far above its trailing window", "action": "snapshot",
             "runbook": "runbooks/TrainLossSpike.md"}  # fmt: skip
    logbook.fired(run, "train", 7, 1, [alert], "checkpoint-6")
    first = (run / "logbook.md").read_text()
    assert typed("note", str(run), "restarted the node").exit_code == 0
    text = (run / "logbook.md").read_text()
    assert text.startswith(first) and "restarted the node" in text and text.count("# Logbook of") == 1
    assert re.search(r"## \d{4}-\d\d-\d\dT.* TrainLossSpike \(warning\)", text) and "in step 7 of train" in text
    assert "Last checkpoint before it: checkpoint-6" in text and "- Found:" in text
