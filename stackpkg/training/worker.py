"""One rank of a training job: `python -m stackpkg.training.worker outbox/<run>/checkpoints/<name>/job.json`."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments, enable_full_determinism, set_seed
from transformers.utils import logging

from stackpkg import model as models
from stackpkg import params
from stackpkg.data import curriculum, manifest, tokenizer, words
from stackpkg.data.provenance import passed_over
from stackpkg.data.stream import Stream
from stackpkg.params import Params
from stackpkg.runs import digest, files_below, memory_gib, now, read_json, write_json
from stackpkg.telemetry import receivers, rows
from stackpkg.telemetry.guard import Guard
from stackpkg.training import attempts, hang, layout, recovery, running, snapshots, stop
from stackpkg.training.mesh import Mesh, build
from stackpkg.training.optim import training_arguments
from stackpkg.training.reproducibility import record
from stackpkg.training.trainer import StackTrainer


def _precision(home: Path, p: Params) -> Params:
    """The profile, in fp32 from the rung on that says so."""
    if all(event["rung"] != "fp32" for event in recovery.history(home)):
        return p
    return p.model_copy(update={"training": p.training.model_copy(update={"precision": "fp32"})})


def run(job_file: Path) -> None:
    """Train the job to its last step, or to its stop file; rank 0 writes `done.json` when everything is on disk.

    An attempt whose updates are not finite ends on all ranks at once; the ladder says how the next one begins.
    """
    job, home = read_json(job_file), job_file.parent
    if why := stop.killed(home):
        raise ValueError(why)
    folder, p = home.parents[1], params.validate(job["params"])
    layout.start(p.layout.hang_minutes + 2)  # so that ranks tell where they wait before the wait breaks off
    mesh = build(p.layout)
    meet = layout.patient(p.layout.timeout_minutes)
    watch = hang.Watch(home, dist.get_rank(), p.layout.hang_minutes)
    held = _precision(home, p).training.precision != p.training.precision  # what a rung said that lasts to the end
    rung = recovery.RUNGS.index("fp32") + 1 if held else 0
    while True:
        rung = _attempt(job, home, folder, _precision(home, p), mesh, rung, watch, meet)
        if rung in (0, len(recovery.RUNGS)):
            break  # "stop": without a report, and without an error, for torch elastic would only try the same again
        gc.collect()  # the model of that attempt
    if dist.get_rank() == 0:
        receivers.close(p)
    layout.leave()


def _climb(home: Path, fault: recovery.RollBack, precision: str) -> int:
    """The number of the next rung: rank 0 climbs, the others hear of it. What it raises, all raise."""
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            told = [recovery.climb(home, len(attempts.read(home)), fault, precision)]
        except Exception as error:  # whatever it is, the others must not wait
            told = [error]
        print(f"[{home.name}] {fault}: {told[0]}", flush=True)
    dist.broadcast_object_list(told)
    if isinstance(told[0], Exception):
        raise told[0]
    return recovery.RUNGS.index(told[0]) + 1


def _model(p: Params, stream: Stream) -> PreTrainedModel:
    """The model a profile asks for; embeddings of texts begin from how rare words are in the corpus."""
    model = models.build(p.model, stream.vocab_size, stream.pad_id, p.seed)
    if (embedder := getattr(model, "embedder", None)) is not None:
        word = words.numbered(tokenizer.of_shards(stream.corpus.folder))
        embedder.begin(*map(torch.from_numpy, (word, words.rarity(stream.corpus, word))), p.seed)
    return model


def _initial(home: Path, p: Params, stream: Stream) -> None:
    """Make the weights that the job begins with, unless they are there: for rank 0, in the memory of its host. Raises
    `ValueError` where they don't fit in there."""
    if (home / "initial").exists():
        return
    needed = models.weight(p.model, stream.vocab_size, stream.pad_id) / 2**30
    has = memory_gib()
    if needed > has:
        raise ValueError(
            f"the weights of this model are {needed:,.1f} GiB in fp32, and rank 0, which makes them, is on a host with "
            f"{has:,.1f} GiB of memory: let the first node have more, or make the model in the profile smaller"
        )
    print(f"[{home.name}] makes the initial weights, {needed:,.1f} GiB", flush=True)
    snapshots.make(home / "initial", lambda folder: _model(p, stream).save_pretrained(folder))


