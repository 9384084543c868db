"""Cards made from a run's records and evidence alone: Croissant data card, provenance report, model card."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from stackpkg import runs
from stackpkg.params import Params

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


def facts(folder: runs.RunFolder, p: Params) -> dict[str, Any]:
    """Everything the cards state, counted from the run: nothing is typed by hand."""
    records = pd.read_parquet(folder.path / "data/records.parquet")
    records["source"] = records["source"].str.split("/").str[0].str.split("#").str[0]
    named = records.assign(licence=records["licence"].replace("", "unknown"))
    tables = {key: named.groupby(key)["text"].agg(["size"]).reset_index() for key in ("source", "licence", "domain")}
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
        "trust": named["trust"].describe().round(4).to_dict(),
        "hashes": named["hash_status"].value_counts().to_dict(),
        "may": {use: int(named[use].sum()) for use in ("may_copy", "may_use_tools")},
        "stamps": pd.to_datetime(named["timestamp"].agg(["min", "max"]), unit="s").dt.date.astype(str).tolist(),
        "personal": {"corpus": personal_data(records["text"]), "archive": personal_data(pages)},
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
