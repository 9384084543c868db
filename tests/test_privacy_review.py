"""A detector that the scrubber does not know, what it may excuse, and a decision that counts for one review alone."""

import socket
import subprocess
from pathlib import Path

import pytest
from governed_run import TEXT, home, run_in
from typer.testing import CliRunner

from stackpkg import params, runs
from stackpkg.cli import app
from stackpkg.governance import privacy

REAL = params.validate({"run": "demo"})


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runs, "root", lambda: tmp_path)
    return home(tmp_path)


@pytest.fixture(scope="module")
def find() -> object:
    return privacy.detector()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("write to jane.roe@contoso.com", ["EMAIL_ADDRESS"]),
        ("write to user@example.com, a@b.invalid or git@github.com", []),
        ("call (718) 575-1816", ["PHONE_NUMBER"]),
        ("free=15482871808, total 2147483647", []),
        ("ask 8.8.8.8 or 2606:4700:4700::1111", ["IP_ADDRESS"] * 2),
        ("at 127.0.0.1, 10.1.2.3, fe80::1 or a[::2]", []),
        ("IBAN DE89 3704 0044 0532 0130 00", ["IBAN_CODE"]),
        ("card 4111 1111 1111 1111 and 4111 1111 1111 1112", ["CREDIT_CARD"]),
        ("nothing of anybody", []),
    ],
)
def test_what_may_be_somebodys_is_left(find, text: str, left: list[str]) -> None:
    assert [each.kind for each in find(text) if not each.excuse] == left


def test_no_name_is_asked_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a network call")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert privacy.detector()("mail jane.roe@contoso.co.uk")


def test_a_shape_tells_no_character() -> None:
    assert privacy.shape("Jane.Röe+1@x9.de") == "aaaa.aaa+0@a0.aa"


def test_the_review_counts_before_and_after_and_shows_no_text(place: Path) -> None:
    folder, p = run_in(place, third="jsonl:a.jsonl#id=3")
    told = privacy.review(folder, p)
    assert (told["records"], told["compared"]) == (3, 3)
    assert told["before"]["EMAIL_ADDRESS"] == {"found": 2, "left": 1}
    assert told["after"]["EMAIL_ADDRESS"] == {"found": 1, "left": 0}, "the scrubber masked one; the other is reserved"
    assert told["after"]["PHONE_NUMBER"] == {"found": 1, "left": 1} and told["left"] == 2
    assert told["per_million"] == 1e6 * 2 / told["characters"] and told["masked_by_scrubber"] == {"personal_email": 1}
    written = (folder / "governance/privacy_review.json").read_text()
    assert not any(word in written for word in ("jane", "718", "contoso", "8.8.8.8")) and '"(000) 000-0000"' in written
    first = runs.digest(folder / "governance/privacy_review.json")
    privacy.review(folder, p)
    assert runs.digest(folder / "governance/privacy_review.json") == first, "a decision is bound to it"


def test_a_source_that_changed_since_is_not_compared(place: Path) -> None:
    folder, p = run_in(place, third="jsonl:a.jsonl#id=3")
    text = (place / "a.jsonl").read_text().replace(TEXT[2], "another text")
    runs.write_text(place / "a.jsonl", text)
    assert privacy.review(folder, p)["compared"] == 2


def test_a_large_corpus_is_looked_at_in_part(place: Path) -> None:
    folder, p = run_in(place)
    some = p.model_copy(update={"governance": p.governance.model_copy(update={"scan_mb": 1e-5})})
    assert privacy.review(folder, some)["records"] < 3


# --- the decision


def key_of(place: Path, name: str, namespaces: str = privacy.NAMESPACE) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place / name)], check=True)
    line = f'{name}@example.org namespaces="{namespaces}" {(place / f"{name}.pub").read_text()}'
    with (place / "governance/allowed_signers").open("a") as signers:
        signers.write(line)
    return place / name


@pytest.fixture
def reviewed(place: Path) -> runs.RunFolder:
    folder, _ = run_in(place)
    runs.write_json(folder / "governance/privacy_review.json", {"left": 2})
    return folder


