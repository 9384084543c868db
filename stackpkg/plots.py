"""One look for every figure: set once, readable on a light and on a dark page."""

import matplotlib as mpl
from cycler import cycler

COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#787774")


def use_style() -> None:
    """Figure size 7 x 3 inches on an opaque white sheet, so that axes stay readable when the page is dark."""
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
