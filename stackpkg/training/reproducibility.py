"""What has to be known to compute the same again; recorded for every attempt of a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stackpkg import runs
from stackpkg.params import Params
from stackpkg.training import support


def machine() -> dict[str, str]:
    """What the bits of a sum depend on beside the code: versions, kernels and instruction set. Vendors' libraries
    choose by the name of the processor as well.
    """
    versions = runs.environment()["packages"]
    cuda = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "transformers": versions["transformers"],
        "accelerate": versions["accelerate"],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processor": processor(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


def processor() -> str:
    """The name the processor gives itself, or nothing where the system does not tell."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")


def record(job: dict[str, Any], p: Params) -> dict[str, Any]:
    """What an attempt of `job` (`launch.describe`) with these parameters computes, from what, and on what."""
    return {
        "seed": p.seed,
        "deterministic": p.training.deterministic,
        "precision": p.training.precision,
        "layout": support.name(p.layout),
        "processes": p.layout.processes,
        "threads": torch.get_num_threads(),
        "job_digest": job["digest"],
        "data": job["data"]["manifest.json"],
        "machine": machine(),
        **runs.environment(),
    }
