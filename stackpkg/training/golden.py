"""Golden losses: a hundred steps in each tested layout, committed to the last bit, computed again and compared.

    python -m stackpkg.training.golden [LAYOUT ...]                   # exit 1 where a number differs
    python -m stackpkg.training.golden [LAYOUT ...] --bless "why"     # these numbers are the right ones from now on

What is run is what `stackpkg launch` runs: the data stream of a small made-up corpus, all objectives, the optimiser in
deterministic mode, an update skipped for a NaN, an evaluation, snapshots, and under FSDP2 a killed rank and a resume.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stackpkg import params, runs
from stackpkg.data.stream import Stream
from stackpkg.params import Params
from stackpkg.runs import RunFolder, read_json, write_json
from stackpkg.telemetry import rows
from stackpkg.training import launch, reproducibility, support, tiny

FOLDER = Path(__file__).parents[2] / "tests/golden_losses"
STEPS, SERIES = 100, ("loss", "grad_norm")
LAYOUTS = ("one process", *support.LAYOUTS)
NAN = {"kind": "nan_gradient", "step": 40, "rank": 0}
KILL = {"kind": "kill", "step": 71, "rank": 1, "attempt": 1}
# Another processor or version rounds otherwise, and a hundred steps make more of it: this is all that is asked there.
FIRST, TOLERANCE = 10, 1e-4
WORDS = ("order", "token", "shard", "stream", "window", "record", "licence", "mask", "alpha", "beta", "gamma", "delta")


def profile(layout: str) -> Params:
    """The job of a layout: all of it but the layout is the same for all."""
    sizes = {} if layout == "one process" else support.LAYOUTS[layout]
    p = tiny.profile("stackpkg", sizes, batch_tokens=1024, epoch_steps=50, deterministic=True).model_dump(mode="json")
    rides = {"long_range": 0.25, "retrieval": 0.5, "preferences": 0.5, "conversations": 0.5}
    p["model"]["config"] |= {"retrieval": False}
    p["curriculum"] = [{"steps": 60, "context": 64, **rides}, {"steps": 40, "context": 128, **rides}]
    p["data"]["sources"] = [{"kind": "folder", "path": "outbox/.golden/text"}]
    p["data"] |= {"vocab_size": 400, "ttl_seconds": 10**11}  # no record ever ends
    p["auxiliary"] |= {"conversations": 32, "conversation_tokens": 192}
    p["objectives"] |= {"preference": 0.1, "conformance": 0.1, "mined_negatives": 0}
    p["optimization"] |= {"learning_rate": 3e-3, "warmup_steps": 10, "floor": 3e-4}
    p["snapshots"] |= {"every_steps": 30}
    return params.validate(p)


def write_corpus(folder: RunFolder) -> None:
    """Text that no edit of the package changes: functions with a line that says what they do, and notes."""
    for k in range(30):
        functions = (
            f'def f{n}_{k}(a, b):\n    """Compute number {n} of module {k} here."""\n'
            f"    x = a + {n * 100 + k}\n    y = x * b\n    return x - y\n"
            for n in range(5)
        )
        runs.write_text(folder / f"text/code{k}.py", "\n\n".join(functions))
    for k in range(40):
        words = (f"{WORDS[(k * 7 + n * n) % len(WORDS)]}{(k * 31 + n) % 97}" for n in range(20 + 3 * k))
        runs.write_text(folder / f"text/note{k}.md", " ".join(words))
    for path in (folder / "text/note0.md").parent.iterdir():
        os.utime(path, (1_700_000_000, 1_700_000_000))  # the time of a file is its record's


def batches(folder: RunFolder, p: Params) -> str:
    """SHA-256 over every number the stream gives in all steps."""
    stream, sha = Stream(folder.path / "data", p), hashlib.sha256()
    for step in range(p.max_steps):
        for name, values in sorted(stream.batch(list(stream.plan.rows_at(stream.plan.position(step)))).items()):
            sha.update(f"{name}{values.shape}{values.dtype}".encode() + values.tobytes())
    return sha.hexdigest()


def measure(folder: RunFolder, layout: str, p: Params, steps: int = STEPS) -> dict[str, Any]:
    """Run the job of a layout, or its first steps: up to the end of the warm-up they are the same whatever follows.
    Returns what a golden file holds of it, floats as `float.hex` writes them.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # a sum by two threads is another sum
    name, faults = path(layout).stem, [NAN, *([KILL] if layout == "fsdp2" else [])]
    done = launch.launch(name, p, folder, steps=steps, faults=faults, quiet=True)
    table = rows.effective(rows.read(folder.path / "telemetry" / name))
    table = table[table["rank"] == 0].sort_values("step")
    found: dict[str, Any] = {series: [float(value).hex() for value in table[series]] for series in SERIES}
    return found | {
        "layout": layout,
        "steps": steps,
        "batches": batches(folder, p),
        "weights_sha256": done["weights_sha256"],
        "machine": reproducibility.machine(),
    }


