"""Slurm and Kubernetes: what is rendered, and real jobs driven through stand-ins for the schedulers' commands."""

import os
import shutil
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from stackpkg import params, runs
from stackpkg.cli import app
from stackpkg.params import Params
from stackpkg.runs import RunFolder, read_json, write_text
from stackpkg.training import clusters, launch, stop

REPOSITORY = Path(__file__).parents[1]
GOLDEN, PAGE = Path(__file__).parent / "golden_launch", (REPOSITORY / "book/launching.md").read_text()
SLURM = {"scheduler": "slurm", "gpus_per_node": 8, "partition": "train", "account": "lab"}
KUBERNETES = {"scheduler": "kubernetes", "gpus_per_node": 8, "image": "registry.example/stackpkg:1", "claim": "lab"}
# Slurm on one machine: a batch script is a process, and every node of its job is this one.
FAKES = {
    "sbatch": """
        script=${@: -1}; nodes=$(sed -n 's/^#SBATCH --nodes=//p' "$script")
        echo "$@" >> "$SLURM/sbatch.log"
        export SLURM_JOB_ID=71 SLURM_JOB_NODELIST=here SLURM_SUBMIT_DIR=$PWD SLURM_NNODES=$nodes
        log=$(sed -n 's/^#SBATCH --output=//p' "$script")
        setsid bash "$script" >> "$log" 2>&1 < /dev/null &
        echo $! > "$SLURM/pid"
        echo "71;cluster"
    """,
    "squeue": """kill -0 "$(cat "$SLURM/pid" 2>/dev/null)" 2>/dev/null && echo RUNNING; true""",
    "scontrol": """case $1 in show) echo localhost ;; *) echo "$@" >> "$SLURM/scontrol.log" ;; esac""",
    "srun": """
        shift
        for node in $(seq "$SLURM_NNODES"); do "$@" & pids="${pids:-} $!"; done
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
        dist.all_gather_object(hosts, os.environ["GROUP_RANK"])
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
    # trains until it is asked to stop; the first node's tells the others
    "patient": """
        from stackpkg import runs
        from stackpkg.training import stop
        first = os.environ.get("NODE", "0") == "0"
        if first:
            runs.write_json(home / "attempts.json", [{"at": "now"}])
        while not (stop.stopped(home) or first and (home / "stop").exists()):
            time.sleep(0.05)
        if first:
            print("[job] stopped:", stop.record(home, 3), flush=True)
    """,
}


def profile(cluster: dict, nodes: int = 2, processes: int = 4, **layout: float) -> Params:
    made = {"processes": processes, "nodes": nodes, "fsdp": 2, "restarts": 1, "timeout_minutes": 6.0} | layout
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


@pytest.fixture
def slurm(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, body in FAKES.items():
        path = write_text(tmp_path / "bin" / name, "#!/bin/bash\n" + textwrap.dedent(body))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
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
    assert service["metadata"]["name"] == job["metadata"]["name"] == "stackpkg-lab-1-train"
    spec = job["spec"]["template"]["spec"]
    assert spec["subdomain"] == service["metadata"]["name"]  # what gives the first pod the name in the command
    bash = spec["containers"][0]["command"]
    assert "--rdzv-endpoint=stackpkg-lab-1-train-0.stackpkg-lab-1-train:29500" in bash[2]
    subprocess.run(["bash", "-n"], input=bash[2], text=True, check=True)
    assert {m["name"] for m in spec["containers"][0]["volumeMounts"]} == {v["name"] for v in spec["volumes"]}
    with pytest.raises(ValueError, match=r"cluster\.image"):
        clusters.render(profile({"scheduler": "kubernetes"}), "train", command)
    with pytest.raises(ValueError, match="slurm or kubernetes"):
        clusters.render(profile({}), "train", command)


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
    assert launch.launch("job", profile(SLURM, timeout_minutes=4.0), folder) == {"sum": 4}
    assert (folder.path / "checkpoints/job/died").exists()


def test_a_preempted_job_stops_whole_and_stands_in_the_queue_again(slurm: Path, folder: RunFolder, monkeypatch) -> None:
    monkeypatch.setattr(launch, "WORKER", "patient")
    p, home = profile(SLURM, nodes=1, processes=1, fsdp=1, timeout_minutes=0.1), folder.path / "checkpoints/job"
    with pytest.raises(TimeoutError, match="still on the cluster, as 71"):
        launch.launch("job", p, folder)
    with pytest.raises(TimeoutError):
        launch.launch("job", p, folder)
    assert len((slurm / "sbatch.log").read_text().splitlines()) == 1, "a job that is there is followed, not submitted"
    subprocess.run(["kill", "-TERM", (slurm / "pid").read_text().strip()], check=True)  # what Slurm's --signal=B: does
    with pytest.raises(launch.Stopped, match="after step 3: preempted"):
        launch.launch("job", p, folder)
    assert (slurm / "scontrol.log").read_text().split() == ["requeue", "71"] and not (home / stop.FILE).exists()


@pytest.mark.parametrize(("ends", "code"), [("preempted", 143), ("a person", 0)])
def test_all_pods_of_a_preempted_job_ask_to_be_replaced(
    folder: RunFolder, repository: Path, ends: str, code: int
) -> None:
    home = folder.path / "checkpoints/job"
    write_text(home / "job.json", "{}")
    command = [sys.executable, "-m", "patient", "outbox/lab_1/checkpoints/job/job.json"]
    made = clusters.render(profile(KUBERNETES, nodes=1, processes=1, fsdp=1), "job", command)
    pod = list(yaml.safe_load_all(made))[1]["spec"]["template"]["spec"]["containers"][0]["command"]
    environment = os.environ | {"PYTHONPATH": f"{repository}:{Path(params.__file__).parents[1]}"}
    pods = [subprocess.Popen(pod, cwd=repository, env=environment | {"NODE": str(k)}) for k in range(2)]
    while not (home / "attempts.json").exists():  # its shell traps the signal by then
        time.sleep(0.05)
    if ends == "preempted":
        pods[0].terminate()  # the other hears of it from the job alone
    else:
        stop.request(home, ends)
    assert [one.wait(60) for one in pods] == [code, code]
    assert read_json(home / "attempts.json")[-1]["stopped"] == {"step": 3, "reason": ends}


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


def test_kubectl_is_asked_to_replace_the_job_and_told_of_its_end(
    slurm: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = folder.path / "checkpoints/job"
    body = f"""
        echo "$@" >> "$SLURM/kubectl.log"
        case $1 in apply) echo '{{"steps": 1}}' > "{home}/done.json" ;; esac
    """
    path = write_text(slurm / "bin/kubectl", "#!/bin/bash\n" + textwrap.dedent(body))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    assert launch.launch("job", profile(KUBERNETES), folder) == {"steps": 1}
    asked = [line.split()[0] for line in (slurm / "kubectl.log").read_text().splitlines()]
    assert asked == ["get", "get", "delete", "apply"]
    assert list(yaml.safe_load_all((home / "launch.yaml").read_text()))[1]["kind"] == "Job"


def test_a_job_that_the_cluster_has_is_not_touched_by_another_profile(
    slurm: Path, folder: RunFolder, monkeypatch
) -> None:
    monkeypatch.setattr(launch, "WORKER", "patient")
    p, home = profile(SLURM, nodes=1, processes=1, fsdp=1, timeout_minutes=0.1), folder.path / "checkpoints/job"
    with pytest.raises(TimeoutError):
        launch.launch("job", p, folder)
    before = (home / "job.json").read_bytes()
    for other in ({"seed": 3}, {"layout": p.layout.model_dump() | {"restarts": 5}}):
        with pytest.raises(ValueError, match="still has stackpkg-lab-1-job, from another profile"):
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