def _attempt(
    job: dict[str, Any],
    home: Path,
    folder: Path,
    p: Params,
    mesh: Mesh,
    rung: int,
    watch: hang.Watch,
    meet: Callable[[], None],
) -> int:
    """Train from the newest checkpoint on; the rung of the ladder that comes next, 0 where the job has ended."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    attempt, checkpoint = attempts.begin(home, record(job, p))
    if rank == 0:
        source = f"resumes from {checkpoint.name}" if checkpoint else "starts"
        print(f"[{job['name']}] attempt {attempt} {source} on {ranks} process(es)", flush=True)

    if rank == 0:
        manifest.check(folder / "data", spared=passed_over(folder / "data"))
    stream = Stream(folder / "data", p, curriculum.decisions(home / "decisions.jsonl"))
    if stream.manifest_digest != (began := job["data"]["manifest.json"]):  # of this attempt, whatever launched it
        raise ValueError(
            f"the corpus is {stream.manifest_digest[:16]}, this job began with {began[:16]}: roll back to it"
        )
    if rank == 0:
        _initial(home, p, stream)
    meet()
    enable_full_determinism(p.seed) if p.training.deterministic else set_seed(p.seed)
    model = layout.load_sharded(home / "initial", p)
    receivers.settle(p, folder, job["name"])
    arguments = TrainingArguments(**training_arguments(p, home, job["steps"]), use_cpu=not torch.cuda.is_available())
    trainer = StackTrainer(
        model=model,
        args=arguments,
        p=p,
        mesh=mesh,
        stream=stream,
        folder=folder,
        name=job["name"],
        attempt=attempt,
        guard=Guard.production(p),
        faults=job["faults"],
        rung=rung,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    watch.listen(model, lambda: trainer.saver.waiting)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except recovery.RollBack as fault:
        trainer.saver.wait()  # all ranks are here, and the next attempt begins from what is on disk
        climbed = _climb(home, fault, p.training.precision)
        trainer.break_off(fault, climbed)
        return climbed
    finally:
        watch.rest()
        trainer.rows.flush()
    if trainer.cadence.stopped:
        dist.barrier()
        if rank == 0:
            reason = stop.record(home, trainer.state.global_step)
            print(f"[{job['name']}] stopped: {reason}", flush=True)
            if reason not in (stop.PREEMPTED, stop.TERMINATED):  # these have a deadline, and the job goes on
                rows.compact(folder / "telemetry" / job["name"])
        meet()
        return 0

    if rank == 0:
        for name in snapshots.ENDS:  # of an attempt in another layout, or one that was broken off
            shutil.rmtree(home / name, ignore_errors=True)
    dist.barrier()
    trainer.save_model(str(home / "final"))
    meet()
    with trainer.ema.swapped():
        trainer.save_model(str(home / "final_ema"))
    meet()
    summary = {
        "steps": trainer.state.global_step,
        "ranks": ranks,
        "attempts": attempt,
        "sharded_share": layout.sharded_share(model),
        "weights_sha256": layout.weights_digest(model),
        "parameters": layout.parameters(model),
        "skipped_updates": trainer.skips.total,
        "ema_updates": trainer.ema.updates,
    }
    if rank == 0:
        written = [path for name in snapshots.ENDS for path in files_below(home / name)]  # a promotion holds them to it
        summary["files"] = {path.relative_to(home).as_posix(): digest(path) for path in written}
        rows.compact(folder / "telemetry" / job["name"])
        write_json(home / "done.json", summary | {"at": now()})
        print(f"[{job['name']}] done: {trainer.state.global_step} steps", flush=True)
    meet()
    return 0


if __name__ == "__main__":
    logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    job_file = Path(sys.argv[1]).resolve()
    with running.hold(job_file.parent):
        run(job_file)
