"""Layouts compute what one process does: a few with real processes here, all of them in the table launches obey."""

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from stackpkg import params, runs
from stackpkg.params import Layout
from stackpkg.training import launch, parity, support, tiny

FEW = [
    ("fsdp2 + ep2", "stackpkg", "fp32"), ("tp2", "qwen3", "fp32"), ("tp2 + ep2", "stackpkg", "fp32"),
    ("pp2", "llama", "fp32"), ("fsdp2 + ep2", "stackpkg", "bf16"),
]  # fmt: skip
TABLE = runs.read_json(support.TABLE)


def within(rows: list[dict[str, Any]]) -> None:
    assert rows and not [row for row in rows if not support.holds(row)]


def job(name: str, sizes: dict[str, Any], resume: str = "", **training: Any) -> dict[str, Any]:
    p = tiny.profile("stackpkg", sizes, **training)
    return {"name": name, "params": p.model_dump(mode="json"), "resume": resume}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Parity of a few layouts; then a checkpoint of tensor and expert parallel ranks taken over by FSDP2 ranks and by
    one process, and bf16 with and without FSDP2."""
    folder = tmp_path_factory.mktemp("parity")
    rows = list(parity.measure(folder, FEW))
    often, half = {"every_steps": 2}, {"precision": "bf16"}
    first = job("first", support.LAYOUTS["tp2 + ep2"], **often)
    again = job("again", support.LAYOUTS["tp2 + ep2"], "first/checkpoint-2", **often)
    other = job("other", support.LAYOUTS["fsdp2"], "first/checkpoint-2", **often)
    sharded, split = job("sharded", support.LAYOUTS["fsdp2"], **half), job("split", support.LAYOUTS["tp2"], **half)
    parity.start(folder, [first, again, other, sharded, split, job("cut", support.LAYOUTS["pp2"], **half)], 2)
    deep = support.LAYOUTS["pp2 interleaved x fsdp2"]
    parity.start(folder, [job("both", deep, **half), job("deep", deep, "first/checkpoint-2", **often)], 4)
    parity.start(folder, [job("alone", {}, "first/checkpoint-2", **often)], 1)
    return folder, rows


def test_a_few_layouts_compute_what_one_process_does(lab: tuple[Path, list[dict[str, Any]]]) -> None:
    within(lab[1])
    assert len(lab[1]) == len(FEW)


def test_a_checkpoint_is_taken_over_by_any_layout(lab: tuple[Path, list[dict[str, Any]]]) -> None:
    first, again, other = (parity.read(lab[0], name, 2) for name in ("first", "again", "other"))
    alone, deep = parity.read(lab[0], "alone", 1), parity.read(lab[0], "deep", 4)
    assert not [found["error"] for found in (first, again, other, alone, deep) if "error" in found]
    assert len(first["seen"]) == 3 and len(again["seen"]) == 1
    assert again["seen"][-1] == first["seen"][-1]  # the same layout goes on to the last bit
    assert all(torch.equal(again["weights"][name], weight) for name, weight in first["weights"].items())
    for found in (other, alone, deep):
        assert found["seen"][-1] == pytest.approx(first["seen"][-1], rel=1e-5)
        assert found["evaluated"]["eval_loss"] == pytest.approx(first["evaluated"]["eval_loss"], rel=1e-5)


def test_bf16_computes_nearly_the_same_on_fp32_weights(lab: tuple[Path, list[dict[str, Any]]]) -> None:
    alone = parity.read(lab[0], "one-stackpkg-fp32", 1)["gradients"]
    names, whole = list(alone), torch.cat([gradient.flatten() for gradient in alone.values()])
    for name, processes in (("sharded", 2), ("split", 2), ("cut", 2), ("both", 4)):
        found = parity.read(lab[0], name, processes)
        assert "error" not in found, found
        assert {weight.dtype for weight in found["weights"].values()} == {torch.float32}
        grads = torch.cat([found["gradients"][weight].flatten() for weight in names])
        assert grads.dtype is torch.float32 and not torch.equal(grads, whole)  # something was rounded
        assert float(torch.cosine_similarity(grads, whole, dim=0)) > 0.99, name


# ---- the table


@pytest.mark.parametrize(
    "wrong", [{"norm": 5.0}, {"average": float("nan")}, {"repeats": False}, {"error": "RuntimeError"}], ids=str
)
def test_a_row_that_is_off_in_anything_does_not_hold(wrong: dict[str, Any]) -> None:
    assert support.holds(TABLE["rows"][0]) and not support.holds(TABLE["rows"][0] | wrong)


def test_a_difference_that_is_no_number_is_the_largest() -> None:
    grads = {"a": torch.ones(3), "b": torch.ones(3)}
    one = {"seen": [[1.0, 1.0, 1.0]], "gradients": grads, "evaluated": {"eval_loss": 1.0}}
    one |= {"weights": grads, "averages": grads, "initial": {name: torch.zeros(3) for name in grads}}
    broken = one | {"gradients": grads | {"b": torch.full((3,), torch.nan)}}
    assert parity.compare(one, one)["gradient"] == 0 and parity.compare(one, broken)["gradient"] != 0


@pytest.mark.parametrize(
    ("layout", "more", "told"),
    [
        ("fsdp2 x tp2", {"moe_intermediate_size": 24}, "moe_intermediate_size 24: .* each of 2 .* a multiple of 16"),
        ("fsdp2", {"moe_intermediate_size": 20}, "moe_intermediate_size 20: .* a multiple of 8"),
        ("fsdp2", {"hidden_size": 36}, "hidden_size 36: .* a multiple of 8"),
        ("fsdp2 x tp2 + ep4", {"moe_intermediate_size": 24}, ""),
    ],
)
def test_experts_that_bf16_can_not_multiply_are_refused(layout: str, more: dict[str, int], told: str) -> None:
    p = tiny.profile("stackpkg", support.LAYOUTS[layout]).model_dump()
    p["model"]["config"] |= more
    support.check(params.validate(p))
    p["training"]["precision"] = "bf16"
    with pytest.raises(ValueError, match=told) if told else nullcontext():
        support.check(params.validate(p))


def test_bf16_asks_for_a_row_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    p = tiny.profile("llama", support.LAYOUTS["tp2"], precision="bf16")
    support.check(p)
    exact = [row for row in TABLE["rows"] if (row["layout"], row["precision"]) != ("tp2", "bf16")]
    monkeypatch.setattr(support, "TABLE", runs.write_json(tmp_path / "support.json", TABLE | {"rows": exact}))
    support.check(tiny.profile("llama", support.LAYOUTS["tp2"]))
    with pytest.raises(ValueError, match=r"tp2 was not tested with llama in bf16, .* nearest that holds: "):
        support.check(p)


@pytest.mark.parametrize("model", ["llama", "qwen3", "stackpkg"])
def test_tied_embeddings_ask_for_a_row_of_a_model_that_has_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str
) -> None:
    """As well as for a row of the model itself."""

    def tied(layout: str, **training: Any) -> params.Params:
        p = tiny.profile(model, support.LAYOUTS[layout], **training).model_dump()
        p["model"]["config"]["tie_word_embeddings"] = True
        return params.validate(p)

    for layout in ("fsdp2", "tp2", "fsdp2 x tp2"):
        support.check(tied(layout))
        support.check(tied(layout, precision="bf16") if model != "stackpkg" else tied(layout))
    with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
        support.check(tied("pp2"))
    for gone, told in ((support.TIED, "tied embeddings"), (model, model)):
        kept = [row for row in TABLE["rows"] if row["layout"] != "tp2" or not row["model"].endswith(gone)]
        monkeypatch.setattr(support, "TABLE", runs.write_json(tmp_path / "support.json", TABLE | {"rows": kept}))
        with pytest.raises(ValueError, match=f"tp2 was not tested with {told} in fp32, .* nearest that holds: "):
            support.check(tied("tp2"))
        support.check(tied("fsdp2"))


def test_other_versions_than_the_table_s_are_told_and_not_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    p, built = tiny.profile("llama", support.LAYOUTS["tp2"]), support.versions()["torch"].partition("+")[0]
    for torch_version, told in (("2.12.1", f"torch {built}.*, measured with 2.12.1. .* -m stackpkg.training.parity"),
                                (built + "+cu130", "")):  # fmt: skip
        table = TABLE | {"versions": TABLE["versions"] | {"torch": torch_version}}
        monkeypatch.setattr(support, "TABLE", runs.write_json(tmp_path / "support.json", table))
        with pytest.warns(UserWarning, match=told) if told else warnings.catch_warnings(action="error"):
            support.check(p)
        support.check(tiny.profile("llama", {}))  # one process agrees with itself


def test_the_table_holds_every_case_of_these_versions() -> None:
    assert TABLE["versions"].keys() == support.versions().keys() and not support.changed(TABLE["versions"])
    assert {*map(support.case, TABLE["rows"])} == set(support.cases(tiny.MODELS, tiny.DENSE))
    within(TABLE["rows"])
    assert TABLE["limits"] == support.LIMITS


@pytest.mark.parametrize(
    ("sizes", "model", "near"),
    [
        ({"processes": 8, "fsdp": 1, "tp": 4, "ep": 8}, "stackpkg", None),
        ({"processes": 16, "fsdp": 4, "tp": 2}, "opt", "replicas2 x fsdp2 x tp2"),
        ({"processes": 8, "fsdp": 2, "tp": 2, "ep": 4}, "llama", "replicas2 x fsdp2 x tp2 with llama"),
        ({"processes": 4, "fsdp": 2, "tp": 2, "ep": 2}, "qwen3", "fsdp2 x tp2 with qwen3"),
        ({"processes": 4, "fsdp": 1, "tp": 2, "pp": 2, "pipeline_schedule": "gpipe"}, "llama", "pp2 gpipe with llama"),
    ],
)
def test_what_was_not_tested_is_refused_with_the_nearest_that_was(
    repository: Path, sizes: Any, model: str, near: str | None
) -> None:
    if near is None:  # not even a layout
        with pytest.raises(ValueError, match="divide fsdp x tp"):
            params.validate({"layout": sizes})
        return
    config = {"kind": "auto", "config": {"model_type": model}}
    p = params.validate({"layout": sizes, "model": config, "training": {"batch_tokens": 8192, "accumulation": 2}})
    with pytest.raises(ValueError, match=f"nearest that holds: {near}"):
        launch.launch("never", p, runs.RunFolder("never"), quiet=True)


def test_a_larger_layout_of_tested_kinds_is_let_through() -> None:
    for sizes in ({"processes": 512, "fsdp": 64}, {"processes": 256, "fsdp": 8, "tp": 8, "ep": 64}):
        support.check(params.validate({"layout": sizes, "training": {"batch_tokens": 64 * 8192}}))
    assert support.name(Layout(processes=16, fsdp=4, tp=2, ep=4)) == "replicas2 x fsdp4 x tp2 + ep4"
    assert (
        support.name(Layout(processes=16, pp=4, fsdp=2, pipeline_schedule="gpipe")) == "pp4 gpipe x replicas2 x fsdp2"
    )


@pytest.mark.slow
def test_the_whole_matrix(tmp_path: Path) -> None:
    within(list(parity.measure(tmp_path, support.cases(tiny.MODELS, tiny.DENSE))))
