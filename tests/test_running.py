"""Whether a job runs is told by a lock; what may not be done to one that runs is refused, with the way on."""

import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stackpkg.cli import app
from stackpkg.runs import RunFolder, read_json, write_json
from stackpkg.training import drills, launch, running, snapshots, stop, tiny


@pytest.fixture
def home(repository: Path, request: pytest.FixtureRequest) -> Path:
    path = RunFolder(f"lab-{abs(hash(request.node.name))}").path / "checkpoints/train"
    write_json(path / "job.json", {})
    return path


def test_a_lock_tells_and_goes_with_its_process(home: Path) -> None:
    assert running.runs(home) == ""
    with running.hold(home), running.hold(home):
        assert running.runs(home) == f"train runs (process {os.getpid()} on {platform.node()})"
    assert running.runs(home) == ""
    code = f"from pathlib import Path; from stackpkg.training import running; h = running.hold(Path({str(home)!r}));"
    child = subprocess.Popen([sys.executable, "-c", f"{code} print(1, flush=True); input()"], stdin=-1, stdout=-1)
    assert child.stdout and child.stdout.readline() and f"process {child.pid}" in running.runs(home)
    child.kill()
    child.wait()
    assert running.runs(home) == "", "the kernel frees it"


def test_no_job_begins_while_one_is_changed(home: Path) -> None:
    begun = threading.Event()

    def begin() -> None:
        with running.hold(home):
            begun.set()

    with running.idle(home):
        launched = threading.Thread(target=begin)
        launched.start()
        assert not begun.wait(0.3)
    launched.join(5)
    assert begun.is_set()


def test_a_row_of_another_machine_tells_until_it_is_old(home: Path) -> None:
    with running.hold(home) as lock:
        lock.truncate(0)
        lock.write("node7 12")
    rows = home.parents[1] / "telemetry/train/rank-00000.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text("{}\n")
    assert "train runs: node7 wrote a row" in running.runs(home)
    for ended in ({"attempts.json": [{"stopped": {"step": 3}}]}, {"attempts.json": [{}], "done.json": {}}):
        for name, told in ended.items():
            write_json(home / name, told)
        assert running.runs(home) == "", "a job that has ended goes on elsewhere at once"
    (home / "done.json").unlink()
    assert "node7 wrote a row" in running.runs(home)
    os.utime(rows, (0, time.time() - running.SILENT - 1))
    assert running.runs(home) == ""


def test_what_the_scheduler_still_has_runs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(home / "job.json", {"params": {"run": home.parents[1].name, "cluster": {"scheduler": "slurm"}}})
    monkeypatch.setattr(running.clusters, "alive", lambda p, name: "-train-" in name)
    assert "slurm has it, as stackpkg-lab" in running.runs(home)
    monkeypatch.undo()
    if not shutil.which("squeue"):
        code, said = typed("rollback", str(home.parents[1]), "--step", "0")
        assert code == 1 and "squeue is not on the path" in said, "nobody knows whether it runs"
        assert "whether it runs is not known: squeue" in typed("job", str(home.parents[1]))[1]


def test_a_job_whose_scheduler_cannot_be_asked_is_not_launched_here(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(home / "job.json", {"params": {"run": home.parents[1].name, "cluster": {"scheduler": "slurm"}}})
    monkeypatch.setenv("PATH", "/nowhere")
    running.await_end(home)  # it was described and never submitted
    write_json(home / "submitted.json", {"scheduler": "slurm", "id": "71"})
    way = r"squeue is not on the path.*if it has ended, remove checkpoints/train/submitted\.json"
    with pytest.raises(ValueError, match=way):
        running.await_end(home)


def typed(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(words))
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def job(repository: Path) -> Iterator[Path]:
    """The folder of a real job that steps, until the tests have ended it."""
    folder, p = RunFolder("running"), drills.profile(drills.Drill("", ()), 1)
    tiny.prepare(folder.path, p)
    home, ended = folder.path / "checkpoints/train", list[str]()

    def go() -> None:
        try:
            launch.launch("train", p, folder, steps=drills.STEPS, faults=[{"kind": "hang", "step": 9}], quiet=True)
        except stop.Stopped as error:
            ended.append(str(error))
        except RuntimeError as error:
            ended.append(str(error))

    launched = threading.Thread(target=go, daemon=True)
    launched.start()
    while not (home / "checkpoint-8").exists():
        assert launched.is_alive(), ended
        time.sleep(0.05)
    yield home
    stop.kill(home, "the tests are over")
    launched.join(60)
    assert ended and not launched.is_alive()


def test_a_running_job_is_not_rolled_back_and_says_what_to_do(job: Path) -> None:
    run, decided = str(job.parents[1]), (job / "decisions.jsonl").read_bytes()
    for words in (("rollback", run, "--step", "4"), ("skip", run, "--step", "8", "--steps", "2")):
        code, said = typed(*words)
        assert (
            code == 1 and "train runs (process " in said and "nothing was changed. End it first: stackpkg halt " in said
        ), said
    assert (job / "decisions.jsonl").read_bytes() == decided and not [*job.glob("*.aside*")], "something was changed"
    code, said = typed("halt", run, "--now", "--wait", "--reason", "it hangs")
    assert code == 0 and "nothing of it runs" in said, said
    code, said = typed("rollback", run, "--step", "4")
    assert code == 0 and "goes on from checkpoint-4" in said and max(snapshots.listed(job)) == 4, said


def test_a_stop_file_that_nobody_obeyed_does_not_wait_for_the_next_launch(home: Path) -> None:
    code, said = typed("halt", str(home.parents[1]), "--reason", "maintenance", "--wait")
    assert code == 0 and "nothing of it runs" in said and "is removed" in said, said
    assert not (home / stop.FILE).exists() and read_json(home / "job.json") == {}
