"""Saves behind the training: the state of their step whatever moves on, failures that all ranks learn of, and jobs that
are killed while they save."""

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import test_training
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from test_training import LLAMA, Job, compared, history, profile, run, weights
from torch import nn
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState

from stackpkg import params
from stackpkg.objectives import Composer, routing
from stackpkg.params import Params, Snapshots
from stackpkg.runs import RunFolder, digest, read_json, write_json
from stackpkg.training import checkpoint, snapshots, versions
from stackpkg.training.recovery import RollBack
from stackpkg.training.saving import Cadence, SaveFailed, Saver, Writer

lab = test_training.lab  # the same tiny run
ABOUT: dict[str, Any] = {"attempt": 1}


@pytest.fixture
def alone(tmp_path: Path):  # type: ignore[no-untyped-def]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield tmp_path
    dist.destroy_process_group()


def small(saver: Saver, step: int) -> None:
    folder = saver.partial / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(b"scalars")


def test_what_is_saved_is_the_state_of_its_step(alone: Path) -> None:
    saver, state = Saver(alone, Snapshots(), ABOUT, []), {"weight": torch.arange(100_000.0)}
    for step in (1, 2, 3):
        small(saver, step)
        saver.begin(step, state, 2.0 / step)
        saver.staged()
        state["weight"] += 1.0  # the update comes while the file is written
    saver.wait()
    for step in (1, 2, 3):
        folder, found = alone / f"checkpoint-{step}", {"weight": torch.empty(100_000)}
        dcp.load(found, checkpoint_id=folder / "dcp")
        assert torch.equal(found["weight"], torch.arange(100_000.0) + step - 1)
        assert snapshots.problems(folder) == []
        assert set(read_json(folder / "complete.json")["files"]) == {
            "dcp/.metadata", "dcp/__0_0.distcp", "manifest.json", "state.pt",
        }  # fmt: skip
        about = read_json(folder / "manifest.json")
        assert (about["step"], about["validation_loss"], about["attempt"]) == (step, 2.0 / step, 1)
    assert not list(saver.partial.iterdir())


