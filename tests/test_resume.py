"""A resume repeats the undisturbed job to the last bit with everything on that has a state of its own, from any step;
Adafactor, whose moments are cut otherwise than their weights, computes in every layout what it does in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stackpkg import params
from stackpkg.training import parity, support

SHARDED = ("fsdp2", "tp2", "fsdp2 + ep2", "pp2")


def job(name: str, model: str, sizes: dict[str, Any], resume: str = "", **more: Any) -> dict[str, Any]:
    """A case that saves behind the training in every step; `more` goes into the profile."""
    p = parity.profile(model, sizes, 1, activation_checkpointing=more.pop("recompute", 0)).model_dump(mode="json")
    p["optimization"] |= more.pop("optimization", {})
    p["model"]["config"] |= more
    return {"name": name, "params": params.validate(p).model_dump(mode="json"), "resume": resume}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    parity.prepare(folder, parity.profile("stackpkg", {}))
    factored, dropout = {"optimization": {"optimizer": "adafactor"}}, {"attention_dropout": 0.1, "recompute": 1}
    layouts = support.LAYOUTS
    mixture = "qwen3_moe", layouts["fsdp2 + ep2"]
    parity.start(folder, [job("alone", "stackpkg", {}, **factored)], 1)
    cases = [job(name, "stackpkg", layouts[name], **factored) for name in SHARDED]
    cases += [job(f"{name} again", "stackpkg", layouts[name], f"{name}/checkpoint-2", **factored) for name in SHARDED]
    cases += [job("all", *mixture, **dropout), job("stored", *mixture, **dropout | {"recompute": 0})]
    cases += [job(f"all from {step}", *mixture, f"all/checkpoint-{step}", **dropout) for step in (1, 2)]
    parity.start(folder, cases, 2)
    return folder


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["seen"][-len(other["seen"]) :] == other["seen"]
    assert all(torch.equal(other["weights"][name], weight) for name, weight in one["weights"].items())


@pytest.mark.parametrize("layout", SHARDED)
def test_adafactor_computes_in_every_layout_what_it_does_alone(lab: Path, layout: str) -> None:
    alone, found = parity.read(lab, "alone", 1), parity.read(lab, layout, 2)
    assert "error" not in found, found
    initial = AutoModelForCausalLM.from_pretrained(lab / "initial/stackpkg", dtype=torch.float32)
    alone["initial"] = dict(initial.named_parameters())
    with torch.no_grad():
        apart = parity.compare(alone, found)
    assert apart["weights"] < 1e-4 and all(apart[name] <= limit for name, limit in support.LIMITS.items()), apart
    same(found, parity.read(lab, f"{layout} again", 2))


@pytest.mark.parametrize("step", [1, 2])
def test_a_resume_repeats_dropout_accumulation_recomputation_and_experts(lab: Path, step: int) -> None:
    whole, again = parity.read(lab, "all", 2), parity.read(lab, f"all from {step}", 2)
    assert "error" not in whole and len(again["seen"]) == parity.STEPS - step
    same(whole, again)
    model = AutoModelForCausalLM.from_pretrained(lab / "initial/qwen3_moe").train()
    first, second = (model(torch.arange(20)[None]).logits for _ in range(2))
    assert not torch.equal(first, second)  # dropout was on


def test_recomputed_layers_give_what_stored_ones_do(lab: Path) -> None:
    same(parity.read(lab, "all", 2), parity.read(lab, "stored", 2))
