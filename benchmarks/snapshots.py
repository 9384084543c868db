"""What a snapshot costs the training: saved behind it against the same save waited for.

    python benchmarks/snapshots.py [--json FILE] [--saves 7]

The job: a reference model, AdamW and the average of the weights, one process with one thread, training on random
tokens; after every few steps the state (weights, two moments, average, fp32) is saved, with checksums, flushed to the
disk and renamed, by turns behind the training and waited for. `stall` is the time in which the training does nothing
but save: taking stock of the state, handing it over, and waiting for its copy before the next update; of the other
kind, the whole save. `slowdown` is what the steps beside a save took longer than steps without one, summed over those
steps: copy, checksum and writes need the cores and the interpreter that the training needs too. Medians over all saves
of one run; a write of the same bytes to the same disk, flushed, is measured beside them.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import report
import torch
import torch.distributed as dist

from stackpkg import model as models
from stackpkg.params import Model, Snapshots
from stackpkg.training import checkpoint, snapshots
from stackpkg.training.ema import ShardedEMA
from stackpkg.training.saving import Saver

SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 32, "block_size": 16}
SIZES = {
    "small": SHAPE | {"hidden_size": 128, "num_hidden_layers": 4, "head_dim": 32, "moe_intermediate_size": 256,
                      "num_experts": 8},
    "large": SHAPE | {"hidden_size": 512, "num_hidden_layers": 6, "head_dim": 128, "moe_intermediate_size": 1024,
                      "num_experts": 4},
}  # fmt: skip
VOCABULARY, ROWS, CONTEXT, QUIET = 4096, 2, 128, 3


class Loop:
    """A model in training, its saver, and the clock."""

    def __init__(self, config: dict, home: Path) -> None:
        self.model = models.build(Model(config=config), VOCABULARY, 0, 17)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=True)
        self.ema = ShardedEMA(self.model, 0.999)
        self.saver = Saver(home, Snapshots(keep_last=1, keep_best=0), {"attempt": 1}, [])
        self.number = 0

    def step(self) -> tuple[float, float]:
        """Seconds of a step, and of these the wait for the copy."""
        began, ids = time.perf_counter(), torch.randint(VOCABULARY, (ROWS, CONTEXT))
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        waits = time.perf_counter()
        self.saver.staged()
        waited = time.perf_counter() - waits
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        self.number += 1
        return time.perf_counter() - began, waited

    def save(self) -> float:
        began = time.perf_counter()
        self.saver.begin(self.number, checkpoint.tensors(self.model, self.optimizer, self.ema), None)
        return time.perf_counter() - began

    @property
    def under_way(self) -> bool:
        return any(not save.upload_completion.done() for save in self.saver._under_way)


def plain_write(source: Path, target: Path) -> float:
    """Seconds to write the bytes of a snapshot once more, and flush them."""
    began = time.perf_counter()
    shutil.copytree(source, target)
    for path in [path for path in target.rglob("*") if path.is_file()]:
        snapshots.flush(path)
    return time.perf_counter() - began


def measure(name: str, config: dict, home: Path, saves: int) -> list[dict]:
    torch.manual_seed(17)
    loop = Loop(config, home)
    quiet, behind, waited_for, slower, writes = [], [], [], [], []
    for turn in range(saves + 1):
        alone = [loop.step()[0] for _ in range(QUIET)]
        stall = loop.save()
        beside, copies = [], 0.0
        while loop.under_way or not beside:
            seconds, waited = loop.step()
            beside.append(seconds - waited)
            copies += waited
        loop.saver.wait()
        loop.step()
        began = time.perf_counter()
        loop.save()
        loop.saver.wait()
        blocking = time.perf_counter() - began
        newest = [*snapshots.listed(home).values()][-1]
        writes.append(plain_write(newest, home / "written"))
        shutil.rmtree(home / "written")
        if turn:  # the first takes the memory for the copy, and warms up
            quiet += alone
            behind.append(stall + copies)
            waited_for.append(blocking)
            slower.append(sum(beside) - len(beside) * statistics.median(alone))
    size = sum(path.stat().st_size for path in snapshots.files_below(newest))
    millions = sum(p.numel() for p in loop.model.parameters()) / 1e6
    print(f"{name}: {millions:.1f}M parameters, {len(behind)} saves of each kind", file=sys.stderr)
    ratio = statistics.median(behind) / statistics.median(waited_for)
    system = f"{name}, {millions:.1f}M parameters"
    return [
        report.row(system, "snapshot", size / 2**20, "MiB"),
        report.row(system, "step without a save", 1e3 * statistics.median(quiet), "ms"),
        report.row(system, "write and flush alone", 1e3 * statistics.median(writes), "ms"),
        report.row(system, "stall, waited for", 1e3 * statistics.median(waited_for), "ms"),
        report.row(system, "stall, behind", 1e3 * statistics.median(behind), "ms"),
        report.row(system, "stall, behind / waited", 100 * ratio, "%"),
        report.row(system, "slowdown, behind", 1e3 * statistics.median(slower), "ms"),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--saves", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rows = []
    for name, config in SIZES.items():
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as place:  # a disk, which /tmp need not be
            rows += measure(name, config, Path(place), args.saves)
    versions = report.machine("torch")["versions"]
    report.write(rows, args.json, torch=versions["torch"])
    sys.stdout.flush()
    os._exit(0)
