"""The page of an epoch: it exists, opens offline, and says FAIL where a limit is missed."""

import importlib
import math
import os
import re
from pathlib import Path

import pytest

from stackpkg import params
from stackpkg.evaluation import report
from stackpkg.runs import read_json, write_json


def epoch(**changes: object) -> dict:
    layers = [{"usage": [0.5, 0.3, 0.2], "entropy": 0.7}, {"usage": [0.4, 0.4, 0.2], "entropy": 0.6}]
    base = {"epoch": 1, "step": 6, "run": "demo", "validation_loss": 4.0, "ema_validation_loss": 4.1, "mrr": 0.5}
    base |= {"validation_loss_by_domain": {"code": 3.5, "docs": 4.5}, "k": 1, "precision_at_k": 0.8, "recall_at_k": 0.8}
    return base | {"pairs": 32, "long_range_accuracy": 0.1, "long_range_answers": 64, "router": layers} | changes


P = params.validate({"evaluation": {"min_precision_at_k": 0.75, "entropy_band": [0.2, 0.9]}})


def verdicts(tmp_path: Path, now: dict, before: dict | None = None) -> dict[str, list[str]]:
    """Verdicts of each number that has a limit, by the number's name."""
    table = report.write(now, before, P, tmp_path / "epoch.html")
    found: dict[str, list[str]] = {}
    for finding, status in zip(table.finding, table.status, strict=True):
        found.setdefault(re.split(r":? Actual|: ", finding)[0].strip(), []).append(status)
    return found


def test_the_page_is_written_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    table = report.write(epoch(), None, P, tmp_path / "new/epoch.html")
    assert set(table.status) == {"SUCCESS"} and len(table) == 5  # precision, and two limits of each layer
    page = (tmp_path / "new/epoch.html").read_text(encoding="utf-8")
    assert "precision at k" in page and "router entropy layer 1" in page
    tags = re.findall(r"<(?:script|link|img|iframe|source|object|embed)\b[^>]*>", page)
    loads = [value for tag in tags for value in re.findall(r"(?:src|href|data)\s*=\s*[\"']?([^\"'\s>]+)", tag)]
    assert [load for load in loads if not load.startswith("data:")] == []
    assert not re.search(r"@import\s+(?:url|[\"'])|url\(\s*[\"']?(?:https?:)?//", page)


def test_a_number_beyond_its_limit_fails(tmp_path: Path) -> None:
    limits = ["precision at k", "router entropy layer 0"]
    collapsed = [{"usage": [1.0, 0.0, 0.0], "entropy": 0.05}, epoch()["router"][1]]
    poor = verdicts(tmp_path, epoch(precision_at_k=0.74, router=collapsed), epoch())
    assert {name for name, found in poor.items() if "FAIL" in found} == set(limits), poor
    assert poor["precision at k"] == ["FAIL"] and sorted(poor["router entropy layer 0"]) == ["FAIL", "SUCCESS"]
    at_the_limit = verdicts(tmp_path, epoch(precision_at_k=0.75), epoch())
    assert {status for found in at_the_limit.values() for status in found} == {"SUCCESS"}


def test_a_loss_that_rose_fails(tmp_path: Path) -> None:
    assert verdicts(tmp_path, epoch(validation_loss=4.21), epoch())["validation loss"] == ["FAIL"]  # by over 5 per cent
    assert verdicts(tmp_path, epoch(validation_loss=4.19), epoch())["validation loss"] == ["SUCCESS"]
    assert verdicts(tmp_path, epoch(validation_loss=3.9), epoch())["validation loss"] == ["SUCCESS"]


def test_a_loss_that_is_not_a_number_fails(tmp_path: Path) -> None:
    """Strict JSON holds NaN as a string: it must come back as a number that fails, not vanish from the page."""
    write_json(tmp_path / "epoch.json", epoch(validation_loss=math.nan, validation_loss_by_domain={"code": math.inf}))
    read = read_json(tmp_path / "epoch.json")
    numbers = report.flat(read)
    assert math.isnan(numbers["validation_loss"]) and numbers["validation_loss_code"] == math.inf
    assert "run" not in numbers
    assert verdicts(tmp_path, read, epoch())["validation loss"] == ["FAIL"]


def test_flat_names_every_number_once() -> None:
    numbers = report.flat(epoch())
    assert numbers["validation_loss_docs"] == 4.5 and numbers["router_entropy_layer_1"] == 0.6
    assert numbers["router_usage_max_layer_0"] == 0.5 and all(isinstance(value, float) for value in numbers.values())


def test_evidently_is_told_not_to_track(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DO_NOT_TRACK", raising=False)
    importlib.reload(report)
    assert os.environ["DO_NOT_TRACK"] == "1"
