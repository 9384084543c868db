"""A whole job in this process: telemetry changes no weight, what is dear is thinned, little leaves the device."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from test_training import profile
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from stackpkg import model as models
from stackpkg import params
from stackpkg.data.stream import Stream
from stackpkg.model.patterns import layout
from stackpkg.params import Params
from stackpkg.runs import RunFolder, read_json
from stackpkg.telemetry import flops, probes, rows, store
from stackpkg.telemetry.guard import Guard, load
from stackpkg.training import measuring, mesh, snapshots, tiny
from stackpkg.training.optim import training_arguments
from stackpkg.training.trainer import StackTrainer

STEPS = 14
ALERTS = Path(__file__).parents[1] / "params/alerts.yaml"
NEVER = dict.fromkeys(params.Params().telemetry.every, 0)


def telling(every: dict[str, int], budget: float, norms: int = 0) -> Params:
    """One stage with pairs in every step; a checkpoint every four; evaluation at the end alone."""
    p = profile(1).model_dump(mode="json")
    p["curriculum"] = [{"steps": STEPS, "context": 64, "long_range": 0.25}]
    p["training"] |= {"batch_tokens": 256, "epoch_steps": STEPS}
    p["snapshots"] |= {"every_steps": 4}
    p["objectives"] |= {"norms_every": norms}
    p["telemetry"] = {"every": every, "budget": budget}
    return params.validate(p)


@pytest.fixture(scope="module")
def job(repository: Path) -> Iterator[Callable[..., StackTrainer]]:
    (repository / "alone").mkdir()
    (repository / "alone/one.md").write_text("a document that is alone in its domain, of a few words\n" * 30)
    folder, p = RunFolder("measured").path, telling(NEVER, 1.0)
    tiny.prepare(folder, p)
    stream = Stream(folder / "data", p)
    models.build(p.model, stream.vocab_size, stream.pad_id, 17).save_pretrained(folder / "initial")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def train(name: str, p: Params, steps: int = STEPS, resume: str = "") -> StackTrainer:
        set_seed(17)
        model = models.StackForCausalLM.from_pretrained(folder / "initial", dtype=torch.float32)
        home = folder / "checkpoints" / name
        trainer = StackTrainer(
            model=model, args=TrainingArguments(**training_arguments(p, home, STEPS), use_cpu=True), p=p,
            mesh=mesh.build(p.layout), stream=Stream(folder / "data", p), folder=folder, name=name,
            attempt=1 + bool(resume), guard=Guard(load(p, ALERTS)), faults=[], rung=0,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Stop(steps))
        trainer.train(resume_from_checkpoint=str(home / resume) if resume else None)
        trainer.saver.wait()
        return trainer

    yield train
    dist.destroy_process_group()


class Stop(TrainerCallback):
    """Ends a job early, by the schedule of a whole one."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_training_stop |= state.global_step >= self.steps


def told(trainer: StackTrainer) -> pd.DataFrame:
    table = rows.effective(pd.read_parquet(rows.compact(trainer.rows.folder)))
    return table.set_index("step")


def fresh(table: pd.DataFrame, name: str) -> list[int]:
    return table.index[table[name].notna()].tolist()


@pytest.fixture(scope="module")
def silent(job: Callable[..., StackTrainer]) -> StackTrainer:
    return job("silent", telling(NEVER, 1.0))


@pytest.fixture(scope="module")
def talkative(job: Callable[..., StackTrainer]) -> StackTrainer:
    return job("talkative", telling(dict.fromkeys(NEVER, 1), 1.0, norms=1))


def test_weights_are_the_same_to_the_last_bit_with_all_probes_and_with_none(
    silent: StackTrainer, talkative: StackTrainer
) -> None:
    state = silent.network.state_dict()
    for name, tensor in talkative.network.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    one, other = told(silent), told(talkative)
    for name in ("loss", "grad_norm", "weight_norm", "validation_loss"):
        pd.testing.assert_series_equal(one[name], other[name], check_exact=True)
    assert not {"router_entropy", "attention_entropy_median", "update_ratio", "batch_precision_at_1"} & {*one}


def test_a_resumed_job_saves_as_often_as_its_profile_says_by_now(job: Callable[..., StackTrainer]) -> None:
    p = telling(NEVER, 1.0)
    first = job("oftener", p, steps=4)
    assert [*snapshots.listed(first.saver.home)] == [4]
    p = p.model_copy(update={"snapshots": p.snapshots.model_copy(update={"every_steps": 2})})
    second = job("oftener", p, resume="checkpoint-4", steps=7)
    assert [*snapshots.listed(second.saver.home)] == [4, 6]
    # what every step leaves in the state of Trainer would be written with each of them
    assert len(read_json(second.saver.home / "checkpoint-6/trainer_state.json")["log_history"]) == 1


