"""Slurm and Kubernetes: what is rendered, and real jobs driven through stand-ins for the schedulers' commands."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from typer.testing import CliRunner

from stackpkg import model as models
from stackpkg import params, runs
from stackpkg.cli import app
from stackpkg.params import Params
from stackpkg.runs import RunFolder, read_json, write_text
from stackpkg.training import clusters, launch, stop, support

REPOSITORY = Path(__file__).parents[1]
GOLDEN, PAGE = Path(__file__).parent / "golden_launch", (REPOSITORY / "book/launching.md").read_text()
DIGEST = "b4c5a4a0"  # sha256 of lab_1/train
SLURM = {"scheduler": "slurm", "gpus_per_node": 8, "partition": "train", "account": "lab"}
KUBERNETES = {"scheduler": "kubernetes", "gpus_per_node": 8, "image": "registry.example/stackpkg:1", "claim": "lab"}
# Slurm on one machine: a batch script is a process, and every node of its job is this one.
FAKES = {
    "sbatch": """
        script=${@: -1}; nodes=$(sed -n 's/^#SBATCH --nodes=//p' "$script")
        echo "$@" >> "$SLURM/sbatch.log"
        sed -n 's/^#SBATCH --job-name=//p' "$script" > "$SLURM/name"
        export SLURM_JOB_ID=71 SLURM_JOB_NODELIST=here SLURM_SUBMIT_DIR=$PWD SLURM_NNODES=$nodes
        log=$(sed -n 's/^#SBATCH --output=//p' "$script")
        setsid bash "$script" >> "$log" 2>&1 < /dev/null &
        echo $! > "$SLURM/pid"
        echo "71;cluster"
    """,
    # without --me also what another person's job of any name is told of
    "squeue": """
        if [ -e "$SLURM/hiccup" ]; then
            echo failed >> "$SLURM/failed"; echo "Unable to contact slurm controller" >&2; exit 1
        fi
        case " $* " in *" --me "*) ;; *) [ -e "$SLURM/colleague" ] && echo RUNNING ;; esac
        case " $* " in *" --name=$(cat "$SLURM/name" 2>/dev/null) "*) ;; *) exit 0 ;; esac
        kill -0 "$(cat "$SLURM/pid" 2>/dev/null)" 2>/dev/null && echo RUNNING; true
    """,
    "scontrol": """case $1 in show) echo localhost ;; *) echo "$@" >> "$SLURM/scontrol.log" ;; esac""",
    "srun": """
        shift
        for node in $(seq "$SLURM_NNODES"); do "$@" & pids="${pids:-} $!"; echo $! >> "$SLURM/tasks"; done
        for pid in $pids; do wait "$pid" || code=$?; done
        exit "${code:-0}"
    """,
}
WORKERS = {
    # every rank meets the others; rank 0 reports who came
    "meeting": """
        import torch
        import torch.distributed as dist
        from stackpkg.training import layout
        rank, ranks = layout.start()
        there = torch.ones(1) * (rank + 1)
        dist.all_reduce(there)
        hosts = [None] * ranks
        dist.all_gather_object(hosts, os.environ.get("GROUP_RANK", "-"))
        if rank == 0:
            print("[job] met", flush=True)
            (home / "done.json").write_text(json.dumps({"sum": there.item(), "groups": hosts}))
        dist.barrier()
        dist.destroy_process_group()
    """,
    # as `meeting`, after one rank of the second node has died
    "mortal": """
        import signal
        from stackpkg.training import layout
        rank, ranks = layout.start()
        if rank == ranks - 1 and not (home / "died").exists():
            (home / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        import torch
        import torch.distributed as dist
        there = torch.ones(1)
        dist.all_reduce(there)
        if rank == 0:
            (home / "done.json").write_text(json.dumps({"sum": there.item()}))
        dist.barrier()
        dist.destroy_process_group()
    """,
    # tells, not of itself alone, and fails
    "telling": """
        print(f"[job] reads {Path.cwd()}/corpus of a.person@university.edu", flush=True)
        raise ValueError("the end")
    """,
    # trains until it is asked to stop, in a long step while `busy` is there; the first node's tells the others
    "patient": """
        from stackpkg import runs
        from stackpkg.training import stop
        first = os.environ.get("NODE", "0") == "0"
        if first:
            runs.write_json(home / "attempts.json", [{"at": "now"}])
        while (home / "busy").exists() or not (stop.stopped(home) or first and (home / "stop").exists()):
            time.sleep(0.05)
        if first:
            print("[job] stopped:", stop.record(home, 3), flush=True)
    """,
}
# What the API of batch/v1 answers of a Job, in the order of its life.
JOBS = {
    "running": {"active": 2, "ready": 2, "startTime": "2026-11-29T10:00:00Z", "terminating": 0,
                "uncountedTerminatedPods": {}},
    "suspended": {"conditions": [{"type": "Suspended", "status": "True", "reason": "JobSuspended"}]},
    "resumed": {"active": 2, "conditions": [{"type": "Suspended", "status": "False", "reason": "JobResumed"}]},
    "complete": {"succeeded": 2, "completedIndexes": "0,1", "completionTime": "2026-11-29T11:00:00Z", "conditions": [
        {"type": "SuccessCriteriaMet", "status": "True", "reason": "CompletionsReached"},
        {"type": "Complete", "status": "True", "reason": "CompletionsReached", "message": "Reached expected number"},
    ]},
    "failed": {"failed": 3, "conditions": [
        {"type": "FailureTarget", "status": "True", "reason": "BackoffLimitExceeded"},
        {"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded",
         "message": "Job has reached the specified backoff limit"},
    ]},
    "new": {},
}  # fmt: skip


def profile(cluster: dict, nodes: int = 2, processes: int = 4, **layout: float) -> Params:
    made = {"processes": processes, "nodes": nodes, "fsdp": 2, "restarts": 1, "timeout_minutes": 7.0} | layout
    return params.validate({"run": "lab_1", "layout": made, "cluster": cluster, "training": {"batch_tokens": 16384}})


@pytest.fixture(autouse=True)
def workers(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "POLL", 0.1)
    for name, body in WORKERS.items():
        head = "import json, os, sys, time\nfrom pathlib import Path\nhome = Path(sys.argv[1]).resolve().parent\n"
        write_text(repository / f"{name}.py", head + textwrap.dedent(body))


@pytest.fixture
def folder(repository: Path, request: pytest.FixtureRequest) -> RunFolder:
    made = RunFolder("lab_1")
    shutil.rmtree(made.path / "checkpoints", ignore_errors=True)
    for name in ("manifest.json", "pairs.parquet", "long_range.parquet"):
        write_text(made / f"data/{name}", name)
    return made


def script(path: Path, body: str) -> Path:
    write_text(path, "#!/bin/bash\n" + textwrap.dedent(body)).chmod(0o755)
    return path


@pytest.fixture
def slurm(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, body in FAKES.items():
        script(tmp_path / "bin" / name, body)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{repository}:{Path(params.__file__).parents[1]}")
    return tmp_path


@pytest.mark.parametrize(("cluster", "file"), [(SLURM, "job.sbatch"), (KUBERNETES, "job.yaml")])
def test_what_is_rendered_is_what_was_read_and_agreed_to(
    cluster: dict, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_caller")
    p = profile(cluster, nodes=8, processes=64)
    command = ["python", *launch.command("outbox/lab_1/checkpoints/train/job.json", p)[1:]]
    made = clusters.render(p, "train", command)
    assert "secret" not in made and str(runs.root()) not in made
    assert made == (GOLDEN / file).read_text(), f"agree to the new one: write it to {GOLDEN.name}/{file}"


def test_the_script_is_bash_and_the_manifest_is_complete() -> None:
    command = ["python", *launch.command("outbox/lab_1/checkpoints/train/job.json", profile(SLURM))[1:]]
    script = clusters.render(profile(SLURM), "train", command)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    service, job = yaml.safe_load_all(clusters.render(profile(KUBERNETES), "train", command))
    assert service["metadata"]["name"] == job["metadata"]["name"] == (called := f"stackpkg-lab-1-train-{DIGEST}")
    spec = job["spec"]["template"]["spec"]
    assert spec["subdomain"] == service["metadata"]["name"]  # what gives the first pod the name in the command
    bash = spec["containers"][0]["command"]
    assert f"--rdzv-endpoint={called}-0.{called}:29500" in bash[2]
    subprocess.run(["bash", "-n"], input=bash[2], text=True, check=True)
    assert {m["name"] for m in spec["containers"][0]["volumeMounts"]} == {v["name"] for v in spec["volumes"]}
    with pytest.raises(ValueError, match=r"cluster\.image"):
        clusters.render(profile({"scheduler": "kubernetes"}), "train", command)
    with pytest.raises(ValueError, match="slurm or kubernetes"):
        clusters.render(profile({}), "train", command)


def test_each_job_has_a_name_of_its_own_that_a_cluster_takes() -> None:
    runs_and_jobs = [("lab_1", "train"), ("lab-1", "train"), ("lab.1", "train"), ("lab", "1-train"), ("lab-1", "Train")]
    runs_and_jobs += [("a" * 60, "train"), ("a" * 60, "finetune"), ("a", "b" * 60), ("lab_1", "_")]
    names = {clusters.name_of(params.validate({"run": run}), job) for run, job in runs_and_jobs}
    assert len(names) == len(runs_and_jobs)
    for name in names:
        assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) and len(name) <= 52, "pods add an index and a suffix"


def test_a_job_of_the_same_name_of_another_person_is_not_taken_for_ours(
    slurm: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (slurm / "colleague").touch()
    monkeypatch.setattr(launch, "WORKER", "meeting")
    assert launch.launch("job", profile(SLURM, nodes=1, processes=1, fsdp=1), folder) == {"sum": 1, "groups": ["-"]}


@pytest.mark.parametrize(("minutes", "told"), [(1.6, "2"), (2.0, "2"), (90.5, "91")])
def test_the_time_of_a_job_is_whole_minutes_and_no_less_than_asked_for(minutes: float, told: str) -> None:
    script = clusters.render(profile(SLURM | {"grace_seconds": 30}, timeout_minutes=minutes), "train", ["true"])
    assert f"#SBATCH --time={told}\n" in script


def test_a_time_that_the_grace_takes_up_is_refused_before_anything_moves(folder: RunFolder) -> None:
    home = folder.path / "checkpoints/job"
    write_text(home / "job.json", '{"digest": "of another job"}')
    for minutes in (0.5, 5.0, 6.0):
        with pytest.raises(ValueError, match=rf"_minutes {minutes:g} .*grace_seconds 300.*more minutes than 6"):
            launch.launch("job", profile(SLURM, timeout_minutes=minutes), folder)
    assert (home / "job.json").exists(), "the job that was there moved away for one that is refused"
    clusters.check(profile(KUBERNETES, timeout_minutes=5.0))  # which sets no limit


def test_two_torchrun_agents_of_a_batch_script_meet(slurm: Path, folder: RunFolder, monkeypatch, capsys) -> None:
    monkeypatch.setattr(launch, "WORKER", "meeting")
    done = launch.launch("job", profile(SLURM), folder)
    assert done["sum"] == 1 + 2 + 3 + 4 and sorted(done["groups"]) == ["0", "0", "1", "1"]
    told = capsys.readouterr().out
    assert "submitted to slurm as 71" in told and "[job] met" in told
    home = folder.path / "checkpoints/job"
    assert read_json(home / "submitted.json") == {"scheduler": "slurm", "id": "71"}
    assert launch.launch("job", profile(SLURM), folder) == done, "a job that is done is not submitted again"
    assert len((slurm / "sbatch.log").read_text().splitlines()) == 1


def test_a_rank_that_dies_on_one_node_starts_all_nodes_again(slurm: Path, folder: RunFolder, monkeypatch) -> None:
    """Each agent of torchrun counts restarts for itself (pytorch #108158): what they share must not depend on it."""
    monkeypatch.setattr(launch, "WORKER", "mortal")
    assert launch.launch("job", profile(SLURM), folder) == {"sum": 4}
    assert (folder.path / "checkpoints/job/died").exists()


def patient(slurm: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> Params:
    """A job that runs on the cluster until it is asked to stop."""
    monkeypatch.setattr(launch, "WORKER", "patient")
    p = profile(SLURM, nodes=1, processes=1, fsdp=1)
    hurried = SimpleNamespace(monotonic=lambda: 120 * time.monotonic(), sleep=time.sleep)
    with monkeypatch.context() as patch, pytest.raises(TimeoutError, match="still on the cluster, as 71"):
        patch.setattr(clusters, "time", hurried)  # a minute of `layout.timeout_minutes` lasts half a second
        launch.launch("job", p, folder)
    return p


def test_a_job_that_two_launch_at_once_is_submitted_once_and_followed_by_both(
    slurm: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "WORKER", "patient")
    script(slurm / "bin/sbatch", "sleep 1\n" + textwrap.dedent(FAKES["sbatch"]))
    p, home, ended = profile(SLURM, nodes=1, processes=1, fsdp=1), folder.path / "checkpoints/job", list[str]()

    def follow() -> None:
        try:
            launch.launch("job", p, folder)
        except (RuntimeError, ValueError) as error:
            ended.append(str(error))

    launched = [threading.Thread(target=follow) for _ in range(2)]
    for one in launched:
        one.start()
    while not (home / "attempts.json").exists():
        time.sleep(0.05)
    time.sleep(2.0)  # the other follows it by now
    assert not ended
    stop.request(home, "a person")
    for one in launched:
        one.join(60)
    assert ended == ["job stopped after step 3: a person; launch it again to go on"] * 2
    assert len((slurm / "sbatch.log").read_text().splitlines()) == 1


def hiccup(slurm: Path, home: Path, over: Callable[[], bool]) -> threading.Thread:
    """Once a job runs, Slurm's controller does not answer until it is `over`; then the job is stopped."""

    def fail() -> None:
        while not (home / "attempts.json").exists():
            time.sleep(0.05)
        (slurm / "hiccup").touch()
        while not over():
            time.sleep(0.05)
        (slurm / "hiccup").unlink()
        stop.request(home, "a person")

    made = threading.Thread(target=fail, daemon=True)
    made.start()
    return made


def test_a_scheduler_that_does_not_answer_for_a_while_ends_no_launch(
    slurm: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(launch, "WORKER", "patient")
    failed = slurm / "failed"
    failing = hiccup(
        slurm, folder.path / "checkpoints/job", lambda: failed.exists() and len(failed.read_text().split()) > 2
    )
    with pytest.raises(launch.Stopped, match="after step 3: a person"):
        launch.launch("job", profile(SLURM, nodes=1, processes=1, fsdp=1), folder)
    failing.join()
    told = [line for line in capsys.readouterr().out.splitlines() if "Unable to contact" in line]
    assert len(told) == 1 and re.match(r"\[job\] squeue .*; asked again, the job is not touched", told[0])


def test_a_scheduler_that_never_answers_again_ends_the_launch_with_the_way_on(
    slurm: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "WORKER", "patient")
    monkeypatch.setattr(clusters, "PATIENCE", 0.6)
    home, ended = folder.path / "checkpoints/job", threading.Event()
    failing = hiccup(slurm, home, ended.is_set)
    with pytest.raises(RuntimeError, match=r"Unable to contact .* for 0\.01 minutes\. job may .* follows it again"):
        launch.launch("job", profile(SLURM, nodes=1, processes=1, fsdp=1), folder)
    ended.set()
    failing.join()
    while (home / stop.FILE).exists():  # before the next test takes the folder away
        time.sleep(0.05)


def test_a_scheduler_s_command_that_does_not_end_is_a_failure_like_others(
    slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(slurm / "bin/squeue", "exec sleep 30")
    monkeypatch.setattr(clusters, "ANSWER", 0.2)
    with pytest.raises(RuntimeError, match=r"^squeue .* failed: no answer in 0\.2 s"):
        clusters.alive(profile(SLURM), "job")


def preempt(slurm: Path) -> None:
    """Slurm tells the tasks, and neither the script nor what a task has started."""
    for task in (slurm / "tasks").read_text().split():
        os.kill(int(task), signal.SIGTERM)


def test_a_preempted_job_stops_whole_and_stands_in_the_queue_again(
    slurm: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, home = patient(slurm, folder, monkeypatch), folder.path / "checkpoints/job"
    assert patient(slurm, folder, monkeypatch) == p
    assert len((slurm / "sbatch.log").read_text().splitlines()) == 1, "a job that is there is followed, not submitted"
    preempt(slurm)
    with pytest.raises(launch.Stopped, match="after step 3: preempted"):
        launch.launch("job", p, folder)
    assert (slurm / "scontrol.log").read_text().split() == ["requeue", "71"] and not (home / stop.FILE).exists()


def test_a_job_that_a_person_stopped_is_not_queued_again_though_it_is_preempted(
    slurm: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, home = patient(slurm, folder, monkeypatch), folder.path / "checkpoints/job"
    write_text(home / "busy", "")
    stop.request(home, "a person")
    preempt(slurm)
    time.sleep(0.5)
    (home / "busy").unlink()
    with pytest.raises(launch.Stopped, match="after step 3: a person"):
        launch.launch("job", p, folder)
    assert not (slurm / "scontrol.log").exists()


@pytest.fixture
def pod(folder: RunFolder, repository: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a pod of a job that trains until it is asked to stop."""
    home, pods = folder.path / "checkpoints/job", list[subprocess.Popen]()
    write_text(home / "job.json", "{}")
    command = [sys.executable, "-m", "patient", "outbox/lab_1/checkpoints/job/job.json"]
    made = clusters.render(profile(KUBERNETES, nodes=1, processes=1, fsdp=1), "job", command)
    line = list(yaml.safe_load_all(made))[1]["spec"]["template"]["spec"]["containers"][0]["command"]

    def start(index: int) -> subprocess.Popen:
        told = {"PYTHONPATH": f"{repository}:{Path(params.__file__).parents[1]}", "JOB_COMPLETION_INDEX": str(index)}
        pods.append(subprocess.Popen(line, cwd=repository, env=os.environ | told | {"NODE": str(index)}))
        while index == 0 and not (home / "attempts.json").exists():  # its shell traps the signal by then
            time.sleep(0.05)
        return pods[-1]

    yield start
    for one in pods:
        one.kill()


@pytest.mark.parametrize(("ends", "code"), [("preempted", 143), ("a person", 0)])
def test_all_pods_of_a_preempted_job_ask_to_be_replaced(folder: RunFolder, pod, ends: str, code: int) -> None:
    home = folder.path / "checkpoints/job"
    pods = [pod(0), pod(1)]
    if ends == "preempted":
        pods[0].terminate()  # the other hears of it from the job alone
    else:
        stop.request(home, ends)
    assert [one.wait(60) for one in pods] == [code, code]
    assert read_json(home / "attempts.json")[-1]["stopped"] == {"step": 3, "reason": ends}
    assert (home / "log.txt").read_text() == f"[job] stopped: {ends}\n", "pod 0 keeps the log, whole and alone"


def test_a_pod_that_takes_another_s_place_leaves_the_stop_of_one_that_is_being_preempted(
    folder: RunFolder, pod
) -> None:
    home = folder.path / "checkpoints/job"
    write_text(home / "busy", "")
    first = pod(0)
    first.terminate()
    while not (home / stop.FILE).exists():
        time.sleep(0.05)
    second = pod(1)  # for one that died, while rank 0 is in the middle of a step
    time.sleep(1.0)
    (home / "busy").unlink()
    assert [one.wait(60) for one in (first, second)] == [143, 143]
    assert read_json(home / "attempts.json")[-1]["stopped"] == {"step": 3, "reason": "preempted"}


@pytest.mark.parametrize(("reason", "age", "stays"), [
    ("preempted\n", 400, False), ("preempted\n", 200, True), ("a person", 400, True),
])  # fmt: skip
def test_a_pod_takes_away_the_stop_of_one_that_must_be_dead(
    folder: RunFolder, pod, reason: str, age: int, stays: bool
) -> None:
    home = folder.path / "checkpoints/job"
    write_text(home / "busy", "")
    stop.request(home, reason)
    os.utime(home / stop.FILE, (time.time() - age,) * 2)
    pod(0)
    assert (home / stop.FILE).exists() == stays


def test_a_stop_that_a_killed_attempt_left_does_not_end_the_next_one(
    slurm: Path, folder: RunFolder, monkeypatch
) -> None:
    monkeypatch.setattr(launch, "WORKER", "meeting")
    home = folder.path / "checkpoints/job"
    write_text(home / stop.FILE, "preempted\n")
    write_text(home / "job.json", "{}")
    runs.write_json(home / "job.json", launch.describe("job", profile(SLURM), folder, profile(SLURM).max_steps, ()))
    launch.launch("job", profile(SLURM), folder)
    assert not (home / stop.FILE).exists()


def test_without_the_scheduler_it_says_where_to_launch_from(folder: RunFolder, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="squeue is not on the path"):
        launch.launch("job", profile(SLURM), folder)
    with pytest.raises(ValueError, match="kubectl is not on the path"):
        launch.launch("job", profile(KUBERNETES), folder)


@pytest.fixture
def kubectl(slurm: Path) -> Path:
    """Kubernetes on one machine: `apply` starts the pods of the Job, `get` answers as the API does."""
    body = f"""
        import json, os, subprocess, sys, yaml
        from pathlib import Path
        here, verb, jobs = Path({str(slurm)!r}), sys.argv[1], {JOBS!r}
        kept = here / "kubernetes.json"
        with (here / "kubectl.log").open("a") as log:
            print(*sys.argv[1:], file=log)

        def put(job, status):
            kept.with_suffix(".new").write_text(json.dumps(job | {{"status": jobs[status]}}))
            kept.with_suffix(".new").rename(kept)

        if verb == "get":
            assert "--output=json" in sys.argv
            print(kept.read_text() if kept.exists() else "", end="")
        if verb == "delete":
            kept.unlink(missing_ok=True)
        if verb == "apply":
            _, job = yaml.safe_load_all(Path(sys.argv[3]).read_text())
            put(job, "running")
            if os.fork():
                os._exit(0)
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDWR), 1), os.dup2(1, 2)
            line = job["spec"]["template"]["spec"]["containers"][0]["command"]
            pods = [subprocess.Popen(line, env=os.environ | {{"JOB_COMPLETION_INDEX": str(k)}})
                    for k in range(job["spec"]["completions"])]
            put(job, "failed" if any([pod.wait() for pod in pods]) else "complete")
    """
    text = textwrap.dedent(body).strip()
    script(slurm / "bin/tee", f'sleep 0.5; exec {shutil.which("tee")} "$@"')  # it is waited for
    write_text(slurm / "bin/kubectl", f"#!{sys.executable}\n{text}\n").chmod(0o755)
    return slurm


@pytest.mark.parametrize(("status", "there"), [
    ("new", True), ("running", True), ("suspended", True), ("resumed", True), ("complete", False), ("failed", False),
])  # fmt: skip
def test_a_job_of_kubernetes_is_there_until_it_is_complete_or_has_failed(
    kubectl: Path, status: str, there: bool
) -> None:
    p = profile(KUBERNETES)
    assert not clusters.alive(p, "job"), "kubectl says nothing of a Job that there is not"
    write_text(kubectl / "kubernetes.json", json.dumps({"kind": "Job", "status": JOBS[status]}))
    assert clusters.alive(p, "job") == there


def test_a_job_of_this_name_that_was_not_submitted_from_here_is_left_alone(kubectl: Path, folder: RunFolder) -> None:
    """A namespace is shared: it may be a colleague's, who has the same run and profile."""
    p = profile(KUBERNETES, nodes=1, processes=1, fsdp=1, timeout_minutes=0.1)
    home = folder.path / "checkpoints/job"
    write_text(kubectl / "kubernetes.json", json.dumps({"kind": "Job", "status": JOBS["running"]}))
    with pytest.raises(ValueError, match=f"has {clusters.name_of(p, 'job')}, from another profile: wait, or cancel"):
        launch.launch("job", p, folder)
    runs.write_json(home / "job.json", launch.describe("job", p, folder, p.max_steps, []))
    with pytest.raises(ValueError, match=f"another job called {clusters.name_of(p, 'job')}: wait for it, or cancel it"):
        launch.launch("job", p, folder)
    assert {line.split()[0] for line in (kubectl / "kubectl.log").read_text().splitlines()} == {"get"}
    assert not (home / "submitted.json").exists()


def test_a_job_of_kubernetes_is_replaced_followed_and_told_of(
    kubectl: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(launch, "WORKER", "meeting")
    p, home = profile(KUBERNETES, nodes=1, processes=1, fsdp=1), folder.path / "checkpoints/job"
    write_text(kubectl / "kubernetes.json", json.dumps({"kind": "Job", "status": JOBS["failed"]}))  # of before
    assert launch.launch("job", p, folder) == {"sum": 1, "groups": ["-"]}
    asked = [line.split()[0] for line in (kubectl / "kubectl.log").read_text().splitlines()]
    assert asked[:4] == ["get", "get", "delete", "apply"] and {*asked[4:]} <= {"get"}
    assert list(yaml.safe_load_all((home / "launch.yaml").read_text()))[1]["kind"] == "Job"
    assert f"submitted to kubernetes as {clusters.name_of(p, 'job')}\n[job] met\n" in capsys.readouterr().out


def test_a_job_of_kubernetes_that_fails_leaves_the_log_that_its_error_names(
    kubectl: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(launch, "WORKER", "telling")
    p, home = profile(KUBERNETES, nodes=1, processes=1, fsdp=1), folder.path / "checkpoints/job"
    with pytest.raises(RuntimeError, match=r"without a report; its log is checkpoints/job/log\.txt"):
        launch.launch("job", p, folder)
    log = (home / "log.txt").read_text()
    assert log.endswith("ValueError: the end\n"), "tee was cut short"
    told = capsys.readouterr().out
    assert "[job] reads ./corpus of <email>" in told and str(runs.root()) not in told and "step" not in told
    (home / "log.txt").unlink()
    monkeypatch.setattr(clusters, "submit", lambda *_: "71")
    with pytest.raises(RuntimeError, match="it left no log: it never began"):
        launch.launch("job", p, folder)


def test_a_job_that_the_cluster_has_is_not_touched_by_another_profile(
    slurm: Path, folder: RunFolder, monkeypatch
) -> None:
    p, home = patient(slurm, folder, monkeypatch), folder.path / "checkpoints/job"
    before = (home / "job.json").read_bytes()
    for other in ({"seed": 3}, {"layout": p.layout.model_dump() | {"restarts": 5}}):
        with pytest.raises(ValueError, match=r"still has stackpkg-lab-1-job-\w{8}, from another profile"):
            launch.launch("job", params.validate(p.model_dump(mode="json") | other), folder)
    assert (home / "job.json").read_bytes() == before and not list(runs.root().glob("outbox/.previous/*/job"))
    stop.request(home, "the test is over")
    while (home / stop.FILE).exists():  # before the next test takes the folder away
        time.sleep(0.05)


def test_a_job_goes_on_in_another_layout_but_not_with_other_numbers(folder: RunFolder) -> None:
    made = [launch.describe("job", p, folder, 5, ()) for p in (profile(SLURM), profile({}, nodes=1, processes=2))]
    assert made[0]["digest"] == made[1]["digest"] and made[0]["params"] != made[1]["params"]
    other = params.validate(profile({}).model_dump(mode="json") | {"seed": 3})
    assert launch.describe("job", other, folder, 5, ())["digest"] != made[0]["digest"]


@pytest.mark.parametrize("line", [x for x in PAGE.splitlines() if x.startswith("stackpkg ")])
def test_the_page_s_commands_render(line: str) -> None:
    done = CliRunner().invoke(app, line.split()[1:])
    assert done.exit_code == 0, done.output
    p = params.load(REPOSITORY / line.split()[2])
    assert f"--nnodes={p.layout.nodes} " in done.output and f"outbox/{p.run}/checkpoints/train/job.json" in done.output


@pytest.mark.parametrize("block", [x.partition("```")[0] for x in PAGE.split("```yaml\n")[1:]])
def test_the_page_s_profiles_render(block: str, tmp_path: Path) -> None:
    template = yaml.safe_load((REPOSITORY / "params/cluster.yaml").read_text())
    profile_ = write_text(tmp_path / "mine.yaml", yaml.safe_dump(template | yaml.safe_load(block)))
    done = CliRunner().invoke(app, ["launch", str(profile_), "--render"])
    assert done.exit_code == 0, done.output
    assert "#SBATCH --nodes=64" in done.output or "completions: 64" in done.output


def counted(p: Params) -> tuple[str, str, str]:
    """Of the model that a profile starts: parameters, those active for a token, in billions, and gigabytes in fp32."""
    with torch.device("meta"):
        model = models.build(p.model, p.data.vocab_size, 0, p.seed)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    everything, experts = sum(sizes.values()), sum(size for name, size in sizes.items() if ".experts." in name)
    active = everything - experts + experts * model.config.num_experts_per_tok // model.config.num_experts
    return f"{everything / 1e9:.1f}", f"{active / 1e9:.1f}", f"{4 * everything / 1e9:,.0f}"


def test_the_template_s_model_is_what_its_comment_says_and_a_host_can_start_it() -> None:
    path = REPOSITORY / "params/cluster.yaml"
    p, text = params.load(path), path.read_text().replace("\n#", "")
    told = r"([\d.]+) billion(?: parameters)?, ([\d.]+) billion of them active(?: for a token)?\b.*?([\d,]+) GB"
    own = p.model_copy(update={"model": params.Model(kind="stack")})
    assert re.findall(told, text) == [counted(p), counted(own)]
    assert float(counted(p)[2]) < 1000, "more than a host has"
    support.check(p)
