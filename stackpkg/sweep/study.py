"""Ask and tell, outside the process group: each trial is a launched job, and any number of workers share a study.

A worker holds a lock for each of its trials. The kernel frees it at the worker's death, so a running trial whose lock
is free was cut off: it is told as failed, and its job is asked again and goes on from its checkpoint.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import optuna
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from stackpkg import runs
from stackpkg.params import Params
from stackpkg.runs import RunFolder, read_json, write_json
from stackpkg.sweep.space import excess, overlay, rung, space, variant
from stackpkg.telemetry.guard import WARM
from stackpkg.training.launch import describe, launch
from stackpkg.training.stop import FILE, TERMINATED, Stopped, request, stopped

LOOK_SECONDS = 0.2
PROFILE = 0  # the trial whose factors are all 1


def hold(folder: RunFolder, what: str, *, patient: bool = False) -> TextIO | None:
    """Lock `what` until the returned file is closed; None when it is held elsewhere and we are not patient."""
    path = runs.root() / "outbox" / ".locks" / f".sweep-{folder.name}-{what}"
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = path.open("a")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if patient else fcntl.LOCK_NB))
    except BlockingIOError:
        stream.close()
        return None
    return stream


@dataclass
class Job:
    """A trial this worker runs: `name` is its launched job, `spec` the digest of what that computes."""

    part: Part
    trial: optuna.Trial
    held: TextIO
    name: str
    spec: str
    p: Params
    faults: list[dict[str, Any]]
    reports: int = 0
    loss: float = math.nan  # the last one reported
    pruned: bool = False


class Part:
    """One study of the sweep: the search, or a list of `arms` (`factors`, `seed`, and what else tells them apart)."""

    def __init__(self, p: Params, folder: RunFolder, name: str, arms: list[dict[str, Any]] | None = None) -> None:
        """Named by the digest of what a trial would compute: results of another profile or corpus don't count."""
        self.p, self.folder, self.name, self.arms = p, folder, name, arms
        base = describe("sweep", variant(p, {}), folder, p.sweep.steps, ())["digest"]
        self.key = hashlib.sha256(f"{base} {space(p)}".encode()).hexdigest()[:16] + f"-{name}"
        ends = [dict(zip(space(p), side, strict=True)) for side in zip(*space(p).values(), strict=True)]
        for factors in ends if arms is None else [arm["factors"] for arm in arms]:
            variant(p, factors)  # a value out of its range is said before anything runs
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with self._alone():
            # Half of the trials go on at a quarter and at a half of the length (asynchronous successive halving,
            # Li et al. 2020, arXiv 1810.05934): no worker waits for another, and no rung is so early that it
            # only sees the warm-up. The median needs more trials before it judges, Hyperband several brackets.
            self.study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(folder / "sweep/journal.log"))),
                study_name=self.key,
                load_if_exists=True,
                pruner=SuccessiveHalvingPruner(min_resource=rung(p), reduction_factor=2),
            )
            known = [trial.user_attrs.get("arm") for trial in self.study.trials]
            if arms is None and not known:  # the first trial is the profile itself
                self.study.enqueue_trial(dict.fromkeys(space(p), 1.0))
            for arm in arms or ():
                if arm not in known:
                    self.study.enqueue_trial({}, user_attrs={"arm": arm})

    def _alone(self) -> TextIO:
        """Whoever changes how many trials there are holds this."""
        stream = hold(self.folder, f"{self.key}.ask", patient=True)
        assert stream
        return stream

    def trials(self) -> list[FrozenTrial]:
        """Trials that ended by themselves, the bad ones too; of arms, those still asked for."""
        ended = self.study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL])
        ended = [trial for trial in ended if trial.state != TrialState.FAIL or "error" in trial.user_attrs]
        return ended if self.arms is None else [trial for trial in ended if trial.user_attrs["arm"] in self.arms]

    @property
    def wanted(self) -> int:
        return self.p.sweep.trials if self.arms is None else len(self.arms)

    def _reap(self) -> None:
        for trial in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            held = hold(self.folder, f"{self.key}-{trial.number}")
            if held:  # nobody lives who runs it
                with held:
                    self.study.tell(trial.number, state=TrialState.FAIL)
                    self.study.enqueue_trial(trial.params, user_attrs=trial.user_attrs)

    def ask(self) -> Job | None:
        """The next trial, held by this worker; None when there is none to give out now."""
        with self._alone():
            self._reap()
            running = self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
            waiting = self.study.get_trials(deepcopy=False, states=[TrialState.WAITING])
            free = bool(waiting) if self.arms is not None else len(self.trials()) + len(running) < self.wanted
            if not free:
                return None
            self.study.sampler = TPESampler(seed=self.p.seed + len(self.study.trials))  # workers draw apart
            trial = self.study.ask()
            held = hold(self.folder, f"{self.key}-{trial.number}")
            assert held
            return self._job(trial, held)

    def _job(self, trial: optuna.Trial, held: TextIO) -> Job:
        arm = trial.user_attrs.get("arm")
        if arm is None:
            factors, seed = {n: trial.suggest_float(n, *span, log=True) for n, span in space(self.p).items()}, None
        else:
            factors, seed = arm["factors"], arm["seed"]
        name = trial.user_attrs.get("job", f"sweep-{self.name}-{trial.number:03d}")
        trial.set_user_attr("job", name)
        (self.folder / f"checkpoints/{name}/{FILE}").unlink(missing_ok=True)  # for a worker that is gone
        p = variant(self.p, factors, seed)
        faults = heat(p.sweep.steps, arm["hot"]) if arm and "hot" in arm else []
        spec = describe(name, p, self.folder, p.sweep.steps, faults)["digest"]
        return Job(self, trial, held, name, spec, p, faults)

    def watch(self, job: Job, alive: bool) -> None:
        """Report the evaluations that are new; ask the job to stop when the pruner gives the trial up."""
        described = self.folder.path / "checkpoints" / job.name / "job.json"
        if not described.exists() or read_json(described)["digest"] != job.spec:
            return  # what lies there is an older job's
        reports = self.folder.matches(f"eval/{job.name}/epoch_*.json")
        for path in reports[job.reports :]:
            report = read_json(path)
            job.loss = float(report["validation_loss"])
            job.trial.report(job.loss, report["step"])
            if self.arms is None and report["step"] < job.p.sweep.steps and job.trial.should_prune():
                job.pruned = True
        if job.pruned and alive and len(reports) > job.reports:
            request(
                described.parent, f"pruned: a validation loss of {job.loss:.4f} is not in the better half at this step"
            )
        job.reports = len(reports)

    def tell(self, job: Job, error: BaseException | None) -> None:
        """The end of a job. A failure or a timeout is a result; any other error is raised. So is the end of all that
        runs here (SIGTERM): the trial is asked again, and goes on."""
        trial, home = job.trial, self.folder.path / "checkpoints" / job.name
        if isinstance(error, Stopped) and job.pruned and math.isfinite(job.loss):
            self.study.tell(trial, state=TrialState.PRUNED)
        elif isinstance(error, Stopped) and (stopped(home) or {}).get("reason") == TERMINATED:
            raise error
        elif isinstance(error, RuntimeError | TimeoutError):
            self._fail(trial, str(error)[-500:])
        elif error:
            raise error
        else:
            self._measure(trial, read_json(self.folder.matches(f"eval/{job.name}/epoch_*.json")[-1]))
        for weights in (path for path in home.glob("*") if path.is_dir()):
            shutil.rmtree(weights)  # log, rows and reports stay; the weights of a trial are of no use

    def _fail(self, trial: optuna.Trial, error: str) -> None:
        trial.set_user_attr("error", error)
        self.study.tell(trial, state=TrialState.FAIL)

    def _measure(self, trial: optuna.Trial, report: dict[str, Any]) -> None:
        loss, broken = float(report["validation_loss"]), excess(self.p, report)
        entropies = [float(layer["entropy"]) for layer in report["router"]]
        trial.set_user_attr("router_entropy", min(entropies, default=None))
        trial.set_user_attr("precision_at_k", float(report["precision_at_k"]))
        for name, value in broken.items():
            trial.set_constraint(name, value)
        if not math.isfinite(loss):
            return self._fail(trial, f"the validation loss is {loss}")
        self.study.tell(trial, loss)
        return None


