"""SIGTERM ends whole what trains: from the process that executes the notebook the job was launched from."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from stackpkg import runs
from stackpkg.runs import read_json, write_json
from stackpkg.training import sigterm, stop, tiny

PACKAGE = Path(runs.__file__).parent
LAUNCH = """from stackpkg import params, runs
from stackpkg.training import launch
p = params.from_notebook(globals())
folder = runs.RunFolder(p.run)
slow = {"kind": "slow", "step": [*range(2, 8)], "seconds": 1, "attempt": 1}
done = launch.launch("train", p, folder, steps=8, faults=[slow])
folder.record("10_train", steps=done["steps"])"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a copy of the package, data, and one notebook, which launches a job of two ranks."""
    made = tmp_path_factory.mktemp("repository")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, made / "stackpkg", ignore=ignored)
    for name in ("params", "book"):
        shutil.copytree(PACKAGE.parent / name, made / name, ignore=shutil.ignore_patterns("images", "theme"))
    p = tiny.profile("stackpkg", {"processes": 2, "fsdp": 2}, every_steps=100, epoch_steps=100)
    tiny.prepare(made / "outbox/demo", p)
    values = p.model_dump(mode="json") | {"run": "demo"}
    values["curriculum"][0]["steps"] = 8
    write_json(made / "params/demo.yaml", values)  # JSON is YAML
    told = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in values.items())
    (made / "notebooks").mkdir()
    for name, code in (("10_train", LAUNCH), ("20_never", "1 / 0")):
        cells = [new_code_cell(told, metadata={"tags": ["parameters"]}), new_code_cell(code)]
        notebook = new_notebook(cells=cells)
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, made / f"notebooks/{name}.ipynb")
    return made


def command(place: Path) -> subprocess.Popen[str]:
    code = "from stackpkg.cli import app; app()"
    arguments = [sys.executable, "-c", code, "run", str(place / "params/demo.yaml"), "--to", "10"]
    environment = os.environ | {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(arguments, cwd=place, env=environment, text=True, **streams)


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 240
    while not what():
        assert time.monotonic() < end and process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def test_a_run_that_gets_sigterm_ends_with_an_agreed_checkpoint_and_the_same_command_goes_on(place: Path) -> None:
    home = place / "outbox/demo/checkpoints/train"
    process = command(place)
    wait_for((home / "attempts.json").exists, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, said
    (attempt,) = read_json(home / "attempts.json")
    at = attempt["stopped"]["step"]
    assert attempt["stopped"]["reason"] == "SIGTERM" and 1 <= at < 8 and not (home / stop.FILE).exists()
    assert read_json(home / f"checkpoint-{at}/complete.json")["step"] == at
    assert {path.name[:4] for path in home.glob(f"checkpoint-{at}/dcp/*.distcp")} == {"__0_", "__1_"}
    assert f"Stopped: train stopped after step {at}: SIGTERM" in said
    assert "nothing has to be mended" in said and "then the same command goes on at this stage" in said

    process = command(place)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    told = read_json(home / "attempts.json")
    assert told[1]["resumed_from"] == f"checkpoint-{at}" and read_json(home / "done.json")["steps"] == 8


# --- which jobs, and when it is over


@pytest.fixture
def heed(monkeypatch: pytest.MonkeyPatch) -> sigterm.Heed:
    monkeypatch.setattr(sigterm.signal, "alarm", lambda seconds: None)
    return sigterm.Heed()


def test_a_process_without_a_job_ends_at_once(heed: sigterm.Heed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sigterm, "jobs", lambda: set())
    with pytest.raises(sigterm.Terminated):
        heed()
    assert heed.got and issubclass(sigterm.Terminated, KeyboardInterrupt)


def test_a_notebook_that_goes_on_after_its_jobs_is_interrupted(
    heed: sigterm.Heed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first job ends in its last step, without looking; one begun since is asked too; then none is left."""
    first, second = tmp_path / "first", tmp_path / "second"
    running = {first}
    monkeypatch.setattr(sigterm, "jobs", lambda: running)
    heed()
    running = {first, second}
    heed()
    assert [(home / stop.FILE).read_text() for home in (first, second)] == ["SIGTERM"] * 2
    (second / stop.FILE).unlink()  # it obeyed
    running = {second}
    heed()
    assert not (second / stop.FILE).exists(), "asked again"
    running = set()
    for _ in range(sigterm.PATIENCE):
        heed()
    with pytest.raises(sigterm.Terminated):
        heed()
    assert not (first / stop.FILE).exists(), "the next launch would obey it"


def test_the_jobs_of_a_process_are_those_below_it(tmp_path: Path) -> None:
    sleep = "import subprocess, sys, time; time.sleep(60)"
    below = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep!r}, {str(tmp_path / 'a/job.json')!r}])"
    )
    with subprocess.Popen([sys.executable, "-c", below], start_new_session=True) as process:
        end = time.monotonic() + 20
        while sigterm.jobs() != {tmp_path / "a"}:
            assert time.monotonic() < end
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)


def test_a_launch_hears_sigterm_in_the_main_thread_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with sigterm.heeded(tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
        assert (tmp_path / stop.FILE).read_text() == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before
    seen: list[object] = []

    def beside() -> None:
        with sigterm.heeded(tmp_path):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=beside)
    thread.start()
    thread.join()
    assert seen == [before]
