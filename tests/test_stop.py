"""The stop file: every rank of a real launch ends at one step, with a reason, and the job goes on as if never asked."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import test_training
import torch
import torch.distributed as dist
from test_training import Job, compared, history, profile, run, weights
from transformers import TrainerControl, TrainerState

from stackpkg import runs
from stackpkg.params import Snapshots, validate
from stackpkg.runs import RunFolder, read_json, write_json
from stackpkg.telemetry import rows as written
from stackpkg.telemetry.guard import Guard
from stackpkg.training import launch, stop
from stackpkg.training.saving import Cadence, Saver
from stackpkg.training.trainer import StackTrainer

lab = test_training.lab  # the same tiny run
STEPS = 4


def test_the_record_keeps_the_reason_and_the_file_goes(tmp_path: Path) -> None:
    (tmp_path / "attempts.json").write_text('[{"at": "now"}]')
    assert stop.stopped(tmp_path) is None and stop.stopped(tmp_path / "nowhere") is None
    stop.request(tmp_path, " the room is on fire\n")
    assert stop.record(tmp_path, 7) == "the room is on fire" and not (tmp_path / stop.FILE).exists()
    assert stop.stopped(tmp_path) == {"step": 7, "reason": "the room is on fire"}
    (tmp_path / stop.FILE).touch()  # as a person in a hurry does
    assert stop.record(tmp_path, 8) == "no reason given"


def test_a_violation_stops_the_job_also_when_it_was_launched_again(tmp_path: Path) -> None:
    watch = Guard.production(validate({}))
    trainer = SimpleNamespace(args=SimpleNamespace(output_dir=tmp_path), guard=watch)
    watch.observe({"violations": 0.0})
    for _ in range(2):
        alerts = watch.observe({"violations": 0.1})
        StackTrainer._act(trainer, alerts)
        assert (tmp_path / stop.FILE).read_text().startswith("TrainSafetyViolation: ")
        (tmp_path / stop.FILE).unlink()


def ask_after(step: int, home: Path, rows: Path) -> None:
    while not (rows.exists() and rows.read_text().count("\n") >= step):
        time.sleep(0.01)
    stop.request(home, "pruned by a test")


def test_a_stopped_job_ends_on_all_ranks_with_a_checkpoint_and_goes_on_to_the_same_weights(lab: RunFolder) -> None:
    home = lab.path / "checkpoints/halted"
    first = lab.path / "telemetry/halted/rank-00000.jsonl"
    asker = threading.Thread(target=ask_after, args=(1, home, first), daemon=True)
    asker.start()
    with pytest.raises(stop.Stopped, match=r"halted stopped after step [23]: pruned by a test; launch it again"):
        launch.launch("halted", profile(2), lab, steps=STEPS, quiet=True)
    (attempt,) = read_json(home / "attempts.json")
    at = attempt["stopped"]["step"]
    assert not (home / "done.json").exists() and not (home / "stop").exists() and not (home / "final").exists()
    assert read_json(home / f"checkpoint-{at}/complete.json")["step"] == at
    table = pd.read_parquet(lab.path / "telemetry/halted.parquet")
    assert table.groupby("rank").step.max().tolist() == [at, at], "the ranks did not agree on the step"

    runs.write_text(home / "final/model-00001-of-00002.safetensors", "of stages, before a roll-back by hand")
    done = run(lab, halted=Job(profile(2), steps=STEPS), free=Job(profile(2), steps=STEPS))
    assert done["halted"]["steps"] == STEPS and done["halted"]["attempts"] == 2
    assert done["halted"]["weights_sha256"] == done["free"]["weights_sha256"]
    pd.testing.assert_frame_equal(compared(history(lab, "halted")), compared(history(lab, "free")), check_exact=True)
    ends = [lab.path / f"checkpoints/{name}/final" for name in ("halted", "free")]
    assert [{path.name for path in end.iterdir()} for end in ends] == [{path.name for path in ends[1].iterdir()}] * 2
    average = weights(lab, "halted", "final_ema"), weights(lab, "free", "final_ema")
    assert all(torch.equal(average[0][name], tensor) for name, tensor in average[1].items())


def command(lab: RunFolder, job: str) -> subprocess.Popen[str]:
    """`stackpkg launch` in a process of its own, in the throw-away repository."""
    values = profile(2).model_dump(mode="json") | {"run": lab.name}
    told = write_json(runs.root() / "sigterm.yaml", values)  # JSON is YAML
    code = "from pathlib import Path\nfrom stackpkg import cli, runs\nfrom stackpkg.training import launch\n"
    code += f"runs.root = launch.root = lambda: Path({str(runs.root())!r})\ncli.app()"
    arguments = [sys.executable, "-c", code, "launch", str(told), "--job", job]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_launch_that_gets_sigterm_ends_whole_and_the_next_goes_on(lab: RunFolder) -> None:
    home, rows = lab.path / "checkpoints/term", lab.path / "telemetry/term/rank-00000.jsonl"
    launched = command(lab, "term")
    while not (rows.exists() and rows.read_text().count("\n") >= 1) and launched.poll() is None:
        time.sleep(0.01)
    launched.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    said, _ = launched.communicate(timeout=120)
    assert time.monotonic() - asked < 30, "longer than a step and a checkpoint take"
    assert launched.returncode == stop.AGAIN and "SIGTERM; launch it again to go on" in said, said
    (attempt,) = read_json(home / "attempts.json")
    at = attempt["stopped"]["step"]
    assert attempt["stopped"]["reason"] == "SIGTERM" and 2 <= at < 6 and not (home / stop.FILE).exists()
    assert read_json(home / f"checkpoint-{at}/complete.json")["step"] == at
    assert {path.name[:4] for path in home.glob(f"checkpoint-{at}/dcp/*.distcp")} == {"__0_", "__1_"}
    assert not (lab.path / "telemetry/term.parquet").exists(), "within a deadline"
    table = written.read(rows.parent)
    assert table.groupby("rank").step.max().tolist() == [at, at], "the ranks did not agree on the step"
    again = command(lab, "term")
    said, _ = again.communicate(timeout=240)
    assert again.returncode == 0 and "done: 6 steps" in said, said
    undisturbed = run(lab, calm=Job(profile(2)))["calm"]
    done = read_json(home / "done.json")
    assert done["attempts"] == 2 and done["weights_sha256"] == undisturbed["weights_sha256"]


def test_a_job_is_asked_to_save_and_one_that_hangs_is_killed_for_good(lab: RunFolder) -> None:
    home, hang = lab.path / "checkpoints/switched", {"kind": "hang", "step": 5, "rank": 1, "attempt": 1}
    p = profile(2)
    p = p.model_copy(update={"snapshots": p.snapshots.model_copy(update={"every_steps": 6})})

    def ask() -> None:
        while not (home / "attempts.json").exists():
            time.sleep(0.01)
        stop.ask_save(home)
        while not [*home.glob("checkpoint-*/complete.json")]:
            time.sleep(0.05)
        stop.kill(home, "does harm")

    threading.Thread(target=ask, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="the launch failed"):
        launch.launch("switched", p, lab, steps=6, faults=[hang], quiet=True)
    assert time.monotonic() - began < 60 * p.layout.hang_minutes, "it ended by the watch over hangs"
    (saved,) = home.glob("checkpoint-*/complete.json")
    assert read_json(saved)["step"] < 5 and not (home / stop.SAVE).exists()
    with pytest.raises(ValueError, match=r"switched was killed: does harm; remove checkpoints/switched/kill"):
        launch.launch("switched", p, lab, steps=6, faults=[hang], quiet=True)
    (home / stop.KILL).unlink()
    assert launch.launch("switched", p, lab, steps=6, faults=[hang], quiet=True)["steps"] == 6


def test_a_request_in_the_last_step_is_no_reason_to_drop_a_finished_job(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        look = Cadence(Saver(tmp_path, Snapshots(), {}, []))
        for asked, step, ends in ((False, 1, False), (True, 2, True), (True, 3, False)):
            if asked:
                stop.request(tmp_path, "a test")
            control, look.stopped = TrainerControl(), False
            look.agree(TrainerState(global_step=step, max_steps=3), control, torch.device("cpu"))
            assert control.should_training_stop == control.should_save == look.stopped == ends
    finally:
        dist.destroy_process_group()
