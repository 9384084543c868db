"""Across a skipped step of the real trainer no bit of weights, moments or average changes, on any rank."""

import json
import textwrap
from itertools import pairwise
from pathlib import Path

import pytest
import test_training
from test_training import Job, history, profile, run

from stackpkg import runs
from stackpkg.params import Params
from stackpkg.runs import RunFolder, write_text
from stackpkg.training import launch

lab = test_training.lab  # the same tiny run
STEPS, SKIPPED = 5, 3
PARTS = ("weights", "moments", "average")
HASHING = """
    import hashlib, json, sys
    from pathlib import Path

    import torch

    from stackpkg.training import worker
    from stackpkg.training.mesh import local


    class Hashing(worker.StackTrainer):
        def _clip_grad_norm(self, model):
            self.tell_bits("before", self.state.global_step + 1)
            return super()._clip_grad_norm(model)

        def _write_row(self):
            super()._write_row()
            self.tell_bits("after", self.state.global_step)

        def tell_bits(self, when, step):
            states = self.optimizer.optimizer.state
            parts = {name: hashlib.sha256() for name in ("weights", "moments", "average")}
            for name, weight in sorted(self.network.named_parameters()):
                add(parts["weights"], name, weight)
                for key, value in sorted(states[weight].items() if weight in states else ()):
                    add(parts["moments"], f"{name}.{key}", value)
                add(parts["average"], name, self.ema.shadow[name])
            parts["average"].update(repr((self.ema.updates, self.ema.unseen)).encode())
            bits = {name: found.hexdigest() for name, found in parts.items()}
            with (Path(self.args.output_dir) / f"bits-{self.rank}.jsonl").open("a") as stream:
                stream.write(json.dumps({"when": when, "step": step, **bits}) + chr(10))


    def add(found, name, value):
        tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.double)
        data = local(tensor).detach().contiguous().reshape(-1).view(torch.uint8)
        found.update(name.encode() + data.numpy().tobytes())


    worker.StackTrainer = Hashing
    torch.set_num_threads(1)
    worker.run(Path(sys.argv[1]).resolve())
"""


def with_(p: Params, section: str, **changes: str) -> Params:
    return p.model_copy(update={section: getattr(p, section).model_copy(update=changes)})


@pytest.fixture(scope="module")
def done(lab: RunFolder) -> RunFolder:
    """The gradient of one rank is poisoned in step 3: by each optimiser, on two ranks that share all of it."""
    write_text(runs.root() / "hashing.py", textwrap.dedent(HASHING))
    fault = {"kind": "nan_gradient", "step": SKIPPED, "rank": 1}
    names = ("adamw", "adafactor")
    jobs = {name: Job(with_(profile(2), "optimization", optimizer=name), [fault], STEPS) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "WORKER", "hashing")
        run(lab, **jobs)
    return lab


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_skipped_step_changes_no_bit_and_the_next_changes_all(done: RunFolder, optimizer: str, rank: int) -> None:
    told = bits(done.path / f"checkpoints/{optimizer}", rank)
    assert history(done, optimizer).update_skipped.tolist() == [int(step == SKIPPED) for step in range(1, STEPS + 1)]
    for step in range(2, STEPS + 1):  # the rate of the first step is 0
        before, after = told["before", step], told["after", step]
        changed = [part for part in PARTS if before[part] != after[part]]
        assert changed == ([] if step == SKIPPED else [*PARTS]), (step, changed)
    for step, later in pairwise(range(1, STEPS + 1)):
        assert told["after", step] == told["before", later], "something moved between two steps"


def bits(home: Path, rank: int) -> dict[tuple[str, int], dict[str, str]]:
    lines = map(json.loads, (home / f"bits-{rank}.jsonl").read_text().splitlines())
    return {(line["when"], line["step"]): {part: line[part] for part in PARTS} for line in lines}


def test_a_sum_that_overflows_in_bf16_does_so_on_sharded_ranks_too(lab: RunFolder) -> None:
    """One process computes under autocast, FSDP casts by itself: the fault is in the arithmetic of either."""
    p = with_(profile(2), "training", precision="bf16")
    run(lab, halves=Job(p, [{"kind": "overflow", "step": 3}], 4))
    assert history(lab, "halves").update_skipped.tolist() == [0, 0, 1, 0]
