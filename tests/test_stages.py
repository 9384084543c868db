"""Real launches of a model in two pipeline stages: they agree with one process, and with each other after a fault."""

import shutil
from typing import Any

import pandas as pd
import pytest
import torch
from test_training import KILL, NAN, STEPS, Job, compared, history, lab, laden, profile, run, weights
from tiny_models import STACK
from transformers import AutoModelForCausalLM

from stackpkg import params
from stackpkg.params import Layout, Params
from stackpkg.runs import RunFolder, read_json, write_json
from stackpkg.telemetry import rows
from stackpkg.training import launch, layout, stages, support

__all__ = ["lab"]
DEEP: dict[str, Any] = {"accumulation": 2, "config": STACK | {"hidden_size": 32, "num_hidden_layers": 4}}
RIDERS = ["loss_conformance", "loss_preference", "loss_contrastive", "gradient_conformance"]


def staged(p: Params, schedule: str = "1f1b") -> Params:
    spread = {"processes": 2, "pp": 2, "fsdp": 1, "pipeline_schedule": schedule}
    return p.model_copy(update={"layout": p.layout.model_copy(update=spread)})


def taken_over(lab: RunFolder, name: str, p: Params, source: str) -> Job:
    """A job that goes on from what `source` left after step 4."""
    for part in ("initial", "checkpoint-4"):
        shutil.copytree(lab.path / f"checkpoints/{source}/{part}", lab.path / f"checkpoints/{name}/{part}")
    write_json(lab.path / f"checkpoints/{name}/job.json", launch.describe(name, p, lab, STEPS, [NAN]))
    return Job(p, [NAN])


@pytest.fixture(scope="module")
def done(lab: RunFolder) -> dict[str, dict[str, Any]]:
    """One process, two stages, two stages of which one dies, each interrupted by a bad gradient; then each goes on in
    the other's layout."""
    alone, piped = profile(1, **DEEP), staged(profile(1, **DEEP))
    found = run(lab, alone=Job(alone, [NAN]), piped=Job(piped, [NAN]))
    found |= run(lab, piped_killed=Job(piped, [NAN, KILL]))
    return found | run(
        lab,
        narrowed=taken_over(lab, "narrowed", alone, "piped"),
        widened=taken_over(lab, "widened", staged(profile(1, **DEEP), "interleaved"), "alone"),
    )


@pytest.fixture(scope="module")
def carried(lab: RunFolder) -> dict[str, dict[str, Any]]:
    one, two = laden(1, **DEEP), staged(laden(1, **DEEP), "zero_bubble")
    return run(lab, carried_one=Job(one), carried_piped=Job(two)) | run(lab, carried_usual=Job(staged(one)))


def test_two_stages_compute_what_one_process_does(lab: RunFolder, done: dict[str, dict[str, Any]]) -> None:
    left, right = compared(history(lab, "alone")), compared(history(lab, "piped"))
    assert left.index.tolist() == list(range(1, STEPS + 1)) and right.update_skipped.tolist() == [0, 0, 1, 0, 0, 0]
    assert {"loss_language_modelling", "loss_contrastive", "loss_long_range", "loss_load_balance"} <= set(right)
    pd.testing.assert_frame_equal(left, right, rtol=1e-6, check_exact=False)
    assert done["piped"]["weights_sha256"] == done["alone"]["weights_sha256"]  # cutting a model changes no sum
    pd.testing.assert_frame_equal(compared(history(lab, "piped", 1)), right, check_exact=True)  # all ranks say the same
    measured = [
        "attention_entropy_mean",
        "router_entropy_min",
        "validation_loss",
        "precision_at_k",
        "masked_edge_share",
    ]
    one, two = (history(lab, name)[measured].astype(float) for name in ("alone", "piped"))
    assert two.notna().any().all()
    pd.testing.assert_frame_equal(one, two, rtol=1e-6, check_exact=False)
    reports = [read_json(lab.path / f"eval/{name}/epoch_002.json") for name in ("alone", "piped")]
    assert len(reports[1]["router"]) == len(reports[0]["router"]) > 1
    for mine, other in zip(*(report["router"] for report in reports), strict=True):
        assert mine["usage"] == pytest.approx(other["usage"], abs=1e-3)
    assert done["piped"]["parameters"] == done["alone"]["parameters"] and 0.2 < done["piped"]["sharded_share"] < 0.8
    assert rows.missing(pd.read_parquet(lab.path / "telemetry/piped.parquet"), STEPS) == 0


