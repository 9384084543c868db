"""Start a training job from a notebook or a shell. The caller is never a rank: it launches, streams and reads files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from stackpkg import params
from stackpkg.params import Params
from stackpkg.runs import RunFolder, digest, portable, read_json, root, write_json
from stackpkg.telemetry import receivers
from stackpkg.telemetry.exporter import target
from stackpkg.telemetry.privacy import clean
from stackpkg.training import clusters, previous, running, sigterm, support
from stackpkg.training.stop import Stopped, killed, stopped

TETHER, WORKER, EXPORTER = (f"stackpkg.{name}" for name in ("training.tether", "training.worker", "telemetry.exporter"))
# sections of a profile that change nothing of what is computed
WHERE = ("layout", "cluster", "telemetry", "snapshots", "sweep", "governance")
DIAGNOSIS = "diagnosis.json"  # what the end of the recovery ladder leaves
RAISED = re.compile(r"(\[rank\d+\]:\s*)?(?=[\w.]*(Error|RollBack|Failed): )")  # the last line of a traceback


def command(job: str, p: Params) -> list[str]:
    """The command a launch runs: plain Python for one process, torchrun for more, per node when there are several."""
    layout, named = p.layout, "-".join(Path(job).parts[-4:-1:2])  # run and job
    if layout.processes == 1:
        return [sys.executable, "-m", WORKER, job]
    where = [f"--rdzv-endpoint={clusters.HEAD}:29500", f"--rdzv-id={named}"]
    where = ["--standalone"] if layout.nodes == 1 else ["--rdzv-backend=c10d", *where]
    per_node = layout.processes // layout.nodes
    options = [f"--nnodes={layout.nodes}", f"--nproc-per-node={per_node}", f"--max-restarts={layout.restarts}", *where]
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", TETHER, "-m", WORKER, job]


def describe(name: str, p: Params, folder: RunFolder, steps: int, faults: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Everything that decides what the job computes; its digest tells a resume from a new start. Where it runs, and on
    how many processes, is no part of the digest: a job goes on in another layout."""
    files = ["manifest.json", "pairs.parquet", "long_range.parquet"]
    files += ["preferences.parquet"] if any(stage.preferences for stage in p.curriculum) else []
    files += ["conversations.parquet", "scopes.yaml"] if any(stage.conversations for stage in p.curriculum) else []
    data = [folder.path / "data" / file for file in files]
    if missing := [path.name for path in data if not path.exists()]:
        raise ValueError(
            f"outbox/{folder.name}/data lacks {', '.join(missing)}: notebooks 10 to 13 make it; run these first"
        )
    spec: dict[str, Any] = {
        "name": name,
        "params": p.model_dump(mode="json"),
        "steps": steps,
        "faults": list(faults),
        "data": {path.name: digest(path) for path in data},
    }
    computes = spec | {"params": {name: value for name, value in spec["params"].items() if name not in WHERE}}
    spec["digest"] = hashlib.sha256(json.dumps(computes, sort_keys=True).encode()).hexdigest()
    return spec


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What makes the job described `now` another than `before`: `optimization.learning_rate`, `data/manifest.json`."""
    found = []
    for section, value in now["params"].items():
        old = before["params"].get(section)
        if section not in WHERE and value != old:
            whole = not (isinstance(old, dict) and isinstance(value, dict))
            found += [section] if whole else [f"{section}.{key}" for key in value if value[key] != old.get(key)]
    found += [f"data/{name}" for name, sha in now["data"].items() if before["data"].get(name) != sha]
    return found + [name for name in ("steps", "faults") if before[name] != now[name]]


def _same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether both describe one job. A parameter that `before`, of an earlier version, does not have yet was as its
    default says."""
    if before.get("digest") == now["digest"]:
        return True
    try:
        filled = before | {"params": params.validate(before["params"]).model_dump(mode="json")}
    except (KeyError, ValueError):  # it has one that is gone
        return False
    return not differences(filled, now)


def _make_room(name: str, folder: RunFolder, spec: dict[str, Any]) -> list[str]:
    """Set aside what another job of this name left, or the same if it has ended, and take up again what was set aside
    of the job `spec`; what is to be told of it."""
    job, told = folder.path / f"checkpoints/{name}/job.json", []
    before = read_json(job) if job.exists() else {}
    if not before:
        why = "nothing says of which job it is"
    elif _same(before, spec):
        why = "the same job, which has ended"
    else:
        why = f"another job: {', '.join(differences(before, spec)) or 'of another version'}"
    if aside := previous.set_aside(folder, name):
        told.append(f"what was here moves to {aside.relative_to(root()).as_posix()}; {why}")
    if found := previous.take_up(folder, name, lambda other: _same(other, spec)):
        told.append(f"goes on with the checkpoints and rows of {found.relative_to(root()).as_posix()}, the same job")
    return told


def launch(
    name: str,
    p: Params,
    folder: RunFolder,
    *,
    steps: int | None = None,
    faults: Iterable[dict[str, Any]] = (),
    quiet: bool = False,
) -> dict[str, Any]:
    """Run the job `name` to its end and return what it reported (`checkpoints/<name>/done.json`).

    An unfinished job with the same description resumes from its newest whole checkpoint, though another of its name
    took its place meanwhile; anything else starts fresh. What must make room is kept in outbox/.previous (`previous`).
    With `cluster.scheduler` it is submitted and followed; a call made anew follows it again. Without, on several nodes,
    the first call describes the job and raises `ValueError` with the command for every node; once the cluster has
    finished it, the same call returns its report.
    Raises `ValueError` for a layout that was not tested with the model (`support`), for a receiver that is not
    installed, and where the job runs already, or another launch has it (`running`); nothing is changed then. `Stopped`
    with the reason when the job obeyed its stop file, `RuntimeError` with the end of the log when it fails,
    `TimeoutError` past `layout.timeout_minutes`.
    """
    support.check(p)
    clusters.check(p)
    receivers.check(p)
    home = folder.path / "checkpoints" / name
    if why := killed(home):
        raise ValueError(why)
    spec = describe(name, p, folder, steps or p.max_steps, faults)
    with running.claim(home) as alone:
        return _launch(name, p, folder, spec, quiet, alone)


