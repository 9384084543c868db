"""Facts counted from a run's records and evidence, and pages made of them: provenance, model card, training summary."""

import hashlib
import re
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from markdown_it import MarkdownIt

from stackpkg import runs
from stackpkg.data import manifest, provenance, sources
from stackpkg.params import Params
from stackpkg.telemetry.privacy import hashed

STATED = [
    "source", "licence", "domain", "language", "timestamp", "ttl_seconds", "trust", "hash_status",
    "may_copy", "may_use_tools",
]  # fmt: skip
MARKUP = re.compile(r"[\\`*\[\]{}|$~^!#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")  # what Markdown or MyST would read
LATEST = 4_102_444_800  # 2100-01-01, unix seconds: a record that outlives it is said to last until then


def rejected(folder: runs.RunFolder) -> pd.DataFrame:
    """record_id, source and the reason of every document that a filter, a limit or the policy dropped."""
    audit = pq.read_table(folder.path / "data/audit.parquet", columns=["record_id", "source", "filter", "decision"])
    return audit.filter(pc.equal(audit["decision"], "drop")).drop_columns("decision").to_pandas()


def _by(frame: pd.DataFrame, column: str) -> list[tuple[str, int]]:
    """How often each value occurs, the commonest first; the same for the same frame."""
    counts = frame[column].value_counts()
    return sorted(((str(name), int(n)) for name, n in counts.items()), key=lambda item: (-item[1], item[0]))


def facts(folder: runs.RunFolder, p: Params, privacy: dict[str, Any]) -> dict[str, Any]:
    """Everything the cards state, counted from the run: nothing is typed by hand. `privacy` is `privacy.review`'s.

    Raises `ValueError` when the run has no manifest.
    """
    files = manifest.records(folder.path / "data")
    table = pa.concat_tables([pq.read_table(file, columns=STATED) for file in files])
    last = pd.Series(provenance.expiry(table, p.data)).agg(["min", "max"]).clip(upper=LATEST)
    named, out = table.to_pandas().fillna({"language": ""}), rejected(folder)
    named = named.replace({"licence": {"": "unknown"}, "language": {"": "not told"}})
    origins = []
    for source in p.data.sources:
        start = sources.prefix(source)
        mine, gone = (frame[frame["source"].str.startswith(start)] for frame in (named, out))
        told = {
            "name": hashed(start, folder.path) if p.telemetry.hash_sources else start.rstrip("#/:"),
            "kind": source.kind,
            "documents": len(mine),
            "rejected": _by(gone, "filter"),
        }
        origins.append(told | {key: _by(mine, key) for key in ("licence", "language", "domain")})
    named["source"] = named["source"].str.split("/").str[0].str.split("#").str[0]
    if p.telemetry.hash_sources:
        named["source"] = named["source"].map({name: hashed(name, folder.path) for name in named["source"].unique()})
    return {
        "run": folder.name,
        "parameters": p.model_dump(mode="json"),
        "manifest": runs.read_json(folder.path / "data/manifest.json"),
        "evidence": {path.stem: runs.read_json(path) for path in folder.matches("evidence/[0-5]*.json")},
        "built": manifest.log(folder.path / "data")[0]["at"][:10],
        "documents": len(named),
        "sources": origins,
        "counts": {key: _by(named, key) for key in STATED[:4]},
        "unlicensed": int(named["licence"].eq("unknown").sum()),
        "rejected": _by(out, "filter"),
        "records_sha256": hashlib.sha256("".join(map(runs.digest, files)).encode()).hexdigest(),
        "trust": named["trust"].describe().round(4).to_dict(),
        "hashes": named["hash_status"].value_counts().to_dict(),
        "may": {use: int(named[use].sum()) for use in ("may_copy", "may_use_tools")},
        "stamps": pd.to_datetime(named["timestamp"].agg(["min", "max"]), unit="s").dt.date.astype(str).tolist(),
        "expiry": pd.to_datetime(last, unit="s").dt.date.astype(str).tolist(),
        "privacy": privacy,
    }


def literal(value: Any) -> Any:
    """Text as Markdown that shows it as it is, on one line: no table, link, code or mathematics begins in it."""
    if isinstance(value, int | float | markupsafe.Markup):
        return value
    return MARKUP.sub(r"\\\g<0>", re.sub(r"\s+", " ", str(value)))


def render(template: str, known: dict[str, Any]) -> str:
    """One page from `governance/templates/`; text from data is escaped, a name it does not know is an error."""
    loader = jinja2.FileSystemLoader(runs.root() / "governance/templates")
    page = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=literal if ".md" in template else None,
    )  # fmt: skip
    return page.get_template(template).render(known)


def as_html(page: str) -> str:
    """A page as HTML for a notebook, its headings below those of the notebook; HTML in it stays text."""
    made = MarkdownIt("commonmark", {"html": False}).enable("table").render(page)
    return re.sub(r"(</?h)([1-3])>", lambda found: f"{found[1]}{int(found[2]) + 3}>", made)


def write(folder: runs.RunFolder, known: dict[str, Any]) -> list[Path]:
    """`governance/provenance.md`, `model_card.md` and `training_summary.md` of the run."""
    cards = ("provenance.md", "model_card.md", "training_summary.md")
    return [runs.write_text(folder / f"governance/{card}", render(f"{card}.j2", known)) for card in cards]
