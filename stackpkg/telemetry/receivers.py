"""What `telemetry.report_to` may name: installed or refused, and offline unless the environment says otherwise."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from stackpkg.params import Params

ENDS = {"mlflow": "end_run", "trackio": "finish", "wandb": "finish"}
LOCAL = {"WANDB_MODE": "offline", "MLFLOW_DISABLE_TELEMETRY": "true"}


def check(p: Params) -> None:
    """Raises `ValueError` for a receiver that is not installed."""
    if missing := [name for name in p.telemetry.report_to if not find_spec(name)]:
        names = ", ".join(missing)
        raise ValueError(f"telemetry.report_to: {names} is not installed; pip install {names}, or take it out")


def settle(p: Params, run: Path, job: str) -> None:
    """Before the callbacks are made: each receiver writes below `telemetry/<job>.reports` of the run, where the
    environment does not name another place."""
    if not p.telemetry.report_to:
        return
    place = run / "telemetry" / f"{job}.reports"
    homes = {
        "TENSORBOARD_LOGGING_DIR": f"{place}/tensorboard",
        "WANDB_DIR": f"{place}",
        "TRACKIO_DIR": f"{place}/trackio",
    }
    homes["MLFLOW_TRACKING_URI"] = f"sqlite:///{place}/mlflow.db"
    place.mkdir(parents=True, exist_ok=True)
    for name, value in (LOCAL | homes).items():
        os.environ.setdefault(name, value)


def close(p: Params) -> None:
    """On the rank that sends: each receiver keeps what it still holds. A rank leaves by `os._exit`, without the end of
    Python at which W&B (0.31) would write its file.
    """
    for name in ENDS.keys() & {*p.telemetry.report_to}:
        getattr(import_module(name), ENDS[name])()
