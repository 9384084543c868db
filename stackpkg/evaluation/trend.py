"""The epochs of a run side by side: one page that opens offline, without a script."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from stackpkg.runs import write_text

PANELS = {  # title -> unit, what the names of its series begin with
    "Validation loss": ("nats per token", "validation_loss"),
    "Retrieval, held-out pairs": ("share", ("precision_at_k", "recall_at_k", "mrr", "ndcg_at_10")),
    "Long range, by distance of the evidence": ("answers right", "long_range_accuracy"),
    "Calibration error": ("share", "calibration_error"),
    "Router entropy": ("normalised", "router_entropy"),
    "Largest share of an expert": ("share", "router_usage_max"),
    "Conformance": ("share", ("violations", "forbidden")),
}
STYLE = """:root{color-scheme:light dark;font:16px/1.5 system-ui,sans-serif}
body{max-width:64rem;margin:2rem auto;padding:0 1rem}
figure{margin:1.5rem 0}svg{max-width:100%;height:auto;background:#fff}.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.2rem .7rem;text-align:right;
border-bottom:1px solid #8886}tbody th{text-align:left;font-weight:400;white-space:nowrap}"""


def panel(trend: pd.DataFrame, title: str, promoted: Mapping[str, float]) -> Figure:
    """A line of each series of a panel over the epochs; those of the averaged weights are dashed, and what the promoted
    snapshot had is dotted. Chance, targets and verdicts are on the pages of the epochs."""
    unit, begins = PANELS[title]
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for name in (
        column
        for column in map(str, trend)
        if column.startswith((begins,) if isinstance(begins, str) else tuple(begins))
    ):
        (line,) = axes.plot(trend.index, trend[name], "o-", label=name.replace("_", " "))
        if f"ema_{name}" in trend:
            axes.plot(trend.index, trend[f"ema_{name}"], "--", color=line.get_color())
        if name in promoted:
            axes.axhline(promoted[name], color=line.get_color(), linestyle=":")
    axes.set(xlabel="epoch", ylabel=unit, title=title, xticks=trend.index)
    if axes.lines:
        figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    return figure


def write(trend: pd.DataFrame, promoted: Mapping[str, float], pages: Iterable[str], path: Path, title: str) -> Path:
    """`trend` has a row of numbers for each epoch; `pages` are the epochs' own, as links from `path`."""
    drawn = []
    for name in PANELS:
        with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}), io.StringIO() as buffer:
            figure = panel(trend, name, promoted)
            plt.close(figure)
            if not figure.axes[0].lines:
                continue
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
            svg = buffer.getvalue()
        shown = f'<figure role="img" aria-label="{name} over {len(trend)} epochs; its numbers are in the table">'
        drawn.append(f"{shown}{svg[svg.index('<svg') :]}</figure>")
    links = " ".join(f'<a href="{html.escape(page)}">{html.escape(Path(page).stem)}</a>' for page in pages)
    table = trend.T.to_html(float_format="{:.4g}".format, border=0)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return write_text(
        path,
        f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width"><meta http-equiv="Content-Security-Policy" content="{policy}">
<style>{STYLE}</style></head><body><main><h1>{html.escape(title)}</h1>
<p>Dashed: averaged weights. Dotted: the promoted snapshot.</p><nav aria-label="epochs">{links}</nav>
{"".join(drawn)}<div class="wide" tabindex="0">{table}</div></main></body></html>
""",
    )
