"""Dashboards are made from the panels, and every panel finds data on a real Prometheus that follows a job's files."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from stackpkg import params
from stackpkg.runs import read_json, write_json
from stackpkg.telemetry import dashboards, exporter, guard, kpis, live, rules
from stackpkg.telemetry.rows import RowWriter

P = params.validate({})
ROW = {
    "loss": 2.0, "loss_language_modelling": 2.0, "weighted_contrastive": 0.1, "grad_norm": 1.0, "gradient_regret": 0.1,
    "learning_rate": 1e-3, "beta1_effective": 0.9, "beta2_effective": 0.95, "nonfinite": 0, "update_skipped": 0,
    "router_entropy": 0.6, "router_entropy_min": 0.5, "router_usage_max": 0.4, "attention_entropy_median": 0.5,
    "masked_edge_share": 0.0, "kv_error": 1e-4, "kv_ratio": 0.5, "kv_evictions": 2.0, "step_seconds": 0.5,
    "data_wait_seconds": 0.001, "tokens_per_second": 4000.0, "memory_mb": 900.0, "activation_outlier_rate": 0.01,
    "precision_at_k": 0.8, "validation_loss": 2.1, "rejected_age": 3, "violations": 0.0, "forbidden_attention": 0.01,
    "router_usage": [[0.4, 0.6], [0.3, 0.7]], "router_entropy_layers": [0.9, 0.8],
    "update_ratio": 1e-3, "router_regret": 0.01, "router_regret_layers": [0.01, 0.02], "similarity_positive": 0.8,
    "similarity_negative": 0.1, "flops_utilisation": 0.3, "probe_share": 0.004,
    "attention_entropy_heads": [[0.5, 0.6], [0.7, 0.8]],
}  # fmt: skip
HISTORY = pd.DataFrame([ROW | {"loss": 3.0}, ROW], index=pd.Index([1, 2], name="step"))
PANELS = dashboards.panels(HISTORY, kpis.load(P))
DRILLS = dashboards.drill_down(HISTORY)


def test_a_panel_exists_where_the_rows_have_its_series() -> None:
    titles = [title for group in dashboards.PANELS.values() for title in group]
    assert [panel.title for panel in PANELS if not panel.kpi] == titles, "the row below has a series for each"
    assert [panel.title for panel in PANELS if panel.kpi] == [kpi.name for kpi in kpis.load(P)]
    dense = HISTORY.drop(columns=[name for name in HISTORY if name.startswith("router_")])
    fewer = dashboards.panels(dense, [])
    assert not any(panel.group == "Routing" for panel in fewer)
    assert not any(panel.data(HISTORY).empty for panel in PANELS)


def test_grafana_gets_every_panel_with_its_expression_and_target() -> None:
    board = json.loads(dashboards.grafana(PANELS))
    charts = [panel for panel in board["panels"] if panel["type"] == "timeseries"]
    assert [chart["title"] for chart in charts] == [panel.title for panel in PANELS]
    assert [chart["targets"][0]["expr"] for chart in charts] == [panel.expression for panel in PANELS]
    steps = charts[3]["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert PANELS[3].kpi and steps[1]["value"] == PANELS[3].target == 0.75


def test_a_drill_down_has_a_line_for_each_expert_of_the_layers_that_are_chosen() -> None:
    assert [panel.title for panel in DRILLS] == [*dashboards.DRILL_DOWN]
    board = json.loads(dashboards.grafana([*PANELS, *DRILLS]))
    (chart,) = (chart for chart in board["panels"] if chart["title"] == "Usage of each expert")
    (target,) = chart["targets"]
    assert target["expr"] == 'train_router_usage{run=~"$run",layer=~"$layer"}'
    assert target["legendFormat"] == "{{run}} layer {{layer}} expert {{expert}}"
    assert [variable["name"] for variable in board["templating"]["list"]] == ["source", "run", "layer"]
    assert dashboards.drill_down(HISTORY[["loss"]]) == []


def test_the_console_holds_every_indicator_and_loads_nothing_from_elsewhere() -> None:
    page = dashboards.console(PANELS)
    assert all(panel.title in page for panel in PANELS)
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)


def test_a_snapshot_has_each_picture_with_its_numbers_and_its_words(tmp_path: Path) -> None:
    verdicts = kpis.measure(HISTORY, {"model_type": "stackpkg", "num_experts": 4}, P)
    listed = dashboards.snapshot(PANELS, HISTORY, verdicts, tmp_path)
    for row, panel in zip(listed.itertuples(), PANELS, strict=True):
        assert "<svg" in (tmp_path / row.picture).read_text() and panel.title in row.alt
        data = pd.read_csv(tmp_path / row.data, index_col="step")
        assert data.to_numpy().tolist() == panel.data(HISTORY).to_numpy().tolist()
    assert [each["title"] for each in read_json(tmp_path / "panels.json")] == listed.title.tolist()
    page = (tmp_path / "snapshot.html").read_text()
    assert page.count("<img alt=") == len(PANELS) and "<script" not in page


@pytest.mark.skipif(bool(live.missing()), reason="prometheus and prometheus-alertmanager are needed")
def test_every_panel_finds_data_on_a_prometheus_that_follows_the_job(tmp_path: Path) -> None:
    run, inbox = tmp_path / "outbox/demo-1.a", live.Inbox()
    write_json(run / "checkpoints/train/job.json", {})
    writer = RowWriter(run / "telemetry/train", run.name, 1, 0, 1)
    child = subprocess.Popen([sys.executable, "-m", exporter.__name__, str(run), "train"])
    text = rules.render(guard.load(P), 1.0, 10.0)
    try:
        with live.servers(tmp_path / "servers", text, tmp_path / "outbox/.targets", inbox.hooks, inbox.at) as address:
            writer.write(1, **ROW)
            writer.flush()
            end = time.monotonic() + 40
            while (left := dashboards.silent(PANELS + DRILLS, address, run.name)) and time.monotonic() < end:
                time.sleep(1)
            assert not left, f"panels without data: {left}"
            assert dashboards.silent(PANELS, address, "another") == [panel.title for panel in PANELS]
    finally:
        child.kill()
        child.wait()
        inbox.close()
