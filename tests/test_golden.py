"""Layouts compute, bit for bit, what is committed; what changes is found, and holds once it is blessed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stackpkg import params, runs
from stackpkg.runs import RunFolder, read_json
from stackpkg.training import golden, support

FEW = 10  # steps, up to the end of the warm-up
FILES = {each: read_json(golden.path(each)) for each in golden.LAYOUTS}


@pytest.fixture(scope="module")
def folder(repository: Path) -> RunFolder:
    return golden.prepare()


def found(folder: RunFolder, layout: str, **changes: dict[str, Any]) -> dict[str, Any]:
    """What the first steps give now, some parameters of some sections changed."""
    p = golden.profile(layout).model_dump(mode="json")
    p |= {name: p[name] | new if isinstance(new, dict) else new for name, new in changes.items()}
    return golden.measure(folder, layout, params.validate(p), FEW)


@pytest.mark.parametrize("layout", ["one process", "fsdp2", "tp2"])
def test_the_first_steps_are_what_they_were(folder: RunFolder, layout: str) -> None:
    now = found(folder, layout)
    assert golden.difference(FILES[layout], now) == ""
    same = FILES[layout]["machine"] == now["machine"]
    assert ("to the last bit" if same else "of another machine or version") in golden.verdict(FILES[layout], now)


@pytest.mark.parametrize(
    ("change", "step"), [({"seed": 18}, None), ({"objectives": {"load_balance": 0.05 + 1e-6}}, FEW)], ids=str
)
def test_a_planted_change_is_found(folder: RunFolder, change: dict[str, Any], step: int | None) -> None:
    before, now = found(folder, "one process"), found(folder, "one process", **change)
    told = golden.difference(before, now)  # both of this machine
    if step is None:
        assert told == "one process: the stream gives other batches, so no loss can be the same"
    else:
        first = next(k for k in range(FEW) if any(before[name][k] != now[name][k] for name in golden.SERIES))
        assert told.startswith(f"one process: step {first + 1}, ") and " golden " in told and ", now " in told


@pytest.mark.slow
@pytest.mark.parametrize("layout", golden.LAYOUTS)
def test_all_steps_are_what_they_were(folder: RunFolder, layout: str) -> None:
    assert golden.difference(FILES[layout], golden.measure(folder, layout, golden.profile(layout))) == ""


# ---- the comparison


def edited(layout: str, series: str, step: int, factor: float, **more: Any) -> dict[str, Any]:
    values = [*FILES[layout][series]]
    values[step - 1] = (float.fromhex(values[step - 1]) * factor).hex()
    return FILES[layout] | {series: values} | more


def test_the_last_bit_of_a_late_step_and_the_weights_count() -> None:
    one = FILES["tp2"]
    told = golden.difference(one, edited("tp2", "grad_norm", 77, 1 + 2**-23))
    assert told.startswith("tp2: step 77, grad_norm: golden ") and one["grad_norm"][76] in told
    assert "weights at the end are not" in golden.difference(one, one | {"weights_sha256": "0"})
    assert "now None" in golden.difference(one, one | {"loss": one["loss"][:50]})


def test_another_instruction_set_is_compared_to_a_tolerance() -> None:
    other = {"machine": FILES["tp2"]["machine"] | {"instructions": "AVX2"}, "weights_sha256": "0"}
    near, far = (edited("tp2", "loss", 3, 1 + x * golden.TOLERANCE, **other) for x in (0.5, 2.0))
    assert golden.difference(FILES["tp2"], near) == ""
    assert "instructions" in golden.verdict(FILES["tp2"], near) and "AVX2" in golden.verdict(FILES["tp2"], near)
    assert golden.difference(FILES["tp2"], far).startswith("tp2: step 3, loss: ")
    nan = edited("tp2", "loss", 3, float("nan"), **other)
    assert golden.difference(FILES["tp2"], nan).startswith("tp2: step 3, loss: ")
    late = edited("tp2", "loss", golden.FIRST + 1, 2.0, **other)
    assert golden.difference(FILES["tp2"], late) == ""  # said in the verdict: only the first steps


def test_losses_are_blessed_with_a_reason_or_not_at_all(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for reason in ("", "  "):
        with pytest.raises(ValueError, match="give the reason"):
            golden.bless(FILES["fsdp2"], reason, tmp_path)
        with pytest.raises(SystemExit):
            golden.main(["--bless", reason])
    assert "needs the reason" in capsys.readouterr().err and not list(tmp_path.iterdir())
    kept = read_json(golden.bless(FILES["fsdp2"], "the clip changed", tmp_path))
    assert kept["blessed"]["reason"] == "the clip changed" and kept["blessed"]["date"] == runs.now()[:10]
    assert golden.difference(FILES["fsdp2"], kept) == ""


def test_the_files_say_all_that_bits_depend_on() -> None:
    assert {golden.path(each) for each in golden.LAYOUTS} == set(golden.FOLDER.iterdir())
    for layout, kept in FILES.items():
        assert kept["layout"] == layout and {len(kept[name]) for name in golden.SERIES} == {golden.STEPS}
        assert kept["machine"].keys() >= {"torch", "transformers", "instructions", "processor", "device"}
        assert kept["blessed"]["reason"] and kept["blessed"]["date"]
        assert float.fromhex(kept["loss"][-1]) < float.fromhex(kept["loss"][0])  # something was learnt
        nan = [k + 1 for k, norm in enumerate(kept["grad_norm"]) if float.fromhex(norm) != float.fromhex(norm)]
        assert nan == [golden.NAN["step"]]
    assert len({kept["batches"] for kept in FILES.values()}) == 1


def test_layouts_part_by_rounding_alone() -> None:
    one = torch.tensor([float.fromhex(loss) for loss in FILES["one process"]["loss"][: golden.FIRST]])
    for layout in golden.LAYOUTS[1:]:
        many = torch.tensor([float.fromhex(loss) for loss in FILES[layout]["loss"][: golden.FIRST]])
        torch.testing.assert_close(many, one, rtol=1e-5, atol=0)
    assert {*golden.LAYOUTS} <= {"one process", *support.LAYOUTS}


# ---- what an attempt records


def test_an_attempt_records_what_is_needed_to_compute_it_again(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    found(folder, "one process")
    home = folder.path / "checkpoints/one-process"
    job, attempt = read_json(home / "job.json"), read_json(home / "attempts.json")[-1]
    kept = attempt["record"]
    assert (kept["seed"], kept["deterministic"], kept["threads"]) == (17, True, 1)
    assert (kept["layout"], kept["processes"], kept["precision"]) == ("one process", 1, "fp32")
    assert kept["data"] == runs.digest(folder.path / "data/manifest.json") and kept["job_digest"] == job["digest"]
    assert kept["machine"]["torch"] == torch.__version__ and kept["machine"]["instructions"]
    monkeypatch.setattr(runs, "root", lambda: Path(runs.__file__).parents[1])  # the checkout that the worker ran
    here = runs.environment()
    assert {name: kept[name] for name in here} == here  # versions, lock, commit, dirty state, cores, memory
