"""Every alert has its page and every page its alert, in one form; tests/test_runbook_commands.py runs the commands."""

import re
import subprocess
from pathlib import Path

import pytest

from stackpkg import params
from stackpkg.cli import app
from stackpkg.telemetry.guard import load

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "book/runbooks").glob("*.md"))}
PROCEDURES = {
    "FailureRecovery", "FailureRecoveryProcess", "FailureRecoveryNode", "FailureRecoveryJob", "CorruptedShardRollback",
    "SpikeRollback", "KillSwitch", "HangDiagnosis", "SlowRank", "ResumeSelfTest", "KeyLoss", "DataWithdrawal",
    "ArchiveRestore",
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
    assert "```sh" in text and "When unsure:" in text
    assert "drill" not in text.lower().replace("51_drill_alerts", ""), (
        "the last drill is told by its receipt, in the book"
    )


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_a_page_states_its_series_and_severity(alert) -> None:
    signal = PAGES[alert.name].partition("## Meaning")[0]
    assert f"`{alert.series}`" in signal and alert.severity in signal


@pytest.mark.parametrize("name", PAGES)
def test_a_page_asks_to_fill_in_an_entry_only_where_its_alert_leaves_one(name: str) -> None:
    record = PAGES[name].partition("## Record")[2]
    leaves = name not in PROCEDURES | {"Watchdog"}
    assert ("Fill in the entry that the alert left in `outbox/<run>/logbook.md`" in record) == leaves
    assert leaves or "Add an entry to `outbox/<run>/logbook.md`" in record


@pytest.mark.parametrize("name", PAGES)
def test_commands_parameters_and_files_exist(name: str) -> None:
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", PAGES[name], flags=re.DOTALL))
    for command in {*re.findall(r"^stackpkg (\w+)", shell, flags=re.MULTILINE)} - {"archive", "restore"}:
        assert command in commands
    for section, key in re.findall(r"`(\w+)\.(\w+)`", PAGES[name]):
        field = params.Params.model_fields.get(section)
        assert field is None or key in field.annotation.model_fields, f"{section}.{key} is no parameter"
    for notebook in re.findall(r"`(\d\d_\w+)`", PAGES[name]):
        assert (ROOT / f"notebooks/{notebook}.ipynb").exists(), notebook
    for block in re.findall(r"python - <<'PY'\n(.*?)\nPY", shell, flags=re.DOTALL):
        compile(block, name, "exec")
    assert not subprocess.run(["sh", "-n"], input=shell, text=True, capture_output=True, check=False).stderr


def test_no_page_moves_or_removes_files_by_hand() -> None:
    """What a rollback sets aside is renamed by `stackpkg rollback`; the one file that is removed by hand lets a killed
    job go on."""
    for name, text in PAGES.items():
        shell = "\n".join(re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL))
        shell = shell.replace("rm outbox/$RUN/checkpoints/train/kill\n", "")
        assert not re.search(r"^\s*(rm|mv)\b", shell, flags=re.MULTILINE), name
        for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL):
            assert "RUN" not in block or re.match(r"export RUN=dry_run\b", block), f"{name}: which run? {block}"
