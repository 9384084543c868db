"""Scale proof: no additive term depends on how a step is split over micro-batches and ranks, nor on recomputation."""

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import STACK
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from stackpkg import params
from stackpkg.model import build, scopes
from stackpkg.model.embedding import embed
from stackpkg.objectives import Composer, Pairs, StepCounts, conformance, losses, preference, reading, routing

Parts = dict[str, torch.Tensor]
SMALL = STACK | {"hidden_size": 32, "retrieval": True}
ROWS, LENGTH = 48, 16
ADDITIVE = (
    "language_modelling", "long_range", "load_balance", "gate_entropy", "z_loss", "regret", "preference", "conformance",
    "reading",
)  # fmt: skip
OFF = params.Objectives(**dict.fromkeys((*ADDITIVE, "contrastive"), 0.0), ramp_steps={}, norms_every=1)
EACH = {name: OFF.model_copy(update={name: 1.0}) for name in ADDITIVE}
ALL = {"all": OFF.model_copy(update=dict.fromkeys(ADDITIVE, 1.0))}
CONTRASTIVE = OFF.model_copy(update={"contrastive": 1.0})
RULES, FORBIDDEN = scopes.load(Path(__file__).parents[1] / "params/scopes.yaml"), torch.tensor([7, 9, 30])
USAGE = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.05, 0.15, 0.3, 0.5]])


