"""Figures that JupyterLab draws itself: the same numbers as the picture, beside it, and nothing where it would lie."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.pylabtools import select_figure_formats
from nbformat.v4 import new_code_cell, new_notebook, new_output

from stackpkg import interactive, plots

DATA = pd.DataFrame({"raw": [8.125, 7.5, 7.25], "averaged": [8.5, np.nan, 8.0]}, index=pd.Index([1, 2, 3], name="step"))


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def test_the_traces_hold_the_numbers_of_the_picture() -> None:
    figure = plots.lines(DATA, "loss", target=7.0)
    drawn = interactive.twin(figure)
    assert drawn
    raw, averaged, target = drawn["data"]
    assert (raw["name"], raw["x"], raw["y"], raw["mode"]) == ("raw", [1, 2, 3], [8.125, 7.5, 7.25], "lines+markers")
    assert (averaged["x"], averaged["y"]) == ([1, 3], [8.5, 8.0])
    assert target["y"] == [7.0, 7.0] and target["line"]["dash"] == "dot"
    assert target["x"] == pytest.approx(figure.axes[0].get_xlim(), rel=1e-5)
    assert raw["line"]["color"] != averaged["line"]["color"]
    assert drawn["layout"]["annotations"][0]["text"] == "loss"
    assert drawn["layout"]["xaxis"]["title"]["text"] == "step"


def test_plotly_takes_it_for_a_figure_and_json_for_json() -> None:
    go = pytest.importorskip("plotly.graph_objects")
    figure, axes = plt.subplots(2, 2, sharex=True)
    for axis in axes.flat:
        axis.plot([1, 2, 3], [0.1, np.nan, np.inf], "--")
    axes[0][0].set(yscale="log", ylim=(0.01, 10), title="first")
    axes[0][0].axvline(2, color="black")
    axes[1][1].remove()
    figure.supxlabel("step")
    drawn = json.loads(json.dumps(interactive.twin(figure), allow_nan=False))
    made = go.Figure(drawn)  # it refuses a name or a value that plotly does not know
    assert len(made.data) == 4 and made.data[0].y == (0.1, None, None)
    assert made.layout.yaxis.type == "log" and made.layout.xaxis3.title.text == "step"
    assert made.layout.yaxis.range == (-2, 1) and made.layout.yaxis2.range is None, (
        "limits that were set, and no others"
    )
    assert not made.layout.xaxis.title.text, "the label of the whole figure stands below its lowest panels"
    assert (made.layout.xaxis.domain, made.layout.yaxis.domain) == ((0, 0.465), (0.535, 1)), "not at the top left"
    assert made.data[1].x == (2, 2)


def test_what_holds_more_than_lines_stays_a_picture() -> None:
    bars, bands, words, many, dates, none = (plt.subplots() for _ in range(6))
    bars[1].bar([1, 2], [1, 2])
    bands[1].errorbar([1, 2], [1, 2], [0.1, 0.1])
    words[1].plot(["a", "b"], [1, 2])
    many[1].plot(np.zeros(interactive.MOST + 1))
    dates[1].plot(pd.date_range("2026-01-01", periods=2), [1, 2])
    for figure, _ in (bars, bands, words, many, dates, none):
        assert interactive.twin(figure) is None
    assert interactive.twin(plt.figure()) is None


def test_in_a_notebook_one_output_holds_the_picture_its_words_and_the_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = InteractiveShell()
    monkeypatch.setattr(plots, "get_ipython", lambda: shell)
    plots.use_style()
    figure = plots.lines(DATA, "loss")
    select_figure_formats(shell, {"png"})  # what the inline backend does before it shows its first figure
    told, _ = shell.display_formatter.format(figure)
    assert set(told) == {interactive.KIND, "image/png", "text/plain"}
    assert told["text/plain"] == plots.describe(figure) and told[interactive.KIND] == interactive.twin(figure)
    assert len(json.dumps(told[interactive.KIND])) < 3000
    axis = plt.subplots()[1]
    axis.bar([1], [1])
    assert set(shell.display_formatter.format(axis.figure)[0]) == {"image/png", "text/plain"}


def test_the_environment_of_the_notebooks_has_what_draws_it() -> None:
    if not importlib.util.find_spec("jupyterlab"):
        pytest.skip("JupyterLab is not installed")
    places = Path(sys.prefix, "share/jupyter/labextensions")
    package = json.loads((places / "jupyterlab-plotly/package.json").read_text())
    assert package["jupyterlab"]["mimeExtension"], "plotly's package brings no renderer for JupyterLab"


@pytest.mark.book
def test_jupyterlab_draws_the_traces(tmp_path: Path) -> None:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found or not importlib.util.find_spec("jupyterlab"):
        pytest.skip("no chromium or google-chrome, or no JupyterLab")
    sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    figure = {interactive.KIND: interactive.twin(plots.lines(DATA, "loss")), "text/plain": "words"}
    cell = new_code_cell("figure", outputs=[new_output("display_data", figure)])
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "one.ipynb")
    options = ["--no-browser", "--allow-root", "--ServerApp.port=0", "--ServerApp.ip=127.0.0.1"]
    options += ["--IdentityProvider.token=t", f"--ServerApp.root_dir={tmp_path}"]
    command = [sys.executable, "-m", "jupyterlab", *options]
    own = {name: str(tmp_path / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    server = subprocess.Popen(command, cwd=tmp_path, env=os.environ | own, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr
        said = next(line for line in server.stderr if "http://127.0.0.1:" in line and "?token" in line)
        home = said.split("http://", 1)[1].split("/lab", 1)[0]
        with sync_playwright() as p:
            page = p.chromium.launch(executable_path=found, args=["--no-sandbox"]).new_page()
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            page.goto(f"http://{home}/doc/tree/one.ipynb?token=t")
            page.wait_for_selector(".js-plotly-plot .scatterlayer .trace", timeout=60_000)
            assert page.locator(".js-plotly-plot .scatterlayer .trace").count() == 2
            others = [url for url in asked if not url.startswith((f"http://{home}", "data:", "blob:"))]
            assert not others, "the figure asks for something elsewhere"
    finally:
        server.terminate()
        server.wait(20)
