"""The doctor tells what is missing, why it matters and how to mend it, and fails only where a run could not go."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stackpkg import doctor, runs
from stackpkg.cli import app


def test_a_missing_program_is_named_with_its_use_and_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.shutil.which
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None if name in ("ssh-keygen", "promtool") else real(name))
    found = {finding.name: finding for finding in doctor.examine()}
    assert found["ssh-keygen"].needed and "openssh" in found["ssh-keygen"].mend
    assert not found["promtool"].needed and "alert rules" in found["promtool"].found and found["promtool"].mend
    assert not found["git"].mend
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1 and "install openssh-client" in done.output


def test_a_package_at_another_version_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "requirements.lock.txt").write_text("# lock\nnumpy==0.1\nno-such-package==1.0\n")
    monkeypatch.setattr(runs, "root", lambda: tmp_path)
    differing = doctor.locked()
    assert differing["numpy"][0] == "0.1" and differing["no-such-package"] == ("1.0", "missing")
    said = {finding.name: finding for finding in doctor.examine()}["packages"]
    assert said.mend == "make env" and "no-such-package missing instead of 1.0" in said.found


def test_a_full_disk_is_told_in_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = doctor.shutil.disk_usage(".")._replace(free=2 * 2**30)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    disk = next(finding for finding in doctor.examine() if finding.name == "disk")
    assert disk.found == "2.0 GiB free" and "free 3.0 GiB" in disk.mend


def test_what_scripts_read_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "locked", dict)
    done = CliRunner().invoke(app, ["doctor", "--json"])
    told = json.loads(done.output)
    assert [row["name"] for row in told] == [finding.name for finding in doctor.examine()]
    assert done.exit_code == int(any(row["needed"] and row["mend"] for row in told))
