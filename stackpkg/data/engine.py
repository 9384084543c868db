"""A stage over parts, on processes of this machine or on Ray: atomic outputs, finished parts are not done again."""

import hashlib
import inspect
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stackpkg import runs

ROWS = 1_000  # of a row group
Job = tuple[Callable[..., pa.Table], tuple[Any, ...], str, Path, Path]  # stage, settings, key, part, output


def run(
    stage: Callable[..., pa.Table],
    parts: Sequence[Path],
    folder: Path,
    *settings: Any,
    engine: str = "processes",
    workers: int = 2,
    key: str = "",
) -> list[Path]:
    """`stage(table, *settings)` of every part, as `folder/NNNNN.parquet` in the order of `parts`.

    `stage` is a function of a module, whose result depends on its arguments alone; so the files are the same bytes with
    any engine and any number of workers. An output is kept when its part, the stage's module, `key` and the settings
    are those it was made with. Settings count by `repr`, files and folders (a `Path`) by their content.

    `engine`: "processes", or "ray": the cluster that RAY_ADDRESS names, else Ray on this machine. Raises `ValueError`
    for another, `RuntimeError` that names the part when a stage fails or its worker is killed; the finished ones stay.
    """
    if engine not in (engines := {"processes": _processes, "ray": _ray}):
        raise ValueError(f"engine {engine!r} is none of {', '.join(engines)}")
    if folder.resolve() in {part.parent.resolve() for part in parts}:
        raise ValueError(f"the outputs of a stage cannot replace its parts in {folder.name}: give another folder")
    name = f"{stage.__module__}.{stage.__qualname__}"
    described = [runs.digest(value) if isinstance(value, Path) else repr(value) for value in settings]
    about = repr((name, inspect.getsource(sys.modules[stage.__module__]), described, key))
    outputs = [folder / f"{number:05d}.parquet" for number in range(len(parts))]
    jobs = [(stage, settings, about, part, output) for part, output in zip(parts, outputs, strict=True)]
    for count, _ in enumerate(engines[engine](jobs, workers), 1):
        if count * 20 // len(jobs) > (count - 1) * 20 // len(jobs):  # at most twenty lines
            print(f"[{'.'.join(name.split('.')[-2:])}] {count}/{len(jobs)} parts", flush=True)
    tidy(folder, outputs)
    return outputs


def write(path: Path, table: pa.Table) -> Path:
    """A Parquet file, whole or not at all; equal tables give equal bytes. Raises `OSError` when the disk is full."""
    try:
        with runs.replacing(path) as temporary:
            pq.write_table(table.combine_chunks(), temporary, compression="zstd", row_group_size=ROWS)
    except OSError as error:
        said = f"{path.parent.name}/{path.name} was not written ({error.strerror or error}); mend that and run again"
        raise OSError(error.errno, said) from error
    return path


def tidy(folder: Path, made: Iterable[Path]) -> None:
    """Remove the parts of an earlier run that this one did not make, and their keys."""
    stems = {path.stem for path in made}
    for path in [*folder.glob("*.parquet"), *folder.glob("*.key")]:
        if path.stem not in stems:
            path.unlink()


def _one(job: Job) -> None:
    """One part, in a worker. Errors leave it as text: an exception of a library may not survive the way back."""
    stage, settings, about, part, output = job
    try:
        key, done = hashlib.sha256(f"{about}{runs.digest(part)}".encode()).hexdigest(), output.with_suffix(".key")
        if output.exists() and done.exists() and done.read_text() == f"{key} {runs.digest(output)}\n":
            return
        done.unlink(missing_ok=True)
        write(output, stage(pq.read_table(part), *settings))
        runs.write_text(done, f"{key} {runs.digest(output)}\n")
    except Exception as error:
        name = f"{stage.__module__}.{stage.__qualname__}"
        raise RuntimeError(f"{name} failed on {part.name}: {type(error).__name__}: {error}") from error


def _killed(jobs: Sequence[Job]) -> RuntimeError:
    left = [job[3].name for job in jobs if not job[4].with_suffix(".key").exists()]
    return RuntimeError(
        f"a worker was killed, most often for want of memory, with {len(left)} of {len(jobs)} parts left, {left[0]} "
        "first; lower data.part_mb or data.workers and run again: finished parts are kept"
    )


def _processes(jobs: Sequence[Job], workers: int) -> Iterator[None]:
    if min(workers, len(jobs)) == 1:
        yield from map(_one, jobs)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(_one, job) for job in jobs]):
                yield future.result()
        except BrokenProcessPool as error:
            raise _killed(jobs) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _ray(jobs: Sequence[Job], workers: int) -> Iterator[None]:
    """Ray core (Moritz et al. 2018): at most `workers` parts at once, each a task of one core.

    Ray on this machine stays up for the next stage and ends with the process.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray  # optional, and seconds to import
    except ImportError as error:
        raise ValueError("engine 'ray' needs the package ray: install it, or choose 'processes'") from error
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "local")
        local: dict[str, Any] = {"num_cpus": workers} if address == "local" else {}
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **local)
    task, left, running = ray.remote(num_cpus=1, max_retries=1)(_one), list(reversed(jobs)), list[Any]()
    try:
        while left or running:
            while left and len(running) < workers:
                running.append(task.remote(left.pop()))
            ended, running = ray.wait(running)
            yield from ray.get(ended)
    except ray.exceptions.RayTaskError as error:
        raise RuntimeError(str(error.cause)) from error
    except ray.exceptions.RayError as error:
        raise _killed(jobs) from error
    finally:
        if running:
            ray.wait(running, num_returns=len(running))  # no task writes after the run has ended
