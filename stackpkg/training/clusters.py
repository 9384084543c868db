"""A job on a cluster: a Slurm script or a Kubernetes manifest from the profile, submitted and followed.

Kubernetes gets a plain indexed Job, whose interface is stable and needs no operator. Neither form holds a value of the
caller's environment, so no secret gets into it. The repository, with its `outbox/`, is on a file system that all nodes
share.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from stackpkg import runs
from stackpkg.params import Params
from stackpkg.runs import portable, read_json, write_json, write_text
from stackpkg.telemetry.privacy import clean
from stackpkg.training import stop
from stackpkg.training.stop import PREEMPTED

HEAD = "$HEAD_NODE"  # stands in a command for the address of the first node
# By itself glibc hands blocks above 32 MiB back to the kernel, and takes them again page by page at every step: a layer
# of 32,768 tokens took 1.7 times as long (benchmarks/attention.py).
KEPT = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296"}
QUIET = KEPT | {
    "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1",
}  # fmt: skip
EARLY = 60  # seconds that Slurm may tell of the end of a job's time too early (sbatch, --signal)
POLL = 5.0  # seconds between two looks at a job
ANSWER = 120  # seconds in which a command of the scheduler must end
PATIENCE = 300.0  # seconds without an answer of the scheduler after which a job is followed no longer
SUBMITTED = "submitted.json"  # the cluster's id of a job, in its folder


def name_of(p: Params, name: str) -> str:
    """What the cluster calls the job: letters, digits and hyphens (RFC 1123), and the beginning of a digest, which
    tells `lab_1` from `lab-1`, and jobs whose names are cut from each other."""
    said = re.sub(r"[^a-z0-9]+", "-", f"stackpkg-{p.run}-{name}".lower())[:43].strip("-")
    return f"{said}-{hashlib.sha256(f'{p.run}/{name}'.encode()).hexdigest()[:8]}"


def check(p: Params) -> None:
    """Raises `ValueError` for a profile that its scheduler can't run well."""
    cluster, minutes, grace = p.cluster, p.layout.timeout_minutes, p.cluster.grace_seconds
    if cluster.scheduler == "slurm" and 60 * minutes <= grace + EARLY:
        raise ValueError(
            f"layout.timeout_minutes {minutes:g} leaves nothing above cluster.grace_seconds {grace}: Slurm may tell "
            "the job to stop as soon as it starts, each time anew; give more minutes than "
            f"{(grace + EARLY) / 60:g}, or a shorter grace"
        )
    if cluster.scheduler == "kubernetes" and not (cluster.image and cluster.claim):
        raise ValueError(
            "kubernetes needs cluster.image, which has the environment, and cluster.claim, a volume claim "
            "that holds the repository; give both"
        )


def _patient(line: str) -> list[str]:
    """Shell that runs `line`, and on SIGTERM asks the job for its own stop instead of killing it: torchrun would kill
    ranks in the middle of a step, this way all of them agree on one checkpoint. A stop that a person asked for stays.
    """
    return [
        f"""trap '[ -e "$home/stop" ] || echo {PREEMPTED} > "$home/stop"' TERM""",
        f"{line} &", "job=$!",
        'while :; do wait "$job" && code=0 || code=$?; kill -0 "$job" 2>/dev/null || break; done',
        'wait "$job" && code=0 || code=$?',  # the trap may have cut the last wait short
    ]  # fmt: skip


# whether the job wants to go on; all ranks of it have ended
ASK = 'if [ "$code" = 0 ]; then python -m stackpkg.training.stop "$home" || code=$?; fi'