def test_a_stage_that_dies_costs_a_restart_and_nothing_else(lab: RunFolder, done: dict[str, dict[str, Any]]) -> None:
    assert done["piped_killed"]["attempts"] == 2
    assert done["piped_killed"]["weights_sha256"] == done["piped"]["weights_sha256"]
    left, right = compared(history(lab, "piped_killed")), compared(history(lab, "piped"))
    pd.testing.assert_frame_equal(left, right, check_exact=True)


@pytest.mark.parametrize(("name", "source"), [("narrowed", "piped"), ("widened", "alone")])
def test_a_checkpoint_goes_on_with_another_number_of_stages(
    lab: RunFolder, done: dict[str, dict[str, Any]], name: str, source: str
) -> None:
    left, right = compared(history(lab, name)), compared(history(lab, source))
    assert left.index.tolist() == [5, 6] and done[name]["ema_updates"] == STEPS - 1
    pd.testing.assert_frame_equal(left, right.loc[5:, left.columns], rtol=1e-5, check_exact=False)
    for part in ("final", "final_ema"):
        torch.testing.assert_close(weights(lab, name, part), weights(lab, source, part), rtol=1e-4, atol=1e-5)


def test_the_result_of_two_stages_is_one_ordinary_folder(lab: RunFolder, done: dict[str, dict[str, Any]]) -> None:
    home = lab.path / "checkpoints/piped"
    model = AutoModelForCausalLM.from_pretrained(home / "final")
    assert layout.weights_digest(model) == done["piped"]["weights_sha256"]
    one, two = (read_json(lab.path / f"checkpoints/{name}/final/config.json") for name in ("alone", "piped"))
    assert one == two
    assert len(list((home / "final").glob("*.safetensors"))) == 2
    torch.testing.assert_close(weights(lab, "piped", "final_ema"), weights(lab, "alone", "final_ema"))


def test_conversations_preferences_and_pairs_ride_through_a_pipeline(
    lab: RunFolder, carried: dict[str, dict[str, Any]]
) -> None:
    one = history(lab, "carried_one")
    assert one[RIDERS].notna().any().all()
    for name in ("carried_piped", "carried_usual"):
        two = history(lab, name)
        pd.testing.assert_frame_equal(one[RIDERS], two[RIDERS], rtol=1e-5, check_exact=False)
        pd.testing.assert_frame_equal(compared(one), compared(two), rtol=1e-5, atol=1e-7, check_exact=False)
        assert carried[name]["weights_sha256"]
    reports = [read_json(lab.path / f"eval/{name}/epoch_002.json") for name in ("carried_one", "carried_piped")]
    for key in ("violations", "forbidden_probability", "forbidden_attention"):
        assert reports[0][key] == pytest.approx(reports[1][key], rel=1e-4), key


# ---- what is refused


def test_layers_are_cut_evenly_and_not_into_more_stages_than_there_are() -> None:
    assert stages.ranges(7, 3) == [range(3), range(3, 5), range(5, 7)]
    with pytest.raises(ValueError, match=r"2 layers can't be cut into 4 pipeline stages; make layout\.pp smaller"):
        stages.ranges(2, 4)
    assert Layout(processes=4, fsdp=1, pp=2, pipeline_schedule="interleaved").stages == 4


def test_a_tied_embedding_is_refused_before_anything_starts() -> None:
    p = profile(1, kind="auto", config={"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": True})
    with pytest.raises(ValueError, match=r"tie_word_embeddings to false in model\.config, or layout\.pp to 1"):
        support.check(staged(p))


@pytest.mark.parametrize(("schedule", "accumulation"), [("1f1b", 1), ("interleaved", 3), ("zero_bubble", 3)])
def test_too_few_micro_batches_are_refused(schedule: str, accumulation: int) -> None:
    values = staged(profile(1), schedule).model_dump(mode="json")
    values["training"] |= {"accumulation": accumulation, "batch_tokens": 3 * 1024}
    with pytest.raises(ValueError, match=r"needs (at least|a multiple of) layout.pp = 2 micro-batches; raise it, or"):
        params.validate(values)
