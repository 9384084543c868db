"""Conditions follow from seal to seal until they are met; what a checklist line says once signatures are there."""

import shutil
from pathlib import Path

import pytest
import yaml
from attacks import EVIDENCE, ROOT, make, sign_all

from stackpkg import params, runs
from stackpkg.governance import checklist, seal, standing, statements, terms

pytestmark = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="ssh-keygen is not installed")
CHECK = {"evidence": "40_evaluate", "value": "precision_at_k", "op": ">=", "limit": 0.75}
SAID = {
    "conditions": [
        {"id": "C1", "text": "reach the target", "due": "2099-01-31", "check": CHECK},
        {"id": "C2", "text": "look at samples", "due": "2099-02-28"},
    ]
}
REVIEWER = "safety@demonstration.invalid"


@pytest.fixture
def outbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runs, "root", lambda: tmp_path)
    runs.write_text(tmp_path / "params/checklist.yaml", (ROOT / "params/checklist.yaml").read_text())
    return tmp_path / "outbox"


def asked(folder: Path, role: str = "safety", **said: object) -> None:
    keys, given = seal.demonstration_keys(folder), terms.Terms(**(said or SAID))
    decision = "approve-with-conditions" if given.conditions else "approve"
    seal.sign(folder, role, keys / role, f"{role}@demonstration.invalid", decision, given)


def listed(folder: Path) -> dict[str, dict[str, object]]:
    return {each["id"]: each for each in runs.read_json(folder / terms.CONDITIONS)}


def test_the_next_run_says_which_conditions_are_met_and_which_are_open(outbox: Path) -> None:
    first = make(outbox, "first")
    assert listed(first) == {}
    asked(first)
    assert seal.verify(first, seal.trust_for(first)[0]) == [], "conditions that are not due yet"
    second = make(outbox, "second", text="0.5")
    assert {name: each["open_until"] for name, each in listed(second).items()} == {
        "C1": "2099-01-31",
        "C2": "2099-02-28",
    }
    assert {each["run"] for each in listed(second).values()} == {"first"}
    third = make(outbox, "third", text="0.8")
    assert listed(third)["C1"]["met"] == "40_evaluate: precision_at_k is 0.8" and "met" not in listed(third)["C2"]


def test_a_seal_of_the_same_run_carries_what_its_own_sign_off_asked_for(outbox: Path) -> None:
    folder = make(outbox)
    asked(folder)
    for text, state in (("0.5", "open_until"), ("0.9", "met")):  # the sign-off that asked is gone after the first
        runs.write_text(folder / EVIDENCE, f'{{"precision_at_k": {text}}}\n')
        sign_all(folder)
        assert state in listed(folder)["C1"], text
    assert set(listed(folder)) == {"C1", "C2"}


def test_a_condition_without_a_check_is_met_by_a_note_of_the_role_that_asked(outbox: Path) -> None:
    first = make(outbox, "first")
    asked(first)
    second = make(outbox, "second")
    keys = seal.demonstration_keys(first)
    with pytest.raises(ValueError, match="safety asked for no condition 'C9'; it asked for: C1, C2"):
        terms.meet(second, "C9", "safety", keys / "safety", REVIEWER, "seen")
    shutil.copytree(keys, seal.demonstration_keys(second), dirs_exist_ok=True)
    note = terms.meet(second, "C2", "safety", keys / "architecture", REVIEWER, "seen")
    sign_all(second)
    assert "met" not in listed(second)["C2"], "signed with the key of another role"
    terms.meet(second, "C2", "safety", keys / "safety", REVIEWER, "seen")
    sign_all(second)
    assert listed(second)["C2"]["met"] == f"note of {REVIEWER}: seen"
    note.write_text(note.read_text().replace("seen", "not seen"))
    sign_all(second)
    assert "met" not in listed(second)["C2"], "the note was edited"


