"""A real Slurm of one node, on this machine: what it does to a job, and that the job goes on without losing a row."""

import os
import platform
import shutil
import socket
import subprocess
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

from stackpkg import params, runs
from stackpkg.params import Params
from stackpkg.runs import RunFolder, read_json
from stackpkg.training import attempts, clusters, launch, tiny

DAEMONS = "slurmctld", "slurmd"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(shutil.which, DAEMONS)), reason="slurmctld and slurmd are not on the path"),
    pytest.mark.skipif(os.getuid() != 0, reason="slurmd wants to be root"),
]
NODE, STEPS = platform.node().partition(".")[0], 48
SLOW = {"kind": "slow", "seconds": 3.0, "attempt": [1, 2, 3]}  # each is to be interrupted in the middle
# Who has no account here is let in (auth/none), and a job that was queued again need not wait two minutes.
# A job of `urgent` preempts one of `train`, which has two minutes; the task alone is signalled (proctrack/cgroup).
CONFIGURATION = """
    ClusterName=test
    SlurmctldHost={node}(127.0.0.1)
    SlurmUser=root
    SlurmctldPort={ports[0]}
    SlurmdPort={ports[1]}
    AuthType=auth/none
    CredType=cred/none
    AuthInfo=cred_expire=5
    StateSaveLocation={home}/state
    SlurmdSpoolDir={home}/spool
    SlurmctldPidFile={home}/slurmctld.pid
    SlurmdPidFile={home}/slurmd.pid
    ProctrackType=proctrack/cgroup
    TaskPlugin=task/none
    SwitchType=switch/none
    MpiDefault=none
    SelectType=select/cons_tres
    PreemptType=preempt/partition_prio
    PreemptMode=REQUEUE
    SchedulerParameters=sched_interval=2,bf_interval=2
    KillWait=10
    ReturnToService=2
    NodeName={node} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
    PartitionName=train Nodes={node} Default=YES PriorityTier=1 GraceTime=120 MaxTime=INFINITE
    PartitionName=urgent Nodes={node} PriorityTier=9 PreemptMode=OFF MaxTime=INFINITE
"""


def free_ports() -> list[int]:
    with socket.socket() as one, socket.socket() as two:
        for made in (one, two):
            made.bind(("127.0.0.1", 0))
        return [made.getsockname()[1] for made in (one, two)]


def ask(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def until(done: Callable[[], bool], what: str, seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"waited {seconds:g} s until {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (home / name).mkdir()
    told = CONFIGURATION.format(home=home, node=NODE, ports=free_ports(), cpus=os.cpu_count())
    (home / "slurm.conf").write_text(textwrap.dedent(told))
    (home / "cgroup.conf").write_text("CgroupPlugin=autodetect\nIgnoreSystemd=yes\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(home / "slurm.conf"))
        log = (home / "log").open("w")
        daemons = [subprocess.Popen([name, "-D"], stdout=log, stderr=log) for name in DAEMONS]
        try:
            until(lambda: "idle" in subprocess.run(["sinfo", "-h"], capture_output=True, text=True).stdout, "it is up")
            yield home
            ask("scancel", "--user=root")
            until(lambda: not ask("squeue", "--noheader"), "its jobs are gone")
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(60)
            log.close()
            print((home / "log").read_text()[-4000:])  # shown where a test fails


def profile(scheduler: str) -> Params:
    p = tiny.profile("llama", {"processes": 2, "fsdp": 2, "timeout_minutes": 60.0}, every_steps=1000, epoch_steps=1000)
    values = p.model_dump(mode="json") | {"run": "slurm"}
    values["curriculum"][0]["steps"] = STEPS
    return params.validate(values | {"cluster": {"scheduler": scheduler, "partition": "train", "grace_seconds": 30}})


def test_a_job_that_is_told_to_stop_in_three_ways_goes_on_and_loses_no_row(
    slurm: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "POLL", 0.2)
    p, folder = profile("slurm"), RunFolder("slurm")
    tiny.prepare(folder.path, p)
    home = folder.path / "checkpoints/job"
    ended: list[dict] = []
    follower = threading.Thread(
        target=lambda: ended.append(launch.launch("job", p, folder, steps=STEPS, faults=[SLOW])), daemon=True
    )
    follower.start()

    def interrupt(number: int, how: Callable[[str], object]) -> None:
        """Once attempt `number` has made two steps; until it has stopped for it, and Slurm has queued it again."""

        def steps() -> int:
            said = (home / "log.txt").read_text() if (home / "log.txt").exists() else ""
            return said.partition(f"[job] attempt {number} ")[2].count("[job] step ")

        until(lambda: steps() > 1, f"attempt {number} has made two steps")
        how(read_json(home / "submitted.json")["id"])
        until(lambda: "stopped" in attempts.read(home)[number - 1], f"attempt {number} has stopped", 150)

    interrupt(1, lambda job: ask("scancel", "--signal=TERM", job))
    other = ["sbatch", "--parsable", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 5"]
    interrupt(2, lambda job: ask(*other))
    interrupt(3, lambda job: ask("scontrol", "update", f"JobId={job}", "TimeLimit=2"))  # it looks twice a minute
    ask("scontrol", "update", f"JobId={read_json(home / 'submitted.json')['id']}", "TimeLimit=60")
    follower.join(180)
    assert ended and ended[0]["attempts"] == 4, (home / "log.txt").read_text()[-3000:]
    kept = attempts.read(home)
    stops = [one["stopped"] for one in kept[:3]]
    assert [one["reason"] for one in stops] == ["preempted"] * 3
    assert [one["resumed_from"] for one in kept] == [None, *(f"checkpoint-{one['step']}" for one in stops)]
    table = pd.read_parquet(folder.path / "telemetry/job.parquet")
    assert table.groupby("rank").step.apply(list).tolist() == [list(range(1, STEPS + 1))] * 2
    undisturbed = launch.launch("calm", profile("none"), folder, steps=STEPS, quiet=True)
    assert ended[0]["weights_sha256"] == undisturbed["weights_sha256"]


def test_a_job_that_a_person_cancels_is_not_queued_again(slurm: Path, repository: Path) -> None:
    folder = RunFolder("slurm")
    home, p = folder.path / "checkpoints/cancelled", profile("slurm")
    runs.write_json(home / "job.json", {})
    job = clusters.submit(p, "cancelled", home, ["sleep", "120"])
    until(lambda: "RUNNING" in ask("squeue", "-h", "-o", "%T"), "it runs")
    ask("scancel", job)
    until(lambda: not clusters.alive(p, clusters.name_of(p, "cancelled")), "Slurm has it no more", 60)
    assert "JobState=CANCELLED" in ask("scontrol", "show", "job", job)
