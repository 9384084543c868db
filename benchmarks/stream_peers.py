"""One system of `benchmarks/stream.py`, in the interpreter that has it: `python stream_peers.py SYSTEM FOLDER STEPS`.

Each reads the same packed rows, written once in its own format, in shuffled batches of `BATCH` rows as int64 tensors.
Prints one JSON object: tokens, seconds of wall clock and of this process's CPU for `STEPS` batches; `open`, seconds
from the start of the loader to its first batch in a process that has just imported it; `resume`, seconds
from nothing but what is on disk, and the saved state, to the batch in the middle; `seek`, the same from an open loader.
"""

import json
import sys
import time
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

BATCH, PAD, EOS = 8, 0, 1


def rows_of(folder: Path) -> np.ndarray:
    return np.load(folder / "rows.npy", mmap_mode="r")


def collate(items: list) -> dict[str, torch.Tensor]:
    """The batch that is asked for: tokens, labels that stop at documents, and positions that restart with them."""
    ids = np.stack(items).astype(np.int64)
    starts = np.ones(ids.shape, bool)
    starts[:, 1:] = ids[:, :-1] == EOS
    place = np.arange(ids.shape[1])
    positions = place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)
    made = {"input_ids": ids, "labels": np.where(starts | (ids == PAD), -100, ids), "position_ids": positions}
    return {name: torch.from_numpy(value) for name, value in made.items()}


def _nothing(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def mosaic(folder: Path):
    # The CPU build of torch has no matching torchvision; nothing that reads tokens needs it.
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.datasets"):
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__getattr__ = _nothing  # type: ignore[method-assign]
        sys.modules[name] = module
    from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    rows, local = rows_of(folder), str(folder / "mds")
    if not Path(local).exists():
        with MDSWriter(out=local, columns={"ids": f"ndarray:uint16:{rows.shape[1]}"}, size_limit=1 << 26) as writer:
            for row in rows:
                writer.write({"ids": np.ascontiguousarray(row)})

    def opened(state=None, loader=None):
        clean_stale_shared_memory()  # an open loader takes a state for its next epoch: to seek is to open anew
        data = StreamingDataset(local=local, shuffle=True, shuffle_seed=17, batch_size=BATCH, num_canonical_nodes=1)
        loader = StreamingDataLoader(
            data, batch_size=BATCH, collate_fn=lambda items: collate([i["ids"] for i in items])
        )
        if state:
            loader.load_state_dict(state)
        return loader

    return opened, lambda loader, step: loader.state_dict()


def litdata(folder: Path):
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader
    from litdata.streaming.writer import BinaryWriter

    rows, local = rows_of(folder), folder / "litdata"
    if not local.exists():
        writer = BinaryWriter(str(local), chunk_bytes=1 << 26, item_loader=TokensLoader(block_size=rows.shape[1]))
        for k, row in enumerate(rows):
            writer.add_item(k, torch.as_tensor(np.ascontiguousarray(row)).to(torch.int32))
        writer.done()
        writer.merge()

    def opened(state=None, loader=None):
        if loader is not None:
            loader.load_state_dict(state)
            return loader
        data = StreamingDataset(
            str(local), item_loader=TokensLoader(block_size=rows.shape[1]), shuffle=True, seed=17, drop_last=True
        )
        loader = StreamingDataLoader(
            data, batch_size=BATCH, num_workers=0, collate_fn=lambda items: collate([item.numpy() for item in items])
        )
        if state:
            loader.load_state_dict(state)
        return loader

    return opened, lambda loader, step: loader.state_dict()


def datasets(folder: Path):
    import datasets as hf

    hf.disable_progress_bars()
    local = folder / "arrow"
    if not local.exists():
        rows = rows_of(folder)
        features = hf.Features({"ids": hf.Sequence(hf.Value("uint16"), length=rows.shape[1])})
        hf.Dataset.from_dict({"ids": list(np.asarray(rows))}, features=features).save_to_disk(str(local))

    def opened(start=0, loader=None):
        data = loader.dataset if loader is not None else hf.load_from_disk(str(local)).with_format("numpy")
        order = np.random.default_rng(17).permutation(len(data))
        batches = [order[k : k + BATCH].tolist() for k in range((start or 0) * BATCH, len(order) - BATCH + 1, BATCH)]
        return DataLoader(data, batch_sampler=batches, collate_fn=lambda items: collate([i["ids"] for i in items]))

    return opened, lambda loader, step: step


def measure(opened, state_of, steps: int) -> dict[str, float]:
    """The same for every system, ours included. `open` is the first of this process, what is imported and compiled on
    the way included; `resume` the better of two, of files that were read before."""
    start = time.perf_counter()
    loader = opened()
    batches = iter(loader)
    first = next(batches)
    opening = time.perf_counter() - start
    assert first["labels"].shape[0] == BATCH and first["input_ids"].dtype == torch.int64
    made, state = {"wall": 0.0, "cpu": 0.0, "tokens": 0}, None
    for count in (steps // 2, steps - steps // 2):
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            made["tokens"] += next(batches)["input_ids"].numel()
        made["wall"] += time.perf_counter() - wall
        made["cpu"] += time.process_time() - cpu
        state = state or state_of(loader, steps // 2 + 1)
    expected, times = None, {"resume": [], "seek": []}
    for name in ("resume", "seek", "resume", "seek"):
        start = time.perf_counter()
        found = next(iter(opened(state, loader if name == "seek" else None)))["input_ids"]
        times[name].append(time.perf_counter() - start)
        assert expected is None or torch.equal(expected, found), f"a {name} does not come to the same batch"
        expected = found
    return made | {"open": opening} | {name: min(found) for name, found in times.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    system, place, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    systems = {"mosaicml-streaming": mosaic, "litdata": litdata, "datasets": datasets}
    print(json.dumps(measure(*systems[system](place), count)))
