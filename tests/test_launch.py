"""Launching with real processes and stand-ins for the worker: commands, resuming, failing, and who dies with whom."""

import itertools
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from stackpkg import params
from stackpkg.params import Params
from stackpkg.runs import RunFolder, read_json, write_json, write_text
from stackpkg.training import launch, running

JOB = "outbox/run/checkpoints/train/job.json"
linux = pytest.mark.skipif(sys.platform != "linux", reason="the tether is Linux's")
WORKERS = {
    # the whole job; notes in `seen` how often it was started in this folder
    "finishing": """
        (home / "seen").open("a").write("x")
        (run / "telemetry" / home.name).mkdir(parents=True, exist_ok=True)
        for end in ("alerts.jsonl", "events.jsonl"):
            (run / "telemetry" / f"{home.name}.{end}").open("a").write("{}")
        (run / "telemetry" / f"{home.name}.reports").mkdir(exist_ok=True)
        (run / "telemetry" / f"{home.name}.reports/points").open("a").write("x")
        sys.stdout.buffer.write(b"torn text: \\xe2\\x96")
        print("\\n[job] shown\\nnot shown", flush=True)
        (home / "done.json").write_text(json.dumps({"seen": len((home / "seen").read_text())}))
    """,
    "failing": """
        (home / "seen").open("a").write("x")
        print("\\n".join(f"line {k}." for k in range(50)), flush=True)
        sys.exit(3)
    """,
    "silent": "",
    # says what no log may hold, and writes it into its rows
    "leaking": """
        from stackpkg.telemetry import logbook
        from stackpkg.telemetry.rows import RowWriter
        said = f"[job] asked by anna.smith@firm.de with {os.environ['TRACKER_TOKEN']}, key AKIA{'Q2W3E4R5T6Y7U3I2'}"
        print(said, flush=True)
        rows = RowWriter(run / "telemetry" / home.name, run.name, 1, 0, 1)
        rows.write(1, loss=1.0, note=said)
        rows.flush()
        logbook.add(run, "note", [said])
        sys.stderr.write("RuntimeError: " + said)
        (home / "done.json").write_text("{}")
    """,
    # a rank that hangs, with a child of its own
    "sleeping": """
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        rank = os.environ.get("RANK", "0")
        (home / f".pids-{rank}").write_text(f"{os.getpid()} {child.pid}")
        (home / f".pids-{rank}").rename(home / f"pids-{rank}")
        time.sleep(60)
    """,
}


@pytest.fixture(autouse=True, scope="module")
def workers(repository: Path) -> None:
    for name, body in WORKERS.items():
        head = "import json, os, subprocess, sys, time\nfrom pathlib import Path\n"
        head += "home = Path(sys.argv[1]).parent\nrun = home.parents[1]\n"
        write_text(repository / f"{name}.py", head + textwrap.dedent(body))


@pytest.fixture
def folder(repository: Path, request: pytest.FixtureRequest) -> RunFolder:
    made = RunFolder(re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[-40:].strip("-"))
    for name in ("manifest.json", "pairs.parquet", "long_range.parquet"):
        write_text(made / f"data/{name}", name)
    return made


def profile(timeout_minutes: float = 2.0, **layout: int) -> Params:
    made = {"processes": 1, "fsdp": 1, "timeout_minutes": timeout_minutes} | layout
    return params.validate({"layout": made, "training": {"batch_tokens": 16384}})


def start(worker: str, monkeypatch: pytest.MonkeyPatch, folder: RunFolder, p: Params | None = None, **more) -> dict:
    monkeypatch.setattr(launch, "WORKER", worker)
    return launch.launch("job", p or profile(), folder, **more)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({}, "-m stackpkg.training.worker {JOB}"),
        (
            {"processes": 4, "fsdp": 2, "restarts": 3},
            "-m torch.distributed.run --nnodes=1 --nproc-per-node=4 --max-restarts=3 --standalone "
            "-m stackpkg.training.tether -m stackpkg.training.worker {JOB}",
        ),
        (
            {"processes": 64, "fsdp": 8, "nodes": 8, "restarts": 0},
            "-m torch.distributed.run --nnodes=8 --nproc-per-node=8 --max-restarts=0 "
            "--rdzv-backend=c10d --rdzv-endpoint=$HEAD_NODE:29500 --rdzv-id=run-train "
            "-m stackpkg.training.tether -m stackpkg.training.worker {JOB}",
        ),
    ],
)
def test_the_command_of_a_layout(layout: dict[str, int], expected: str) -> None:
    assert launch.command(JOB, profile(**layout)) == [sys.executable, *expected.format(JOB=JOB).split()]