def difference(golden: dict[str, Any], found: dict[str, Any]) -> str:
    """What differs first in the steps that were `found`, with both values; empty when nothing does. Bits are compared
    where the machine is the same in all that rounding depends on, elsewhere the first steps to a tolerance.
    """
    where = f"{golden['layout']}: "
    if golden["batches"] != found["batches"]:
        return where + "the stream gives other batches, so no loss can be the same"
    exact = golden["machine"] == found["machine"]
    for step in range(found["steps"] if exact else min(FIRST, found["steps"])):
        for series in SERIES:
            old, new = (each[series][step] if step < len(each[series]) else None for each in (golden, found))
            if old is None or new is None:
                return f"{where}step {step + 1}, {series}: golden {old}, now {new}"
            was, now = float.fromhex(old), float.fromhex(new)
            if old != new and (exact or not abs(now - was) <= TOLERANCE * abs(was)):
                return f"{where}step {step + 1}, {series}: golden {was!r} ({old}), now {now!r} ({new})"
    if exact and golden["steps"] == found["steps"] and golden["weights_sha256"] != found["weights_sha256"]:
        return where + "every loss is the same to the last bit, the weights at the end are not"
    return ""


def verdict(golden: dict[str, Any], found: dict[str, Any]) -> str:
    """One line for a reader on a comparison without a difference."""
    ours, theirs = found["machine"], golden["machine"]
    if ours == theirs:
        return f"{golden['layout']}: {found['steps']} steps and the weights are the same to the last bit"
    apart = ", ".join(f"{key} {theirs.get(key)} -> {value}" for key, value in ours.items() if theirs.get(key) != value)
    return (
        f"{golden['layout']}: the first {FIRST} steps are within {TOLERANCE:g}; bits can't be compared, the golden "
        f"losses are of another machine or version ({apart})"
    )


def bless(found: dict[str, Any], reason: str, folder: Path = FOLDER) -> Path:
    """Write the golden file of a layout. Raises `ValueError` without a reason, which the file keeps."""
    if not reason.strip():
        raise ValueError('golden losses are blessed on purpose: give the reason, --bless "why the numbers changed"')
    made = {"reason": reason.strip(), "date": runs.now()[:10], "above_commit": runs.environment()["git_commit"]}
    return write_json(folder / path(found["layout"]).name, found | {"blessed": made})


def prepare() -> RunFolder:
    """The corpus, in a folder of its own."""
    folder = RunFolder(".golden")
    write_corpus(folder)
    tiny.prepare(folder.path, profile("one process"))
    return folder


def path(layout: str) -> Path:
    """The golden file of a layout."""
    return FOLDER / f"{layout.replace(' ', '-').replace('+-', '')}.json"


def main(arguments: Iterable[str]) -> int:
    parser = argparse.ArgumentParser("stackpkg.training.golden", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("layouts", nargs="*", metavar="LAYOUT", help=", ".join(LAYOUTS))
    parser.add_argument("--bless", metavar="REASON", help="write the golden losses, with the reason")
    given = parser.parse_args([*arguments])
    if unknown := sorted({*given.layouts} - {*LAYOUTS}):
        parser.error(f"no golden losses of {', '.join(unknown)}; there are {', '.join(LAYOUTS)}")
    if given.bless is not None and not given.bless.strip():
        parser.error("--bless needs the reason why the numbers changed")
    folder, wrong = prepare(), 0
    try:
        for layout in given.layouts or LAYOUTS:
            found = measure(folder, layout, profile(layout))
            if given.bless is not None:
                print(f"{layout}: blessed in {bless(found, given.bless).name}", flush=True)
                continue
            golden = read_json(path(layout))
            told = difference(golden, found)
            wrong += bool(told)
            print(told or verdict(golden, found), flush=True)
    finally:
        shutil.rmtree(folder.path)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
