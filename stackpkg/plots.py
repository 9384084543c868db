"""One look for every figure: set once, readable on a light and on a dark page."""

import io
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from cycler import cycler
from IPython import get_ipython
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from stackpkg import interactive

COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#787774")


def use_style() -> None:
    """Figure size 7 x 3 inches on an opaque white sheet, so that axes stay readable when the page is dark; tables that
    show where a text comes from to its end; in a notebook the words of `describe` beside each figure, and of lines
    what JupyterLab draws itself."""
    pd.set_option("display.max_colwidth", 110)
    if shell := get_ipython():
        plt.switch_backend(mpl.get_backend())  # now: set up within an `rc_context`, it would show no figure ever after
        shell.display_formatter.mimebundle_formatter.for_type(Figure, _beside)
    mpl.rcParams.update(
        {
            "figure.figsize": (7.0, 3.0),
            "figure.dpi": 110,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "axes.prop_cycle": cycler(color=COLOURS),
            "font.size": 9.5,
        }
    )


def _beside(figure: Figure) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a notebook keeps beside the picture. A formatter of plain text would not last: with its first figure
    the inline backend takes away each kind's formatter of figures; that of whole bundles stays."""
    drawn = interactive.twin(figure)
    return {"text/plain": describe(figure)} | ({interactive.KIND: drawn} if drawn else {}), {}


def describe(figure: Figure) -> str:
    """A figure in words, for whoever does not see it: per panel its title, its axes, and how its lines run."""
    parts = []
    for axis in figure.axes:
        if axis.get_label() == "<colorbar>":
            continue
        title, x, y = axis.get_title(), axis.get_xlabel() or figure.get_supxlabel(), axis.get_ylabel()
        drawn = [told for line in axis.get_lines() if (told := _runs(line))]
        drawn += [f"{len(axis.patches)} bars or areas"] * bool(axis.patches) + ["a map of colours"] * len(axis.images)
        points = sum(np.shape(dots.get_offsets())[0] for dots in axis.collections)
        drawn += [f"{points} points"] * bool(points)
        head = " ".join([title or y or "panel", *[f"over {x}"] * bool(x)])
        parts.append(f"{head}: {', '.join(drawn) or 'no data'}")
    return "; ".join(parts) or "an empty figure"


def _runs(line: Line2D) -> str:
    """Such as `raw from 8.1 to 7.2`; a level line is `target at 0.75`."""
    label, values = str(line.get_label()), np.asarray(line.get_ydata(orig=False), dtype=float)
    values, name = values[np.isfinite(values)], "a line" if label.startswith("_") else label
    if not values.size:
        return ""
    first, last = values[0], values[-1]
    return f"{name} at {first:.3g}" if (values == first).all() else f"{name} from {first:.3g} to {last:.3g}"


def lines(data: pd.DataFrame, title: str, target: float | None = None) -> Figure:
    """Each column over the index, with a dotted line at `target`. Points where there are few."""
    figure, axis = plt.subplots()
    for name in data:
        values = data[name].dropna()
        axis.plot(values.index, values, "o-" if len(values) < 30 else "-", markersize=3, label=str(name))
    if target is not None:
        axis.axhline(target, color="crimson", linestyle=":", label=f"target {target:g}")
    axis.set(title=title, xlabel=data.index.name or "")
    axis.legend(fontsize="small", ncols=1 + data.shape[1] // 5)
    return figure


def heat(axis: Axes, table: pd.DataFrame, label: str) -> None:
    """Rows of `table` over its columns as colours, on `axis`; `label` says what the colour is."""
    image = axis.imshow(table, aspect="auto", cmap="viridis", interpolation="nearest")
    axis.set(yticks=range(len(table)), yticklabels=table.index, xlabel=table.columns.name, ylabel=table.index.name)
    places = np.unique(np.linspace(0, table.shape[1] - 1, min(8, table.shape[1])).astype(int))
    axis.set_xticks(places, [str(table.columns[place]) for place in places])
    axis.grid(False)
    plt.colorbar(image, ax=axis, label=label)


def svg(figure: Figure) -> str:
    """The same text for the same figure."""
    with mpl.rc_context({"svg.hashsalt": "stackpkg"}):
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def flow(links: Mapping[tuple[str, str], int]) -> Figure:
    """A flow diagram (Sankey): a band from a to b for each (a, b), as wide as its number. There may be no circle."""
    column: dict[str, int] = {}
    for _ in links:
        for a, b in links:
            column[b] = max(column.get(b, 1), column.setdefault(a, 0) + 1)
    sums = ({n: sum(v for pair, v in links.items() if pair[side] == n) for n in column} for side in (0, 1))
    total = {n: max(both) for n, *both in zip(column, *(side.values() for side in sums), strict=True)}
    gap = 0.04 * sum(v for (a, _), v in links.items() if not column[a])
    figure = plt.figure(figsize=(8, 4.5), layout="none")
    axes, ends, colour = figure.add_axes((0, 0, 1, 1)), dict[str, list[float]](), dict[str, str]()
    axes.set_axis_off()
    for place in range(max(column.values(), default=0) + 1):
        top = 0.0
        for node in sorted((n for n in column if column[n] == place), key=lambda n: -total[n]):
            colour[node] = COLOURS[len(colour) % len(COLOURS)]
            axes.bar(place, total[node], 0.06, -top - total[node], color=colour[node])
            axes.text(place + 0.05, -top - total[node] / 2, f"{node}  {total[node]:,}", va="center", fontsize=8)
            ends[node], top = [-top, -top], top + total[node] + gap
    x = np.linspace(0, 1, 40)
    for (a, b), width in sorted(links.items(), key=lambda link: (-ends[link[0][0]][0], -ends[link[0][1]][1])):
        low, high = column[a] + 0.03, column[b] - 0.03
        curve = ends[a][0] + (ends[b][1] - ends[a][0]) * x**2 * (3 - 2 * x)
        axes.fill_between(low + (high - low) * x, curve - width, curve, color=colour[a], alpha=0.3, linewidth=0)
        ends[a][0], ends[b][1] = ends[a][0] - width, ends[b][1] - width
    axes.set_xlim(-0.1, max(column.values(), default=0) + 0.7)
    return figure
