"""What `telemetry.report_to` sends, read back from what each receiver keeps on the disk, where that is installed.

`pip install mlflow trackio wandb`, as the workflow `slow` does; TensorBoard, which the lock has, is tested with the
launches of `test_training`.
"""

import json
import sqlite3
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from optional import missing

from stackpkg import params, runs
from stackpkg.telemetry import rows
from stackpkg.training import launch, tiny

STEPS = 4


def profile(receiver: str) -> params.Params:
    p = tiny.profile("stackpkg", {"processes": 1, "fsdp": 1}, 2, accumulation=1, epoch_steps=STEPS)
    values: dict[str, Any] = {"curriculum": [{"steps": STEPS, "context": 64, "long_range": 0.25}]}
    return params.validate(p.model_dump(mode="json") | values | {"telemetry": {"report_to": [receiver], "budget": 1.0}})


def mlflow(place: Path) -> list[tuple[int, float]]:
    with sqlite3.connect(place / "mlflow.db") as base:
        return base.execute("SELECT step, value FROM metrics WHERE key = 'loss'").fetchall()


def trackio(place: Path) -> list[tuple[int, float]]:
    found = []
    for path in (place / "trackio").glob("*.db"):
        with sqlite3.connect(path) as base:
            told = [(step, json.loads(text)) for step, text in base.execute("SELECT step, metrics FROM metrics")]
        found += [(row.get("train/global_step", step), row["train/loss"]) for step, row in told if "train/loss" in row]
    return found


def records(data: bytes) -> Iterator[bytes]:
    """What W&B's file holds: LevelDB's log format, behind a header of seven bytes. Blocks of 32 KiB; each part has a
    checksum, its length and whether it is the whole (1) or the first, a middle or the last (2, 3, 4) of a record."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := 32_768 - at % 32_768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):
            yield whole
            whole = b""


def wandb(place: Path) -> list[tuple[int, float]]:
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for data in (data for path in place.rglob("*.wandb") for data in records(path.read_bytes())):
        record = Record()
        record.ParseFromString(data)
        row = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if "train/loss" in row:
            found.append((int(row["train/global_step"]), float(row["train/loss"])))
    return found


@pytest.mark.parametrize("read", [mlflow, trackio, wandb], ids=lambda read: read.__name__)
def test_a_receiver_keeps_the_loss_of_each_step_below_the_run(
    repository: Path, read: Callable[[Path], list[tuple[int, float]]]
) -> None:
    name = read.__name__
    if missing(name):
        pytest.skip(f"{name} is not installed")
    folder = runs.RunFolder(f"told-{name}")
    tiny.prepare(folder.path, profile(name))
    launch.launch("job", profile(name), folder, steps=STEPS, quiet=True)
    table = rows.read(folder.path / "telemetry/job").set_index("step")
    found = read(folder.path / "telemetry/job.reports")
    assert sorted(step for step, _ in found) == list(range(1, STEPS + 1))
    assert dict(found) == pytest.approx(table.loss.to_dict(), rel=1e-6)
    assert not (folder.path / "wandb").exists() and not (repository / "mlruns").exists(), "nothing lies elsewhere"
