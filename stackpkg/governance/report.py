"""Provenance and trust of a corpus as one page with pictures: opens offline, without a script."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import markupsafe
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stackpkg import plots, runs
from stackpkg.data import manifest, provenance
from stackpkg.evaluation.trend import STYLE
from stackpkg.governance.datacards import render
from stackpkg.params import Params

MOST = 12  # bars of a picture; the tables hold every name
DAY = 86_400


class Picture(NamedTuple):
    title: str
    alt: str
    draw: Callable[[Axes], object]


def figure(picture: Picture) -> Figure:
    """Drawn; names come from data, so that no mathematics is read in them."""
    with mpl.rc_context({"text.parse_math": False}):
        made, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
        picture.draw(axis)
    axis.set_title(picture.title)
    return made


def _svg(picture: Picture) -> markupsafe.Markup:
    with mpl.rc_context({"svg.fonttype": "path"}):
        made = figure(picture)
        svg = plots.svg(made)
    plt.close(made)
    return markupsafe.Markup(svg[svg.index("<svg") :])  # noqa: S704  matplotlib's own


def _bars(title: str, counts: list[tuple[str, int]]) -> Picture:
    shown = counts[:MOST][::-1]

    def draw(axis: Axes) -> None:
        axis.barh(range(len(shown)), [count for _, count in shown])
        axis.set_yticks(range(len(shown)), ["".join(c if c.isprintable() else "?" for c in n)[:48] for n, _ in shown])
        axis.set(xlabel="documents")

    told = ", ".join(f"{name} {count}" for name, count in counts[:3])
    return Picture(title, f"{title}: {told or 'none'}; {len(counts)} in all.", draw)


def pictures(folder: runs.RunFolder, p: Params, known: dict[str, Any]) -> list[Picture]:
    """Title, alternative text and drawing of each picture: trust, time-to-live, what was rejected, licences."""
    files = manifest.records(folder.path / "data")
    scored = pq.read_table(folder.path / "data/trust.parquet", columns=["trust"])["trust"].to_numpy()
    ends = np.concatenate(
        [provenance.expiry(pq.read_table(f, columns=["timestamp", "ttl_seconds"]), p.data).to_numpy() for f in files]
    )
    days, low = np.sort((ends - time.time()) / DAY), p.data.min_trust

    def trust(axis: Axes) -> None:
        axis.hist(scored, bins=np.linspace(0, 1.0001, 41).tolist())
        axis.axvline(low, color=plots.COLOURS[1], label="limit")
        axis.set(xlabel="trust", ylabel="records scored")
        axis.legend()

    def horizon(axis: Axes) -> None:
        axis.step([0, *days], [len(days), *range(len(days) - 1, -1, -1)], where="post")
        axis.set(xlabel="days from now", ylabel="records that may still be used", ylim=(0, None))

    below, half = int((scored < low).sum()), float(days[len(days) // 2])
    return [
        Picture("Trust", f"Trust of {len(scored)} scored records: median {np.median(scored):.2f}, lowest "
                 f"{scored.min():.2f}; {below} are below the limit of {low:g}.", trust),
        Picture("Time-to-live", f"Records that may still be used: the first ends in {days[0]:.0f} days, half of them "
                 f"in {half:.0f}, the last in {days[-1]:.0f}.", horizon),
        _bars("Rejected, by reason", known["rejected"]),
        _bars("Licences", known["counts"]["licence"]),
    ]  # fmt: skip


def write(folder: runs.RunFolder, p: Params, known: dict[str, Any]) -> Path:
    """`governance/provenance.html`; `known` is what `datacards.facts` counted. Text from data is escaped."""
    tables = [(f"All {name}", name, rows) for name, rows in (
        ("licences", known["counts"]["licence"]), ("reasons", known["rejected"]),
        ("languages", known["counts"]["language"]), ("sources", known["counts"]["source"]))]  # fmt: skip
    drawn = [{**each._asdict(), "svg": _svg(each)} for each in pictures(folder, p, known)]
    about = {"pictures": drawn, "tables": tables, "style": markupsafe.Markup(STYLE)}  # noqa: S704  our own
    return runs.write_text(folder / "governance/provenance.html", render("provenance.html.j2", known | about))