def test_a_rank_vouches_for_all_that_it_wrote(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of its generators too: `Trainer` writes it, and on a disk that nodes share another can't flush it."""
    saver, seen, vouch = Saver(alone, Snapshots(), ABOUT, []), list[str](), snapshots.vouch

    def watched(checkpoint: Path, rank: int, paths: list[Path]) -> None:
        seen.extend(path.relative_to(checkpoint).as_posix() for path in paths)
        vouch(checkpoint, rank, paths)

    monkeypatch.setattr(snapshots, "vouch", watched)
    small(saver, 1)
    (saver.partial / "checkpoint-1/rng_state.pth").write_bytes(b"draws")
    saver.begin(1, {"weight": torch.ones(10)}, None)
    saver.wait()
    assert seen == ["dcp/__0_0.distcp", "rng_state.pth"]


def test_a_full_disk_ends_the_job_and_the_checkpoint_before_stays(alone: Path, monkeypatch) -> None:
    saver, state = Saver(alone, Snapshots(), ABOUT, []), {"weight": torch.ones(10)}
    small(saver, 1)
    saver.begin(1, state, None)
    saver.wait()
    flush = snapshots.flush

    def full(path: Path) -> None:
        if path.name == "state.pt":
            raise OSError(28, "No space left on device")
        flush(path)

    monkeypatch.setattr(snapshots, "flush", full)
    small(saver, 2)
    saver.begin(2, state, None)
    saver.settle()
    assert saver.failed
    with pytest.raises(SaveFailed, match=r"checkpoint-2 was not saved, .* rank 0: OSError: .* No space left on device"):
        saver.wait()
    assert not saver.partial.exists(), "what is half written takes the room that is missing"
    assert snapshots.latest(alone) == (alone / "checkpoint-1", [])
    monkeypatch.undo()
    small(saver, 3)
    saver.begin(3, state, None)
    saver.wait()
    assert list(snapshots.listed(alone)) == [1, 3]


def test_a_state_that_is_not_finite_is_no_snapshot_and_rolls_back_to_the_one_before(alone: Path) -> None:
    saver, state = Saver(alone, Snapshots(), ABOUT, []), {"weight": torch.ones(10), "moment": torch.ones(10)}
    for step in (1, 3):
        small(saver, step)
        saver.begin(step, state, None)
        saver.staged()
    state["moment"][7] = float("inf")
    small(saver, 6)
    saver.begin(6, state, None)
    saver.settle()
    assert saver.failed
    with pytest.raises(RollBack) as raised:
        saver.wait()
    assert (raised.value.first, raised.value.last) == (4, 6) and not saver.partial.exists()
    assert snapshots.latest(alone) == (alone / "checkpoint-3", [])


def step_end(cadence: Cadence) -> bool:
    control = TrainerControl()
    cadence.agree(TrainerState(), control, torch.device("cpu"))
    return control.should_save


def test_a_checkpoint_is_due_by_time_too(alone: Path, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    cadence = Cadence(Saver(alone, Snapshots(every_minutes=0.5), ABOUT, []))
    for at, due in ((29.0, False), (30.0, True), (31.0, True)):
        now[0] = at
        assert step_end(cadence) == due
    cadence.on_save(None, None, TrainerControl())  # type: ignore[arg-type]
    for at, due in ((60.0, False), (61.0, True)):
        now[0] = at
        assert step_end(cadence) == due
    never = Cadence(Saver(alone, Snapshots(), ABOUT, []))
    now[0] = 1e9
    assert not step_end(never)


def two(rank: int, home: str) -> None:
    """One of two ranks: the clock of rank 1 runs ahead, its disk is full at step 2."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    store = dist.FileStore(f"{home}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(minutes=1))
    saver = Saver(Path(home), Snapshots(every_minutes=60), ABOUT, [])
    cadence, write, told = Cadence(saver), Writer.write_data, []
    cadence.last = -1e9 if rank else time.monotonic()

    def full(writer: Writer, *given: Any) -> Any:
        if rank and writer.about["step"] == 2:
            raise OSError(28, "No space left on device")
        return write(writer, *given)

    Writer.write_data = full  # type: ignore[method-assign]
    told.append(step_end(cadence))
    try:
        for step in (1, 2):
            (saver.partial / f"checkpoint-{step}").mkdir(parents=True, exist_ok=True)
            saver.begin(step, {"weight": torch.ones(10)}, None)
            for _ in range(100):
                step_end(cadence)
                time.sleep(0.01)
    except SaveFailed as error:
        told += [step, str(error)]
    write_json(Path(home) / f"told-{rank}.json", told)
    dist.barrier()
    os._exit(0)


def test_both_ranks_learn_at_once_of_what_one_knows(tmp_path: Path) -> None:
    mp.start_processes(two, (str(tmp_path),), 2, start_method="forkserver")
    first, second = (read_json(tmp_path / f"told-{rank}.json") for rank in range(2))
    assert first == second, "the ranks disagree"
    assert first[:2] == [False, 2], "the clock of rank 0 counts"
    assert first[2].endswith("rank 1: OSError: [Errno 28] No space left on device")
    assert snapshots.latest(tmp_path) == (tmp_path / "checkpoint-1", [])


# --- the small files, read apart


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer(routing.BIAS, torch.randn(4))
        self.register_buffer(routing.CENTER, torch.randn(4))


def composer(steps: int) -> Composer:
    made = Composer(params.Objectives(), [Router(), Router()])
    made.steps, made.usage = steps, torch.rand(2, 4)
    made.bandit.sums = {"paid": torch.rand(2, 4, dtype=torch.double), "squares": torch.rand((), dtype=torch.double)}
    return made


def test_the_state_of_routers_is_read_apart(tmp_path: Path) -> None:
    one, other = composer(7), composer(0)
    checkpoint.write_router(tmp_path, one, checkpoint.biases(one))
    checkpoint.read_router(tmp_path, other)
    assert other.steps == 7 and other.usage is not None and torch.equal(other.usage, one.usage)  # type: ignore[arg-type]
    assert all(torch.equal(other.bandit.sums[name], value) for name, value in one.bandit.sums.items())
    for mine, theirs in zip(one.routers, other.routers, strict=True):
        assert all(torch.equal(getattr(mine, name), getattr(theirs, name)) for name in routing.STATE.values())
    choice = {name: value for name, value in checkpoint.biases(one).items() if name.startswith("bias")}
    checkpoint.write_router(tmp_path, one, choice)
    checkpoint.read_router(tmp_path, other)
    assert not any(getattr(router, routing.CENTER).any() for router in other.routers), "what a file of 1.0 tells"
    checkpoint.write_router(tmp_path, one, {})
    with pytest.raises(ValueError, match=r"router.safetensors has no choice bias of layer 0: take the file from"):
        checkpoint.read_router(tmp_path, other)
    dense, fresh = Composer(params.Objectives()), Composer(params.Objectives())
    checkpoint.write_router(tmp_path, dense, {})
    checkpoint.read_router(tmp_path, fresh)
    assert fresh.usage is None and not fresh.bandit.sums


def test_another_major_version_is_refused_by_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "ROUTER", "2.1")
    checkpoint.write_router(tmp_path, composer(1), {})
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"router.safetensors has version 2.1, this code reads 1.x: take the"):
        checkpoint.read_router(tmp_path, composer(1))
    config = {"hidden_size": 32, "num_experts": 4}
    write_json(tmp_path / "manifest.json", {"config": config, "versions": {"architecture": "1.0.0"}})
    versions.check(tmp_path, config | {"num_experts_per_tok": 1})
    with pytest.raises(ValueError, match=r"breaking change: num_experts 4 -> 8"):
        versions.check(tmp_path, config | {"num_experts": 8})
    with pytest.raises(ValueError, match=r"has architecture 1.0.0, .* breaking change: hidden_size 32 -> 64\. Give"):
        versions.check(tmp_path, config | {"hidden_size": 64})


# --- jobs


def dropping(processes: int) -> Params:
    """A llama with dropout, in two micro-batches; of its checkpoints only the newest must stay."""
    p = profile(processes, accumulation=2, kind="auto", config=LLAMA | {"attention_dropout": 0.1})
    return p.model_copy(update={"snapshots": Snapshots(every_steps=1, keep_last=1, keep_best=1)})


@pytest.fixture(scope="module")
def jobs(lab: RunFolder) -> dict[str, dict[str, Any]]:
    """Undisturbed; and one whose second rank, then its first, is killed while it saves."""
    broken = [{"kind": "kill_saving", "step": 3, "rank": rank, "attempt": 2 - rank} for rank in (1, 0)]
    p = dropping(2)
    often = p.model_copy(update={"layout": p.layout.model_copy(update={"restarts": 2})})
    return run(lab, steady=Job(p)) | run(lab, cut=Job(often, broken))


def test_a_job_killed_while_it_saves_goes_on_from_the_checkpoint_before_to_the_same_weights(lab, jobs) -> None:
    home = lab.path / "checkpoints/cut"
    attempts = read_json(home / "attempts.json")
    assert [attempt["resumed_from"] for attempt in attempts] == [None, "checkpoint-2", "checkpoint-2"]
    assert [attempt["aside"] for attempt in attempts[1:]] == [["checkpoint-3: saving was broken off; removed"]] * 2
    assert jobs["cut"]["weights_sha256"] == jobs["steady"]["weights_sha256"]
    pd.testing.assert_frame_equal(compared(history(lab, "cut")), compared(history(lab, "steady")), check_exact=True)
    average = weights(lab, "cut", "final_ema"), weights(lab, "steady", "final_ema")
    assert all(torch.equal(average[0][name], tensor) for name, tensor in average[1].items())


def test_a_job_keeps_what_its_profile_says_and_each_tells_what_it_is(lab: RunFolder, jobs) -> None:
    home = lab.path / "checkpoints/steady"
    losses = {
        3 * epoch: read_json(lab.path / f"eval/steady/epoch_00{epoch}.json")["validation_loss"] for epoch in (1, 2)
    }
    best = min(losses, key=lambda step: losses[step])
    assert [*snapshots.listed(home)] == sorted({3, 4, 5, 6, best}), "what the ladder may need, and the best"
    for step, folder in snapshots.listed(home).items():
        about = read_json(folder / "manifest.json")
        assert snapshots.problems(folder) == [] and about["validation_loss"] == losses.get(step)
        assert (about["run"], about["job"], about["attempt"], about["step"]) == ("lab", "steady", 1, step)
        assert about["data"] == digest(lab.path / "data/manifest.json")
        assert about["layout"]["fsdp"] == 2 and about["config"]["model_type"] == "llama"
        assert about["versions"] == {"architecture": "1.0.0", "router": "1.1", "retriever": "1.0"}
    assert not list((home / snapshots.PARTIAL).iterdir())
    model = AutoModelForCausalLM.from_pretrained(home / "final")
    assert model.config.attention_dropout == 0.1