def slurm(p: Params, name: str, command: Sequence[str]) -> str:
    """A batch script that runs `command` on every node. Before a preemption, or the end of its time, Slurm tells the
    tasks, not the script; the job stops whole, and the script queues it again.
    """
    cluster, home = p.cluster, f"outbox/{p.run}/checkpoints/{name}"
    # --exclusive: whole nodes. By itself Slurm gives a task one CPU, and all ranks of a node are children of one task
    options = {
        "job-name": name_of(p, name), "nodes": p.layout.nodes, "ntasks-per-node": 1,
        "gpus-per-node": cluster.gpus_per_node, "time": math.ceil(p.layout.timeout_minutes),
        "partition": cluster.partition, "account": cluster.account, "signal": f"TERM@{cluster.grace_seconds}",
        "open-mode": "append", "output": f"{home}/log.txt",
    }  # fmt: skip
    heads = [f"#SBATCH --{key}={value}" for key, value in options.items() if value]
    line = " ".join(f'"{part}"' if HEAD in part else shlex.quote(part) for part in command)
    return "\n".join([
        "#!/bin/bash", *heads, "#SBATCH --exclusive", "#SBATCH --requeue", "set -euo pipefail",
        'cd "$SLURM_SUBMIT_DIR"',
        *(f"export {key}={value}" for key, value in QUIET.items()),
        'export HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"export home={shlex.quote(home)}",
        f'if grep -qsx {PREEMPTED} "$home/stop"; then rm "$home/stop"; fi  # of an attempt that was killed too early',
        "task=$(cat <<'TASK'", *_patient(line), 'exit "$code"', "TASK", ")",
        'srun --kill-on-bad-exit=1 bash -c "$task" && code=0 || code=$?',
        ASK, f'if [ "$code" = {stop.AGAIN} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
        'exit "$code"', "",
    ])  # fmt: skip


def kubernetes(p: Params, name: str, command: Sequence[str]) -> str:
    """A headless Service and an indexed Job of one pod a node. When a pod is preempted the job stops whole: all pods
    exit with 143, which counts for no failure, and those that take their places go on from the checkpoint. A stop that
    a person asked for ends the Job. Pod 0, which has rank 0, keeps the log.

    A pod that starts leaves the stop of another that is being preempted: rank 0 may not have seen it yet. Past the
    grace that one is dead, and the stop is of no use.
    """
    cluster, called, nodes = p.cluster, name_of(p, name), p.layout.nodes
    line = shlex.join(part.replace(HEAD, f"{called}-0.{called}") for part in command)
    script = [
        f"home={shlex.quote(f'outbox/{p.run}/checkpoints/{name}')} log=",
        'if [ "$JOB_COMPLETION_INDEX" = 0 ]; then exec > >(tee -a "$home/log.txt") 2>&1; log=$!; fi',
        f'find "$home" -maxdepth 1 -name {stop.FILE} -mmin +{cluster.grace_seconds / 60:g} '
        f"-exec grep -qx {PREEMPTED} {{}} \\; -delete  # of a pod that is dead by now",
        *_patient(line), ASK,
        'if [ -n "$log" ]; then exec >&- 2>&-; wait "$log"; fi  # for its last lines',
        'exit "$code"',
    ]  # fmt: skip
    volumes = {"repository": {"persistentVolumeClaim": {"claimName": cluster.claim}},
               "shm": {"emptyDir": {"medium": "Memory"}}}  # fmt: skip
    mounts = {"repository": "/repository", "shm": "/dev/shm"}  # noqa: S108  NCCL's shared memory
    pod: dict[str, Any] = {
        "subdomain": called, "restartPolicy": "Never", "terminationGracePeriodSeconds": cluster.grace_seconds,
        "containers": [{
            "name": "node", "image": cluster.image, "workingDir": mounts["repository"],
            "command": ["bash", "-c", "\n".join(script)],
            "env": [{"name": key, "value": value} for key, value in QUIET.items()],
            "resources": {"limits": {"nvidia.com/gpu": cluster.gpus_per_node}} if cluster.gpus_per_node else {},
            "volumeMounts": [{"name": volume, "mountPath": path} for volume, path in mounts.items()],
        }],
        "volumes": [{"name": volume, **source} for volume, source in volumes.items()],
    }  # fmt: skip
    job = {
        "completionMode": "Indexed", "completions": nodes, "parallelism": nodes,
        "backoffLimit": nodes * p.layout.restarts,
        "podFailurePolicy": {"rules": [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
            {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [stop.AGAIN]}},
        ]},
        "template": {"metadata": {"labels": {"app": called}}, "spec": pod},
    }  # fmt: skip
    service = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"app": called}}
    return yaml.safe_dump_all(
        [
            {"apiVersion": "v1", "kind": "Service", "metadata": {"name": called}, "spec": service},
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": called}, "spec": job},
        ],
        sort_keys=False,
    )