def feasible(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.COMPLETE and all(value <= 0 for value in trial.constraints.values())


def _work(parts: Iterable[Part]) -> None:
    """Run trials of `parts`, one per core at once, until all that is wanted has ended, here or at another worker."""
    parts, cores = list(parts), os.cpu_count() or 1
    running: dict[Future[Any], Job] = {}
    try:
        with ThreadPoolExecutor(cores) as pool:
            try:
                while True:
                    while len(running) < cores and (job := next(filter(None, (part.ask() for part in parts)), None)):
                        how: dict[str, Any] = {"steps": job.p.sweep.steps, "faults": job.faults, "quiet": True}
                        running[pool.submit(launch, job.name, job.p, job.part.folder, **how)] = job
                    if not running:
                        if all(len(part.trials()) >= part.wanted for part in parts):
                            return
                        time.sleep(LOOK_SECONDS)  # the rest runs at another worker, who may yet die
                    done = wait(running, LOOK_SECONDS, FIRST_COMPLETED).done
                    for future in [*running]:
                        job = running[future]
                        job.part.watch(job, alive=future not in done)
                        if future in done:
                            job.part.tell(job, future.exception())
                            running.pop(future).held.close()
            finally:  # interrupted: what still runs ends with a checkpoint, and is asked again by the next worker
                for job in (job for future, job in running.items() if not future.done()):
                    request(Path(job.part.folder / "checkpoints") / job.name, "the sweep was interrupted")
    finally:
        for job in running.values():
            job.held.close()


def finalists(search: Part) -> list[dict[str, Any]]:
    """Arms of the profile itself and of the best feasible trials, each with the same seeds, none of which the search
    saw: the smallest of many noisy losses is too small.
    """
    p = search.p
    best = sorted(filter(feasible, search.trials()), key=lambda trial: (trial.value, trial.number))
    others = [(trial.number, trial.params) for trial in best if overlay(p, trial.params)]
    chosen, seeds = [(PROFILE, {}), *others[: p.sweep.finalists]], range(p.seed + 1, p.seed + 1 + p.sweep.seeds)
    return [{"of": number, "seed": seed, "factors": factors} for number, factors in chosen for seed in seeds]


def heat(steps: int, factor: float) -> list[dict[str, Any]]:
    """Faults of a run that is sound until the windows of the guardrails are warm, or, where it is shorter, to its
    middle; from there on each update has `factor` times the learning rate."""
    first = min(WARM + 2, steps // 2 + 1)
    return [{"kind": "hot_rate", "step": [*range(first, steps + 1)], "factor": factor}]


def run(p: Params, folder: RunFolder) -> dict[str, Part]:
    """The whole sweep: `search`, `hot` runs of the profile meant to diverge, and `final` runs of the best. What has
    ended is not run again, so a sweep cut off goes on; any number of processes may run it at once.
    """
    write_json(folder / "sweep/params.json", p.model_dump(mode="json"))
    hot = [{"seed": p.seed + k, "factors": {}, "hot": factor} for k, factor in enumerate(p.sweep.hot)]
    parts = [Part(p, folder, "search"), Part(p, folder, "hot", hot)]
    _work(parts)
    parts.append(Part(p, folder, "final", finalists(parts[0])))
    _work(parts[2:])
    return {part.name: part for part in parts}
