"""What the exporter serves is what the files of a job say; it listens on loopback alone, and outlives the trainer."""

import json
import math
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from stackpkg.runs import RunFolder, read_json, write_json
from stackpkg.telemetry import exporter
from stackpkg.telemetry.rows import RowWriter


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_json(tmp_path / "run/checkpoints/train/job.json", {})
    return tmp_path / "run"


def told(job: exporter.Job) -> dict[str, float]:
    return {family.name: family.samples[0].value for family in job.collect()}


def scraped(run: Path, job: str) -> dict[str, tuple[dict[str, str], float]]:
    (group,) = read_json(exporter.target(run, job))
    text = urllib.request.urlopen(f"http://{group['targets'][0]}/metrics", timeout=5).read().decode()
    samples = (family.samples[0] for family in text_string_to_metric_families(text))
    return {sample.name: (sample.labels, sample.value) for sample in samples}


def test_the_last_row_of_rank_0_is_served_with_numbers_only_and_nan_kept(run: Path) -> None:
    zero, one = (RowWriter(run / "telemetry/train", "run", 2, rank, 2) for rank in (0, 1))
    job = exporter.Job(run, "train")
    assert "train_loss" not in told(job)
    zero.write(1, loss=3.0, precision_at_k=0.5, shards=["a"], entropy=None)
    zero.write(2, loss=math.nan, update_skipped=1)
    one.write(2, loss=7.0)
    zero.flush(), one.flush()
    found = told(job)
    assert math.isnan(found["train_loss"]) and found["train_update_skipped"] == 1
    assert (found["train_step"], found["train_attempt"]) == (2, 2)
    assert found["train_precision_at_k"] == 0.5, "a series that is not in every row keeps its last value"
    assert found["train_max_loss"] == found["train_min_loss"] == 3.0
    assert not {"train_shards", "train_entropy", "train_rank", "train_time", "train_run"} & found.keys()
    assert abs(found["train_heartbeat_time"] - time.time()) < 5


def test_values_of_layers_and_experts_are_served_apart_until_they_are_measured_again(run: Path) -> None:
    writer, job = RowWriter(run / "telemetry/train", "run", 1, 0, 1), exporter.Job(run, "train")
    writer.write(1, loss=3.0, router_usage=[[0.25, 0.75], [0.5, 0.5]], router_entropy_layers=[0.8, math.nan])
    writer.write(2, loss=2.0)
    writer.flush()
    found = {family.name: family.samples for family in job.collect()}
    usage = {(each.labels["layer"], each.labels["expert"]): each.value for each in found["train_router_usage"]}
    assert usage == {("0", "0"): 0.25, ("0", "1"): 0.75, ("1", "0"): 0.5, ("1", "1"): 0.5}
    assert {each.labels["job"] for each in found["train_router_usage"]} == {"train"}
    first, second = found["train_router_entropy_layers"]
    assert first.value == 0.8 and math.isnan(second.value) and set(first.labels) == {"run", "job", "layer"}


def test_lines_are_read_once_whole_and_a_torn_one_is_passed_over(run: Path) -> None:
    path = run / "telemetry/train/rank-00000.jsonl"
    path.parent.mkdir(parents=True)
    row = {"run": "run", "attempt": 1, "rank": 0, "ranks": 1, "step": 1, "time": time.time(), "loss": 1.0}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"step": 2, "loss": 2.0})[:-9])
    follow = exporter.Rows(path.parent)
    assert [each["step"] for each in follow.added()] == [1]
    with path.open("a") as stream:
        stream.write("\n" + json.dumps(row | {"step": 3}) + "\n")
    assert [each["step"] for each in follow.added()] == [3] and follow.added() == []
    path.write_text(json.dumps(row | {"step": 9}) + "\n")  # another job began
    assert [each["step"] for each in follow.added()] == [9]


