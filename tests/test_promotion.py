"""What is promoted has passed its gate, and the registry tells the story."""

import dataclasses
import math
import shutil
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackpkg.model.configuration import StackConfig
from stackpkg.runs import digest, read_json, write_json, write_text
from stackpkg.training import origin, promotion, versions
from stackpkg.training.snapshots import PROMOTED, promoted, touched


@pytest.mark.parametrize(
    ("comparison", "good", "bad"),
    [(">", 1.1, 1.0), (">=", 1.0, 0.9), ("<", 0.9, 1.0), ("<=", 1.0, 1.1), ("==", 1.0, 1.1)],
)
def test_the_gate_lets_only_measured_numbers_pass(comparison: str, good: float, bad: float) -> None:
    limits = {"loss": (comparison, 1.0)}
    assert promotion.gate({"loss": good}, limits) == []
    assert promotion.gate({"loss": bad}, limits) == [f"loss is {bad:g}, must be {comparison} 1"]
    for value in (math.inf, -math.inf, "-Infinity"):
        assert promotion.gate({"loss": value}, limits) == [f"loss is {float(value):g}, must be {comparison} 1"]
    # "NaN" is how a NaN stands in strict JSON, None what was not measured
    for value in (math.nan, "NaN", None):
        assert promotion.gate({"loss": value}, limits) == [f"loss is nan, must be {comparison} 1"]
    assert promotion.gate({"other": good}, limits) == [f"loss is nan, must be {comparison} 1"]


def test_the_gate_names_every_limit_that_was_missed() -> None:
    limits = {"loss": ("<", 2.0), "precision": (">=", 0.5), "entropy": (">=", 0.2)}
    assert promotion.gate({"loss": math.inf, "precision": 0.7}, limits) == [
        "loss is inf, must be < 2",
        "entropy is nan, must be >= 0.2",
    ]


@pytest.fixture
def candidate(tmp_path: Path) -> Path:
    folder = tmp_path / "final"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    (folder / "config.json").write_text("{}")
    return folder


def test_promotions_refusals_and_demotions_are_entered(tmp_path: Path, candidate: Path) -> None:
    artifacts = tmp_path / "artifacts"
    assert not promotion.promote(artifacts, candidate, "v0", {}, ["loss is 9, must be < 2"])
    assert not (artifacts / "v0").exists() and read_json(artifacts / "registry.json")["current"] is None

    sha = {}
    for version in ("v1", "v2", "v3"):
        write_json(candidate / "config.json", {"hidden_size": 32, "_name_or_path": version})
        assert promotion.promote(artifacts, candidate, version, {"loss": 1.0}, [])
        sha[version] = digest(candidate)
        assert digest(artifacts / version) == sha[version]
    assert not promotion.promote(artifacts, candidate, "v4", {}, ["no"])
    assert read_json(artifacts / "registry.json")["current"] == "v3"  # a refusal leaves the current one alone

    assert promotion.demote(artifacts, "loss rose in service") == "v2"
    assert promotion.demote(artifacts, "so does this one") == "v1"
    assert promotion.demote(artifacts, "and this one") is None
    with pytest.raises(ValueError, match="no version is in use; promoted so far: v1, v2, v3"):
        promotion.demote(artifacts, "and what else")
    registry = read_json(artifacts / "registry.json")
    assert registry["current"] is None and (artifacts / "v3").exists()
    told = [(entry["event"], entry["version"]) for entry in registry["history"]]
    assert told == [
        ("refused", "v0"), ("promoted", "v1"), ("promoted", "v2"), ("promoted", "v3"), ("refused", "v4"),
        ("demoted", "v3"), ("demoted", "v2"), ("demoted", "v1"),
    ]  # fmt: skip
    assert registry["history"][0]["missed"] == ["loss is 9, must be < 2"]
    assert [entry.get("sha256") for entry in registry["history"][1:4]] == list(sha.values())
    assert registry["history"][5]["reason"] == "loss rose in service"


