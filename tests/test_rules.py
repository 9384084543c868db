"""The rules fire in Prometheus when the guard fires in process: checked with promtool where it is installed."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from stackpkg import params
from stackpkg.telemetry import rules
from stackpkg.telemetry.guard import load

ALERTS = load(params.validate({}))
needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (prometheus)")


def rendered(step_seconds: float = 1.0) -> list[dict]:
    text = rules.render([alert.drilled() for alert in ALERTS], step_seconds, evaluation_seconds=10.0)
    return yaml.safe_load(text)["groups"][0]["rules"]


def test_every_alert_has_a_rule_with_a_runbook_and_a_wait() -> None:
    found = {rule["alert"]: rule for rule in yaml.safe_load(rules.render(ALERTS, 0.5, 60.0))["groups"][0]["rules"]}
    assert list(found) == [alert.name for alert in ALERTS]
    for alert in ALERTS:
        rule = found[alert.name]
        assert rule["annotations"]["runbook_url"] == f"runbooks/{alert.name}.html"
        assert f"train_{alert.series}" in rule["expr"] and rule["labels"]["severity"] == alert.severity
    assert found["TrainRouterEntropyLow"]["for"] == "500s"  # 999 steps of half a second
    assert found["TrainLowPrecisionAtK"]["for"] == "120s"  # two evaluations more
    assert found["TrainNonFinite"]["for"] == "0s"


@needs_promtool
def test_promtool_accepts_the_rules(tmp_path: Path) -> None:
    (tmp_path / "rules.yml").write_text(rules.render(ALERTS, 0.5, 60.0))
    done = subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True)
    assert done.returncode == 0 and f"{len(ALERTS)} rules found" in done.stdout, done.stderr


def promtool(tmp_path: Path, rule: dict, series: str, values: str, expected: dict[str, bool]) -> str:
    """Feed one series to one rule; `expected`: does it fire at that time? Returns the complaint."""
    (tmp_path / "rules.yml").write_text(
        yaml.safe_dump({"groups": [{"name": "one", "interval": "1s", "rules": [rule]}]})
    )
    labels = {"exp_labels": rule["labels"] | {"run": "demo"}}
    notes = {
        "exp_annotations": rule["annotations"]
        | {"summary": rule["annotations"]["summary"].replace("{{ $labels.run }}", "demo")}
    }
    checks = [
        {"eval_time": time, "alertname": rule["alert"], "exp_alerts": [labels | notes] if fires else []}
        for time, fires in expected.items()
    ]
    test = {"interval": "1s", "input_series": [{"series": f'{series}{{run="demo"}}', "values": values}]}
    case = {"rule_files": ["rules.yml"], "evaluation_interval": "1s", "tests": [test | {"alert_rule_test": checks}]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(case))
    done = subprocess.run(["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


CALM = {"nonfinite": 0, "update_skipped": 0, "recovery_rung": 0, "loss": 2, "grad_norm": 1, "router_entropy": 0.6}
CALM |= {"attention_entropy_median": 0.5, "precision_at_k": 0.9, "data_wait_seconds": 0}


@needs_promtool
@pytest.mark.parametrize("rule", rendered(), ids=lambda rule: rule["alert"])
def test_each_rule_fires_on_its_fault_and_only_then(tmp_path: Path, rule: dict) -> None:
    alert = next(alert for alert in ALERTS if alert.name == rule["alert"])
    calm, fault = CALM[alert.series], alert.drill.fault
    values = f"{calm}x100 {fault}x60"  # seconds 0 to 100 calm, the fault from 101 on
    fires = 101 + int(rule["for"].removesuffix("s")) + 1
    complaint = promtool(tmp_path, rule, f"train_{alert.series}", values, {"99s": False, f"{fires}s": True})
    assert not complaint, complaint
    # the test itself can fail: the same rule with an unreachable threshold stays silent
    mute = rule | {"expr": f"({rule['expr']}) and train_{alert.series} > 1e9"}
    assert promtool(tmp_path, mute, f"train_{alert.series}", values, {f"{fires}s": True})