def test_several_nodes_get_the_command_to_run(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = profile(processes=16, nodes=2)
    with pytest.raises(ValueError, match="2 nodes") as raised:
        start("finishing", monkeypatch, folder, cluster, steps=5)
    job = f"outbox/{folder.name}/checkpoints/job/job.json"
    assert str(raised.value).endswith("python " + " ".join(launch.command(job, cluster)[1:]))
    assert read_json(folder.path / "checkpoints/job/job.json")["steps"] == 5  # what the command reads is there
    assert not (folder.path / "checkpoints/job/log.txt").exists()
    write_json(folder / "checkpoints/job/done.json", {"steps": 5})  # the cluster has run it
    assert start("finishing", monkeypatch, folder, cluster, steps=5) == {"steps": 5}
    with pytest.raises(ValueError, match="2 nodes"):
        start("finishing", monkeypatch, folder, cluster, steps=6)  # that is another job
    assert not (folder.path / "checkpoints/job/done.json").exists()


def test_the_digest_tells_what_the_job_computes(folder: RunFolder) -> None:
    def digest(steps: int = 4, faults: tuple = (), name: str = "job", **layout: int) -> str:
        return launch.describe(name, profile(**layout), folder, steps, faults)["digest"]

    same = digest()
    assert same == digest() == digest(processes=2), "a job goes on in another layout"
    kill = {"kind": "kill", "step": 2, "rank": 0}
    others = [digest(steps=5), digest(faults=(kill,)), digest(name="other")]
    write_text(folder / "data/manifest.json", "other data")
    assert len({same, digest(), *others}) == 5


def test_a_finished_job_starts_fresh_and_the_old_one_is_kept(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, repository: Path, capsys: pytest.CaptureFixture
) -> None:
    write_json(folder / "eval/job/epoch_001.json", {"of": "the first"})
    for _ in range(4):
        assert start("finishing", monkeypatch, folder) == {"seen": 1}  # never in the folder of another job
    said = capsys.readouterr().out.splitlines()
    assert said.count("[job] shown") == 4 and "not shown" not in said
    kept, stray = sorted((repository / "outbox/.previous" / folder.name / "job").iterdir())
    assert stray.name == "unknown" and (stray / "eval/epoch_001.json").exists(), "what no job describes"
    where = f"outbox/.previous/{folder.name}/job/{kept.name}"
    assert said.count(f"[job] what was here moves to {where}; the same job, which has ended") == 3  # the last is kept
    assert "not shown" in (folder.path / "checkpoints/job/log.txt").read_text(encoding="utf-8")
    assert read_json(kept / "checkpoints/done.json") == {"seen": 1}
    beside = ["alerts.jsonl", "events.jsonl", "reports"]
    assert sorted(path.name for path in kept.iterdir()) == sorted([*beside, "checkpoints", "telemetry"])
    told = ("alerts.jsonl", "events.jsonl", "reports/points")  # what the old job told is not this one's
    assert [(folder.path / f"telemetry/job.{end}").read_text() for end in told] == ["{}", "{}", "x"]
    assert not (folder.path / "eval/job").exists()
    write_json(folder / "checkpoints/job/promoted.json", {"4": "v1"})
    for _ in range(3):
        start("finishing", monkeypatch, folder, quiet=True)
    assert len([*kept.parent.glob("*/checkpoints/promoted.json")]) == 1 and len([*kept.parent.iterdir()]) == 3


def test_an_unfinished_job_keeps_its_folder_until_its_description_changes(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError):
            start("failing", monkeypatch, folder, quiet=True)
    assert (folder.path / "checkpoints/job/seen").read_text() == "xx"
    assert start("finishing", monkeypatch, folder, quiet=True) == {"seen": 3}
    with pytest.raises(RuntimeError):
        start("failing", monkeypatch, folder, quiet=True)
    assert start("finishing", monkeypatch, folder, steps=7, quiet=True) == {"seen": 1}
    kept = (repository / "outbox/.previous" / folder.name / "job").glob("*/checkpoints/seen")
    assert sorted(path.read_text() for path in kept) == ["x", "xxx"]


def rate(learning_rate: float) -> Params:
    return profile().model_copy(update={"optimization": params.Optimization(learning_rate=learning_rate)})


def begin(monkeypatch: pytest.MonkeyPatch, folder: RunFolder, p: Params) -> None:
    """A job that breaks off, with a row, a report and a checkpoint of its own."""
    with pytest.raises(RuntimeError):
        start("failing", monkeypatch, folder, p)
    said = str(p.optimization.learning_rate)
    for place in ("checkpoints/job/checkpoint-100/state.pt", "eval/job/epoch_001.json", "telemetry/job/rank-0.jsonl"):
        write_text(folder / place, said)
    write_text(folder / "telemetry/job.alerts.jsonl", said)


def left(folder: RunFolder) -> list[str]:
    """What each part of the run's job was written by."""
    found = [*folder.matches("checkpoints/job/checkpoint-*/*"), *folder.matches("eval/job/*")]
    found += [*folder.matches("telemetry/job/*"), *folder.matches("telemetry/job.*")]
    return [path.read_text() for path in found]


def test_a_typo_and_its_correction_cost_nothing(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, repository: Path, capsys: pytest.CaptureFixture
) -> None:
    begin(monkeypatch, folder, rate(2e-4))
    write_json(folder / "checkpoints/job/promoted.json", {"100": "v1"})
    capsys.readouterr()
    begin(monkeypatch, folder, rate(2e-3))
    kept = repository / "outbox/.previous" / folder.name / "job"
    (first,) = kept.iterdir()
    assert left(folder) == ["0.002"] * 4
    where = f"[job] what was here moves to outbox/.previous/{folder.name}/job"
    told = f"{where}/{first.name}; another job: optimization.learning_rate"
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("[job]")] == [told]
    with pytest.raises(RuntimeError):
        start("failing", monkeypatch, folder, rate(2e-4))
    assert left(folder) == ["0.0002"] * 4, "checkpoints, reports, rows and alerts come back together"
    home = folder.path / "checkpoints/job"
    assert (home / "promoted.json").exists() and (home / "seen").read_text() == "xx", "it goes on where it was"
    (other,) = kept.iterdir()
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("[job]")] == [
        f"{where}/{other.name}; another job: optimization.learning_rate",
        f"[job] goes on with the checkpoints and rows of {where.partition('to ')[2]}/{first.name}, the same job",
    ]
    for learning_rate in (2e-3, 2e-4, 5e-4, 2e-4):
        with pytest.raises(RuntimeError):
            start("failing", monkeypatch, folder, rate(learning_rate), quiet=True)
    assert left(folder) == ["0.0002"] * 4 and len([*kept.iterdir()]) == 2


