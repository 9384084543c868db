"""Negatives mined in the loop: the nearest other documents of recent steps, the same however a step is split."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from stackpkg import params
from stackpkg.objectives import Composer, Pairs, StepCounts
from stackpkg.objectives.mining import STEPS, Recent

OFF = dict.fromkeys(("load_balance", "gate_entropy", "regret", "conformance", "long_range", "reading"), 0.0)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def filled(steps: int, rows: int = 6) -> Recent:
    recent = Recent()
    for step in range(steps):
        recent.observe(unit(rows, 5, seed=step), torch.arange(rows) + step * rows)
        recent.after_step()
    return recent


def test_mined_are_the_nearest_of_another_document() -> None:
    recent, query, key = filled(4), unit(3, 5, seed=99), torch.tensor([0, 13, 777])
    documents, keys = (torch.cat(parts) for parts in zip(*recent.steps, strict=True))
    found = recent.hardest(query, key, 2)
    for row in range(3):
        scores = [(float(query[row] @ d), d) for d, k in zip(documents, keys, strict=True) if k != key[row]]
        best = sorted(scores, key=lambda pair: -pair[0])[:2]
        torch.testing.assert_close(found[row], torch.stack([d for _, d in best]))
    assert not found.requires_grad


def test_there_are_no_more_than_there_are_and_none_of_the_own_key() -> None:
    assert Recent().hardest(unit(3, 5), torch.arange(3), 4).shape == (3, 0, 5)
    recent = Recent()
    recent.observe(unit(3, 5), torch.tensor([7, 7, 8]))
    recent.after_step()
    found = recent.hardest(unit(2, 5, seed=1), torch.tensor([7, 9]), 4)
    assert found.shape == (2, 1, 5) and torch.equal(found[0, 0], unit(3, 5)[2])


def test_old_steps_and_skipped_ones_are_forgotten() -> None:
    recent = filled(STEPS + 3)
    assert len(recent.steps) == STEPS and int(recent.steps[0][1][0]) == 3 * 6
    recent.observe(unit(2, 5), torch.arange(2))
    recent.drop()
    recent.after_step()
    assert int(recent.steps[-1][1][0]) == (STEPS + 2) * 6


def stepped(composer: Composer, number: int, sizes: list[int]) -> torch.Tensor:
    """One step of 8 pairs in micro-batches of these sizes: the gradient of its queries."""
    query, positive = unit(8, 5, seed=2 * number).requires_grad_(), unit(8, 5, seed=2 * number + 1)
    key, at, logits, total = torch.arange(8) + 8 * number, 0, torch.zeros(1, 2, 3), 0.0
    for size in sizes:
        part = slice(at, at + size)
        pairs = Pairs(query[part], positive[part], positive[part, None][:, :0], key[part])
        counts = StepCounts(8, 0, 8, 1)
        total = (
            total + composer.losses(logits, torch.zeros(1, 2).long(), torch.zeros(1, 2).bool(), [], pairs, counts).total
        )
        at += size
    composer.after_step()
    return torch.autograd.grad(total, query)[0]


def test_a_query_is_pushed_from_what_was_mined_and_the_state_goes_on_the_same() -> None:
    weights = params.Objectives(**OFF, ramp_steps={}, norms_every=0)
    one, without = Composer(weights), Composer(weights.model_copy(update={"mined_negatives": 0}))
    assert torch.equal(stepped(one, 0, [8]), stepped(without, 0, [8])), "nothing was seen before"
    other = Composer(weights)
    other.load_state_dict(one.state_dict())
    other.recent.load_state_dict(one.recent.state_dict())
    gradients = [stepped(each, 1, [8]) for each in (one, other, without)]
    assert torch.equal(gradients[0], gradients[1]) and not torch.equal(gradients[0], gradients[2])


def test_what_is_remembered_does_not_depend_on_micro_batches() -> None:
    whole, cut = (Composer(params.Objectives(**OFF, ramp_steps={}, norms_every=0)) for _ in range(2))
    stepped(whole, 0, [8]), stepped(cut, 0, [1, 5, 2])
    query, key = unit(3, 5, seed=50), torch.tensor([0, 3, 100])
    assert torch.equal(whole.recent.hardest(query, key, 3), cut.recent.hardest(query, key, 3))


def remembered(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    recent = Recent()
    recent.observe(unit(8, 5)[4 * rank : 4 * rank + 4], torch.arange(4) + 4 * rank)
    recent.after_step()
    torch.save(recent.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_remembers_what_all_saw(tmp_path: Path, rank: int) -> None:
    mp.spawn(remembered, (str(tmp_path),), nprocs=2)
    state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
    assert torch.equal(state["documents"][0], unit(8, 5)) and state["keys"][0].tolist() == list(range(8))
