"""What a run shows of itself, and what it says when a stage fails."""

import io
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from stackpkg import failure, progress, runs

NAMES = ["10_make", "20_use", "30_end"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    """One finished run of 10, 20 and 30 s, and one that has a single stage."""
    for name, seconds in zip(NAMES, (10.0, 20.0, 30.0), strict=True):
        runs.write_json(tmp_path / f"whole/lock/{name}.json", {"state": "ok", "seconds": seconds})
    runs.write_json(tmp_path / "part/lock/10_make.json", {"state": "ok", "seconds": 99.0})
    runs.write_json(tmp_path / "part/lock/20_use.json", {"state": "failed", "seconds": 1.0})
    return tmp_path


def test_the_time_left_goes_by_a_finished_run_and_by_how_fast_this_one_is(outbox: Path) -> None:
    forecast = progress.Forecast(outbox, "new", NAMES)
    assert forecast.left({}) == 60
    assert forecast.left({"10_make": 20.0}) == 100, "twice as slow as that run"
    assert forecast.left({"10_make": 10.0}, "20_use", 15.0) == 35
    assert forecast.left({"10_make": 10.0}, "20_use", 99.0) == 30, "a stage that takes longer owes nothing"
    assert progress.Forecast(outbox / "none", "new", NAMES).left({}) is None
    assert progress.Forecast(outbox, "new", [*NAMES, "40_more"]).left({}) == 80, "one nobody knows: the mean"


@pytest.mark.parametrize(("seconds", "said"), [(45, "45 s"), (720, "12 min"), (11100, "3 h 05 min")])
def test_a_time_in_words(seconds: float, said: str) -> None:
    assert progress.clock(seconds) == said


def shown(display: progress.Lines, stream: io.StringIO) -> str:
    with display:
        display.passed("10_make", "unchanged")
        display.started("20_use", "its code changed")
        told = progress.Told(display)
        told.write("noise\n[ 3/9] loss [bold]7.1\nmore")
        if isinstance(display, progress.Live):
            display.bar.refresh()
        display.ended("ok", 2.0)
    return stream.getvalue()


def test_a_terminal_sees_one_bar_with_stage_word_and_time_left(outbox: Path) -> None:
    stream = Terminal()
    told = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(progress.display(stream, outbox, "new", NAMES), stream))
    assert "[ 1/3] 10_make                    unchanged" in told
    assert re.search(r"20_use .*1/3 .*about 50 s left.*\[ 3/9\]", told.replace("\n", " ")), told
    assert "[ 2/3] 20_use                     ok in 2.0 s (its code changed)" in told and "noise" not in told
    assert "unknown" in shown(progress.display(again := Terminal(), outbox / "none", "new", NAMES), again)


def test_a_pipe_sees_one_line_a_stage_and_no_control_character(outbox: Path) -> None:
    stream = io.StringIO()
    told = shown(progress.display(stream, outbox, "new", NAMES), stream)
    assert told.splitlines() == [
        "[ 1/3] 10_make                    unchanged",
        "[ 2/3] 20_use                     ok in 2.0 s (its code changed)",
    ]


def executed(path: Path, began: int) -> Path:
    cells = [new_markdown_cell("# Title\n\n## Steps\n\n### The run\n\ntext")]
    cells += [new_code_cell(f"step({i})\nmore") for i in range(3)]
    for number, cell in enumerate(cells[1:], 1):
        cell.metadata["papermill"] = {"start_time": "2026-11-29" if number <= began else None}
    banner = new_markdown_cell("# failed", metadata={"tags": ["papermill-error-cell-tag"]})
    return runs.write_text(path / "demo/nb/31_train.ipynb", nbformat.writes(new_notebook(cells=[banner, *cells])))


def test_a_failure_names_notebook_cell_cause_and_next_step(tmp_path: Path) -> None:
    said = failure.explain("31_train", executed(tmp_path, 2), AssertionError("loss 3\nmust be < 2")).splitlines()
    assert said[0] == "31_train failed in code cell 2 of 3 under 'The run': step(1)"
    assert said[1:3] == ["  cause  AssertionError: loss 3", "         must be < 2"]
    assert said[3] == "  see    outbox/demo/nb/31_train.ipynb, the executed copy with the traceback"
    assert said[4].startswith("  next   a check did not hold") and said[4].endswith("goes on at this stage")


def test_a_failure_before_the_first_cell_says_so(tmp_path: Path) -> None:
    said = failure.explain("31_train", executed(tmp_path, 0), RuntimeError("no kernel"))
    assert said.startswith("31_train failed\n  cause  RuntimeError: no kernel\n  see    no cell ran\n  next   mend")
    assert failure.cell(tmp_path / "absent.ipynb") == ""
