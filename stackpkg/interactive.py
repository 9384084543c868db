"""A figure of lines a second time, as JSON of plotly beside the picture: JupyterLab shows it, with zoom and the numbers
under the pointer; a reader without plotly's extension, and the book, show the picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

KIND = "application/vnd.plotly.v1+json"
MOST = 10_000  # numbers of a figure; with more the notebook would grow by more than a fifth of a megabyte
GAP = 0.07  # between panels, as a share of the figure
DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}


def twin(figure: Figure) -> dict[str, Any] | None:
    """The lines of `figure` as traces of plotly; None where something else is drawn, or more than `MOST` numbers."""
    if not figure.axes or not all(map(_told, figure.axes)):
        return None
    if sum(np.size(line.get_ydata()) for axis in figure.axes for line in axis.lines) > MOST:
        return None
    traces: list[dict[str, Any]] = []
    layout: dict[str, Any] = {
        "height": round(figure.get_figheight() * 110),
        "margin": {"l": 60, "r": 20, "t": 40, "b": 50},
        "paper_bgcolor": "white",  # readable on a dark page too
        "hovermode": "closest",
        "annotations": [],
    }
    for number, axis in enumerate(figure.axes, 1):
        x, y = (f"{letter}{number if number > 1 else ''}" for letter in "xy")
        across, up = _place(axis)
        bottom = axis.get_xlabel() or (figure.get_supxlabel() if up[0] == 0 else "")
        layout[f"xaxis{x[1:]}"] = _axis(axis, "x", bottom) | {"domain": across, "anchor": y}
        layout[f"yaxis{y[1:]}"] = _axis(axis, "y", axis.get_ylabel()) | {"domain": up, "anchor": x}
        head = {"text": axis.get_title(), "x": sum(across) / 2, "y": up[1], "xref": "paper", "yref": "paper"}
        layout["annotations"].append(head | {"xanchor": "center", "yanchor": "bottom", "showarrow": False})
        traces += [_trace(axis, line) | {"xaxis": x, "yaxis": y} for line in axis.lines]
    return {"data": traces, "layout": layout}


def _told(axis: Axes) -> bool:
    """Whether lines over numbers, on plain or logarithmic scales, are all that `axis` shows."""
    others = [*axis.patches, *axis.images, *axis.collections, *axis.texts]
    scales = {axis.get_xscale(), axis.get_yscale()}
    units = axis.xaxis.have_units() or axis.yaxis.have_units()  # names and dates
    return (
        bool(axis.lines) and not others and not units and scales <= {"linear", "log"} and bool(axis.get_subplotspec())
    )


def _axis(axis: Axes, letter: str, title: str) -> dict[str, Any]:
    """Label and scale, and limits where they were set, which plotly takes as exponents on a logarithmic scale."""
    scale, limits = (axis.get_xscale(), axis.get_xlim()) if letter == "x" else (axis.get_yscale(), axis.get_ylim())
    told: dict[str, Any] = {"title": {"text": title}, "type": scale}
    if not (axis.get_autoscalex_on() if letter == "x" else axis.get_autoscaley_on()):
        told["range"] = _numbers(np.log10(limits) if scale == "log" else np.asarray(limits))
    return told


def _place(axis: Axes) -> tuple[list[float], list[float]]:
    """Its share of the width and of the height, from the left and from below."""
    spec = axis.get_subplotspec()
    assert spec is not None
    rows, columns = spec.get_gridspec().get_geometry()
    edges = (
        (spec.colspan.start, spec.colspan.stop, columns),
        (rows - spec.rowspan.stop, rows - spec.rowspan.start, rows),
    )
    across, up = (
        [round(start / of + GAP / 2 * (start > 0), 4), round(stop / of - GAP / 2 * (stop < of), 4)]
        for start, stop, of in edges
    )
    return across, up


def _trace(axis: Axes, line: Line2D) -> dict[str, Any]:
    """A level or an upright line of matplotlib goes over the width or the height of its panel."""
    x, y = (np.asarray(values, dtype=float) for values in (line.get_xdata(orig=False), line.get_ydata(orig=False)))
    if line.get_transform() == axis.get_yaxis_transform():
        x = np.asarray(axis.get_xlim())
    elif line.get_transform() == axis.get_xaxis_transform():
        y = np.asarray(axis.get_ylim())
    label, colour = str(line.get_label()), to_hex(line.get_color())
    named = not label.startswith("_")
    marked = str(line.get_marker()) not in ("None", "none", "", " ")
    return {
        "type": "scatter",
        "mode": "lines+markers" if marked else "lines",
        "x": _numbers(x),
        "y": _numbers(y),
        "name": label if named else axis.get_title() or axis.get_ylabel(),
        "showlegend": named,
        "line": {"color": colour, "dash": DASHES.get(str(line.get_linestyle()), "solid")},
        "marker": {"size": 5},
    }


def _numbers(values: np.ndarray) -> list[float | None]:
    """Six digits, as JSON; a gap where there is no number."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values]
