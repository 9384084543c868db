"""Every alert has its page and every page its alert; the commands on the pages exist, and the read-only ones run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stackpkg import params, runs
from stackpkg.cli import app
from stackpkg.telemetry.guard import load
from stackpkg.telemetry.rows import RowWriter

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "book/runbooks").glob("*.md"))}
PROCEDURES = {
    "FailureRecovery", "CorruptedShardRollback", "SpikeRollback", "KillSwitch", "HangDiagnosis", "SlowRank",
    "ResumeSelfTest", "KeyLoss", "DataWithdrawal",
}  # fmt: skip
HEADINGS = ["Signal", "Meaning", "Impact", "First five minutes", "Decide", "Act and roll back", "Verify", "Record"]
ALERTS = load(params.validate({}))


def test_every_alert_has_a_page_and_every_page_an_alert() -> None:
    assert {alert.name for alert in ALERTS} | PROCEDURES == set(PAGES)
    assert len({alert.name for alert in ALERTS}) == len(ALERTS)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_its_eight_sections_all_filled(name: str) -> None:
    text = PAGES[name]
    assert text.startswith(f"# {name}\n")
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    assert parts[1::2] == HEADINGS
    assert all(len(body.split()) >= 8 for body in parts[2::2]), "a section is empty"
    assert "```sh" in text and "When unsure:" in text and "Last drill" in text


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_a_page_states_its_series_and_severity(alert) -> None:
    signal = PAGES[alert.name].partition("## Meaning")[0]
    assert f"`{alert.series}`" in signal and alert.severity in signal


@pytest.mark.parametrize("name", PAGES)
def test_commands_parameters_and_files_exist(name: str) -> None:
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", PAGES[name], flags=re.DOTALL))
    for command in re.findall(r"^(?:.*&& )?stackpkg (\w+)", shell, flags=re.MULTILINE):
        assert command in commands
    for section, key in re.findall(r"`(\w+)\.(\w+)`", PAGES[name]):
        field = params.Params.model_fields.get(section)
        assert field is None or key in field.annotation.model_fields, f"{section}.{key} is no parameter"
    for notebook in re.findall(r"`(\d\d_\w+)`", PAGES[name]):
        assert (ROOT / f"notebooks/{notebook}.ipynb").exists(), notebook
    for block in re.findall(r"python - <<'PY'\n(.*?)\nPY", shell, flags=re.DOTALL):
        compile(block, name, "exec")
    assert not subprocess.run(["sh", "-n"], input=shell, text=True, capture_output=True, check=False).stderr


@pytest.fixture(scope="module")
def made_up_run() -> Path:
    """A run with telemetry and reports enough to look at."""
    folder = runs.RunFolder("test-runbooks")
    writer = RowWriter(folder.path / "telemetry/train", folder.name, attempt=1, rank=0, ranks=1)
    names = "loss grad_norm learning_rate activation_outlier_rate loss_contrastive loss_load_balance loss_gate_entropy "
    names += "router_entropy router_entropy_min router_usage_max masked_edge_share "
    names += "attention_entropy_mean attention_entropy_std "
    names += (
        "attention_entropy_median data_wait_seconds step_seconds tokens_per_second memory_mb nonfinite update_skipped "
    )
    for step in range(1, 21):
        writer.write(step, context=128, cursor=8 * step, **dict.fromkeys(names.split(), 0.5))
    writer.flush()
    numbers = dict.fromkeys(("precision_at_k", "recall_at_k", "mrr", "validation_loss", "long_range_accuracy"), 0.5)
    runs.write_json(folder / "eval/train/epoch_001.json", numbers | {"router": [{"entropy": 0.5}]})
    yield folder.path
    shutil.rmtree(folder.path)


NEEDS_DATA = ("Ledger(", "Stream(", "manifest.verify", "pairs.parquet")  # drilled by the notebooks, which have a corpus


@pytest.mark.parametrize("name", PAGES)
def test_the_first_five_minutes_run(name: str, made_up_run: Path) -> None:
    section = PAGES[name].partition("## First five minutes")[2].partition("## Decide")[0]
    blocks = re.findall(r"python - <<'PY'\n(.*?)\nPY", section, flags=re.DOTALL)
    for block in blocks:
        if not any(word in block for word in NEEDS_DATA):
            environment = {"PATH": "/usr/bin:/bin", "RUN": made_up_run.name, "PYTHONPATH": str(ROOT), "STEP": "3"}
            done = subprocess.run([sys.executable, "-"], input=block, text=True, capture_output=True, env=environment)
            assert done.returncode == 0, f"{name}:\n{block}\n{done.stderr[-800:]}"


def test_no_page_moves_or_removes_files_by_hand() -> None:
    """What a rollback sets aside is renamed by `stackpkg rollback`, which tests/test_incidents.py tries."""
    for name, text in PAGES.items():
        shell = "\n".join(re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL))
        assert not re.search(r"^\s*(rm|mv)\b", shell, flags=re.MULTILINE), name


@pytest.fixture(scope="module")
def typed() -> dict[str, str]:
    """What was run already: many pages begin alike."""
    return {}


@pytest.mark.parametrize("name", PAGES)
def test_commands_that_only_look_run(name: str, made_up_run: Path, typed: dict[str, str]) -> None:
    """Each line of the first five minutes that shows a job or its rows, on the made-up run."""
    runs.write_json(made_up_run / "checkpoints/train/job.json", {})
    runs.write_text(made_up_run / "checkpoints/train/log.txt", "a line\n")
    section = PAGES[name].partition("## First five minutes")[2].partition("## Decide")[0]
    for line in re.findall(r"^stackpkg (?:job|rows|status) .*$", section, flags=re.MULTILINE):
        if line not in typed:
            environment = os.environ | {"RUN": made_up_run.name, "PYTHONPATH": str(ROOT)}
            command = line.replace("stackpkg", f"{sys.executable} -c 'from stackpkg.cli import app; app()'", 1)
            done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environment, cwd=ROOT)
            typed[line] = done.stderr[-500:] if done.returncode else ""
        assert not typed[line], f"{line}: {typed[line]}"