def test_extremes_cover_a_minute_of_rows(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, job, clock = RowWriter(run / "telemetry/train", "run", 1, 0, 1), exporter.Job(run, "train"), time.time()
    for step, loss in enumerate((9.0, 1.0, 2.0)):
        monkeypatch.setattr(time, "time", lambda step=step: clock + 40 * step)
        writer.write(step, loss=loss)
    writer.flush()
    found = told(job)
    assert (found["train_loss"], found["train_max_loss"], found["train_min_loss"]) == (2.0, 2.0, 1.0)


def test_ranks_are_compared_at_a_step_that_all_have(run: Path) -> None:
    zero, one = (RowWriter(run / "telemetry/train", "run", 1, rank, 2) for rank in (0, 1))
    job = exporter.Job(run, "train")
    for step in (1, 2):
        zero.write(step, loss=2.0 * step, grad_norm=1.0, weight_norm=5.0)
    one.write(1, loss=2.0, grad_norm=1.0, weight_norm=5.0)
    zero.flush(), one.flush()
    assert told(job)["train_rank_divergence"] == 0  # not 4.0 of one step against 2.0 of another
    one.write(2, loss=4.0, grad_norm=1.0, weight_norm=4.0)
    one.flush()
    assert told(job)["train_rank_divergence"] == pytest.approx(0.2)


def test_the_age_of_a_checkpoint_is_that_of_the_newest_whole_one(run: Path) -> None:
    job, home = exporter.Job(run, "train"), run / "checkpoints/train"
    launched = (home / "job.json").stat().st_mtime
    assert told(job)["train_checkpoint_time"] == told(job)["train_heartbeat_time"] == launched
    (home / "checkpoint-8").mkdir()
    assert told(job)["train_checkpoint_time"] == launched
    write_json(home / "checkpoint-4/complete.json", {})
    assert told(job)["train_checkpoint_time"] == (home / "checkpoint-4/complete.json").stat().st_mtime > launched


def test_a_flipped_bit_of_the_corpus_is_found_and_rests_are_paid_for(run: Path) -> None:
    from data_corpus import conversing

    conversing(run)
    job = exporter.Job(run, "train")
    assert exporter.REST <= job.look() < 60 and told(job)["train_shards_corrupt"] == 0
    shard = max((run / "data/shards").glob("*.bin"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(bytes(content))
    job.look()
    assert told(job)["train_shards_corrupt"] == 1
    (run / "data/manifest.json").write_text("{}")
    job.look()
    assert told(job)["train_shards_corrupt"] == 1


def test_the_process_listens_on_loopback_alone_and_labels_what_it_serves(run: Path) -> None:
    command = [sys.executable, "-m", "stackpkg.telemetry.exporter", str(run), "train"]
    child = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 30
        while not exporter.target(run, "train").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        writer = RowWriter(run / "telemetry/train", "run", 1, 0, 1)
        writer.write(1, loss=2.5)
        writer.flush()
        found = scraped(run, "train")
        assert found["train_loss"] == ({"run": "run", "job": "train"}, 2.5)
        assert found["train_disk_free_bytes"][1] > 0
        (group,) = read_json(exporter.target(run, "train"))
        assert group["labels"] == {"run": "run", "job": "train"}
        port = int(group["targets"][0].rpartition(":")[2])
        listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
        assert {row[1] for row in listening if row[1].endswith(f":{port:04X}") and row[3] == "0A"} == {
            f"0100007F:{port:04X}"
        }
        with pytest.raises(OSError):
            socket.create_connection((socket.gethostbyname(socket.gethostname()), port), timeout=2).close()
            if socket.gethostbyname(socket.gethostname()).startswith("127."):
                raise OSError("this machine has no other address to try")
    finally:
        child.kill()
        child.wait()


def test_a_run_folder_names_its_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("stackpkg.runs.root", lambda: tmp_path)
    assert exporter.target(RunFolder("lab").path, "train") == tmp_path / "outbox/.targets/lab.train.json"
