"""Every fault that a job must survive, done to real jobs of a tiny model, and what came of each.

`python -m stackpkg.training.drills` does them all and writes `book/faults.json`, which the book and notebook 22 show.
"""

from __future__ import annotations

import math
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from stackpkg import params, runs
from stackpkg.params import Params
from stackpkg.runs import RunFolder, read_json, write_json
from stackpkg.telemetry import rows
from stackpkg.training import attempts, launch, recovery, snapshots, stop, support, tiny
from stackpkg.training.faults import flip

TABLE = support.TABLE.with_name("faults.json")
STEPS, EVERY = 16, 2
LATE = [*range(10, STEPS + 1)]  # the window of norms is warm from the ninth step on
BURST = [4, 5, 6, 7]  # as many steps as make a rung
Damage = Callable[[RunFolder, Path], None]


@dataclass(frozen=True)
class Drill:
    """A fault, and what is expected: how the job goes on (`went`), and whether its weights end as if nothing had been.

    With `damage` the job is killed in step 6, then that is done to what lies on the disk, and it is launched again; if
    that launch must be `refused`, the text of its error says so, and `mend` is done before it is launched once more.
    `during` is done while the job runs, when the rows of its first steps are on the disk.
    """

    what: str
    went: tuple[str, ...]
    faults: tuple[dict[str, Any], ...] = ()
    same: bool = True
    processes: int = 1
    precision: str = "fp32"
    damage: Damage | None = None
    refused: str = ""
    mend: Damage | None = None
    then: int = 0  # processes of the launch after the damage, if others
    during: Damage | None = None
    layout: dict[str, Any] = field(default_factory=dict)


def newest(home: Path) -> Path:
    return [*snapshots.listed(home).values()][-1]


def shard(home: Path) -> Path:
    return sorted((newest(home) / "dcp").glob("*.distcp"))[0]


def truncate(_: RunFolder, home: Path) -> None:
    shard(home).write_bytes(shard(home).read_bytes()[:-100])


def flip_all(_: RunFolder, home: Path) -> None:
    for path in home.glob("checkpoint-*/dcp/*.distcp"):
        flip(path)


def half_write(_: RunFolder, home: Path) -> None:
    """As a machine that loses power leaves it: in the folder of what is being saved, without its marker."""
    path = newest(home)
    (path / snapshots.MARKER).unlink()
    path.rename(home / snapshots.PARTIAL / path.name)


def tokens(folder: RunFolder) -> Path:
    return max((folder.path / "data/shards").glob("*.bin"), key=lambda path: path.stat().st_size)


def lose(folder: RunFolder, _: Path) -> None:
    tokens(folder).rename(folder.path / "lost.bin")


def find(folder: RunFolder, _: Path) -> None:
    names = [shard["name"] for shard in read_json(folder.path / "data/manifest.json")["shards"]]
    gone = next(name for name in names if not (folder.path / "data/shards" / f"{name}.bin").exists())
    (folder.path / "lost.bin").rename(folder.path / "data/shards" / f"{gone}.bin")


def another_corpus(folder: RunFolder, _: Path) -> None:
    path = folder.path / "data/manifest.json"
    shutil.copy(path, folder.path / "manifest.kept")
    runs.write_text(path, path.read_text(encoding="utf-8") + "\n")


def same_corpus(folder: RunFolder, _: Path) -> None:
    (folder.path / "manifest.kept").replace(folder.path / "data/manifest.json")


def ask(_: RunFolder, home: Path) -> None:
    stop.request(home, "a drill")


def another_code(_: RunFolder, home: Path) -> None:
    told = attempts.read(home)
    write_json(home / attempts.FILE, [*told[:-1], told[-1] | {"code": "0" * 16}])


def nothing(_: RunFolder, home: Path) -> None:
    """The job is only launched again."""


def at(step: int | list[int], kind: str, **more: Any) -> tuple[dict[str, Any], ...]:
    return ({"kind": kind, "step": step, **more},)