def test_what_was_rolled_back_from_does_not_come_back_by_a_demotion(tmp_path: Path, candidate: Path) -> None:
    artifacts = tmp_path / "artifacts"
    for version in ("v1", "v2", "v3"):
        promotion.promote(artifacts, candidate, version, {}, [])
    promotion.roll_back(artifacts, "v2", "v3 says what it may not")
    assert promotion.demote(artifacts, "v2 is slow") == "v1"
    promotion.roll_back(artifacts, "v2", "no, it was the network")
    assert promotion.registry(artifacts)["current"] == "v2" and promotion.demote(artifacts, "it was v2") == "v1"
    assert promotion.demote(artifacts, "and v1") is None


def test_a_version_that_comes_back_can_be_returned_to(tmp_path: Path, candidate: Path) -> None:
    artifacts = tmp_path / "artifacts"
    for version in ("v1", "v2"):
        promotion.promote(artifacts, candidate, version, {}, [])
    assert promotion.demote(artifacts, "looked bad") == "v1"
    for version in ("v2", "v3"):  # the alarm was false
        promotion.promote(artifacts, candidate, version, {}, [])
    assert promotion.demote(artifacts, "is bad") == "v2"
    assert promotion.demote(artifacts, "is bad too") == "v1"


def test_an_interrupted_copy_leaves_the_version_that_was_there(tmp_path: Path, candidate: Path, monkeypatch) -> None:
    artifacts = tmp_path / "artifacts"
    promotion.promote(artifacts, candidate, "v1", {}, [])
    first = digest(artifacts / "v1")
    write_json(candidate / "config.json", {"hidden_size": 64})

    def full(source: str, target: str, **_: object) -> None:
        if target.endswith(".safetensors"):
            raise OSError(28, "No space left on device")
        shutil.copyfile(source, target)

    copytree = shutil.copytree
    monkeypatch.setattr(shutil, "copytree", lambda *given: copytree(*given, copy_function=full))
    for version in ("v1", "v2"):
        with pytest.raises((OSError, shutil.Error)):
            promotion.promote(artifacts, candidate, version, {}, [])
    assert digest(artifacts / "v1") == first and not (artifacts / "v2").exists()
    assert len(read_json(artifacts / "registry.json")["history"]) == 1
    monkeypatch.undo()
    assert promotion.promote(artifacts, candidate, "v2", {}, [])  # what was left of the copy is in nobody's way
    assert digest(artifacts / "v2") == digest(candidate)
    with pytest.raises(ValueError, match="v1 is "):
        promotion.promote(artifacts, candidate, "v1", {}, [])
    assert sorted(path.name for path in artifacts.iterdir()) == ["registry.json", "v1", "v2"]


def test_only_an_artifact_that_is_as_it_was_promoted_comes_back(tmp_path: Path, candidate: Path) -> None:
    artifacts = tmp_path / "artifacts"
    for version in ("v1", "v2", "v3"):
        promotion.promote(artifacts, candidate, version, {}, [])
    promotion.roll_back(artifacts, "v1", "v3 and v2 answer slower")
    told = promotion.registry(artifacts)
    assert told["current"] == "v1"
    assert told["history"][-1] | {"at": ""} == {
        "event": "rolled_back", "version": "v1", "from": "v3", "reason": "v3 and v2 answer slower", "at": "",
    }  # fmt: skip
    (artifacts / "v2/model.safetensors").write_bytes(b"weights" * 99 + b"weighty")
    with pytest.raises(ValueError, match=r"v2 can't be current: .* allowed: \['v1', 'v3'\]"):
        promotion.roll_back(artifacts, "v2", "try it")
    with pytest.raises(ValueError, match="v9 can't be current"):
        promotion.roll_back(artifacts, "v9", "try it")
    with pytest.raises(ValueError, match="v1 is current already"):
        promotion.roll_back(artifacts, "v1", "try it")
    assert promotion.registry(artifacts)["current"] == "v1"
    promotion.roll_back(artifacts, "v3", "false alarm")
    assert promotion.demote(artifacts, "it was true") == "v1", "v2 is damaged: passed over"


