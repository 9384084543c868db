"""Cards made from a run's records and evidence alone: Croissant data card, provenance report, model card."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from stackpkg import runs
from stackpkg.data import manifest, provenance
from stackpkg.params import Params
from stackpkg.telemetry import privacy

STATED = [
    "source", "licence", "domain", "language", "timestamp", "ttl_seconds", "trust", "hash_status",
    "may_copy", "may_use_tools",
]  # fmt: skip
LATEST = 4_102_444_800  # 2100-01-01, unix seconds: a record that outlives it is said to last until then
PERSONAL = {
    "e-mail addresses": re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}"),
    "IPv4 addresses": re.compile(
        r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.])"
    ),
}


def personal_data(texts: Iterable[str]) -> dict[str, int]:
    """How often each pattern of personal data occurs; a version number of four parts counts as an address."""
    counts = Counter(dict.fromkeys(PERSONAL, 0))
    for text in texts:
        counts.update({name: sum(1 for _ in pattern.finditer(text)) for name, pattern in PERSONAL.items()})
    return dict(counts)


def _texts(files: Iterable[Path]) -> Iterator[str]:
    """Every text of the records, a batch in memory at a time."""
    for file in files:
        with pq.ParquetFile(file) as records:
            for batch in records.iter_batches(1_000, columns=["text"]):
                yield from batch["text"].to_pylist()


def facts(folder: runs.RunFolder, p: Params) -> dict[str, Any]:
    """Everything the cards state, counted from the run: nothing is typed by hand.

    Raises `ValueError` when the run has no manifest.
    """
    files = manifest.records(folder.path / "data")
    table = pa.concat_tables([pq.read_table(file, columns=STATED) for file in files])
    last = pd.Series(provenance.expiry(table, p.data)).agg(["min", "max"]).clip(upper=LATEST)
    named = table.to_pandas().fillna({"language": ""})
    named["source"] = named["source"].str.split("/").str[0].str.split("#").str[0]
    if p.telemetry.hash_sources:
        told = {name: privacy.hashed(name, folder.path) for name in named["source"].unique()}
        named["source"] = named["source"].map(told)
    named = named.replace({"licence": {"": "unknown"}, "language": {"": "not told"}})
    tables = {key: named.groupby(key)["trust"].agg(["size"]).reset_index() for key in STATED[:4]}
    pages = [
        path.read_text(encoding="utf-8")
        for path in folder.matches("nb/[0-5]*.ipynb") + folder.matches("eval/epoch_*.html")
    ]
    return {
        "run": folder.name,
        "parameters": p.model_dump(mode="json"),
        "manifest": runs.read_json(folder.path / "data/manifest.json"),
        "evidence": {path.stem: runs.read_json(path) for path in folder.matches("evidence/[0-5]*.json")},
        "counts": {key: list(map(tuple, table.itertuples(index=False))) for key, table in tables.items()},
        "records": {file.name: runs.digest(file) for file in files},
        "records_sha256": hashlib.sha256("".join(map(runs.digest, files)).encode()).hexdigest(),
        "trust": named["trust"].describe().round(4).to_dict(),
        "hashes": named["hash_status"].value_counts().to_dict(),
        "may": {use: int(named[use].sum()) for use in ("may_copy", "may_use_tools")},
        "stamps": pd.to_datetime(named["timestamp"].agg(["min", "max"]), unit="s").dt.date.astype(str).tolist(),
        "expiry": pd.to_datetime(last, unit="s").dt.date.astype(str).tolist(),
        "personal": {"corpus": personal_data(_texts(files)), "archive": personal_data(pages)},
    }


def render(template: str, known: dict[str, Any]) -> str:
    """One card from `governance/templates/`; text from data is escaped, a name it does not know is an error."""
    loader = jinja2.FileSystemLoader(runs.root() / "governance/templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    text = environment.get_template(template).render(known)
    return json.dumps(json.loads(text), indent=1) + "\n" if ".json" in template else text


def write(folder: runs.RunFolder, known: dict[str, Any]) -> list[Path]:
    """`governance/croissant.json`, `provenance.md` and `model_card.md` of the run."""
    cards = ("croissant.json", "provenance.md", "model_card.md")
    return [runs.write_text(folder / f"governance/{card}", render(f"{card}.j2", known)) for card in cards]
