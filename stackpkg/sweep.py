"""The automated sweep: Optuna asks, a launched job answers. Optuna lives outside the process group (ask and tell)."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from math import isfinite
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from stackpkg.params import Params, validate
from stackpkg.runs import RunFolder, read_json
from stackpkg.training.launch import describe, launch

SPACE = {  # name: low, high of a log-uniform draw, as a multiple of the profile's value
    "optimization.learning_rate": (0.3, 3.0),
    "objectives.contrastive": (0.25, 4.0),
    "objectives.load_balance": (0.25, 4.0),
}


def variant(p: Params, factors: dict[str, float]) -> Params:
    """The profile of one trial: one process, `sweep.steps` steps, one evaluation at the end, values times factors."""
    if p.sweep.steps > p.max_steps:
        raise ValueError(f"sweep.steps {p.sweep.steps} is above the {p.max_steps} steps of the curriculum; give fewer")
    values = p.model_dump()
    for name, factor in factors.items():
        section, key = name.split(".")
        values[section][key] *= factor
    o, steps = values["optimization"], p.sweep.steps
    o["warmup_steps"], o["floor"] = min(o["warmup_steps"], steps // 2), min(o["floor"], o["learning_rate"])
    values["training"] |= {"epoch_steps": steps, "checkpoint_steps": steps}
    values["sweep"]["trials"] = 1  # how many there are is no property of one
    values["layout"] |= {"processes": 1, "nodes": 1, "fsdp": 1}
    return validate(values)


def open_study(p: Params, folder: RunFolder) -> optuna.Study:
    """The study of this profile and corpus, in a journal file that survives a crash; trials cut off are told as failed.

    Its name is the digest of what a trial would compute, so results of another profile are never taken for this one's.
    """
    name = describe("sweep", variant(p, {}), folder, p.sweep.steps, ())["digest"][:16]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(folder / "sweep/journal.log")))
    study = optuna.create_study(
        storage=storage, study_name=name, load_if_exists=True, sampler=optuna.samplers.TPESampler(seed=p.seed)
    )
    for stale in study.get_trials(states=[TrialState.RUNNING]):
        study.tell(stale.number, state=TrialState.FAIL)  # without an error: it was cut off and is asked again
    return study


def answered(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials that ended by themselves: finished, or diverged with their error kept."""
    ended = study.get_trials(states=[TrialState.COMPLETE, TrialState.FAIL])
    return [trial for trial in ended if trial.state == TrialState.COMPLETE or "error" in trial.user_attrs]


def _answer(study: optuna.Study, trial: optuna.Trial, p: Params, folder: RunFolder) -> None:
    factors = {name: trial.suggest_float(name, *span, log=True) for name, span in SPACE.items()}
    name = f"sweep-{trial.number:03d}"
    try:
        launch(name, variant(p, factors), folder, steps=p.sweep.steps, quiet=True)
    except RuntimeError as error:  # a trial that diverges is a result, not an end
        trial.set_user_attr("error", str(error)[-500:])
        study.tell(trial, state=TrialState.FAIL)
        return
    report = read_json(folder.path / "eval" / name / "epoch_001.json")
    if not isfinite(float(report["validation_loss"])):
        trial.set_user_attr("error", "the validation loss is not finite")
    entropies = [float(layer["entropy"]) for layer in report["router"]]  # strict JSON holds "NaN" as a string
    low, high = p.evaluation.entropy_band
    trial.set_user_attr("feasible", all(low <= entropy <= high for entropy in entropies))
    trial.set_user_attr("router_entropy", min(entropies, default=None))
    trial.set_user_attr("precision_at_k", report["precision_at_k"])
    loss = float(report["validation_loss"])
    if math.isnan(loss):  # Optuna takes it for a failure
        trial.set_user_attr("error", "the validation loss is not a number")
    study.tell(trial, loss)


def run(p: Params, folder: RunFolder) -> optuna.Study:
    """Ask until `sweep.trials` trials have ended by themselves, one process each, one per core at once."""
    study = open_study(p, folder)
    while (left := p.sweep.trials - len(answered(study))) > 0:
        batch = [study.ask() for _ in range(min(left, os.cpu_count() or 1))]
        with ThreadPoolExecutor(len(batch)) as pool:
            list(pool.map(lambda trial: _answer(study, trial, p, folder), batch))
    return study


def winner(study: optuna.Study) -> dict[str, Any]:
    """The rule: smallest validation loss among trials whose router entropy stays in its band.

    Raises `ValueError` when no trial is feasible, with what was seen.
    """
    done = study.get_trials(states=[TrialState.COMPLETE])
    feasible = [trial for trial in done if trial.user_attrs["feasible"]]
    if not feasible:
        seen = [trial.user_attrs.get("router_entropy") for trial in done]
        raise ValueError(f"no trial kept the router entropy in its band; seen {seen}; widen the sweep or the band")
    best = min(feasible, key=lambda trial: float("inf") if trial.value is None else trial.value)
    return {"trial": best.number, "validation_loss": best.value, "factors": best.params}
