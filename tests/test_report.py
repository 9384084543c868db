"""The page of an epoch: it exists, opens offline, and says FAIL where a limit is missed."""

import importlib
import math
import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pandas as pd
import pytest

from stackpkg import params
from stackpkg.evaluation import epoch as schema
from stackpkg.evaluation import report, trend
from stackpkg.runs import read_json, write_json


def epoch(**changes: object) -> dict:
    layers = [{"usage": [0.5, 0.3, 0.2], "entropy": 0.7}, {"usage": [0.4, 0.4, 0.2], "entropy": 0.6}]
    main = {"validation_loss": 4.0, "validation_loss_by_domain": {"code": 3.5, "docs": 4.5}, "calibration_error": 0.05}
    main |= {"precision_at_k": 0.8, "recall_at_k": 0.8, "mrr": 0.5, "ndcg_at_10": 0.6, "long_range_accuracy": 0.1}
    ranked = {"precision_at_10": 0.1, "recall_at_10": 0.7, "ndcg_at_10": 0.4, "mrr": 0.3, "queries": 9, "documents": 50}
    guard = {"on": True, "sigma_min": 0.45, "accepted": 4, "relevant": 2, "rejected": {"age": 3}, "similarities": [7]}
    far = [
        {"up_to": 60, "value": 0.2, "low": 0.1, "high": 0.4, "n": 30},
        {"up_to": 120, "value": 0, "low": 0, "high": 0.2, "n": 34},
    ]
    base = main | {"run": "demo", "attempt": 1, "epoch": 1, "step": 6, "k": 1, "pairs": 32, "long_range_answers": 64}
    base |= {"validation_loss_by_row": {"code": [3.0, 4.0], "docs": [4.5]}, "ema": main | {"validation_loss": 4.1}}
    base |= {"calibration": {"count": [1.0] * 15, "confidence": [0.5] * 15, "right": [0.0] * 15}, "guard": guard}
    return base | {"retrieval_sets": {"fiqa": ranked}, "long_range_by_distance": far, "router": layers} | changes


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
    broken = epoch(validation_loss=math.nan, validation_loss_by_domain={"code": math.inf}, calibration_error=math.nan)
    schema.write(tmp_path / "epoch.json", broken)
    assert read_json(tmp_path / "epoch.json")["validation_loss"] == "NaN"
    read = schema.read(tmp_path / "epoch.json")
    assert math.isnan(report.flat(read_json(tmp_path / "epoch.json"))["validation_loss"])
    numbers = report.flat(read)
    assert math.isnan(numbers["validation_loss"]) and numbers["validation_loss_code"] == math.inf
    assert "run" not in numbers
    assert verdicts(tmp_path, read, epoch())["validation loss"] == ["FAIL"]


def test_a_number_that_the_epoch_before_did_not_have_is_shown(tmp_path: Path) -> None:
    assert verdicts(tmp_path, epoch(), epoch(retrieval_sets={}))["validation loss"] == ["SUCCESS"]
    assert "fiqa ndcg at 10" in (tmp_path / "epoch.html").read_text(encoding="utf-8")


def test_flat_names_every_number_once() -> None:
    numbers = report.flat(epoch())
    assert numbers["validation_loss_docs"] == 4.5 and numbers["router_entropy_layer_1"] == 0.6
    assert numbers["ema_validation_loss"] == 4.1 and numbers["ema_validation_loss_code"] == 3.5
    assert numbers["fiqa_ndcg_at_10"] == 0.4 and numbers["long_range_accuracy_to_60"] == 0.2
    assert numbers["router_usage_max_layer_0"] == 0.5 and all(isinstance(value, float) for value in numbers.values())


def test_evidently_is_told_not_to_track(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DO_NOT_TRACK", raising=False)
    importlib.reload(report)
    assert os.environ["DO_NOT_TRACK"] == "1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision_at_k": 1.2}, "precision_at_k: .*between 0 and 1, given 1.2"),
        ({"precison": 0.3}, "precison: Extra inputs"),
        ({"router": [{"usage": [0.5]}]}, "router.0.entropy: Field required"),
        ({"step": -1}, "step"),
        ({"ema": {}}, "ema.validation_loss"),
    ],
)
def test_a_report_against_its_schema_is_neither_written_nor_read(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"epoch.json is no epoch report: .*{message}"):
        schema.write(tmp_path / "epoch.json", epoch(**changes))
    assert not (tmp_path / "epoch.json").exists()
    write_json(tmp_path / "epoch.json", epoch(**changes))
    with pytest.raises(ValueError, match=message):
        schema.read(tmp_path / "epoch.json")


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    schema.write(tmp_path / "epoch.json", epoch())
    assert schema.read(tmp_path / "epoch.json") == epoch()
    assert set(schema.EpochReport.model_json_schema()["required"]) <= set(epoch())


def test_the_trend_page_shows_every_panel_and_loads_nothing(tmp_path: Path) -> None:
    frame = pd.DataFrame([report.flat(epoch(epoch=e, validation_loss=5.0 - e)) for e in (1, 2, 3)]).set_index("epoch")
    page = trend.write(frame, {"validation_loss": 2.1}, ["epoch_001.html"], tmp_path / "trend.html", "Run <b>x</b>")
    text = page.read_text(encoding="utf-8")
    assert text.count("<figure") == len(trend.PANELS) - 1 and "Conformance over" not in text, "without conversations"
    assert "<b>x" not in text and 'href="epoch_001.html"' in text and "long_range_accuracy_to_120" in text
    assert not re.search(r"<script|(?:src|href)=\"(?!epoch|#)|url\((?!#)|@import", text)
    root = ET.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    again = trend.write(frame, {"validation_loss": 2.1}, ["epoch_001.html"], tmp_path / "again.html", "Run <b>x</b>")
    assert root.tag.endswith("svg") and again.read_text(encoding="utf-8") == text
    lines = trend.panel(frame, "Validation loss", {"validation_loss": 2.1}).axes[0].lines
    drawn = {line.get_label(): list(line.get_ydata()) for line in lines}
    assert drawn["validation loss"] == [4.0, 3.0, 2.0] and [2.1, 2.1] in drawn.values()
    assert [4.1] * 3 in drawn.values(), "the averaged weights are drawn too"
    assert len({line.get_color() for line in lines}) == 3 and len(lines) == 7, "a colour each: all, code, docs"
