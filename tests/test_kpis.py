"""Key performance indicators: what they are taken from, and that a value nobody measured meets no target."""

import pandas as pd
import pytest

from stackpkg import params
from stackpkg.telemetry import kpis

P = params.validate({"evaluation": {"min_precision_at_k": 0.5, "max_data_wait": 0.1, "entropy_band": [0.2, 0.9]}})


def history(**columns: list[float]) -> pd.DataFrame:
    rows = {"loss": [3.0, 2.0, 1.0], "nonfinite": [0, 0, 0], "step_seconds": [1.0] * 3, "data_wait_seconds": [0.1] * 3}
    return pd.DataFrame(rows | columns, index=pd.Index([1, 2, 3], name="step"))


def test_a_good_run_meets_all_and_a_plain_model_has_fewer() -> None:
    full = {"precision_at_k": [None, 0.4, 0.6], "router_entropy_min": [0.1, 0.5, None], "masked_edge_share": [0.0] * 3}
    table = kpis.measure(history(**full, kv_error=[5e-4] * 3), P).set_index("kpi")
    assert table.met.all() and len(table) == 7
    assert table.value["retrieval precision@k"] == 0.6 and table.value["router entropy, lowest layer"] == 0.5
    assert kpis.measure(history(), P).kpi.tolist() == ["loss falls", "finite steps", "data wait"]


@pytest.mark.parametrize(
    ("columns", "missed"),
    [
        ({"loss": [1.0, 1.0, 1.0]}, "loss falls"),
        ({"loss": [3.0, 2.0, float("nan")], "nonfinite": [0, 0, 1]}, "finite steps"),
        ({"data_wait_seconds": [0.2] * 3}, "data wait"),
        ({"precision_at_k": [None, None, 0.49]}, "retrieval precision@k"),
        ({"precision_at_k": [None, None, None]}, "retrieval precision@k"),
        ({"router_entropy_min": [0.5, 0.5, 0.1]}, "router entropy, lowest layer"),
        ({"kv_error": [float("nan")] * 3}, "KV round-trip error"),
    ],
)
def test_each_can_be_missed(columns: dict[str, list[float]], missed: str) -> None:
    table = kpis.measure(history(**columns).astype(float), P)
    assert table[~table.met].kpi.tolist() == [missed]
