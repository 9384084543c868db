"""A resume repeats the undisturbed job to the last bit with everything on that has a state of its own, from any step;
Adafactor, whose moments are cut otherwise than their weights, computes in every layout what it does in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stackpkg import params
from stackpkg.training import parity, support, tiny

SHARDED = ("fsdp2", "tp2", "fsdp2 + ep2", "pp2")
MIXED = ("fsdp2 + ep2", "tp2 + ep2", "pp2")


def job(name: str, model: str, sizes: dict[str, Any], resume: str = "", **more: Any) -> dict[str, Any]:
    """A case that saves behind the training in every step; `more` goes into the profile."""
    p = tiny.profile(model, sizes, 1, activation_checkpointing=more.pop("recompute", 0)).model_dump(mode="json")
    p["optimization"] |= more.pop("optimization", {})
    p["model"]["config"] |= more
    return {"name": name, "params": params.validate(p).model_dump(mode="json"), "resume": resume}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    tiny.prepare(folder, tiny.profile("stackpkg", {}))
    factored, dropout = {"optimization": {"optimizer": "adafactor"}}, {"attention_dropout": 0.1, "recompute": 1}
    layouts = support.LAYOUTS
    parity.start(folder, [job("alone", "stackpkg", {}, **factored)], 1)
    cases = [job(name, "stackpkg", layouts[name], **factored) for name in SHARDED]
    cases += [job(f"{name} again", "stackpkg", layouts[name], f"{name}/checkpoint-2", **factored) for name in SHARDED]
    for name in MIXED:
        mixture = "qwen3_moe", layouts[name]
        cases.append(job(f"all {name}", *mixture, **dropout))
        again = (job(f"all {name} {n}", *mixture, f"all {name}/checkpoint-{n}", **dropout) for n in (1, 2))
        cases += [*again, job(f"stored {name}", *mixture, **dropout | {"recompute": 0})]
    parity.start(folder, cases, 2)
    return folder


@pytest.mark.parametrize("layout", SHARDED)
def test_adafactor_computes_in_every_layout_what_it_does_alone(lab: Path, layout: str) -> None:
    alone, found = parity.read(lab, "alone", 1), parity.read(lab, layout, 2)
    assert "error" not in found, found
    first = parity.initial(lab, tiny.profile("stackpkg", {}))
    alone["initial"] = dict(AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32).named_parameters())
    with torch.no_grad():
        apart = parity.compare(alone, found)
    limits = support.LIMITS["fp32"]
    assert apart["weights"] < 1e-4 and all(apart[name] <= limit for name, limit in limits.items()), apart
    assert parity.same(found, parity.read(lab, f"{layout} again", 2))


@pytest.mark.parametrize("layout", MIXED)
@pytest.mark.parametrize("step", [1, 2])
def test_a_resume_repeats_dropout_accumulation_recomputation_and_experts(lab: Path, step: int, layout: str) -> None:
    whole, again = parity.read(lab, f"all {layout}", 2), parity.read(lab, f"all {layout} {step}", 2)
    assert "error" not in whole and len(again["seen"]) == tiny.STEPS - step
    assert parity.same(whole, again)


def test_dropout_is_on(lab: Path) -> None:
    first = parity.initial(lab, params.validate(job("all", "qwen3_moe", {}, attention_dropout=0.1)["params"]))
    model = AutoModelForCausalLM.from_pretrained(first).train()
    first, second = (model(torch.arange(20)[None]).logits for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("layout", MIXED)
def test_recomputed_layers_give_what_stored_ones_do(lab: Path, layout: str) -> None:
    assert parity.same(parity.read(lab, f"all {layout}", 2), parity.read(lab, f"stored {layout}", 2))