def render(p: Params, name: str, command: Sequence[str]) -> str:
    """What is submitted. Raises `ValueError` for a profile that names no scheduler."""
    if p.cluster.scheduler == "none":
        raise ValueError("cluster.scheduler is none; give slurm or kubernetes")
    check(p)
    return (slurm if p.cluster.scheduler == "slurm" else kubernetes)(p, name, command)


def _ask(*command: str) -> str:
    """What a command of the scheduler says. Raises `ValueError` where there is none, `RuntimeError` where it fails or
    does not end."""
    if not shutil.which(command[0]):
        raise ValueError(f"{command[0]} is not on the path: launch from a machine that may submit, or set cluster")
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=runs.root(), timeout=ANSWER)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{' '.join(command)} failed: no answer in {ANSWER} s") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def submit(p: Params, name: str, home: Path, command: Sequence[str]) -> str:
    """Write the script or manifest into the job's folder and submit it; the cluster's id of the job."""
    if p.cluster.scheduler == "slurm":
        script = write_text(home / "launch.sbatch", render(p, name, command))
        return _ask("sbatch", "--parsable", str(script)).partition(";")[0]
    manifest = write_text(home / "launch.yaml", render(p, name, command))
    _ask("kubectl", "delete", "job", name_of(p, name), "--ignore-not-found", "--wait")  # a Job can't be changed
    _ask("kubectl", "apply", "--filename", str(manifest))
    return name_of(p, name)


def alive(p: Params, job: str) -> bool:
    """Whether the cluster still has the job, waiting or running. On Slurm those of other people don't count: their
    names may be the same."""
    if p.cluster.scheduler == "slurm":
        return bool(_ask("squeue", "--noheader", "--me", "--format=%T", f"--name={job}"))
    found = _ask("kubectl", "get", "job", job, "--ignore-not-found", "--output=json")
    conditions = json.loads(found)["status"].get("conditions", []) if found else []
    ended = any(one["type"] in ("Complete", "Failed") and one["status"] == "True" for one in conditions)
    return bool(found) and not ended


def place(p: Params, name: str, home: Path, command: Sequence[str]) -> None:
    """Submit the job, unless the cluster has it still. Raises `ValueError` where it has one of this name that was not
    submitted from here."""
    called, known = name_of(p, name), home / SUBMITTED
    if not alive(p, called):
        job = submit(p, name, home, command)
        write_json(known, {"scheduler": p.cluster.scheduler, "id": job})
        print(f"[{name}] submitted to {p.cluster.scheduler} as {job}", flush=True)
    elif not known.exists():
        raise ValueError(f"the cluster still has another job called {called}: wait for it, or cancel it")


def follow(p: Params, name: str, home: Path) -> None:
    """Wait until the report of a job is there, or the cluster has it no more. Lines of its log that the job means to be
    read are printed.

    A scheduler that does not answer is asked again. Raises `RuntimeError` when it does not for `PATIENCE` seconds, and
    `TimeoutError` past `layout.timeout_minutes`; the cluster then goes on, and another call follows it again.
    """
    called, answered, silent = name_of(p, name), time.monotonic(), False
    deadline, log, shown = time.monotonic() + 60 * p.layout.timeout_minutes, home / "log.txt", 0
    while True:
        try:
            over = (home / "done.json").exists() or not alive(p, called)
            answered, silent = time.monotonic(), False
        except RuntimeError as error:
            if time.monotonic() - answered > PATIENCE:
                raise RuntimeError(
                    f"{error}; so for {PATIENCE / 60:g} minutes. {name} may still be on the cluster: the same launch "
                    "follows it again"
                ) from None
            if not silent:
                print(f"[{name}] {clean(portable(str(error)))}; asked again, the job is not touched", flush=True)
            over, silent = False, True
        said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        lines = said.splitlines(keepends=True)
        lines = lines[: len(lines) - bool(said and not said.endswith("\n"))]  # the last may be on its way
        told = [line for line in lines[shown:] if line.startswith(f"[{name}]")]
        print("".join(clean(portable(line)) for line in told), end="", flush=True)
        shown = len(lines)
        if over:
            return
        if time.monotonic() > deadline:
            job = read_json(home / SUBMITTED)["id"]
            raise TimeoutError(f"{name} is still on the cluster, as {job}; the same launch follows it again")
        time.sleep(POLL)