@pytest.mark.parametrize("moves", range(8))  # four parts leave, four return
@pytest.mark.parametrize("again", [2e-4, 2e-3, 5e-4])
def test_a_move_that_was_broken_off_tears_no_job(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, moves: int, again: float
) -> None:
    """Killed after some moves, while one job makes room for another that was set aside; then either, or a third."""
    rename, made = Path.rename, itertools.count()

    def killed(path: Path, target: Path) -> Path:
        if next(made) == moves:
            raise KeyboardInterrupt
        return rename(path, target)

    begin(monkeypatch, folder, rate(2e-4))
    begin(monkeypatch, folder, rate(2e-3))
    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        start("failing", monkeypatch, folder, rate(2e-4))
    monkeypatch.setattr(Path, "rename", rename)
    for learning_rate in (again, 2e-3, 2e-4):
        with pytest.raises(RuntimeError):
            start("failing", monkeypatch, folder, rate(learning_rate), quiet=True)
        assert left(folder) == [str(learning_rate)] * (0 if learning_rate == 5e-4 else 4)


def test_a_parameter_that_is_new_and_at_its_default_makes_no_other_job(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(monkeypatch, folder, profile())
    job = folder.path / "checkpoints/job/job.json"
    spec = read_json(job)
    del spec["params"]["optimization"]["ema_decay"]  # as an earlier version, which had no such thing, described it
    write_json(job, spec | {"digest": "of that version"})
    with pytest.raises(RuntimeError):
        start("failing", monkeypatch, folder, quiet=True)
    assert len(left(folder)) == 4 and read_json(job)["digest"] != "of that version"
    spec["params"]["optimization"]["gone"] = 1
    write_json(job, spec | {"digest": "of that version"})
    with pytest.raises(RuntimeError):
        start("failing", monkeypatch, folder, quiet=True)
    assert not left(folder), "one with a parameter that is gone is another"


def test_a_failing_job_raises_with_the_end_of_its_log(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="exit code 3") as raised:
        start("failing", monkeypatch, folder, quiet=True)
    assert "line 20.\n" in str(raised.value) and str(raised.value).endswith("line 49.\n")
    assert "line 19." not in str(raised.value)
    assert "line 0." in (folder.path / "checkpoints/job/log.txt").read_text()
    with pytest.raises(RuntimeError, match="ended without a report"):
        start("silent", monkeypatch, folder, quiet=True)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent to notice does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def pids(folder: RunFolder) -> list[int]:
    """Processes that the sleeping ranks have noted: themselves and their children."""
    return [int(pid) for file in folder.matches("checkpoints/job/pids-*") for pid in file.read_text().split()]


def until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@linux
def test_a_job_over_its_time_is_killed_with_its_children(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"timeout_minutes = 0\.08"):
        start("sleeping", monkeypatch, folder, profile(timeout_minutes=0.08), quiet=True)
    assert time.monotonic() - began < 30
    assert len(pids(folder)) == 2 and until(lambda: not any(map(alive, pids(folder))), 5)


CALLER = """
import sys
from stackpkg import params, runs
from stackpkg.training import launch
runs.root = launch.root = lambda: runs.Path(sys.argv[1])
launch.WORKER = "sleeping"
p = params.validate({"layout": {"processes": 2, "fsdp": 2, "restarts": 0}})
launch.launch("job", p, runs.RunFolder(sys.argv[2]))
"""


@linux
def test_killing_the_caller_kills_every_rank(folder: RunFolder, repository: Path) -> None:
    caller = subprocess.Popen([sys.executable, "-c", CALLER, repository, folder.name], stderr=subprocess.DEVNULL)
    try:
        assert until(lambda: len(pids(folder)) == 4, 60), "the ranks did not start"
        ranks = [int(file.read_text().split()[0]) for file in folder.matches("checkpoints/job/pids-*")]
        assert all(map(alive, ranks)) and caller.poll() is None
        caller.send_signal(signal.SIGKILL)
        caller.wait()
        assert until(lambda: not any(map(alive, ranks)), 5), "ranks outlive the caller that was killed"
    finally:
        caller.kill()
        for pid in filter(alive, pids(folder)):  # the children that a rank starts are its own affair
            os.kill(pid, signal.SIGKILL)


@linux
def test_a_job_that_is_launched_is_not_launched_again(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    monkeypatch.setattr(running, "DYING", 0.2)
    home, ended = folder.path / "checkpoints/job", list[str]()

    def go() -> None:
        with pytest.raises(RuntimeError) as raised:
            start("sleeping", monkeypatch, folder, quiet=True)
        ended.append(str(raised.value))

    launched = threading.Thread(target=go)
    launched.start()
    try:
        assert until(lambda: len(pids(folder)) == 2, 60), "the rank did not start"
        before = (home / "job.json").read_bytes()
        who = rf"job has been launched already \(process {os.getpid()} on .*nothing was changed.*checkpoints/job/stop"
        for p in (profile(), rate(2e-3), profile(processes=16, nodes=2)):
            with pytest.raises(ValueError, match=who):
                start("finishing", monkeypatch, folder, p)
        assert (home / "job.json").read_bytes() == before and launched.is_alive()
        assert not (repository / "outbox/.previous" / folder.name).exists()
        write_text(folder / "checkpoints/another/job.json", "{}")
        with running.claim(folder.path / "checkpoints/another"):
            pass  # jobs of a run go side by side
    finally:
        for pid in filter(alive, pids(folder)):
            os.kill(pid, signal.SIGKILL)
        launched.join(60)
    assert "exit code" in ended[0]
    assert start("finishing", monkeypatch, folder, quiet=True) == {"seen": 1}


@pytest.mark.parametrize("p", [profile(), profile(processes=16, nodes=2)])
@pytest.mark.parametrize("learning_rate", [2e-4, 2e-3])
def test_a_job_whose_ranks_run_without_a_launch_is_not_described_anew(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, p: Params, learning_rate: float
) -> None:
    monkeypatch.setattr(running, "DYING", 0.2)
    begin(monkeypatch, folder, rate(2e-4))
    job = folder.path / "checkpoints/job/job.json"
    before = job.read_bytes()
    p = p.model_copy(update={"optimization": rate(learning_rate).optimization})
    with running.hold(job.parent), pytest.raises(ValueError, match=r"job runs \(process .*nothing was changed"):
        start("finishing", monkeypatch, folder, p)  # a node's ranks, started by hand, hold it
    assert job.read_bytes() == before and len(left(folder)) == 4


def test_a_launch_waits_for_what_a_killed_one_left(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for hold in (running.claim, running.hold):
        dying = hold(folder.path / "checkpoints/job")
        threading.Timer(1.0, dying.close).start()
        assert start("finishing", monkeypatch, folder, quiet=True) == {"seen": 1}
        assert dying.closed, "it did not wait"


def test_what_makes_it_another_job_is_named() -> None:
    def spec(p: params.Params, manifest: str) -> dict[str, Any]:
        return {"params": p.model_dump(mode="json"), "data": {"manifest.json": manifest}, "steps": 4, "faults": []}

    one, other = params.Params(), params.validate({"seed": 3, "optimization": {"learning_rate": 1e-3}})
    assert launch.differences(spec(one, "a"), spec(one, "a")) == []
    assert launch.differences(spec(one, "a"), spec(other, "b")) == [
        "seed", "optimization.learning_rate", "data/manifest.json",
    ]  # fmt: skip
    wider = params.validate({"layout": {"processes": 2, "fsdp": 2}})
    assert launch.differences(spec(one, "a"), spec(wider, "a")) == [], "where it runs makes it no other job"


def test_what_a_rank_raised_comes_before_the_report_of_torchrun() -> None:
    log = [
        "[rank1]: Traceback (most recent call last):\n",
        "[rank1]: ValueError: the corpus is abc, this job began with def: roll back to it\n",
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n",
        "Root Cause (first observed failure):\n",
    ]
    assert launch.cause(log) == ": ValueError: the corpus is abc, this job began with def: roll back to it"
    assert launch.cause(["stackpkg.training.saving.SaveFailed: checkpoint-3 was not saved\n"]).endswith("not saved")
    assert launch.cause(["step 3 Error rate: 5\n"]) == launch.cause([]) == ""
    lost = "[rank1]: RuntimeError: [/x/pair.cc:553] Connection closed by peer [127.0.0.1]:1830. GLHF!\n"
    assert launch.cause([*log, lost]) == launch.cause(log), "what the other ranks say of it"
    assert "closed by peer" in launch.cause([lost])


def test_what_a_job_says_of_people_and_of_secrets_stays_in_it(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKER_TOKEN", hidden := "Zx81-correct-horse")
    start("leaking", monkeypatch, folder)
    told = {path: path.read_text() for path in folder.path.rglob("*") if path.is_file()} | {
        "shown": capsys.readouterr().out
    }
    names = {getattr(path, "name", path) for path, text in told.items() if "<email>" in text and "<secret>" in text}
    assert names == {"log.txt", "rank-00000.jsonl", "logbook.md", "shown"}
    for planted in ("anna.smith", hidden, "AKIAQ2W3"):
        assert not [path for path, text in told.items() if planted in text]


def test_a_receiver_that_is_not_installed_is_refused_before_anything_is_written(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.receivers, "find_spec", lambda name: None if name == "wandb" else True)
    asked = params.validate(
        {"telemetry": {"report_to": ["tensorboard", "wandb"]}, "layout": {"processes": 1, "fsdp": 1}}
    )
    with pytest.raises(ValueError, match=r"report_to: wandb is not installed; pip install wandb, or take it out"):
        start("finishing", monkeypatch, folder, asked)
    assert not (folder.path / "checkpoints").exists()
