"""Real launches of a tiny model on real text: layouts agree, faults leave no trace, checkpoints fit any layout."""

import json
import math
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import LLAMA, QWEN, STACK
from transformers import AutoModelForCausalLM, AutoTokenizer

from stackpkg import params, runs
from stackpkg.data import (
    curriculum,
    provenance,
    shards,
    tokenizer,
)
from stackpkg.data import manifest as versions
from stackpkg.data.corpus import Corpus
from stackpkg.data.ledger import Ledger
from stackpkg.data.schedule import Schedule
from stackpkg.data.stream import Stream
from stackpkg.model import StackForCausalLM
from stackpkg.objectives import preference
from stackpkg.params import Params, Until
from stackpkg.runs import RunFolder, read_json, write_json
from stackpkg.telemetry import rows
from stackpkg.training import launch, layout, origin, snapshots, tiny, worker

SOURCE = runs.root()  # of the text: the package itself
STEPS, TOKENS = 6, 1024
NAN = {"kind": "nan_gradient", "step": 3, "rank": 0}
KILL = {"kind": "kill", "step": 5, "rank": 1, "attempt": 1}


def profile(processes: int, accumulation: int = 1, **model: Any) -> Params:
    """Two stages: a longer context and no retrieval in the second; a checkpoint every 2 steps."""
    folders = {SOURCE / "stackpkg": "", SOURCE / "book/runbooks": "documentation", runs.root() / "alone": "alone"}
    values: dict[str, Any] = {
        "data": {
            "sources": [{"kind": "folder", "path": str(path), "domain": d} for path, d in folders.items()],
            "vocab_size": 512,
            "shard_tokens": 50_000,
            "validation_share": 0.1,
            "longest_document": 128,
            "max_epochs": 100,
            "workers": 1,
        },
        "curriculum": [
            {"steps": 4, "context": 64, "long_range": 0.25},
            {"steps": 2, "context": 128, "long_range": 0.25, "retrieval": 0.0},
        ],
        "auxiliary": {
            "pairs": 80,
            "query_tokens": 8,
            "document_tokens": 16,
            "long_range_tasks": 32,
            "conversations": 32,
            "conversation_tokens": 192,
        },
        "model": model or {"config": STACK | {"hidden_size": 32, "retrieval": True}},
        "optimization": {"learning_rate": 3e-3, "warmup_steps": 1, "floor": 3e-4, "ema_decay": 0.9},
        "training": {"batch_tokens": TOKENS, "accumulation": accumulation, "epoch_steps": 3},
        "snapshots": {"every_steps": 2},
        "layout": {"processes": processes, "fsdp": processes, "restarts": 1, "timeout_minutes": 4},
        "evaluation": {"rows": 2, "pairs": 8},
        "telemetry": {"budget": 1.0},  # what rows hold must not depend on the time it takes
    }
    return params.validate(values)


@pytest.fixture(scope="module")
def lab(repository: Path) -> RunFolder:
    """A run whose data room has done its work, from reading the sources to the long-range tasks."""
    (repository / "alone").mkdir()  # a domain of one document, which can't be held out
    shutil.copy(SOURCE / "CONTRIBUTING.md", repository / "alone")
    folder = RunFolder("lab")
    tiny.prepare(folder.path, profile(1))
    return folder


@dataclass
class Job:
    p: Params
    faults: list[dict[str, Any]] = field(default_factory=list)
    steps: int = STEPS


def run(lab: RunFolder, **jobs: Job) -> dict[str, dict[str, Any]]:
    """Launch jobs beside each other, as the sweep does; what each reported."""

    def one(item: tuple[str, Job]) -> dict[str, Any]:
        name, job = item
        return launch.launch(name, job.p, lab, steps=job.steps, faults=job.faults, quiet=True)

    with ThreadPoolExecutor(len(jobs)) as pool:
        return dict(zip(jobs, pool.map(one, jobs.items()), strict=True))


@pytest.fixture(scope="module")
def alone(lab: RunFolder) -> dict[str, dict[str, Any]]:
    return run(lab, one=Job(profile(1), [NAN]), one_twice=Job(profile(1, accumulation=2)))