def test_a_signed_decision_counts_and_a_demonstration_never_replaces_it(place: Path, reviewed: runs.RunFolder) -> None:
    assert privacy.decided(reviewed, REAL) == (None, "nobody decided yet: stackpkg privacy")
    words = ["privacy", str(reviewed.path), "--reviewer", "ann@example.org", "--key", str(key_of(place, "ann"))]
    done = CliRunner().invoke(app, [*words, "--reason", "only versions", "--decision", "approve"])
    assert done.exit_code == 0, done.output
    said, why = privacy.decided(reviewed, REAL)
    assert (
        said and not why and (said.decision, said.reviewer, said.demonstration) == ("approve", "ann@example.org", False)
    )
    shown = REAL.model_copy(
        update={"governance": params.validate({"governance": {"demonstration_keys": True}}).governance}
    )
    assert privacy.decided(reviewed, shown) == (said, "")


def test_a_decision_is_void_when_the_review_changes(place: Path, reviewed: runs.RunFolder) -> None:
    privacy.decide(reviewed.path, "ann@example.org", key_of(place, "ann"), "approve", [], "fine")
    runs.write_json(reviewed / "governance/privacy_review.json", {"left": 3})
    assert "another review" in privacy.decided(reviewed, REAL)[1]


@pytest.mark.parametrize("change", ["text", "stranger", "namespace", "unsigned"])
def test_a_decision_that_nobody_listed_signed_does_not_count(
    place: Path, reviewed: runs.RunFolder, change: str
) -> None:
    own = key_of(place, "ann", "stackpkg-readiness-safety" if change == "namespace" else privacy.NAMESPACE)
    if change == "stranger":
        own = key_of(place, "bob")
    path = privacy.decide(reviewed.path, "ann@example.org", own, "approve", [], "fine")
    if change == "text":
        runs.write_text(path, path.read_text().replace("fine", "fair"))
    if change == "unsigned":
        Path(f"{path}.sig").unlink()
    assert "no signature of ann@example.org" in privacy.decided(reviewed, REAL)[1]


def test_a_rejection_says_why_and_no_demonstration_overrules_it(place: Path, reviewed: runs.RunFolder) -> None:
    privacy.decide(reviewed.path, "ann@example.org", key_of(place, "ann"), "reject", [], "health data")
    shown = params.validate({"governance": {"demonstration_keys": True}})
    for p in (REAL, shown):
        assert privacy.decided(reviewed, p)[1] == "rejected: health data"


def test_a_demonstration_says_so_and_counts_for_no_real_profile(reviewed: runs.RunFolder) -> None:
    shown = params.validate({"governance": {"demonstration_keys": True}})
    said, why = privacy.decided(reviewed, shown)
    assert said and not why and said.demonstration and said.reason == privacy.LOUD and said.conditions
    assert privacy.decided(reviewed, shown) == (said, ""), "and is made once for a review"
    assert "a demonstration decides nothing" in privacy.decided(reviewed, REAL)[1]


@pytest.mark.parametrize(
    ("decision", "conditions", "reason"),
    [("perhaps", [], "r"), ("approve", ["c"], "r"), ("approve-with-conditions", [], "r"), ("approve", [], " ")],
)
def test_a_decision_that_does_not_fit_is_refused(
    place: Path, reviewed: runs.RunFolder, decision: str, conditions: list[str], reason: str
) -> None:
    with pytest.raises(ValueError, match="give a reason and one of approve"):
        privacy.decide(reviewed.path, "ann@example.org", place / "none", decision, conditions, reason)
    with pytest.raises(ValueError, match="could not sign"):
        privacy.decide(reviewed.path, "ann@example.org", place / "none", "approve", [], "r")
    assert not (reviewed.path / "governance/privacy_decision.json").exists(), "nothing half written"
    (reviewed / "governance/privacy_review.json").unlink()
    with pytest.raises(ValueError, match="run notebook 60 first"):
        privacy.decide(reviewed.path, "ann@example.org", place / "none", "approve", [], "r")
