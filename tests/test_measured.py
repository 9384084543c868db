"""The page of goals is made from the benchmarks' files, and says where one is missed."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "book")]

import measured  # noqa: E402


def test_every_goal_has_its_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks/results")
    monkeypatch.chdir(tmp_path)
    told = measured.goals()
    lines = [line.split("|") for line in told.splitlines() if "|" in line]
    lengths = [2048, 4096, 8192]
    whats = [goal.what.format(length) for goal in measured.GOALS for length in (lengths if "{}" in goal.what else [0])]
    assert [what for what in whats if measured.text(what) not in told] == []
    assert measured.text("tokens/s of 1024") not in told, "so short that nobody set a goal"
    systems = {cell.strip() for line in lines for cell in line[:3]}
    assert not systems & {measured.text(peer) for peer in measured.PEERS}, "no goal is set for what is beside"
    assert systems >= {"sliding", "block", "dilated", "reference model"}
    shown = measured.rows()
    assert all(
        f"benchmarks/{name}.py" in shown and (ROOT / f"benchmarks/{name}.py").is_file() for name in measured.LISTED
    )


@pytest.mark.parametrize(
    ("value", "low", "high", "said"),
    [
        (1.0, 0.5, 2.0, "`met`"),
        (1.0, -1.0, 4.0, "met, not surely"),
        (3.5, 2.0, 5.0, "missed"),
        (3.5, 3.2, 3.8, "missed"),
    ],
)
def test_an_interval_beyond_the_limit_is_not_sure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: float, low: float, high: float, said: str
) -> None:
    names = {"overhead wall": value, "overhead wall, low": low, "overhead wall, high": high}
    rows = [{"system": "tiny: stack", "metric": name, "value": each, "unit": "%"} for name, each in names.items()]
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/trainer.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measured, "GOALS", measured.GOALS[:1])
    assert said in measured.goals()