def told(p: Params) -> Params:
    """Its rows go to TensorBoard besides."""
    return p.model_copy(update={"telemetry": p.telemetry.model_copy(update={"report_to": ["tensorboard"]})})


@pytest.fixture(scope="module")
def spread(lab: RunFolder) -> dict[str, dict[str, Any]]:
    return run(lab, two=Job(told(profile(2)), [NAN])) | run(lab, two_twice=Job(profile(2, accumulation=2)))


@pytest.fixture(scope="module")
def killed(lab: RunFolder) -> dict[str, Any]:
    return run(lab, killed=Job(profile(2), [NAN, KILL]))["killed"]


@pytest.fixture(scope="module")
def others(lab: RunFolder, spread: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`narrow` takes over what two processes left after step 4, alone, its newest checkpoint damaged; and a llama."""
    narrow, wide = Job(profile(1), [NAN]), lab.path / "checkpoints/two"
    for part in ("initial", "checkpoint-2", "checkpoint-4"):
        shutil.copytree(wide / part, lab.path / "checkpoints/narrow" / part)
    shard = lab.path / "checkpoints/narrow/checkpoint-4/dcp/__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-100])
    spec = launch.describe("narrow", narrow.p, lab, STEPS, narrow.faults)
    write_json(lab / "checkpoints/narrow/job.json", spec)
    deaf = profile(1).model_dump(mode="json")  # evaluates each step, and asks for what so short a run can't reach
    deaf["training"]["epoch_steps"], deaf["evaluation"]["min_precision_at_k"] = 1, 1.0
    deaf["retrieval"]["sigma_min"] = 0.05  # so that something is read, whatever the words of this package are
    llama = Job(profile(1, kind="auto", config=LLAMA), steps=2)
    return run(lab, narrow=narrow, llama=llama, deaf=Job(params.validate(deaf), steps=5))


@pytest.fixture(scope="module")
def mixture(lab: RunFolder) -> dict[str, Any]:
    return run(lab, mixture=Job(profile(2, kind="auto", config=QWEN | {"hidden_size": 32}), steps=2))["mixture"]


def laden(processes: int, **model: Any) -> Params:
    """Every second step carries conversations, preferences and pairs at once, the others none of them."""
    p = profile(processes, **model)
    each = {"conversations": 0.5, "preferences": 0.5, "retrieval": 0.5}
    stages = [stage.model_copy(update=each) for stage in p.curriculum]
    weights = p.objectives.model_copy(update={"preference": 0.1, "norms_every": 1})
    return p.model_copy(update={"curriculum": stages, "objectives": weights})


@pytest.fixture(scope="module")
def carrying(lab: RunFolder) -> dict[str, dict[str, Any]]:
    """The same steps on two processes, also after one of them died, and on one; and a llama, which knows no scopes."""
    done = run(lab, laden_two=Job(laden(2)))
    done |= run(lab, laden_killed=Job(laden(2), [KILL]))
    return done | run(lab, laden_one=Job(laden(1)), laden_llama=Job(laden(1, kind="auto", config=LLAMA), steps=2))


@pytest.fixture(scope="module")
def referring(lab: RunFolder) -> None:
    """DPO, on two processes of which one dies when the first weights are long gone, and on one."""
    weights = {"preference": 0.1, "preference_loss": "dpo", "preference_beta": 0.1, "conformance": 0.0}
    one, two = (
        p.model_copy(update={"objectives": p.objectives.model_copy(update=weights)}) for p in (laden(1), laden(2))
    )
    run(lab, dpo_two=Job(two, [KILL]))
    run(lab, dpo_one=Job(one))


@pytest.fixture(scope="module")
def decided(lab: RunFolder) -> RunFolder:
    """A run whose first stage ends by a condition, whose second rank dies after that, and in which a record that the
    second stage would read was withdrawn."""
    p, other = profile(2), RunFolder("decided")
    shutil.copytree(lab.path / "data", other.path / "data")
    until = Until(metric="validation_loss", at_most=100.0)
    stages = [p.curriculum[0].model_copy(update={"until": until}), *p.curriculum[1:]]
    p = p.model_copy(update={"curriculum": stages})
    schedule = Schedule(Corpus(other.path / "data"), p, [{"kind": "stage_end", "step": 3, "stage": 0}])
    rows = [i for i in schedule.plan.rows_at(5) if schedule.plan[i].lane < len(schedule.domains)]
    victim = str(schedule.corpus.records[schedule.pieces(rows[0])[0][0]])
    provenance.withdraw(other.path / "data/withdrawn.jsonl", victim, 1_000, "asked to")
    run(other, main=Job(p, [KILL]))
    return other


def history(lab: RunFolder, name: str, rank: int = 0) -> pd.DataFrame:
    """Rows that count of one rank, by step."""
    table = rows.effective(pd.read_parquet(lab.path / f"telemetry/{name}.parquet"))
    return table[table["rank"] == rank].set_index("step")


def compared(table: pd.DataFrame) -> pd.DataFrame:
    """Columns that may not depend on the layout."""
    names = ["loss", "grad_norm", "weight_norm", "learning_rate", "update_skipped", "context", "cursor"]
    return table[names + sorted(name for name in table if name.startswith("loss_"))].astype(float)


def weights(lab: RunFolder, name: str, part: str = "final") -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(lab.path / "checkpoints" / name / part).state_dict()


def test_a_receiver_gets_each_row_once_beside_the_telemetry(lab: RunFolder, spread) -> None:
    event_file_loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    files = [path for path in (lab.path / "telemetry/two.reports").rglob("*") if path.is_file()]
    assert len(files) == 1 and "tensorboard" in files[0].parts, "rank 0 alone, and nothing elsewhere"
    seen: dict[str, dict[int, list[float]]] = {}
    for event in event_file_loader.EventFileLoader(str(files[0])).Load():
        for value in event.summary.value:
            if value.tensor.float_val:
                seen.setdefault(value.tag, {}).setdefault(event.step, []).append(value.tensor.float_val[0])
    mine = history(lab, "two")
    for name in ("loss", "grad_norm", "loss_language_modelling", "validation_loss", "update_skipped"):
        expected = mine[name].dropna() if name == "validation_loss" else mine[name]
        points = seen[f"train/{name}"]
        assert {step: len(values) for step, values in points.items()} == dict.fromkeys(expected.index, 1), name
        for step, (value,) in points.items():
            assert value == pytest.approx(expected[step], rel=1e-6, nan_ok=True)
    assert math.isnan(mine.grad_norm[3]) and not (lab.path / "telemetry/one.reports").exists()
    assert not [path for path in lab.path.rglob("events.out.*") if path not in files]


def test_each_row_tells_where_the_text_of_its_batch_lies(lab: RunFolder, killed) -> None:
    ledger, table = Ledger(lab.path, "killed"), rows.read(lab.path / "telemetry/killed")
    tokens = [len(t) for t in table["batch_tokens"]]
    assert tokens == [len(s) for s in table["batch_shards"]] == [len(o) for o in table["batch_offsets"]]
    assert min(tokens) > 0 and set(table["batch_shards"].explode()) <= set(ledger.stream.corpus.names)
    for step, each in rows.effective(table).groupby("step"):
        read = sum(row["tokens"] for row in ledger.step(step - 1) if row["use"] in ("text", "filler"))
        assert sum(map(sum, each["batch_tokens"])) == read, "both ranks together read the step"


@pytest.mark.parametrize(("single", "double"), [("one", "two"), ("one_twice", "two_twice")])
def test_two_processes_compute_what_one_does(lab: RunFolder, alone, spread, single: str, double: str) -> None:
    left, right = compared(history(lab, single)), compared(history(lab, double))
    assert left.index.tolist() == list(range(1, STEPS + 1)) and left.loss.notna().all()
    assert {"loss_language_modelling", "loss_contrastive", "loss_long_range", "loss_load_balance"} <= set(left)
    assert (left.loss_reading.dropna() > 0).tolist() == [True] * 4, "pairs ride in the first stage alone"
    pd.testing.assert_frame_equal(left, right, rtol=1e-5, atol=1e-7, check_exact=False)
    assert (alone[single]["ranks"], spread[double]["ranks"]) == (1, 2)
    assert spread[double]["sharded_share"] > 0.9 and alone[single]["sharded_share"] == 0.0
    reports = [read_json(lab.path / f"eval/{name}/epoch_002.json") for name in (single, double)]
    keys = "validation_loss", "precision_at_k", "mrr", "long_range_accuracy", "calibration_error", "reading_loss"
    for key in keys:
        assert reports[0][key] == pytest.approx(reports[1][key], rel=1e-4), key
    assert reports[0]["ema"]["validation_loss"] == pytest.approx(reports[1]["ema"]["validation_loss"], rel=1e-4)
    assert reports[0]["ema"]["validation_loss"] != reports[0]["validation_loss"]
    assert reports[0]["step"] == STEPS and list(reports[0]["validation_loss_by_domain"]) == ["code", "documentation"]


def test_accumulation_changes_nothing_but_the_negatives(lab: RunFolder, alone) -> None:
    whole, parts = compared(history(lab, "one")), compared(history(lab, "one_twice"))
    first = ["loss_language_modelling", "loss_long_range", "loss_gate_entropy"]
    assert parts.loc[1, first].tolist() == pytest.approx(whole.loc[1, first].tolist(), rel=1e-5)
    assert 0 < parts.loc[1, "loss_contrastive"] < whole.loc[1, "loss_contrastive"]  # half the documents to confuse


def test_rows_tell_of_both_stages_and_of_time(lab: RunFolder, spread) -> None:
    table = history(lab, "two_twice")
    assert table.context.tolist() == [64] * 4 + [128] * 2 and table.cursor.tolist() == [1, 2, 3, 4, 5, 6]
    assert table.loss_contrastive.notna().tolist() == [True] * 4 + [False] * 2  # no retrieval in the second stage
    assert table.precision_at_k.notna().tolist() == [False, False, True] * 2
    assert (table[["step_seconds", "tokens_per_second", "memory_mb"]] > 0).all(axis=None)
    assert (table.masked_edge_share == 0).all() and table.router_entropy_min.between(0, 1).all()
    both = pd.read_parquet(lab.path / "telemetry/two_twice.parquet")
    assert rows.missing(both, STEPS) == 0 and len(both) == 2 * STEPS
    for name in ("step_seconds", "data_wait_seconds", "memory_mb"):  # each rank knows the worst of both
        steps = both.pivot(index="step", columns="rank", values=name)
        assert table[f"{name}_max"].tolist() == steps.max(axis=1).tolist()
        assert table[f"{name}_max_rank"].tolist() == steps.idxmax(axis=1).tolist()
        assert table[f"{name}_mean"].tolist() == pytest.approx(steps.mean(axis=1).tolist())
    other = history(lab, "two_twice", 1)
    assert (other.grad_norm_part_max == table.grad_norm_part_max).all()
    assert (table.grad_norm_part_max < table.grad_norm).all() and table.grad_norm_part_max_rank.isin([0, 1]).all()
    assert table.router_usage.notna().any() and not other.get("router_usage", pd.Series([None])).notna().any()


def test_a_bad_gradient_is_skipped_without_a_trace(lab: RunFolder, alone, spread) -> None:
    for name, report in (("one", alone["one"]), ("two", spread["two"])):
        table = history(lab, name)
        assert report["skipped_updates"] == 1 and report["ema_updates"] == STEPS - 1
        assert table.update_skipped.tolist() == table.nonfinite.tolist() == [0, 0, 1, 0, 0, 0]
        assert pd.isna(table.grad_norm[3]) and table.loss.notna().all()
        assert table.weight_norm[3] == table.weight_norm[2] != table.weight_norm[4]  # to the last bit
        assert table.beta1_effective[3] == table.beta1_effective[2]  # Adam has not counted it either
        assert table.learning_rate[4] == table.learning_rate[3]  # nor has the schedule
    alerts = [
        line for line in (lab.path / "telemetry/two.alerts.jsonl").read_text().splitlines() if "NonFinite" in line
    ]
    assert len(alerts) == 1 and '"step": 3' in alerts[0]


def test_a_killed_rank_costs_a_restart_and_nothing_else(lab: RunFolder, spread, killed) -> None:
    assert killed["attempts"] == 2 and spread["two"]["attempts"] == 1
    assert killed["weights_sha256"] == spread["two"]["weights_sha256"]
    assert (killed["skipped_updates"], killed["ema_updates"]) == (1, STEPS - 1)
    attempts = read_json(lab.path / "checkpoints/killed/attempts.json")
    assert [attempt["resumed_from"] for attempt in attempts] == [None, "checkpoint-4"]
    table = pd.read_parquet(lab.path / "telemetry/killed.parquet")
    assert rows.missing(table, STEPS) == 0
    for rank in (0, 1):
        mine = history(lab, "killed", rank)
        assert mine.attempt.tolist() == [1, 1, 1, 1, 2, 2]
        pd.testing.assert_frame_equal(compared(mine), compared(history(lab, "two", rank)), check_exact=True)
    average = weights(lab, "killed", "final_ema"), weights(lab, "two", "final_ema")
    assert all(torch.equal(average[0][name], tensor) for name, tensor in average[1].items())


def test_a_checkpoint_outlives_its_layout_and_a_damaged_one_is_set_aside(lab: RunFolder, spread, others) -> None:
    home, report = lab.path / "checkpoints/narrow", others["narrow"]
    assert (report["ranks"], report["skipped_updates"], report["ema_updates"]) == (1, 1, STEPS - 1)
    (attempt,) = read_json(home / "attempts.json")
    assert attempt["resumed_from"] == "checkpoint-2"
    assert attempt["aside"] == ["checkpoint-4/dcp/__1_0.distcp: changed since it was saved"]
    assert len(list(home.glob("checkpoint-4.damaged-*"))) == 1
    assert sorted(path.name for path in home.glob("checkpoint-?")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    left, right = compared(history(lab, "narrow")), compared(history(lab, "two"))
    assert left.index.tolist() == [3, 4, 5, 6]  # the sample order goes on where the checkpoint was made
    pd.testing.assert_frame_equal(left, right.loc[3:, left.columns], rtol=1e-4, check_exact=False)
    for part in ("final", "final_ema"):
        torch.testing.assert_close(weights(lab, "narrow", part), weights(lab, "two", part), rtol=1e-3, atol=1e-4)


def test_a_mixture_of_experts_of_transformers_trains_on_two_processes(lab: RunFolder, mixture) -> None:
    assert mixture["ranks"] == 2 and mixture["sharded_share"] > 0.9
    table = history(lab, "mixture")
    assert table.index.tolist() == [1, 2] and (table[["loss", "grad_norm"]] > 0).all(axis=None)
    assert table.router_entropy.between(0, 1).all() and table.loss_gate_entropy.notna().all()
    assert pd.notna(table.loss_load_balance[2]) and "attention_entropy_mean" not in table
    assert table.weight_norm[1] != table.weight_norm[2]
    model = AutoModelForCausalLM.from_pretrained(lab.path / "checkpoints/mixture/final")
    assert model.config.model_type == "qwen3_moe" and layout.weights_digest(model) == mixture["weights_sha256"]


def test_a_dense_model_of_transformers_trains_without_router_series(lab: RunFolder, others) -> None:
    assert others["llama"]["steps"] == 2
    table = history(lab, "llama")
    assert (table[["loss", "grad_norm", "loss_contrastive"]] > 0).all(axis=None)
    assert not [name for name in table if "router" in name or "balance" in name or "attention" in name]
    model = AutoModelForCausalLM.from_pretrained(lab.path / "checkpoints/llama/final")
    assert model.config.model_type == "llama" and layout.weights_digest(model) == others["llama"]["weights_sha256"]


def test_decisions_are_recorded_once_and_a_resume_repeats_them(decided: RunFolder) -> None:
    made = curriculum.decisions(decided.path / "checkpoints/main/decisions.jsonl")
    assert [(d["kind"], d["step"]) for d in made] == [("withdraw", 0), ("stage_end", 3)]
    assert made[1]["metric"] == "validation_loss" and 0 < made[1]["value"] < 100
    table, ledger = history(decided, "main"), Ledger(decided.path, "main")
    assert table.attempt.tolist() == [1, 1, 1, 1, 2, 2], "the second attempt began after the decision"
    assert table.context.tolist() == [64] * 3 + [128] * 3 and table.cursor.tolist() == [1, 2, 3, 4, 5, 6]
    assert ledger.stream.plan.steps == [3, 3]
    assert ledger.document(made[0]["record_id"]) == []
    withdrawn = [item for item in ledger.step(5) if item["use"] == "withdrawn"]
    assert {item["record_id"] for item in withdrawn} == {made[0]["record_id"]}


def test_retrieval_is_switched_off_by_its_alert_and_stays_off_in_the_checkpoint_and_the_result(lab, others) -> None:
    reports = [read_json(lab.path / f"eval/deaf/epoch_{epoch:03d}.json") for epoch in range(1, 6)]
    assert max(report["precision_at_k"] for report in reports) < 1
    assert all(report["guard"]["accepted"] for report in reports)
    assert [report["guard"]["on"] for report in reports] == [True] * 3 + [False] * 2  # after three low evaluations
    assert all("no sigma_min" in report["guard"]["calibration"]["failed"] for report in reports[3:])
    assert not any("calibration" in report["guard"] for report in reports[:3])
    alerts = [json.loads(line) for line in (lab.path / "telemetry/deaf.alerts.jsonl").read_text().splitlines()]
    assert [a["step"] for a in alerts if a["action"] == "retrieval_off"] == [3]
    assert history(lab, "deaf").loss_reading.notna().tolist() == [True] * 3 + [False] * 2, "nothing is read any more"
    assert [report["reading_gain"] != 0 for report in reports] == [True] * 3 + [False] * 2
    home = lab.path / "checkpoints/deaf"
    kept = [read_json(home / f"checkpoint-{step}/retriever.json")["on"] for step in (2, 4)]
    assert kept == [True, False] and not read_json(home / "final/retriever.json")["on"]
    assert read_json(lab.path / "checkpoints/narrow/final_ema/retriever.json")["on"]
    assert history(lab, "deaf").rejected_trust.tolist() == [report["guard"]["rejected"]["trust"] for report in reports]


def test_conversations_preferences_and_pairs_ride_in_one_step(lab: RunFolder, carrying) -> None:
    one, two = history(lab, "laden_one"), history(lab, "laden_two")
    riders = ["loss_conformance", "loss_preference", "loss_contrastive", "gradient_conformance"]
    for table in (one, two):
        assert table[riders].notna().to_numpy().tolist() == [[step % 2 == 0] * 4 for step in range(1, STEPS + 1)]
        assert (table[["loss_conformance", "gradient_conformance"]].dropna() > 0).all(axis=None)
        assert table.update_skipped.sum() == 0 and table.violations.notna().tolist() == [False, False, True] * 2
    pd.testing.assert_frame_equal(compared(one), compared(two), rtol=1e-5, atol=1e-7, check_exact=False)
    reports = [read_json(lab.path / f"eval/laden_{name}/epoch_002.json") for name in ("one", "two")]
    for key in ("violations", "forbidden_probability", "forbidden_attention"):
        assert reports[0][key] == pytest.approx(reports[1][key], rel=1e-4), key
    spec = read_json(lab.path / "checkpoints/laden_two/job.json")
    assert {"conversations.parquet", "scopes.yaml", "preferences.parquet"} <= spec["data"].keys()


def test_dpo_refers_to_the_weights_that_the_job_began_with(lab: RunFolder, referring) -> None:
    one, two = history(lab, "dpo_one"), history(lab, "dpo_two")
    assert len(read_json(lab.path / "checkpoints/dpo_two/attempts.json")) == 2
    pd.testing.assert_frame_equal(compared(one), compared(two), rtol=1e-5, atol=1e-7, check_exact=False)
    kept = [
        load_file(lab.path / f"checkpoints/dpo_{name}/reference.safetensors")["log_probs"] for name in ("one", "two")
    ]
    torch.testing.assert_close(*kept)
    home = lab.path / "checkpoints/dpo_one"
    model, stream = AutoModelForCausalLM.from_pretrained(home / "initial").eval(), Stream(lab.path / "data", laden(1))
    pairs = {name: torch.as_tensor(values) for name, values in stream.labelled["preferences"].items()}
    for column, name in enumerate(("chosen_ids", "rejected_ids")):
        with torch.no_grad():
            logits = model(input_ids=pairs[name], use_cache=False).logits
        found = preference.answers(logits, pairs[name], pairs["answer_start"], stream.pad_id).log_probs
        torch.testing.assert_close(kept[0][:, column], found, rtol=1e-4, atol=1e-4)
    # an update away from the reference the margin is near 0, and -log sigma(0) = log 2; then it moves
    first, *later = one.loss_preference.dropna().tolist()
    assert first == pytest.approx(math.log(2), abs=0.01) and all(abs(loss - math.log(2)) > 1e-4 for loss in later)


def test_a_resume_repeats_what_rode_along(lab: RunFolder, carrying) -> None:
    assert carrying["laden_killed"]["attempts"] == 2
    assert carrying["laden_killed"]["weights_sha256"] == carrying["laden_two"]["weights_sha256"]
    told, other = compared(history(lab, "laden_killed")), compared(history(lab, "laden_two"))
    pd.testing.assert_frame_equal(told, other, check_exact=True)


def test_a_model_without_scopes_is_held_to_the_tokens_alone(lab: RunFolder, carrying) -> None:
    table = history(lab, "laden_llama")
    assert carrying["laden_llama"]["steps"] == 2 and table.loss_conformance[2] > 0
    assert "forbidden_attention" not in table
    log = (lab.path / "checkpoints/laden_llama/log.txt").read_text()
    assert "llama knows no scopes: conformance is that of tokens alone" in log


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_results_are_ordinary_folders_of_transformers(lab: RunFolder, alone, spread, name: str) -> None:
    home = lab.path / "checkpoints" / name
    model = AutoModelForCausalLM.from_pretrained(home / "final")
    assert layout.weights_digest(model) == (alone | spread)[name]["weights_sha256"]  # what was trained, to the bit
    average = AutoModelForCausalLM.from_pretrained(home / "final_ema")
    assert isinstance(model, StackForCausalLM) and isinstance(average, StackForCausalLM)
    assert layout.weights_digest(average) != layout.weights_digest(model)
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        assert model(input_ids=ids).logits.isfinite().all() and average(input_ids=ids).logits.isfinite().all()
    words = AutoTokenizer.from_pretrained(home / "final")
    asked = words("Words that are read as the corpus was.", return_tensors="pt")
    (expected,) = tokenizer.encode(tokenizer.of_shards(lab.path / "data"), ["Words that are read as the corpus was."])
    assert asked["input_ids"].tolist() == [expected] and words.eos_token_id == tokenizer.EOS
    assert model.generate(**asked, max_new_tokens=2, do_sample=False).shape[1] > len(expected)
    files = {path.suffix for part in ("final", "final_ema") for path in (home / part).rglob("*") if path.is_file()}
    assert files == {".json", ".safetensors"}  # nothing that unpickles when it is opened
    told, newest = read_json(home / "done.json")["files"], [*snapshots.listed(home).values()][-1]
    assert told == {f"{path.parent.name}/{path.name}": runs.digest(path) for path in home.glob("final*/*")}
    for part in ("final", "final_ema"):
        assert origin.traced(home / part, newest)["step"] == STEPS, "what a promotion asks for"


@pytest.fixture(scope="module")
def split(lab: RunFolder) -> dict[str, Any]:
    p = profile(2)
    layout = p.layout.model_copy(update={"fsdp": 1, "tp": 2})
    return run(lab, split=Job(p.model_copy(update={"layout": layout}), [NAN]))["split"]


@pytest.mark.parametrize("name", ["two", "split"])
def test_the_average_of_the_weights_is_that_of_one_process(lab: RunFolder, alone, spread, split, name: str) -> None:
    assert split["ema_updates"] == alone["one"]["ema_updates"] == STEPS - 1, "not of the step that was skipped"
    mine, whole = weights(lab, name, "final_ema"), weights(lab, "one", "final_ema")
    torch.testing.assert_close(mine, whole, rtol=0, atol=2e-5)  # of a rare word Adam divides noise by noise
    raw = weights(lab, "one")
    assert max(float((whole[each] - raw[each]).abs().max()) for each in raw) > 5e-4, "the average is no copy"


def test_attention_is_that_of_all_heads_whoever_holds_them(lab: RunFolder, alone, split) -> None:
    names = ["attention_entropy_mean", "attention_entropy_std", "masked_edge_share", "kv_ratio"]
    one, two = (history(lab, name) for name in ("one", "split"))
    measured = one.attention_entropy_mean.notna()
    assert measured.any() and (two.attention_entropy_mean.notna() == measured).all()
    left, right = (table.loc[measured, names].astype(float) for table in (one, two))
    pd.testing.assert_frame_equal(left, right, rtol=1e-3, check_exact=False)
    left, right = (np.stack(np.stack(table.attention_entropy_heads.dropna().iloc[0])) for table in (one, two))
    assert left.shape == right.shape == (STACK["num_hidden_layers"], STACK["num_attention_heads"])
    np.testing.assert_allclose(left, right, atol=1e-4)


def test_a_job_refuses_a_corrupt_shard_and_another_corpus_than_it_began_with(lab: RunFolder) -> None:
    p, other = profile(1), RunFolder("elsewhere")
    data = shutil.copytree(lab.path / "data", other.path / "data")
    shard = data / f"shards/{versions.read(data)['shards'][0]['name']}.bin"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(RuntimeError, match=rf"corrupt or missing: shards/{shard.name}; runbook Corrupt"):
        launch.launch("torn", p, other, steps=1, quiet=True)
    shard.write_bytes(raw)
    job = other.path / "checkpoints/moved/job.json"
    spec = launch.describe("moved", p, other, 1, ())
    shorter = p.data.model_copy(update={"longest_document": 64})
    shards.build(data, versions.records(data), tokenizer.of_shards(data), shorter)  # the head moves on
    write_json(job, spec)
    done = subprocess.run(launch.command(str(job), p), capture_output=True, text=True, timeout=120)
    began = spec["data"]["manifest.json"][:16]
    assert done.returncode and f"this job began with {began}: roll back to it" in done.stderr
    assert versions.rollback(data, began) == began and not list(job.parent.glob("checkpoint-*"))


def test_initial_weights_are_whole_or_not_there(lab: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    p, home = profile(1), lab.path / "checkpoints/begun"
    stream = Stream(lab.path / "data", p)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", full)  # after the configuration
        with pytest.raises(OSError, match="No space left"):
            worker._initial(home, p, stream)
    assert not (home / "initial").exists()
    worker._initial(home, p, stream)
    assert StackForCausalLM.from_pretrained(home / "initial") and not list(home.glob(".saving/*"))
    before = runs.digest(home / "initial")
    worker._initial(home, p.model_copy(update={"seed": 4}), stream)
    assert runs.digest(home / "initial") == before, "made once"


def test_a_model_larger_than_the_memory_of_its_host_is_refused_before_it_is_made(
    lab: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, home = profile(1), lab.path / "checkpoints/huge"
    config = p.model.config | {"hidden_size": 65536, "moe_intermediate_size": 262144}
    huge = p.model_copy(update={"model": p.model.model_copy(update={"config": config})})
    with pytest.raises(ValueError, match=r"are [\d,]{3,}\.\d GiB in fp32, and rank 0, .* let the first node have more"):
        worker._initial(home, huge, Stream(lab.path / "data", p))
    assert not home.exists()