def batch() -> Parts:
    """Rows with very different numbers of labels, answers and preferences, and two rows of the same document."""
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 64, (ROWS, LENGTH), generator=g)
    labels, answers, key = ids.clone(), torch.zeros_like(ids, dtype=torch.bool), torch.arange(ROWS)
    for row in range(ROWS):
        labels[row, : row % 14] = -100
    answers[1, -3:] = answers[6, -1:] = answers[40, 9:] = True
    pairs = torch.randint(1, 64, (3, ROWS, 6), generator=g).transpose(0, 1)
    texts = torch.randint(1, 64, (2, ROWS, 8), generator=g).transpose(0, 1)
    start = torch.randint(1, 5, (ROWS,), generator=g)
    prefers = torch.where(key % 3 > 0, key, -1)
    talk = ids.roll(1, 0).masked_fill(torch.arange(LENGTH) >= LENGTH - key[:, None] % 5, 0)  # padded on the right
    roles = torch.randint(0, len(scopes.ROLES), (ROWS, LENGTH // 4), generator=g).repeat_interleave(4, 1)
    spans = torch.randint(-1, 2, (ROWS, LENGTH // 4, 4), generator=g).repeat_interleave(4, 1)
    spans[talk == 0] = -1
    documents = torch.randint(1, 64, (ROWS, 3, 6), generator=g).masked_fill(
        torch.arange(6) > 1 + key[:, None, None] % 5, 0
    )
    return {
        "conversation_ids": talk, "conversation_roles": roles, "conversation_spans": spans,
        "ids": ids, "labels": labels, "answers": answers, "pairs": pairs, "key": key % 40, "texts": texts,
        "start": start, "prefers": prefers, "positive_ids": documents[:, 0], "negative_ids": documents[:, 1:],
    }  # fmt: skip


def counts(ranks: int) -> StepCounts:
    whole = batch()
    labelled = whole["labels"][:, 1:] != -100
    answers, pairs = int((whole["answers"][:, 1:] & labelled).sum()), int((whole["prefers"] >= 0).sum())
    talks, inside = whole["conversation_ids"] != 0, whole["conversation_spans"][:, 1:, scopes.PROTECTED] >= 0
    read = int((whole["positive_ids"][:, 1:] != 0).sum())
    return StepCounts(int(labelled.sum()), answers, ROWS, ranks, pairs, int(talks.sum()), int(inside.sum()), read)


def composer(weights: params.Objectives) -> Composer:
    """In the middle of a run: with usage and rewards of the steps before."""
    made, g = Composer(weights), torch.Generator().manual_seed(2)
    made.usage = USAGE
    gates = [torch.rand(99, 4, generator=g).softmax(-1) for _ in USAGE]
    for _ in range(2):
        labels, spent = torch.randint(0, 64, (99,), generator=g), 4 + torch.rand(99, generator=g)
        made.bandit.observe(spent, labels, gates, [gate.topk(2).indices for gate in gates])
        made.bandit.after_step() if not dist.is_initialized() else alone(made)
    return made


def alone(made: Composer) -> None:
    """The history of `composer` is the whole step's: on every rank, and counted once."""
    made.bandit.new = {name: value / dist.get_world_size() for name, value in made.bandit.new.items()}
    made.bandit.after_step()


def forward(model: PreTrainedModel, part: Parts, contrastive: bool = False) -> dict[str, Any]:
    """What the composer gets of one micro-batch, but for the counts."""
    with routing.record(model) as routed:
        logits = model(input_ids=part["ids"], use_cache=False).logits
    given = {"logits": logits, "labels": part["labels"], "answer_mask": part["answers"], "routed": routed}
    if contrastive:
        found = embed(model, part["pairs"].flatten(0, 1), 0).unflatten(0, (-1, 3))
        return given | {"pairs": Pairs(found[:, 0], found[:, 1], found[:, 2:], part["key"])}
    said = conformance.read(model, part, RULES, FORBIDDEN, 0)
    assert len(said.mass) == 2
    texts, start = part["texts"].flatten(0, 1), part["start"].repeat_interleave(2)
    both = preference.answers(model(input_ids=texts, use_cache=False).logits, texts, start, 0)
    sides = [preference.Answers(both.log_probs[i::2], both.tokens[i::2]) for i in (0, 1)]
    pairs = preference.Preferences(*sides, part["prefers"])
    read = reading.said(model(**reading.asked(part, 0)).logits, part, 0)
    return given | {"pairs": None, "preferences": pairs, "conversations": said, "read": read}


def cut(part: Parts, sizes: list[int]) -> list[Parts]:
    return [dict(zip(part, rows, strict=True)) for rows in zip(*(t.split(sizes) for t in part.values()), strict=True)]


def cuts(rows: int) -> list[list[int]]:
    """1, 4 and 8 micro-batches, as uneven as can be."""
    half, fourth = rows // 2, rows // 4
    return [[rows], [half, 1, fourth, rows - 1 - half - fourth], [1] * 7 + [rows - 7]]


def one_step(
    model: PreTrainedModel, part: Parts, sizes: list[int], ranks: int, weights: dict[str, params.Objectives]
) -> dict[str, torch.Tensor]:
    """A step under each of `weights`: its gradient, averaged over ranks as FSDP does, its values, summed over them, its
    gradient norms, and what its composer knows in the end. One forward a micro-batch serves all.
    """
    made = {name: composer(each) for name, each in weights.items()}
    found: dict[str, torch.Tensor] = {}

    def add(key: str, value: torch.Tensor) -> None:
        found[key] = found[key] + value.double() if key in found else value.double()

    leaves = list(model.parameters())
    for micro in cut(part, sizes):
        given = forward(model, micro, "contrastive" in weights)
        for name, each in made.items():
            step = each.losses(**given, counts=counts(ranks))
            grads = torch.autograd.grad(step.total, leaves, retain_graph=True, materialize_grads=True)
            add(f"gradient {name}", torch.cat([g.flatten() for g in grads]) / ranks)
            for kind in ("raw", "weighted", "squares"):
                for term, value in getattr(step, kind).items():
                    add(f"{kind} {name} {term}", value)
    for key in sorted(found):
        if dist.is_initialized():
            dist.all_reduce(found[key])
    for name, each in made.items():
        each.after_step()
        found[f"usage {name}"] = each.usage
        found |= {f"rewards {name} {key}": value for key, value in each.bandit.sums.items()}
    return found


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative distance of each quantity of two steps."""
    assert one.keys() == other.keys()
    return {k: float((one[k] - other[k]).double().norm() / one[k].double().norm().clamp_min(1e-30)) for k in one}


# ---- one process group for each number of ranks, all ways to split a step inside


def worker(rank: int, ranks: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)
    report = {"additive": split_steps(rank, ranks, folder), "contrastive": one_cut(rank, ranks, folder)}
    if ranks == 2:
        report["fsdp"] = sharded(rank, folder)
    if rank == 0:
        Path(f"{folder}/{ranks}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


def share(rank: int, ranks: int) -> Parts:
    return {name: t.chunk(ranks)[rank] for name, t in batch().items()}


def split_steps(rank: int, ranks: int, folder: str) -> dict[str, dict[str, float]]:
    reference, report = torch.load(f"{folder}/additive.pt", weights_only=True), {}
    for recompute in (False, True):
        model = tiny(SMALL)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for sizes in cuts(ROWS // ranks):
            found = one_step(model, share(rank, ranks), sizes, ranks, EACH)
            report[f"{sizes} {recompute}"] = differences({key: reference[key] for key in found}, found)
    return report


def one_cut(rank: int, ranks: int, folder: str) -> dict[str, float]:
    """InfoNCE on all rows of the rank at once."""
    reference = torch.load(f"{folder}/contrastive.pt", weights_only=True)
    found = one_step(tiny(SMALL), share(rank, ranks), [ROWS // ranks], ranks, {"contrastive": CONTRASTIVE})
    return differences(reference, found)


def sharded(rank: int, folder: str) -> dict[str, dict[str, float]]:
    """Parameters in shards, and a plain `backward`: with and without gradient norms."""
    spread = DistributedConfig(fsdp_size=2)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=spread, dtype=torch.float32)
    assert any(isinstance(p, DTensor) for p in model.parameters())
    report, bits = {}, []
    for every in (0, 1):
        for name, weights in (("additive", ALL["all"]), ("contrastive", CONTRASTIVE)):
            reference = torch.load(f"{folder}/{name}.pt", weights_only=True)
            made, squares = composer(weights.model_copy(update={"norms_every": every})), {}
            model.zero_grad()
            part = share(rank, 2)
            for micro in cut(part, [ROWS // 2] if name == "contrastive" else [1, ROWS // 2 - 1]):
                step = made.losses(**forward(model, micro, name == "contrastive"), counts=counts(2))
                step.total.backward()
                for term, value in step.squares.items():
                    squares[term] = squares.get(term, 0.0) + value
            assert bool(squares) == bool(every)
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
            grads = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]
            bits.append(torch.cat([g.flatten() for g in grads]))
            key = "all" if name == "additive" else name
            found = {f"gradient {key}": bits[-1].double()}
            for term, value in squares.items():
                dist.all_reduce(value)
                found[f"squares {key} {term}"] = value
            report[f"{name} {every}"] = differences({k: reference[k] for k in found}, found)
    report["disturbed"] = {str(i): float((bits[i] - bits[i + 2]).abs().max()) for i in (0, 1)}
    return report


def tiny(config: dict) -> PreTrainedModel:
    return build(params.Model(kind="auto" if "model_type" in config else "stack", config=config), 64, 0, 3).train()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole step in one micro-batch of one process: what all others are compared with."""
    folder = tmp_path_factory.mktemp("scale")
    model = tiny(SMALL)
    model.save_pretrained(folder)
    torch.save(one_step(model, batch(), [ROWS], 1, EACH | ALL), folder / "additive.pt")
    torch.save(one_step(model, batch(), [ROWS], 1, {"contrastive": CONTRASTIVE}), folder / "contrastive.pt")
    return folder


@pytest.fixture(scope="module", params=[1, 2, 4])
def report(request: pytest.FixtureRequest, home: Path) -> dict[str, Any]:
    multiprocessing.set_forkserver_preload(["torch", "stackpkg.model", "stackpkg.objectives"])  # imported once for all
    mp.start_processes(worker, (request.param, str(home)), request.param, start_method="forkserver")
    return json.loads((home / f"{request.param}.json").read_text()) | {"ranks": request.param}


def test_splitting_a_step_changes_no_additive_term(report: dict[str, Any]) -> None:
    assert len(report["additive"]) == 6
    for where, found in report["additive"].items():
        assert {f"gradient {name}" for name in ADDITIVE} <= found.keys()
        wrong = {key: value for key, value in found.items() if not value < 1e-6}
        assert not wrong, f"{report['ranks']} ranks, micro-batches and recomputation {where}"


def test_splitting_rows_over_ranks_changes_no_contrastive_gradient(report: dict[str, Any]) -> None:
    assert "gradient contrastive" in report["contrastive"]
    assert {k: v for k, v in report["contrastive"].items() if not v < 1e-6} == {}


def test_sharded_parameters_get_the_same_gradient_and_norms_leave_it_alone(report: dict[str, Any]) -> None:
    if report["ranks"] != 2:
        assert "fsdp" not in report
        return
    assert report["fsdp"].pop("disturbed") == {"0": 0.0, "1": 0.0}
    assert len(report["fsdp"]) == 4 and "squares all regret_load_balance" in report["fsdp"]["additive 1"]
    wrong = {where: {k: v for k, v in found.items() if not v < 1e-6} for where, found in report["fsdp"].items()}
    assert not any(wrong.values()), wrong


# ---- what is not additive, and the statement that holds instead


def test_contrastive_term_depends_on_the_negatives_in_a_micro_batch() -> None:
    model, weights = tiny(SMALL), {"contrastive": CONTRASTIVE}
    whole, halves = (one_step(model, batch(), sizes, 1, weights) for sizes in ([ROWS], [ROWS // 2] * 2))
    assert halves["raw contrastive contrastive"] < whole["raw contrastive contrastive"]
    assert differences(whole, halves)["gradient contrastive"] > 1e-3


@pytest.mark.parametrize("sizes", [[12], [1, 11], [3, 1, 6, 2], [1] * 12], ids=str)
def test_contrastive_term_is_additive_when_the_negatives_are_held_fixed(sizes: list[int]) -> None:
    g = torch.Generator().manual_seed(1)
    query, document = (torch.randn(12, 5, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    value = losses.info_nce(query, document, document[:, None][:, :0], torch.arange(12), 0.5)
    expected = torch.autograd.grad(value, (query, document))
    parts, rows = query.new_zeros(()), torch.arange(12)
    others = torch.stack([document[rows != row] for row in rows])  # each row brings all other documents along
    for part in rows.split(sizes):
        same_key = torch.zeros(len(part), dtype=torch.long)  # and takes none from the micro-batch
        parts = parts + losses.info_nce(query[part], document[part], others[part], same_key, 0.5)
    torch.testing.assert_close(parts, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(parts, (query, document)), expected, rtol=1e-9, atol=1e-12)


def test_balance_of_a_micro_batch_alone_is_not_additive_and_never_below_that_of_the_step() -> None:
    choices = torch.rand(48, 4, generator=torch.Generator().manual_seed(3)).argmax(-1)
    whole = losses.balance_divergence(torch.bincount(choices, minlength=4)[None] / 48)
    local = sum(
        len(part) / 48 * losses.balance_divergence(torch.bincount(part, minlength=4)[None] / len(part))
        for part in choices.split([5, 20, 23])
    )
    assert local > whole + 1e-3, "Jensen: the divergence is convex, so small micro-batches look unbalanced"
