"""What curation costs, stage by stage, and what a trillion tokens would: a linear model fitted to measurements.

    python benchmarks/curation.py [--sizes 4 8 16 32] [--nodes 64] [--cores 64] [--json FILE]

Text is that of the installed packages, whole and cut into short documents, so that bytes and documents vary apart. Each
measurement has a process of its own and one core; imports and compilation are not counted. The largest size is not
fitted: it shows how far the model is off. Stages whose module is not there are left out, and said.
"""

import argparse
import importlib
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import report
from scipy.optimize import nnls

from stackpkg import runs
from stackpkg.data import engine, sources
from stackpkg.params import Data, Source

SHAPES = {"whole": 0, "short": 1500}  # characters of a document at most; 0: as it is
TOKENS, NOW, PREDICTED = 1e12, 1_800_000_000, "1T tokens"
SPREAD = {"read": "process", "trust": "process", "dedup": "node"}  # what a stage can use; others: every node
DATA = Data(vocab_size=32_768)


def load(name: str) -> Any:
    return importlib.import_module(f"stackpkg.data.{name}")


def read(folder: Path) -> None:
    source = Source(kind="jsonl", path=str(folder / "rows.jsonl"), max_mb=1e6)
    sources.write_parts([source], folder / "read", DATA.part_mb, [])


def stage(module: str, function: str, into: str, after: str, *settings: Any) -> Callable[[Path], None]:
    def call(folder: Path) -> None:
        models = [folder.parent / value if isinstance(value, Path) else value for value in settings]
        engine.run(getattr(load(module), function), parts(folder, after), folder / into, *models, workers=1)

    return call


def parts(folder: Path, name: str) -> list[Path]:
    return sorted((folder / name).glob("*.parquet"))


def perplexity(folder: Path) -> None:
    """The models that the filters need: fitted on a sample of bounded size, so no cost per megabyte."""
    (folder.parent / "models").mkdir()
    for name in ("read", "identify"):
        STAGES[name](folder)
    load("perplexity").fit(parts(folder, "identify"), folder.parent / "models", DATA)


def trust(folder: Path) -> None:
    load("trust").score(parts(folder, "read"), DATA, [], NOW)


def dedup(folder: Path) -> None:
    load("dedup").deduplicate(parts(folder, "read"), {}, DATA.shingle_words, DATA.jaccard)


def tokenise(folder: Path) -> int:
    """Tokens of the text, with a tokenizer that the smallest corpus has trained."""
    home, texts = tokenizers(), (pq.read_table(path)["text"].to_pylist() for path in parts(folder, "read"))
    model = importlib.import_module("tokenizers").Tokenizer.from_file(str(folder.parent / "tokenizer.json"))
    return sum(len(ids) for batch in texts for ids in home.encode(model, batch))


def tokenizers() -> Any:
    """The room that trains and applies tokenizers."""
    try:
        return load("tokenizer")
    except ModuleNotFoundError:
        return load("shards")


STAGES: dict[str, Callable[[Path], Any]] = {
    "read": read,
    "identify": stage("language", "identify", "identify", "read"),
    "filters": stage("filters", "apply", "filters", "identify", DATA, Path("models")),
    "trust": trust,
    "dedup": dedup,
    "tokenise": tokenise,
}


