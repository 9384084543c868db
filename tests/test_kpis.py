"""Key performance indicators: what they are taken from, and that a value nobody measured meets no target."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from stackpkg import params, runs
from stackpkg.telemetry import kpis

REFERENCE = {"model_type": "stackpkg", "num_experts": 4}
FULL = {
    "precision_at_k": [None, 0.4, 0.6],
    "router_entropy_min": [0.1, 0.5, 0.5],
    "masked_edge_share": [0.0] * 3,
    "kv_error": [5e-4] * 3,
    "router_entropy": [0.5] * 3,
    "attention_entropy_median": [0.5] * 3,
}
P = params.validate({"evaluation": {"min_precision_at_k": 0.5, "max_data_wait": 0.1, "entropy_band": [0.2, 0.9]}})


def history(**columns: Any) -> pd.DataFrame:
    text, told = columns.pop("loss_language_modelling", [3.0, 2.0, 1.0]), [math.nan, 2.0, 1.0]
    rows = {
        "loss_language_modelling": text,
        "validation_loss": told,
        "nonfinite": [0, 0, 0],
        "step_seconds": [1.0] * 3,
        "data_wait_seconds": [0.1] * 3,
    }
    return pd.DataFrame(rows | columns, index=pd.Index([1, 2, 3], name="step"))


def test_a_good_run_meets_all_and_a_plain_model_has_fewer() -> None:
    table = kpis.measure(history(**FULL).astype(float), REFERENCE, P).set_index("kpi")
    assert table.met.all() and len(table) == 9
    assert table.value["retrieval precision@k"] == 0.6 and table.value["router entropy, lowest layer"] == 0.5
    dense = kpis.measure(history(precision_at_k=FULL["precision_at_k"]).astype(float), {"model_type": "llama"}, P)
    assert dense.kpi.tolist() == ["loss falls", "steps not finite", "data wait", "retrieval precision@k"]
    assert dense.met.all()
    routed = kpis.measure(history(), {"model_type": "mixtral", "num_local_experts": 8}, P)
    assert routed.kpi.tolist()[-2:] == ["router entropy, lowest layer", "router entropy, mean of layers"]
    assert not routed.met.iloc[-3:].any()
    talks = P.model_copy(update={"curriculum": [P.curriculum[0].model_copy(update={"conversations": 0.5})]})
    spoken = set(kpis.measure(history(), REFERENCE, talks).kpi) - set(table.index)
    assert spoken == {"violations in protected scopes", "attention on forbidden edges"}


def test_a_series_that_nobody_wrote_meets_no_target() -> None:
    assert kpis.measure(history(), REFERENCE, P).met.tolist() == [True] * 3 + [False] * 6


@pytest.mark.parametrize(
    ("columns", "missed"),
    [
        ({"loss_language_modelling": [1.0, 1.0, 1.0]}, "loss falls"),
        ({"nonfinite": [0, 0, 1]}, "steps not finite"),
        ({"data_wait_seconds": [0.2] * 3}, "data wait"),
        ({"precision_at_k": [None, None, 0.49]}, "retrieval precision@k"),
        ({"precision_at_k": [None, None, None]}, "retrieval precision@k"),
        ({"precision_at_k": [None, 0.6, None]}, "retrieval precision@k"),
        ({"router_entropy_min": [0.5, 0.5, None]}, "router entropy, lowest layer"),
        ({"router_entropy_min": [0.5, 0.5, 0.1]}, "router entropy, lowest layer"),
        ({"router_entropy": [0.5, 0.5, 0.95]}, "router entropy, mean of layers"),
        ({"attention_entropy_median": [0.5, 0.5, 0.05]}, "attention entropy, median head"),
        ({"masked_edge_share": [0.0, 0.1, 0.0]}, "masked edge share"),
        ({"kv_error": [float("nan")] * 3}, "KV round-trip error"),
    ],
)
def test_each_can_be_missed(columns: dict[str, Any], missed: str) -> None:
    table = kpis.measure(history(**FULL | columns).astype(float), REFERENCE, P)
    assert table[~table.met].kpi.tolist() == [missed]


def test_each_has_an_owner_an_action_and_a_page_that_exists() -> None:
    for kpi in kpis.load(P):
        assert kpi.owner and len(kpi.missed.split()) >= 3 and kpi.series in kpi.formula
        assert not kpi.runbook or (runs.root() / f"book/runbooks/{kpi.runbook}.md").is_file(), kpi.runbook


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("comparison", "==", "comparison"),
        ("target", "evaluation.min_precison", "names no number among the parameters"),
        ("owner", "nobody", "architecture"),
        ("seriess", "loss", "seriess"),
        ("name", "data wait", "defined twice: data wait"),
    ],
)
def test_a_bad_definition_is_refused_with_its_field(tmp_path: Path, field: str, value: object, message: str) -> None:
    definitions = yaml.safe_load((runs.root() / "params/kpis.yaml").read_text())
    definitions[0][field] = value
    (tmp_path / "kpis.yaml").write_text(yaml.safe_dump(definitions))
    with pytest.raises(ValueError, match=message):
        kpis.load(P, tmp_path / "kpis.yaml")
