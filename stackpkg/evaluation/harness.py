"""Tasks of EleutherAI's lm-evaluation-harness on a model of a run; needs the extra `lm-eval`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import stackpkg.model  # noqa: F401  makes the reference model known to transformers
from stackpkg.data import tokenizer
from stackpkg.model.tokenizer import pretrained
from stackpkg.runs import digest

EXTRA = "lm-evaluation-harness is not installed: pip install 'stackpkg[lm-eval]', best in an environment of its own"


def tasks_in(path: Path) -> dict[str, Path]:
    """Task name -> its file, of one YAML file or of those in a folder. Raises `ValueError` where there is none."""
    files = sorted(path.glob("*.yaml")) if path.is_dir() else [path] * path.is_file()
    named = ((re.search(r"^task: *['\"]?([\w.-]+)", file.read_text(encoding="utf-8"), re.M), file) for file in files)
    found = {name[1]: file for name, file in named if name}
    if not found:
        raise ValueError(f"{path} has no task of the harness: give a YAML file with `task: name`, or a folder of them")
    return found


def measure(model: Path, data: Path, tasks: Path) -> dict[str, Any]:
    """Results by task of a folder of `save_pretrained`, with the tokenizer of the shards below `data`. A task may run
    code that lies beside it, and fetches its data if it names a set of a hub.

    Raises `ValueError` without the extra, or without a task.
    """
    files = tasks_in(tasks)
    try:
        from lm_eval import __version__, simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"{EXTRA} ({error})") from None
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    words = pretrained(tokenizer.of_shards(data))
    known = TaskManager(include_path=str(tasks if tasks.is_dir() else tasks.parent), include_defaults=False)
    asked = HFLM(pretrained=network, backend="causal", tokenizer=words, device="cpu", batch_size=1, max_length=4_096)
    found = simple_evaluate(asked, tasks=list(files), task_manager=known, log_samples=False)
    assert found is not None, "None on the ranks that are not the first alone"
    told = {name: {**found["results"][name], "sha256": digest(file)} for name, file in files.items()}
    return {"harness": __version__, "model_sha256": digest(model), "results": told}