def measure(name: str, folder: Path, warm: Path) -> dict[str, float]:
    """CPU-seconds, wall-seconds and peak megabytes of a stage; the tiny corpus first, for what is done only once."""
    made = STAGES[name](warm)
    for path in (folder / name).glob("*.key"):
        path.unlink()  # measured, not kept
    begin, wall = time.process_time(), time.perf_counter()
    made = STAGES[name](folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    found = {"cpu": time.process_time() - begin, "wall": time.perf_counter() - wall, "peak": peak}
    return found | {"tokens": float(made or 0)}


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def corpus(folder: Path, megabytes: float, longest: int) -> dict[str, float]:
    """`rows.jsonl` of text of installed packages; returns its megabytes and documents."""
    folder.mkdir()
    count = size = 0
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as stream:
        for row in sources.read([Source(max_mb=megabytes)], []):
            step = longest or len(row["text"])
            for text in filter(str.strip, (row["text"][k : k + step] for k in range(0, len(row["text"]), step))):
                stream.write(json.dumps({"text": text, "domain": row["domain"], "timestamp": NOW}) + "\n")
                count, size = count + 1, size + len(text.encode())
    return {"MB": size / 1e6, "documents": count}


def fit(rows: list[dict[str, float]], value: str) -> np.ndarray:
    """(a, b, c) of value = a + b MB + c documents, none negative, by relative least squares (Lawson, Hanson 1974)."""
    y = np.array([row[value] for row in rows])
    return nnls(features(rows) / y[:, None], np.ones(len(y)))[0]


def features(rows: list[dict[str, float]]) -> np.ndarray:
    return np.array([[1.0, row["MB"], row["documents"]] for row in rows])


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--sizes", type=float, nargs="+", default=[4, 8, 16, 32], help="megabytes; the last is held out")
    ask.add_argument("--nodes", type=int, default=64)
    ask.add_argument("--cores", type=int, default=64)
    ask.add_argument("--json", type=Path)
    asked, rows, models = ask.parse_args(), [], {}
    with tempfile.TemporaryDirectory() as home:
        corpora = {(mb, shape): Path(home) / f"{mb}-{shape}" for mb in asked.sizes for shape in SHAPES}
        about = {key: corpus(folder, key[0], SHAPES[key[1]]) for key, folder in corpora.items()}
        corpus(warm := Path(home) / "warm", 0.3, SHAPES["short"])
        texts = (json.loads(line)["text"] for line in (corpora[asked.sizes[0], "whole"] / "rows.jsonl").open())
        model = tokenizers().train_tokenizer(texts, DATA.vocab_size)
        runs.write_text(Path(home) / "tokenizer.json", model.to_str())
        for name in STAGES:
            try:
                if name == "filters":
                    alone(perplexity, corpora[asked.sizes[0], "whole"])
                found = [row | alone(measure, name, corpora[key], warm) | {"at": key[0]} for key, row in about.items()]
            except Exception as error:  # a stage that is not there yet, and those after it
                print(f"left out: {name}: {type(error).__name__}: {error}")
                continue
            kept, held = ([row for row in found if (row["at"] == asked.sizes[-1]) == last] for last in (False, True))
            cost, memory = models[name] = fit(kept, "cpu"), fit(kept, "peak")
            off = [100 * (features([r]) @ cost / r["cpu"] - 1).item() for r in held]
            units = zip(("start", "per_MB", "per_document"), ("s", "s/MB", "s/document"), cost, strict=True)
            rows += [report.row(name, f"cpu_{what}", value, unit) for what, unit, value in units]
            rows += [report.row(name, f"held_out_error_{s}", e, "%") for s, e in zip(SHAPES, off, strict=True)]
            rows.append(report.row(name, "peak_memory", max(r["peak"] for r in found), "MB"))
            rows.append(report.row(name, "memory_per_document", memory[2] * 1e6, "B"))
            disk = sum(path.stat().st_size for path in parts(corpora[asked.sizes[-1], "whole"], name)) / 1e6
            rows.append(report.row(name, "disk_per_MB", disk / held[0]["MB"], "MB/MB"))
            if name == "tokenise":
                rows.append(report.row(name, "bytes_per_token", 1e6 * held[0]["MB"] / held[0]["tokens"], "B"))
        mean = 1e6 * about[asked.sizes[-1], "whole"]["MB"] / about[asked.sizes[-1], "whole"]["documents"]
    rows += predict(rows, models, mean, asked.nodes, asked.cores)
    report.write(rows, asked.json, sizes=asked.sizes, predicted_for=f"{asked.nodes} nodes of {asked.cores} cores")


def predict(rows: list[dict[str, Any]], models: dict[str, Any], mean: float, nodes: int, cores: int) -> list[Any]:
    """A run of TOKENS at the measured bytes a token and a document, on `nodes` machines of `cores` like this one."""
    value = {(row["system"], row["metric"]): row["value"] for row in rows}
    size = TOKENS * value["tokenise", "bytes_per_token"] / 1e6
    made = [report.row(PREDICTED, "text", size / 1e6, "TB"), report.row(PREDICTED, "documents", 1e6 * size / mean, "1")]
    hours = walls = disk = 0.0
    for name, (cost, memory) in models.items():
        work = float(np.array([1.0, size, 1e6 * size / mean]) @ cost) / 3600
        wall = work / {"process": 1, "node": cores}.get(SPREAD.get(name, ""), nodes * cores)
        hours, walls, disk = hours + work, walls + wall, disk + value[name, "disk_per_MB"] * size / 1e6
        made += [
            report.row(PREDICTED, f"{name}_core_hours", work, "h"),
            report.row(PREDICTED, f"{name}_wall", wall, "h"),
        ]
        if name in SPREAD:  # holds something of every document
            made.append(report.row(PREDICTED, f"{name}_memory", memory[2] * size / mean, "TB"))
    made += [report.row(PREDICTED, "core_hours", hours, "h"), report.row(PREDICTED, "wall", walls, "h")]
    shards = TOKENS * (2 if DATA.vocab_size <= 65_536 else 4) / 1e12
    return [*made, report.row(PREDICTED, "disk_parts", disk, "TB"), report.row(PREDICTED, "disk_shards", shards, "TB")]


if __name__ == "__main__":
    main()
