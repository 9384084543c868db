"""Figures: what they say in words, and that a notebook hands the words on."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.pylabtools import select_figure_formats

from stackpkg import plots


def test_a_figure_in_words_tells_titles_axes_and_how_lines_run() -> None:
    data = pd.DataFrame(
        {"raw": [8.125, 7.5, 7.25], "averaged": [8.5, np.nan, np.nan]}, index=pd.Index([1, 2, 3], name="step")
    )
    said = plots.describe(plots.lines(data, "loss", target=7.0))
    assert said == "loss over step: raw from 8.12 to 7.25, averaged at 8.5, target 7 at 7"
    figure, (left, middle, right) = plt.subplots(1, 3)
    left.bar(["a", "b"], [1, 2])
    plots.heat(middle, pd.DataFrame([[1, 2], [3, 4]]), "share")
    right.set(title="nothing", ylabel="y")
    assert plots.describe(figure) == "panel: 2 bars or areas; panel: a map of colours; nothing: no data"
    assert plots.describe(plt.figure()) == "an empty figure"


def test_in_a_notebook_the_words_go_beside_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = InteractiveShell()
    monkeypatch.setattr(plots, "get_ipython", lambda: shell)
    plots.use_style()
    figure, axis = plt.subplots()
    axis.plot([1.0, 2.0])
    select_figure_formats(shell, {"png"})  # the inline backend does it, and takes other formatters of figures away
    assert shell.display_formatter.format(figure)[0]["text/plain"] == "panel: a line from 1 to 2"
