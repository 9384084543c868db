"""Ranks that begin, wait and fail together."""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from test_snapshots import checkpoint, flip

from stackpkg.runs import write_text
from stackpkg.training import attempts, layout, snapshots


def together(rank: int, home: Path) -> None:
    store = dist.FileStore(str(home.parents[1] / "store"), 2)
    store.set(f"here-{rank}", "")
    store.wait(["here-0", "here-1"], timedelta(minutes=2))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=5))
    meet = layout.patient(1.0)
    with pytest.raises(
        snapshots.ResumeFailed, match=r"checkpoint-20/dcp/.* changed.*; checkpoint-10/state.pt: missing"
    ):
        attempts.begin(home, {})
    time.sleep(0 if rank else 8)  # longer than a collective may take
    meet()
    write_text(home / f"met-{rank}", "")
    if rank == 0:
        os._exit(0)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="by peer"):
        meet()
    assert time.monotonic() - began < 10, "one that died is seen at once, however long the others would wait"
    write_text(home / "seen", "")
    os._exit(0)


def test_ranks_fail_together_where_no_checkpoint_is_whole_and_wait_for_one_that_works_alone(tmp_path: Path) -> None:
    home = tmp_path / "run/checkpoints/train"
    (checkpoint(home, 10) / "state.pt").unlink()
    flip(checkpoint(home, 20))
    mp.spawn(together, (home,), nprocs=2)
    assert sorted(path.name for path in home.iterdir()) == ["checkpoint-10", "checkpoint-20", "met-0", "met-1", "seen"]
    assert attempts.read(home) == []