def test_nobody_signs_over_a_list_that_is_not_true(outbox: Path) -> None:
    asked(make(outbox, "first"))
    second = make(outbox, "second")
    path = second / terms.CONDITIONS
    path.write_text(path.read_text().replace('"open_until": "2099-02-28"', '"met": "so they say"'))
    seal.seal(second)
    with pytest.raises(ValueError, match=r"approval/conditions\.json: C2 is not as it says"):
        asked(second, waivers=[])


def test_conditions_of_a_demonstration_bind_no_real_run(outbox: Path) -> None:
    asked(make(outbox, "first"))
    second = make(outbox, "second")
    terms.write(second, statements.Trust.read(seal.demonstration_keys(second)), False)
    assert listed(second) == {}


# --- the checklist, judged over the sign-offs


@pytest.fixture
def judged(outbox: Path) -> runs.RunFolder:
    """A run whose list has E1, waiting for sign-offs, and V3, amber; sealed and signed."""
    folder = runs.RunFolder("demo")
    items = [
        item for item in yaml.safe_load((ROOT / "params/checklist.yaml").read_text()) if item["id"] in ("E1", "V3")
    ]
    for item in items:
        item |= {"files": [], "checks": [CHECK | {"limit": 0.2}], "pending": "short run" if item["id"] == "V3" else ""}
    runs.write_text(runs.root() / "params/checklist.yaml", yaml.safe_dump(items))
    runs.write_text(folder / EVIDENCE, '{"precision_at_k": 0.25}\n')
    checklist.write(folder, checklist.evaluate(folder, params.validate({"run": "demo"})))
    sign_all(folder.path)
    return folder


def state(folder: runs.RunFolder) -> dict[str, tuple[str, str]]:
    return {item["id"]: (item["status"], "; ".join(item["reasons"])) for item in standing.live(folder.path)[0]}


def test_the_approval_is_green_over_signatures_and_amber_in_the_sealed_list(judged: runs.RunFolder) -> None:
    sealed = {item["id"]: (item["status"], item["reasons"]) for item in checklist.read(judged.path)}
    assert sealed["E1"] == ("amber", [checklist.UNSIGNED])
    assert state(judged)["E1"] == ("green", seal.LOUD) and state(judged)["V3"] == ("amber", "short run")
    assert {item["id"]: item["status"] for item in checklist.read(judged.path)} == {"E1": "amber", "V3": "amber"}


def test_the_approval_falls_with_a_missing_or_rejecting_role_and_with_any_change(judged: runs.RunFolder) -> None:
    path = judged.path / "signoffs/safety.json"
    kept = path.read_bytes()
    path.unlink()
    assert state(judged)["E1"][0] == "amber" and "0 of 1 approvals by safety" in state(judged)["E1"][1]
    path.write_bytes(kept)
    assert state(judged)["E1"][0] == "green"
    seal.sign(judged.path, "safety", seal.demonstration_keys(judged.path) / "safety", REVIEWER, "reject")
    assert state(judged)["E1"][0] == "red" and f"{REVIEWER} decided: reject" in state(judged)["E1"][1]
    runs.write_text(judged / EVIDENCE, "{}")
    assert "changed since the seal" in state(judged)["E1"][1]


def test_a_failed_check_stays_red_whoever_signs(judged: runs.RunFolder) -> None:
    runs.write_text(judged / EVIDENCE, '{"precision_at_k": 0.1}\n')
    checklist.write(judged, checklist.evaluate(judged, params.validate({"run": "demo"})))
    sign_all(judged.path)
    assert state(judged)["E1"][0] == "red" and "must be >= 0.2" in state(judged)["E1"][1]


def test_a_waiver_shows_with_reason_signer_and_day(judged: runs.RunFolder) -> None:
    asked(judged.path, waivers=[{"item": "V3", "reason": "known", "expires": "2099-01-31"}])
    assert state(judged)["V3"] == ("waived", f"known: {REVIEWER}, until 2099-01-31; short run")
    (judged.path / "signoffs/safety.json.sig").write_text("")
    assert state(judged)["V3"] == ("amber", "short run")