def test_every_series_is_there_and_lists_survive_to_parquet(talkative: StackTrainer) -> None:
    table, config = told(talkative), talkative.network.config
    layers, heads, experts = config.num_hidden_layers, config.num_attention_heads, config.num_experts
    shapes = {
        "attention_entropy_heads": (layers, heads), "router_usage": (layers, experts),
        "router_entropy_layers": (layers,),
        "router_regret_layers": (layers,), "similarity_histogram": (2, probes.BINS),
    }  # fmt: skip
    for name, shape in shapes.items():
        value = torch.tensor([[*row] if shape[1:] else row for row in table[name][STEPS]])
        assert value.shape == shape and (value >= 0).all() and (value <= 1).all(), name
    assert sum(table.similarities[STEPS]) > 0 and table.similarities[: STEPS - 1].isna().all()
    assert table.update_ratio[1:].between(1e-6, 0.1).all() and table.flops_utilisation.gt(0).all()
    assert (table[["nan_count", "overflow_count"]] == 0).all(axis=None) and (table.flops_peak == "matmul").all()
    assert (table.step_seconds_max == table.step_seconds).all() and (table.step_seconds_max_rank == 0).all()
    assert table.grad_norm_part_max.to_numpy() == pytest.approx(table.grad_norm.to_numpy(), rel=1e-6)
    assert table.gradient_language_modelling.gt(0).all()
    assert table.gradient_cosine_regret_load_balance.dropna().abs().le(1).all()


def test_what_moved_is_the_difference_of_two_checkpoints(job: Callable[..., StackTrainer]) -> None:
    p = telling(NEVER | {"update": 1}, 1.0)
    p = p.model_copy(update={"optimization": p.optimization.model_copy(update={"warmup_steps": 0})})
    trainer = job("moved", p, steps=1)
    start = models.StackForCausalLM.from_pretrained(trainer.folder / "initial", dtype=torch.float32)
    pairs = zip(trainer.network.parameters(), start.parameters(), strict=True)
    moved = torch.cat([(new - old).detach().double().flatten() for new, old in pairs]).norm()
    now = torch.cat([w.detach().double().flatten() for w in trainer.network.parameters()]).norm()
    assert moved > 0 and told(trainer).update_ratio[1] == pytest.approx(float(moved / now), rel=1e-6)


def test_alerts_see_their_series_within_the_step_and_the_rest_stays_on_the_device(talkative: StackTrainer) -> None:
    seen = talkative.measuring.later
    watched = {alert.series for alert in talkative.guard.alerts}
    assert not watched & seen.keys() and {"router_entropy", "attention_entropy_median"} <= watched
    assert {"weighted_language_modelling", "attention_entropy_heads", "update_ratio", "nan_count"} <= seen.keys()
    assert all(isinstance(value, torch.Tensor) for value in seen.values())