ONCE = {"attempt": 1}
DRILLS = {
    "nan_loss": Drill("NaN in the loss", ("skip 1",), at(5, "nan_loss", **ONCE), same=False),
    "inf_loss": Drill("Inf in the loss", ("skip 1",), at(5, "inf_loss", **ONCE), same=False),
    "nan_loss_stages": Drill("NaN in the loss of a pipeline", ("skip 1",), at(5, "nan_loss", **ONCE), False, 2,
                             layout={"pp": 2, "fsdp": 1, "pipeline_schedule": "gpipe"}),
    "nan_gradient": Drill("NaN in the gradient of one rank", ("skip 1",), at(5, "nan_gradient", rank=1), False, 2),
    "inf_gradient": Drill("Inf in the gradient of one rank", ("skip 1",), at(5, "inf_gradient", rank=1), False, 2),
    "nan_parameter": Drill("NaN in a weight of one rank", ("roll_back",), at(5, "nan_parameter", rank=1, **ONCE),
                           processes=2),
    "inf_parameter": Drill("Inf in a weight of one rank", ("roll_back",), at(5, "inf_parameter", rank=1, **ONCE),
                           processes=2),
    "nan_moment": Drill("NaN in a moment of the optimiser", ("roll_back",), at(5, "nan_moment", **ONCE)),
    "inf_moment": Drill("Inf in a moment of the optimiser", ("roll_back",), at(5, "inf_moment", **ONCE)),
    "inf_second_moment": Drill("Inf in a second moment of one rank", ("roll_back",),
                               at(5, "inf_second_moment", rank=1, **ONCE), processes=2),
    "poison": Drill("data that poisons four steps", ("roll_back", "skip_data"),
                    ({"kind": "nan_gradient", "cursor": [step - 1 for step in BURST]},), same=False),
    "overflow": Drill("a sum that overflows in bf16 and not in fp32", ("roll_back", "skip_data", "fp32"),
                      at([*range(4, STEPS + 1)], "overflow"), False, precision="bf16"),
    "hopeless": Drill("NaN in the same steps whatever is done", ("roll_back", "skip_data", "stop"),
                      at(BURST, "nan_gradient"), same=False),
    "spike": Drill("a gradient 10,000 times as large", ("skip 1",), at(10, "spike_gradient"), same=False),
    "burst": Drill("three of them in a row", ("skip 3",), at([10, 11, 12], "spike_gradient"), same=False),
    "level": Drill("from one step on all of them", ("skip 4",), at(LATE, "spike_gradient"), same=False),
    "kill_rank": Drill("kill -9 of one rank", ("restart",), at(5, "kill", rank=1, **ONCE), processes=2),
    "kill_all": Drill("kill -9 of all ranks", ("restart",), at(5, "kill", **ONCE), processes=2),
    "kill_job": Drill("kill -9 of the whole job", ("launch",), damage=nothing),
    "kill_saving": Drill("kill -9 of a rank that saves", ("restart",), at(6, "kill_saving", rank=1, **ONCE),
                         processes=2),
    "terminate": Drill("SIGTERM to one rank", ("restart",), at(5, "terminate", rank=1, **ONCE), processes=2),
    "preempted": Drill("preemption, ranks out of step", ("stopped", "launch"),
                       at([*range(3, 9)], "slow", rank=1, seconds=0.5, **ONCE), processes=2, during=ask),
    "disk_full": Drill("a full disk", ("restart",), at(5, "disk_full", **ONCE), processes=2),
    "hang": Drill("a rank that hangs", ("restart", "rank 1 hung"), at(5, "hang", rank=1, **ONCE), processes=2,
                  layout={"hang_minutes": 0.1}),
    "slow_rank": Drill("a slow rank, left out", ("stopped", "launch"), at([*range(3, 9)], "slow", rank=1, seconds=0.5),
                       same=False, processes=2, during=ask, then=1),
    "clock": Drill("a clock that goes back by a day", (), at(5, "clock_back")),
    "truncated": Drill("a checkpoint cut short", ("launch", "set aside"), damage=truncate),
    "flipped": Drill("a bit of a checkpoint flipped", ("launch", "set aside"),
                     damage=lambda _, home: flip(shard(home))),
    "half_written": Drill("a checkpoint half written", ("launch", "set aside"), damage=half_write),
    "none_whole": Drill("a bit of every checkpoint flipped", ("refused", "launch"), damage=flip_all,
                        refused="none is whole", mend=flip_all),
    "corrupt_shard": Drill("a bit of a shard flipped", ("refused", "launch"), refused="corrupt or missing: shards/",
                           damage=lambda folder, _: flip(tokens(folder)), mend=lambda folder, _: flip(tokens(folder))),
    "missing_shard": Drill("a shard gone", ("refused", "launch"), damage=lose, refused="corrupt or missing: shards/",
                           mend=find),
    "another_corpus": Drill("another manifest of the data", ("refused", "launch"), at(12, "kill", rank=1, **ONCE),
                            processes=2, during=another_corpus, refused="manifest.json is corrupt", mend=same_corpus),
    "fewer_ranks": Drill("resumed on half as many ranks", ("launch",), processes=2, damage=nothing, then=1, same=False),
    "more_ranks": Drill("resumed on twice as many ranks", ("launch",), damage=nothing, then=2, same=False),
    "another_code": Drill("resumed under other code", ("launch", "code changed"), damage=another_code),
}  # fmt: skip
CLEAN = {"clean_1": Drill("", ()), "clean_2": Drill("", (), processes=2)}


def profile(drill: Drill, processes: int) -> Params:
    """The reference model of `tiny` for `STEPS` steps; a job that is killed from outside is not restarted."""
    sizes = {"processes": processes, "fsdp": processes, "restarts": int(drill.damage is None), **drill.layout}
    p = tiny.profile("stackpkg", sizes, EVERY, accumulation=1, epoch_steps=STEPS, precision=drill.precision)
    values = p.model_dump(mode="json") | {"curriculum": [{"steps": STEPS, "context": 64, "long_range": 0.25}]}
    return params.validate(values)


def attempt(folder: RunFolder, p: Params, faults: list[dict[str, Any]]) -> str:
    """Launch the job `job` of a drill; why that did not end well, if it did not."""
    try:
        launch.launch("job", p, folder, steps=STEPS, faults=faults, quiet=True)
    except (RuntimeError, ValueError) as error:  # `Stopped` is one
        return str(error)
    return ""