def test_a_promotion_in_the_middle_of_a_demotion_waits_and_stays(
    tmp_path: Path, candidate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A demotion hashes every artifact before it writes: what is promoted meanwhile may not be lost."""
    artifacts, real, late = tmp_path / "artifacts", promotion.whole, list[threading.Thread]()
    for version in ("v1", "v2"):
        promotion.promote(artifacts, candidate, version, {}, [])

    def slow(given: Path, version: str) -> bool:
        if not late:
            late.append(threading.Thread(target=promotion.promote, args=(artifacts, candidate, "v3", {}, [])))
            late[0].start()
            late[0].join(0.5)
        return real(given, version)

    monkeypatch.setattr(promotion, "whole", slow)
    assert promotion.demote(artifacts, "slow") == "v1"
    late[0].join()
    told = promotion.registry(artifacts)
    assert [(event["event"], event["version"]) for event in told["history"][2:]] == [
        ("demoted", "v2"),
        ("promoted", "v3"),
    ]
    assert told["current"] == "v3"


def card(version: str) -> str:
    return f"# {version}"


def promoted_as(artifacts: Path, candidate: Path, values: dict[str, float]) -> str:
    """What notebook 32 does with a candidate that missed nothing."""
    version = promotion.name(artifacts, candidate, card)
    assert promotion.promote(artifacts, candidate, version, values, [], card=card(version))
    return version


def test_other_weights_get_the_next_free_name_and_the_same_change_nothing(tmp_path: Path, candidate: Path) -> None:
    artifacts = tmp_path / "artifacts"
    assert promoted_as(artifacts, candidate, {"loss": 2.0}) == "v1"
    promotion.promote(artifacts, candidate, "damaged", {"loss": math.inf}, ["loss is inf"])
    before = digest(artifacts)
    assert promoted_as(artifacts, candidate, {"loss": 2.0}) == "v1"
    promotion.promote(artifacts, candidate, "damaged", {"loss": math.inf}, ["loss is inf"])
    assert digest(artifacts) == before, "the same again"

    (candidate / "model.safetensors").write_bytes(b"learned more" * 100)
    first = digest(artifacts / "v1")
    assert promoted_as(artifacts, candidate, {"loss": 1.0}) == "v2"
    assert digest(artifacts / "v1") == first and promotion.whole(artifacts, "v1")
    assert promotion.demote(artifacts, "slow") == "v1", "there is one to go back to"
    (candidate / "model.safetensors").write_bytes(b"and more" * 100)
    assert promoted_as(artifacts, candidate, {"loss": 0.5}) == "v3", "the name of a demoted version is not free"


def test_other_evidence_of_the_same_weights_is_another_version(tmp_path: Path, candidate: Path) -> None:
    artifacts = tmp_path / "artifacts"
    promoted_as(artifacts, candidate, {})
    assert promotion.name(artifacts, candidate, lambda version: f"# {version}, measured again") == "v2"
    (artifacts / "v1/model.safetensors").write_bytes(b"changed")
    assert promotion.name(artifacts, candidate, card) == "v2", "what is on disk is not what was promoted"


def test_a_known_name_keeps_its_bytes(tmp_path: Path, candidate: Path) -> None:
    artifacts = tmp_path / "artifacts"
    promotion.promote(artifacts, candidate, "v1", {}, [])
    before = digest(artifacts)
    (candidate / "model.safetensors").write_bytes(b"others" * 100)
    with pytest.raises(ValueError, match=r"v1 is \w{16}, promoted .*; give a name that is free: none of v1"):
        promotion.promote(artifacts, candidate, "v1", {}, [])
    assert digest(artifacts) == before


def test_weights_that_were_demoted_are_not_promoted_by_running_again(tmp_path: Path, candidate: Path) -> None:
    artifacts = tmp_path / "artifacts"
    promoted_as(artifacts, candidate, {})
    assert promotion.withheld(artifacts, candidate) == ""
    promotion.promote(artifacts, candidate, "v2", {}, [], card="# other evidence, the same weights")
    promotion.demote(artifacts, "says what it may not")
    assert promotion.withheld(artifacts, candidate) == "v2"
    promotion.roll_back(artifacts, "v2", "it was the prompt")
    assert promotion.withheld(artifacts, candidate) == ""


def test_versions_follow_what_changed_against_the_promoted_architecture(tmp_path: Path, candidate: Path) -> None:
    artifacts, first = tmp_path / "artifacts", {"hidden_size": 32, "num_experts": 4, "rope_theta": 1e6}
    steps = [
        (first, "1.0.0"),
        (first | {"transformers_version": "6"}, "1.0.0"),  # other weights, the same architecture
        (first | {"num_experts": 8}, "1.1.0"),
        (first | {"num_experts": 8, "rope_theta": 1e4}, "1.1.1"),
        (first | {"num_experts": 8, "rope_theta": 1e4, "hidden_size": 64}, "2.0.0"),
        (first, "1.0.0"),  # one that was there before has its own version
        (first | {"attention_pattern": "block"}, "1.2.0"),  # 1.1.0 is another
    ]
    for number, (config, version) in enumerate(steps):
        write_json(candidate / "config.json", config)
        assert versions.architecture(config, artifacts) == version
        promotion.promote(artifacts, candidate, f"v{number}", {}, [])
    entries = promotion.registry(artifacts)["history"]
    assert [entry["versions"]["architecture"] for entry in entries] == [version for _, version in steps]
    assert {(entry["versions"]["router"], entry["versions"]["retriever"]) for entry in entries} == {("1.1", "1.0")}


def test_every_setting_of_the_reference_model_has_a_kind_of_change() -> None:
    """A setting that nobody classified is breaking: right for sizes, wrong for a new number or pattern."""
    named = {field.name for field in dataclasses.fields(StackConfig)}
    sizes = {
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "moe_intermediate_size", "embedding_size", "tie_word_embeddings", "pad_token_id",
    }  # fmt: skip
    known = versions.TOPOLOGY | versions.NUMBERS | versions.SILENT
    assert {n for n in named - known - sizes if n in StackConfig.__annotations__} == set()
    before = StackConfig().to_dict()
    assert versions.change(before, StackConfig(num_hidden_layers=24).to_dict()) == (
        "major", ["num_hidden_layers 48 -> 24"],
    )  # fmt: skip
    assert versions.change(before, before) == ("none", [])
    assert versions.change(before, StackConfig(sliding_window=256, rms_norm_eps=1e-5).to_dict())[0] == "minor"


@given(st.tuples(*[st.integers(0, 99)] * 3), st.lists(st.sampled_from(versions.KINDS), max_size=6))
def test_a_later_version_is_never_smaller(start: tuple[int, int, int], kinds: list[str]) -> None:
    version = ".".join(map(str, start))
    for kind in kinds:
        later = versions.bump(version, kind)
        old, new = (tuple(map(int, given.split("."))) for given in (version, later))
        assert new == old if kind == "none" else new > old
        changed = next((place for place in range(3) if new[place] != old[place]), 3)
        assert changed == {"major": 0, "minor": 1, "patch": 2, "none": 3}[kind] and not any(new[changed + 1 :])
        version = later


def ended(home: Path, steps: int = 4) -> None:
    """The job in `home` has ended and told what it wrote, as its rank 0 does."""
    files = {path.relative_to(home).as_posix(): digest(path) for path in sorted(home.glob("final*/*"))}
    write_json(home / "done.json", {"steps": steps, "files": files})


def test_a_snapshot_that_does_not_tell_what_it_is_leaves_nothing_behind(tmp_path: Path, candidate: Path) -> None:
    snapshot, artifacts = tmp_path / "checkpoint-4", tmp_path / "artifacts"
    ended(tmp_path)
    for damaged in (None, "{", '["step", "data"]', '{"step": 4}', '{"step": "4", "data": "corpus"}'):
        if damaged is not None:
            write_text(snapshot / "manifest.json", damaged)
        with pytest.raises(ValueError, match=r"checkpoint-4/manifest\.json is gone or damaged, .* restore it, or"):
            promotion.promote(artifacts, candidate, "v1", {}, [], snapshot=snapshot)
        assert not (artifacts / "v1").exists() and promotion.registry(artifacts)["history"] == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda final: (final / "config.json").write_text('{"rope_theta": 1}'), "final/config.json"),
        (lambda final: (final / "model.safetensors").unlink(), "final/model.safetensors"),
        (lambda final: (final / "adapter.safetensors").write_bytes(b"more"), "final/adapter.safetensors"),
        (lambda final: (final.parent / "done.json").unlink(), "it has not ended, or was rolled back since"),
        (lambda final: ended(final.parent, 6), "final is of step 6, .* checkpoint-4 of step 4: give the checkpoint"),
    ],
)
def test_only_what_the_job_wrote_is_promoted(tmp_path: Path, candidate: Path, change, told: str) -> None:
    snapshot, artifacts = tmp_path / "checkpoint-4", tmp_path / "artifacts"
    write_json(snapshot / "manifest.json", {"step": 4, "data": "corpus"})
    ended(tmp_path)
    (candidate / "README.md").write_text("a card is no part of a model")
    with warnings.catch_warnings(action="error"):
        assert origin.traced(candidate, snapshot)["data"] == "corpus"
    change(candidate)
    with pytest.raises(ValueError, match=told):
        promotion.promote(artifacts, candidate, "v1", {}, [], snapshot=snapshot)
    assert not artifacts.exists() or not (artifacts / "v1").exists()
    elsewhere = shutil.copytree(candidate, tmp_path / "elsewhere/final")
    assert origin.traced(elsewhere, snapshot)["step"] == 4, "what no job of this snapshot wrote has no such record"


def test_a_job_that_ended_under_an_earlier_version_is_promoted_with_a_warning(tmp_path: Path, candidate: Path) -> None:
    snapshot = tmp_path / "checkpoint-4"
    write_json(snapshot / "manifest.json", {"step": 4, "data": "corpus"})
    write_json(tmp_path / "done.json", {"steps": 4})
    with pytest.warns(UserWarning, match="kept no digests: whether final is as the job wrote it is not checked"):
        assert promotion.promote(tmp_path / "artifacts", candidate, "v1", {}, [], snapshot=snapshot)


def test_the_checkpoint_that_was_promoted_is_marked(tmp_path: Path, candidate: Path) -> None:
    snapshot = tmp_path / "checkpoint-4"
    write_json(snapshot / "manifest.json", {"step": 4, "data": "corpus"})
    ended(tmp_path)
    assert not promotion.promote(tmp_path / "artifacts", candidate, "v1", {}, ["no"], snapshot=snapshot)
    assert not (tmp_path / PROMOTED).exists()
    assert promotion.promote(tmp_path / "artifacts", candidate, "v1", {}, [], card="# A card", snapshot=snapshot)
    assert read_json(tmp_path / PROMOTED) == {"4": "v1"}
    assert (tmp_path / "artifacts/v1/README.md").read_text() == "# A card"
    promotion.promote(tmp_path / "artifacts", candidate, "v2", {}, [], card="# Other evidence", snapshot=snapshot)
    assert promoted(tmp_path) == {4: ["v1", "v2"]} and touched(tmp_path, 3)[1:3] == ["version v1", "version v2"]


MEASURED = {"validation_loss": 4.0, "precision_at_k": 0.5, "recall_at_k": 0.5, "mrr": 0.6, "ndcg_at_10": 0.7}
MEASURED |= {"long_range_accuracy": 0.0, "pairs": 64, "long_range_answers": 128}


@pytest.fixture
def current(tmp_path: Path, candidate: Path) -> Path:
    """Artifacts of a run whose current version was measured on the corpus `d`."""
    write_json(tmp_path / "checkpoint-4/manifest.json", {"step": 4, "data": "d"})
    ended(tmp_path)
    artifacts = tmp_path / "outbox/old/artifacts"
    promotion.promote(artifacts, candidate, "v1", MEASURED, [], snapshot=tmp_path / "checkpoint-4")
    promotion.promote(artifacts, candidate, "bad", {"validation_loss": 9.0}, ["no"])
    return artifacts


def test_a_candidate_may_not_be_worse_than_the_version_to_beat(current: Path, tmp_path: Path) -> None:
    limits = promotion.no_worse(promotion.to_beat(current, "d", [tmp_path / "other weights"]))
    assert promotion.gate(MEASURED, limits) == [], "it is no worse than itself"
    assert promotion.gate(MEASURED | {"validation_loss": 4.07}, limits) == []
    for change in ({"validation_loss": 4.09}, {"precision_at_k": 0.1}, {"mrr": 0.2}, {"validation_loss": math.nan}):
        assert len(promotion.gate(MEASURED | change, limits)) == 1, change
    assert len(promotion.gate({}, limits)) == len(limits) == 6, "what is not measured is not better"
    assert limits["long_range_accuracy"] == (">=", 0.0), "there is nothing to lose"


def test_another_corpus_or_no_version_in_use_is_nothing_to_beat(current: Path, tmp_path: Path) -> None:
    for nothing in (promotion.to_beat(current, "another", []), promotion.to_beat(tmp_path / "nothing", "d", [])):
        assert promotion.no_worse(nothing) == {} and promotion.called(nothing).startswith("none: no earlier version")
    assert promotion.called(promotion.to_beat(current, "d", [])) == "v1 of outbox/old"
    promotion.demote(current, "withdrawn")
    assert promotion.to_beat(current, "d", []) == {}


def test_a_job_is_compared_with_the_last_version_of_other_weights(current: Path, tmp_path: Path) -> None:
    """Notebook 40 reads what notebook 32 promoted a moment ago from the same job: that is nothing to compare with."""
    final, average = tmp_path / "final", tmp_path / "final_ema"
    assert promotion.to_beat(current, "d", [final]) == {}, "a first promotion"
    shutil.copytree(final, average)
    (final / "model.safetensors").write_bytes(b"learned on" * 100)
    (average / "model.safetensors").write_bytes(b"learned on, averaged" * 100)
    ended(tmp_path)
    assert promotion.to_beat(current, "d", [final, average])["version"] == "v1"
    worse = MEASURED | {"validation_loss": 4.05, "precision_at_k": 0.6}
    promotion.promote(current, average, "v2", worse, [], snapshot=tmp_path / "checkpoint-4")
    beaten = promotion.to_beat(current, "d", [final, average])
    assert beaten["version"] == "v1", "v2 is of this job"
    assert promotion.to_beat(current, "d", [])["version"] == "v2"
    assert promotion.gate(worse | {"validation_loss": 4.1}, promotion.no_worse(beaten)) == [
        "validation_loss is 4.1, must be <= 4.08"
    ]


def test_the_version_to_beat_may_be_that_of_another_run(current: Path, tmp_path: Path) -> None:
    artifacts = tmp_path / "outbox/new/artifacts"
    assert promotion.to_beat(artifacts, "d", [tmp_path / "final"]) == {}, "a first run has none"
    beaten = promotion.to_beat(artifacts, "d", [tmp_path / "final"], "old")
    assert promotion.called(beaten) == "v1 of outbox/old"
    worse = MEASURED | {"validation_loss": 5.0, "mrr": 0.2}
    missed = promotion.gate(worse, promotion.no_worse(beaten))
    assert missed[0] == "validation_loss is 5, must be <= 4.08" and missed[1].startswith("mrr is 0.2, must be >= 0.")
    assert not promotion.promote(artifacts, tmp_path / "final", "v1", worse, missed)
    assert promotion.registry(artifacts)["history"][-1]["missed"] == missed and len(missed) == 2
    with pytest.raises(ValueError, match=r"v1 of outbox/old was measured on the corpus d, this run has another"):
        promotion.to_beat(artifacts, "another", [], "old")
    with pytest.raises(ValueError, match=r"no version of outbox/older is in use; give a run that has one \(old\)"):
        promotion.to_beat(artifacts, "d", [], "older")


@pytest.mark.parametrize(("share", "n"), [(0.02, 64), (0.1, 64), (0.5, 32), (0.9, 64), (0.98, 500)])
def test_the_gate_seldom_refuses_a_candidate_that_is_as_good(
    share: float, n: int, tmp_path: Path, candidate: Path
) -> None:
    """Two draws of the same share: all five measures are refused once in a hundred at most."""
    rng, trials, refused = np.random.default_rng(n), 4_000, 0
    write_json(tmp_path / "checkpoint-4/manifest.json", {"step": 4, "data": "d"})
    ended(tmp_path)
    promotion.promote(tmp_path, candidate, "v1", {}, [], snapshot=tmp_path / "checkpoint-4")
    told = read_json(tmp_path / "registry.json")
    for _ in range(trials // 10):
        before = rng.binomial(n, share, 5) / n
        values = dict(zip(promotion.COUNTED, before.tolist(), strict=True)) | {"pairs": n, "long_range_answers": n}
        told["history"][-1]["values"] = values | {"validation_loss": 1.0}
        write_json(tmp_path / "registry.json", told)
        limits = promotion.no_worse(promotion.to_beat(tmp_path, "d", []))
        for now in rng.binomial(n, share, (10, 5)) / n:
            drawn = dict(zip(promotion.COUNTED, now.tolist(), strict=True)) | {"validation_loss": 1.0}
            refused += bool(promotion.gate(drawn, limits))
    assert refused <= 0.01 * trials, f"{refused} of {trials}"