def test_a_block_takes_one_copy_however_much_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies, original = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (copies.append(self.numel()), original(self))[1])
    writer = rows.RowWriter(tmp_path, "run", 1, 0, 1)
    for step in range(1, rows.FLUSH_ROWS + 1):
        assert not copies
        some = {"usage": torch.full((2, 3), step / 7)} if step % 2 else {}
        row = writer.write(step, {"a": torch.tensor(step / 3), **some}, loss=1.0)
        assert "a" not in row and row["loss"] == 1.0
    assert copies == [rows.FLUSH_ROWS + 6 * rows.FLUSH_ROWS // 2]
    table = rows.read(tmp_path)
    assert table.a.tolist() == pytest.approx([step / 3 for step in range(1, rows.FLUSH_ROWS + 1)], rel=1e-6)
    assert table.usage[2] == [[round(3 / 7, 6)] * 3] * 2 and table.usage.isna().tolist() == [False, True] * 4


def test_numbers_that_are_not_finite_are_counted_before_the_clip_spreads_them(
    job: Callable[..., StackTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = StackTrainer._clip_grad_norm

    def poisoned(self: StackTrainer, model: torch.nn.Module) -> torch.Tensor:
        if self.state.global_step == 1:
            gradient = self.network.lm_head.weight.grad
            gradient[0, :3], gradient[1, :5] = float("nan"), float("-inf")
        return honest(self, model)

    monkeypatch.setattr(StackTrainer, "_clip_grad_norm", poisoned)
    table = told(job("poisoned", telling(NEVER | {"update": 1}, 1.0), steps=3))
    assert table.nan_count.tolist() == [0, 3, 0] and table.overflow_count.tolist() == [0, 5, 0]
    assert table.update_skipped.tolist() == [0, 1, 0] and table.weight_norm[2] == table.weight_norm[1]
    assert table.update_ratio.notna().all(), "what was found last is repeated"


@pytest.fixture(scope="module")
def slow() -> Iterator[dict[str, Any]]:
    """Attention that takes half a second more than it must."""
    with pytest.MonkeyPatch.context() as patch:
        honest = probes.model_statistics
        patch.setattr(measuring, "model_statistics", lambda *given: (time.sleep(0.5), honest(*given))[1])
        yield {"every": NEVER | {"attention": 2, "routing": 1}, "budget": 0.01}


def test_a_planted_slow_probe_is_thinned_and_a_resumed_job_goes_on_alike(
    job: Callable[..., StackTrainer], slow: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    whole = job("slow", telling(**slow))
    printed = capsys.readouterr().out
    table = told(whole)
    # blocks end with a checkpoint; the second has the verdict, and the third: every 2 steps, 4, 8
    assert fresh(table, "attention_entropy_heads") == [1, 3, 5, 7, 9, 14]  # the last with the evaluation
    assert table.attention_entropy_mean.notna().all(), "rows between two runs repeat the last"
    events = [json.loads(line) for line in whole.measuring.events.read_text().splitlines()]
    assert (events[0]["probe"], events[0]["was"], events[0]["every"], events[0]["step"]) == ("attention", 2, 4, 8)
    kinds = [event["kind"] for event in store.events(whole.folder, "slow")]
    assert kinds.count("thinned") == len(events)
    assert events[0]["seconds"] >= 0.5 and events[0]["share"] > 0.01 and events[0]["attempt"] == 1
    assert "probe attention takes" in printed and "every 4 steps, not 2" in printed
    job("slow_two", telling(**slow), steps=8)
    again = job("slow_two", telling(**slow), resume="checkpoint-8")
    assert again.measuring.meter.every["attention"] == whole.measuring.meter.every["attention"] >= 8
    other = told(again)
    assert fresh(other, "attention_entropy_heads") == fresh(table, "attention_entropy_heads")
    kept = ["attention_entropy_mean", "attention_entropy_median", "kv_error", "masked_edge_share", "loss"]
    pd.testing.assert_frame_equal(other[kept], table[kept], check_exact=True)


# ---- utilisation


def test_flops_of_a_dense_model_are_those_of_the_formula() -> None:
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
              "num_key_value_heads": 2, "intermediate_size": 48}  # fmt: skip
    model = models.build(params.Model(kind="auto", config=config), 100, 0, 1)
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    assert flops.active(model) == 3 * layer + 32 + 100 * 32  # the head, and not the table of embeddings
    assert flops.per_token(model, flops.active(model), 128) == 6 * flops.active(model) + 12 * 3 * 32 * 128


def test_of_the_experts_those_count_that_a_token_is_sent_to() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 8, "moe_intermediate_size": 24, "sliding_window": 16, "block_size": 8}  # fmt: skip
    few, many = (
        models.build(params.Model(config=sizes | {"num_experts": n, "num_experts_per_tok": 2}), 64, 0, 1)
        for n in (4, 8)
    )
    assert flops.active(many) - flops.active(few) == 2 * 4 * 32  # the gates alone grow


@pytest.mark.parametrize("pattern", ["sliding", "dilated", "block", "hybrid"])
@pytest.mark.parametrize("context", [24, 64, 192])
def test_keys_are_those_that_the_mask_lets_through(pattern: str, context: int) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 1, "num_experts_per_tok": 1,
             "sliding_window": 16, "block_size": 8, "dilation": 3, "summaries_per_block": 0}  # fmt: skip
    model = models.build(params.Model(config=sizes | {"attention_pattern": pattern}), 64, 0, 1)
    names = {model.config.pattern(layer) for layer in range(2)}
    made = [layout(model.config, name, torch.arange(context)[None], torch.float32) for name in names]
    seen = [sum(int((mask == 0).sum()) for mask in each.masks) for each in made]
    spare = [-context % (each.cut.chunk * each.cut.dilation) for each in made]
    if not any(spare):  # the mask has no queries beyond the row
        assert flops.keys(model, context) == pytest.approx(sum(seen) / len(seen) / context)
    assert flops.keys(model, context) <= 1 + min(context, 16 + 8)


def test_the_peak_is_a_rate_and_leaves_the_generator_of_training_alone() -> None:
    state = torch.random.get_rng_state()
    assert 1e8 < flops.peak(torch.device("cpu"), torch.float32) < 1e15
    assert torch.equal(torch.random.get_rng_state(), state), "dropout would differ"