def perform(name: str, drill: Drill, data: Path) -> dict[str, Any]:
    """Do it in a run of its own, `outbox/.drills-<name>`; what was seen."""
    folder = RunFolder(f".drills-{name}")
    shutil.rmtree(folder.path)
    shutil.copytree(data, folder.path / "data")
    home, faults = folder.path / "checkpoints/job", list(drill.faults)
    if drill.damage:
        faults = list(at(6, "kill", **ONCE))

    def go(processes: int) -> str:
        return attempt(folder, profile(drill, processes), faults)

    if drill.during:
        threading.Thread(target=_when_it_runs, args=(drill.during, folder, home), daemon=True).start()
    said, again = go(drill.processes), drill.then or drill.processes
    if drill.damage:
        drill.damage(folder, home)
    if drill.damage or "stopped" in drill.went:
        said = go(again)
    refused = bool(drill.refused) and drill.refused in said
    if drill.mend:
        drill.mend(folder, home)
        said = go(again)
    return _seen(drill, folder, home, said, refused)


def _when_it_runs(damage: Damage, folder: RunFolder, home: Path) -> None:
    told = folder.path / "telemetry/job/rank-00000.jsonl"
    while not (told.exists() and told.read_text().count("\n") >= EVERY):
        time.sleep(0.01)
    damage(folder, home)


def _seen(drill: Drill, folder: RunFolder, home: Path, said: str, refused: bool) -> dict[str, Any]:
    """How the job went, in words, and numbers from its own records."""
    begun, climbed = attempts.read(home), [event["rung"] for event in recovery.history(home)]
    table, done = rows.read(folder.path / "telemetry/job"), home / "done.json"
    report = read_json(done) if done.exists() else {}
    went = [*climbed] or ([f"skip {skipped}"] if (skipped := report.get("skipped_updates")) else [])
    went += ["stopped"] if any("stopped" in attempt for attempt in begun) else []
    went += ["refused"] if refused else []
    if len(begun) > 1 + len(climbed):
        went += ["launch" if drill.damage or drill.during else "restart"]
    went += ["set aside"] if any(attempt["aside"] for attempt in begun) and drill.damage else []
    hung = [attempt["hung"] for attempt in begun if "hung" in attempt]
    went += [f"rank {', '.join(map(str, each['ranks']))} hung" for each in hung]
    went += ["code changed"] if any("code_changed" in attempt for attempt in begun) else []
    mine = table[table["rank"] == 0]
    kept = rows.effective(mine).set_index("step")
    return {
        "fault": drill.what, "went": went, "processes": drill.processes, "attempts": len(begun),
        "steps": len(kept), "again": len(mine) - len(kept), "rows_missing": rows.missing(table, int(kept.index.max())),
        "weights_sha256": report.get("weights_sha256", ""), "loss": float(kept.loss.iloc[-1]),
        "seconds": wait(table),
        "said": said.splitlines()[0] if said else "",
    }  # fmt: skip


def wait(table: pd.DataFrame) -> float:
    """Seconds from the last row of an attempt to the first of the next, of rank 0: the longest of them."""
    ends = table[table["rank"] == 0].groupby("attempt").time.agg(["min", "max"]).to_dict("records")
    return round(max((late["min"] - early["max"] for early, late in pairwise(ends)), default=0.0), 1)


def every(names: Iterable[str] = ()) -> list[dict[str, Any]]:
    """A row for each drill, beside the undisturbed job on as many processes; two jobs run at a time."""
    chosen = {name: DRILLS[name] for name in names or DRILLS}
    lab = RunFolder(".drills")
    try:
        tiny.prepare(lab.path, profile(CLEAN["clean_1"], 1))
        with ThreadPoolExecutor(2) as pool:
            jobs = {
                name: pool.submit(perform, name, each, lab.path / "data") for name, each in (CLEAN | chosen).items()
            }
            found = {name: job.result() for name, job in jobs.items()}
    finally:
        for folder in (runs.root() / "outbox").glob(".drills*"):
            shutil.rmtree(folder)
    made = []
    for name, drill in chosen.items():
        row, clean = found[name], found[f"clean_{drill.processes}"]
        row["same"] = row.pop("weights_sha256") == clean["weights_sha256"]
        last = row.pop("loss") if row["steps"] == STEPS else math.nan  # a job that ended before has no loss to compare
        row["loss_difference"] = last - clean["loss"]
        made.append({"drill": name, **row})
    return made


def write(found: list[dict[str, Any]]) -> None:
    """The table of the book: with the versions and the machine that it is of."""
    versions = {package: metadata.version(package) for package in ("torch", "transformers")}
    machine = {key: runs.environment()[key] for key in ("system", "cores")}
    write_json(TABLE, {"at": runs.now(), "versions": versions, "machine": machine, "rows": found})


if __name__ == "__main__":
    result = every(sys.argv[1:])
    print(pd.DataFrame(result).drop(columns=["fault", "said"]).to_string())
    if not sys.argv[1:]:
        write(result)