def _launch(
    name: str, p: Params, folder: RunFolder, spec: dict[str, Any], quiet: bool, alone: IO[str]
) -> dict[str, Any]:
    """See `launch`, which gives the lock `alone`: it ends once the job is the cluster's, whose jobs many may follow."""
    home = folder.path / "checkpoints" / name
    job, done = home / "job.json", home / "done.json"
    previous.settle(folder, name)
    same = job.exists() and _same(read_json(job), spec)
    away = p.layout.nodes > 1 or p.cluster.scheduler != "none"
    if away and same and done.exists():
        return read_json(done)  # the cluster has finished the job that an earlier call described
    if p.cluster.scheduler != "none" and clusters.alive(p, clusters.name_of(p, name)):
        if not same or read_json(job)["params"] != spec["params"]:
            raise ValueError(
                f"the cluster still has {clusters.name_of(p, name)}, from another profile: wait, or cancel it"
            )
    else:
        running.await_end(home)
        if done.exists() or not same:
            for line in _make_room(name, folder, spec):
                if not quiet:
                    print(f"[{name}] {line}")
        write_json(job, spec)  # of the same job, the layout that it goes on in
        (home / DIAGNOSIS).unlink(missing_ok=True)
    if away:
        shown = ["python", *command(f"outbox/{folder.name}/checkpoints/{name}/job.json", p)[1:]]
        if p.cluster.scheduler == "none":
            raise ValueError(
                f"{p.layout.nodes} nodes: the job is described; run on every node, from the repository, with HEAD_NODE "
                f"the first of them: {' '.join(shown)}"
            )
        with running.hold(home), _exported(name, p, folder):
            clusters.place(p, name, home, shown)
            alone.close()
            clusters.follow(p, name, home)
    else:
        with running.hold(home), _exported(name, p, folder), sigterm.heeded(home):
            _stream(command(str(job), p), home / "log.txt", p, "" if quiet else f"[{name}]")
    if done.exists() or stopped(home):
        target(folder.path, name).unlink(missing_ok=True)  # nobody is to miss it
    if not done.exists():
        if (home / DIAGNOSIS).exists():
            raise RuntimeError(f"{name}: {read_json(home / DIAGNOSIS)['message']}")
        if end := stopped(home):
            raise Stopped(name, **end)
        log = home / "log.txt"
        left = f"its log is checkpoints/{name}/log.txt" if log.exists() else "it left no log: it never began"
        raise RuntimeError(f"{name}: the job ended without a report; {left}")
    return read_json(done)


@contextmanager
def _exported(name: str, p: Params, folder: RunFolder) -> Iterator[None]:
    """With the exporter beside it, where the profile asks for one: it ends with this block, or with this process."""
    if not p.telemetry.export:
        yield
        return
    following = [sys.executable, "-m", TETHER, "-m", EXPORTER, str(folder.path), name]
    with (folder / f"checkpoints/{name}/exporter.txt").open("w") as said:
        child = subprocess.Popen(following, stdout=said, stderr=said, env=_environment(), start_new_session=True)
    try:
        yield
    finally:
        child.terminate()
        child.wait()


def _environment() -> dict[str, str]:
    paths = filter(None, (str(root()), os.environ.get("PYTHONPATH")))
    return clusters.QUIET | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def _stream(arguments: list[str], log: Path, p: Params, shown: str) -> None:
    """Run to the end; everything goes to `log`, lines that start with `shown` to the reader as well."""
    minutes = p.layout.timeout_minutes
    environment = _environment()
    if not p.model.name_or_path:
        environment["HF_HUB_OFFLINE"] = "1"
    process = subprocess.Popen(
        [arguments[0], "-m", TETHER, *arguments[1:]],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        encoding="utf-8", errors="replace",
    )  # fmt: skip
    late = threading.Event()

    def stop() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(60 * minutes, stop)
    timer.start()
    lines: list[str] = []
    try:
        with log.open("a", encoding="utf-8") as record:
            for line in process.stdout or ():
                line = clean(portable(line))
                record.write(line)
                lines.append(line)
                if shown and line.startswith(shown):
                    print(line, end="", flush=True)
        code = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if late.is_set():
        raise TimeoutError(f"the launch ran longer than layout.timeout_minutes = {minutes:g}; raise it or run less")
    if code:
        end = f"the end of its log:\n{''.join(lines[-30:])}"
        raise RuntimeError(f"the launch failed with exit code {code}{cause(lines)}\n{end}")


def cause(lines: Iterable[str]) -> str:
    """`: ` and what a rank raised last, from a log; torchrun's own report, which comes after it, hides it, and so does
    the lost connection of the ranks that did not raise it. Empty where no rank raised anything."""
    found = [line.strip() for line in lines if RAISED.match(line) and "ChildFailedError" not in line]
    own = [line for line in found if "by peer" not in line] or found
    return f": {RAISED.sub('', own[-1], count=1)}" if own else ""
