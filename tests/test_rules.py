"""The rules fire in Prometheus when the guard fires in process: checked with promtool where it is installed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from stackpkg import params
from stackpkg.telemetry import rules
from stackpkg.telemetry.guard import Alert, Guard, load

ALERTS = load(params.validate({}))
needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (prometheus)")


def test_every_alert_has_a_rule_with_a_runbook_and_a_wait() -> None:
    found = {rule["alert"]: rule for rule in yaml.safe_load(rules.render(ALERTS, 0.5, 60.0))["groups"][0]["rules"]}
    assert list(found) == [alert.name for alert in ALERTS]
    for alert in ALERTS:
        rule = found[alert.name]
        assert rule["annotations"]["runbook_url"] == f"runbooks/{alert.name}.html"
        assert alert.series in rule["expr"] or alert.name == "Watchdog"
        assert rule["labels"]["severity"] == alert.severity
    assert found["TrainRouterEntropyLow"]["for"] == "500s"  # 999 steps of half a second
    assert found["TrainLowPrecisionAtK"]["for"] == "120s"  # two evaluations more
    assert found["TrainNonFinite"]["for"] == "0s" and found["TrainTargetAbsent"]["for"] == "59s"
    assert found["TrainNonFinite"]["expr"] == "train_max_nonfinite > 0.0"  # no step slips through between two scrapes


@needs_promtool
def test_promtool_accepts_the_rules(tmp_path: Path) -> None:
    (tmp_path / "rules.yml").write_text(rules.render(ALERTS, 0.5, 60.0))
    done = subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True)
    assert done.returncode == 0 and f"{len(ALERTS)} rules found" in done.stdout, done.stderr


def promtool(
    tmp_path: Path, rule: dict, series: str, values: str, expected: dict[str, bool], everyone: bool = False
) -> str:
    """Feed one series to one rule; `expected`: does it fire at that time? Returns the complaint."""
    (tmp_path / "rules.yml").write_text(
        yaml.safe_dump({"groups": [{"name": "one", "interval": "1s", "rules": [rule]}]})
    )
    labels = {"exp_labels": rule["labels"] | ({} if everyone else {"run": "demo"})}
    said = rule["annotations"]["summary"].replace("{{ $labels.run }}", "" if everyone else "demo")
    notes = {"exp_annotations": rule["annotations"] | {"summary": said}}
    checks = [
        {"eval_time": time, "alertname": rule["alert"], "exp_alerts": [labels | notes] if fires else []}
        for time, fires in expected.items()
    ]
    test = {"interval": "1s", "input_series": [{"series": f'{series}{{run="demo"}}', "values": values}]}
    case = {"rule_files": ["rules.yml"], "evaluation_interval": "1s", "tests": [test | {"alert_rule_test": checks}]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(case))
    done = subprocess.run(["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


CALM = {"nonfinite": 0.0, "update_skipped": 0.0, "recovery_rung": 1.0, "loss": 2.0, "grad_norm": 1.0}
CALM |= {"attention_entropy_median": 0.5, "precision_at_k": 0.9, "data_wait_seconds": 0.0, "violations": 0.0}
CALM |= {"tokens_per_second": 100.0, "rank_divergence": 0.0, "shards_corrupt": 0.0, "up": 1.0, "router_entropy": 0.6}
NEAR, FAULT, END = 100, 200, 330  # seconds at which it comes near the threshold for 40 s, goes beyond it, and is over


def near(alert: Alert) -> float:
    """A value close to the threshold, on its calm side."""
    limit, calm = float(alert.threshold), CALM[alert.series]
    if alert.comparison == "robust_z_above":
        return calm + 0.9 * limit * 0.01 * calm  # a flat window counts as 1% wide
    if alert.comparison.startswith("times_median"):
        return calm * limit * (1.1 if alert.falls else 0.9)
    return limit


def story(alert: Alert) -> tuple[str, str, int]:
    """A series as promtool writes it, its values from second 0 to END, and the second at which it goes beyond."""
    if alert.comparison == "older_than":  # a time that stands still from FAULT on
        return f"train_{alert.series}", f"0+1x{FAULT} {FAULT}+0x{END}", FAULT + int(alert.threshold) + 1
    if alert.comparison == "fills_within":  # at first too slowly to matter
        most = 1e12
        return f"train_{alert.series}", f"{most}-{1e6}x{FAULT} {most / 2}-{1e9}x{END - FAULT}", FAULT + 1
    fault, calm = alert.drill.fault, CALM[alert.series]
    found = re.search(rf"train_(max_|min_)?{alert.series}|up", rules.expression(alert, 1.0))
    assert found
    parts = [(calm, NEAR), (near(alert), 40), (calm, FAULT - NEAR - 40), (fault, END - FAULT)]
    values = " ".join(f"{value}x{seconds - 1}" for value, seconds in parts)
    return found[0], values, FAULT


def complaint(tmp_path: Path, alert: Alert, rule: dict) -> str:
    """Empty when the rule is silent while all is calm or near the threshold and until its hold is over, then fires."""
    if alert.comparison == "always":
        return promtool(tmp_path, rule, "train_loss", "1x9", {"0s": True, "9s": True}, everyone=True)
    series, values, beyond = story(alert)
    held = beyond + alert.drill.hold - 1
    times = {f"{second}s": False for second in (NEAR - 1, NEAR + 30, FAULT - 1)} | {f"{held + 3}s": True}
    times |= {f"{held - 1}s": False} if alert.drill.hold > 1 else {}
    return promtool(tmp_path, rule, series, values, times)


DRILLED = [alert.drilled() for alert in ALERTS]
EACH = pytest.mark.parametrize("alert", DRILLED, ids=lambda alert: alert.name)


def ruled(alert: Alert) -> dict:
    return yaml.safe_load(rules.render([alert], 1.0, 1.0))["groups"][0]["rules"][0]


@needs_promtool
@EACH
def test_each_rule_fires_on_its_fault_and_only_then(tmp_path: Path, alert: Alert) -> None:
    assert not complaint(tmp_path, alert, ruled(alert))


def mutants(alert: Alert) -> dict[str, dict]:
    """The rule with a weaker and a harder threshold, without its hold, and with its comparison turned round."""
    rule, limit = ruled(alert), float(alert.threshold)
    if alert.comparison == "always":
        return {"never": rule | {"expr": "vector(1) > 1"}}
    step = 0.2 * limit if alert.comparison.startswith(("times", "robust")) else 0.05 * abs(limit) + 1e-7
    sign = -1 if alert.falls or alert.comparison == "fills_within" else 1
    weak, hard = limit - sign * step, limit + sign * (abs(alert.drill.fault) + 1e6 if sign > 0 else limit)
    if alert.comparison == "older_than":
        weak, hard = -1.0, 1e6
    if alert.comparison == "fills_within":
        weak, hard = 1e9, 1.0
    made = {
        "weaker": ruled(alert.model_copy(update={"threshold": weak})),
        "harder": ruled(alert.model_copy(update={"threshold": hard})),
        "turned": rule | {"expr": rule["expr"].translate(str.maketrans("<>", "><"))},
    }
    return made | ({"without hold": rule | {"for": "0s"}} if alert.drill.hold > 1 else {})


@needs_promtool
@EACH
def test_a_rule_that_was_tampered_with_does_not_pass(tmp_path: Path, alert: Alert) -> None:
    passed = [name for name, rule in mutants(alert).items() if not complaint(tmp_path, alert, rule)]
    assert not passed, f"{alert.name} passes although its rule is {passed}"


@EACH
def test_the_guard_says_the_same_of_the_same_series(alert: Alert) -> None:
    """The test above holds Prometheus to the same story: silent near the threshold, firing when the hold is over."""
    if alert.seen == "outside":
        assert alert.name not in {inside.name for inside in Guard(ALERTS).alerts}
        return
    watch, calm = Guard([alert]), CALM[alert.series]
    told = [(calm, 100), (near(alert), 40), (calm, 60), (alert.drill.fault, 130)]
    rows = [{alert.series: value} for value, count in told for _ in range(count)]
    assert [second for second, row in enumerate(rows) if watch.observe(row)] == [FAULT + alert.drill.hold - 1]


def graceful(tmp_path: Path, rule: dict, alert: Alert) -> str:
    """Empty when a series that never met its limit is let pass for its grace, and no longer."""
    assert alert.grace
    series, values = f"train_{alert.series}", f"{alert.drill.fault}x{END}"
    return promtool(tmp_path, rule, series, values, {f"{alert.grace - 1}s": False, f"{alert.grace + 1}s": True})


@needs_promtool
def test_what_is_violated_from_the_start_fires_when_its_grace_is_over(tmp_path: Path) -> None:
    (alert,) = (alert for alert in DRILLED if alert.comparison == "returns_above")
    assert not graceful(tmp_path, ruled(alert), alert)
    rule, changed = ruled(alert), {"shorter": alert.grace - 4, "longer": alert.grace + 4}
    made = {name: ruled(alert.model_copy(update={"grace": grace})) for name, grace in changed.items()}
    made["none"] = rule | {"expr": re.sub(r" or .* offset .*\)", ")", rule["expr"])}
    assert rule["expr"] != made["none"]["expr"]
    assert not [name for name, each in made.items() if not graceful(tmp_path, each, alert)], "a mutant passes"
    rows = [{alert.series: alert.drill.fault}] * (alert.grace + 1)
    watch = Guard([alert])
    assert [at for at, row in enumerate(rows) if watch.observe(row)] == [alert.grace], "the guard says the same"


def test_each_severity_goes_to_a_receiver_of_its_own() -> None:
    hooks = {name: f"http://127.0.0.1:9/{name}" for name in rules.RECEIVERS.values()}
    config = yaml.safe_load(rules.routes(hooks))
    noted, *rest = config["route"]["routes"]
    assert noted["receiver"] == "logbook" and noted["continue"] and 'seen="outside"' in noted["matchers"]
    assert {route["receiver"]: route["matchers"] for route in rest} == {
        name: [f'severity="{severity}"'] for severity, name in rules.RECEIVERS.items()
    }
    assert {alert.severity for alert in ALERTS} == rules.RECEIVERS.keys()
    assert config["route"]["receiver"] == "page" and config["receivers"][-1]["name"] == "logbook"
    with pytest.raises(ValueError, match="no webhook for deadman, page"):
        rules.routes({"ticket": "http://127.0.0.1:9"})


@pytest.mark.skipif(not shutil.which("amtool"), reason="amtool is not installed (prometheus-alertmanager)")
def test_amtool_accepts_the_routes(tmp_path: Path) -> None:
    hooks = {name: f"http://127.0.0.1:9/{name}" for name in rules.RECEIVERS.values()}
    (tmp_path / "alertmanager.yml").write_text(rules.routes(hooks))
    done = subprocess.run(["amtool", "check-config", tmp_path / "alertmanager.yml"], capture_output=True, text=True)
    assert done.returncode == 0 and "4 receivers" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("amtool"), reason="amtool is not installed (prometheus-alertmanager)")
def test_what_no_guard_sees_is_noted_down_and_somebody_is_called_all_the_same(tmp_path: Path) -> None:
    hooks = {name: f"http://127.0.0.1:9/{name}" for name in rules.RECEIVERS.values()}
    (tmp_path / "alertmanager.yml").write_text(rules.routes(hooks))
    for rule in yaml.safe_load(rules.render(ALERTS, 0.5, 60.0))["groups"][0]["rules"]:
        labels = [f"{name}={value}" for name, value in rule["labels"].items()]
        command = ["amtool", "config", "routes", "test", f"--config.file={tmp_path}/alertmanager.yml", *labels]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        noted = rule["labels"]["seen"] == "outside" and rule["alert"] != "Watchdog"
        receiver = rules.RECEIVERS[rule["labels"]["severity"]]
        assert [*told[0].split(",")] == ["logbook", receiver][not noted :], rule["alert"]
