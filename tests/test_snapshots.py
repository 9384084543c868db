"""Checkpoints are whole or not there, and those that are needed stay."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackpkg.params import Snapshots
from stackpkg.runs import digest, read_json, write_json
from stackpkg.training import recovery, snapshots


def checkpoint(home: Path, step: int, marked: bool = True) -> Path:
    folder = home / f"checkpoint-{step}"
    (folder / "dcp").mkdir(parents=True)
    (folder / "dcp/__0_0.distcp").write_bytes(bytes(range(256)) * 40 + bytes([step]))
    (folder / "state.pt").write_bytes(b"scalars of step %d" % step)
    if marked:
        snapshots.complete(folder, step)
    return folder


def truncate(folder: Path) -> None:
    data = folder / "dcp/__0_0.distcp"
    data.write_bytes(data.read_bytes()[:5_000])


def flip(folder: Path) -> None:
    data = bytearray((folder / "dcp/__0_0.distcp").read_bytes())
    data[4_321] ^= 1
    (folder / "dcp/__0_0.distcp").write_bytes(bytes(data))


def lose(folder: Path) -> None:
    (folder / "state.pt").unlink()


def unmark(folder: Path) -> None:
    (folder / snapshots.MARKER).unlink()


def flip_marker(folder: Path) -> None:
    raw = bytearray((folder / snapshots.MARKER).read_bytes())
    raw[0] ^= 1
    (folder / snapshots.MARKER).write_bytes(bytes(raw))


def flip_key(folder: Path) -> None:
    marker = folder / snapshots.MARKER
    marker.write_text(marker.read_text().replace('"files"', '"fhles"'))


def flip_beyond_text(folder: Path) -> None:
    marker = folder / snapshots.MARKER
    marker.write_bytes(marker.read_bytes().replace(b"files", b"f\xe9les"))


def empty_marker(folder: Path) -> None:
    (folder / snapshots.MARKER).write_bytes(b"")


def another_marker(folder: Path) -> None:
    (folder / snapshots.MARKER).write_text("[]")


DAMAGE = {
    truncate: "checkpoint-30/dcp/__0_0.distcp: changed since it was saved",
    flip: "checkpoint-30/dcp/__0_0.distcp: changed since it was saved",
    lose: "checkpoint-30/state.pt: missing",
    unmark: "checkpoint-30: no complete.json; saving was interrupted",
    **dict.fromkeys(
        (flip_marker, flip_key, flip_beyond_text, empty_marker, another_marker),
        "checkpoint-30/complete.json: changed since it was saved",
    ),
}


def test_the_newest_whole_checkpoint_is_chosen_by_number(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert snapshots.problems(tmp_path / "checkpoint-9") == []
    assert snapshots.latest(tmp_path) == (tmp_path / "checkpoint-100", [])
    assert snapshots.latest(tmp_path / "nothing") == (None, [])


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_set_aside_and_an_older_one_chosen(tmp_path: Path, damage) -> None:
    for step in (10, 20, 30):
        checkpoint(tmp_path, step)
    damage(tmp_path / "checkpoint-30")
    left = digest(tmp_path / "checkpoint-30")
    assert snapshots.problems(tmp_path / "checkpoint-30") == [DAMAGE[damage]]
    assert snapshots.latest(tmp_path) == (tmp_path / "checkpoint-20", [DAMAGE[damage]])
    assert not (tmp_path / "checkpoint-30").exists()
    (aside,) = tmp_path.glob("checkpoint-30.damaged-*")
    assert digest(aside) == left  # evidence of what happened: nothing of it is deleted
    assert snapshots.latest(tmp_path) == (tmp_path / "checkpoint-20", [])  # and it is not looked at again


def test_where_nothing_is_whole_a_person_says_whether_to_begin_anew(tmp_path: Path) -> None:
    home = tmp_path / "run/checkpoints/train"
    checkpoint(home, 10, marked=False)
    flip(checkpoint(home, 20))
    begun(home, 30)
    for _ in range(2):  # a restart finds the same
        with pytest.raises(snapshots.ResumeFailed) as raised:
            snapshots.latest(home)
        assert str(raised.value).startswith(
            "train has 2 checkpoint(s), and none is whole: checkpoint-20/dcp/__0_0.distcp: changed since it was saved; "
            "checkpoint-10: no complete.json; saving was interrupted. They are where they were: restore one"
        )
        assert str(raised.value).endswith("stackpkg rollback outbox/run --step 0 --job train")
        assert list(snapshots.listed(home)) == [10, 20]
    flip(home / "checkpoint-20")  # restored
    assert snapshots.latest(home) == (home / "checkpoint-20", [])
    flip(home / "checkpoint-20")
    snapshots.roll_back(home, 0)
    assert snapshots.latest(home) == (None, []), "asked for"
    for step in range(1, 20):
        flip(checkpoint(home, step))
    with pytest.raises(snapshots.ResumeFailed, match=r"19 checkpoint.*; and 11 more"):
        snapshots.latest(home)


def test_a_marker_counts_all_files_and_not_itself(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 7)
    marker = read_json(folder / snapshots.MARKER)
    assert marker["step"] == 7 and set(marker["files"]) == {"dcp/__0_0.distcp", "state.pt"}
    write_json(folder / "extra.json", {})  # a file that came later harms nobody
    assert snapshots.problems(folder) == []


# --- a save that is broken off


def begun(home: Path, step: int) -> Path:
    return checkpoint(home / snapshots.PARTIAL, step, marked=False)


def test_a_published_checkpoint_is_whole_and_what_was_there_is_kept(tmp_path: Path) -> None:
    first = snapshots.publish(begun(tmp_path, 3), 3)
    assert first == tmp_path / "checkpoint-3" and snapshots.problems(first) == []
    again = snapshots.publish(begun(tmp_path, 3), 3)
    assert again == first and len(list(tmp_path.glob("checkpoint-3.replaced-*"))) == 1
    snapshots.publish(begun(tmp_path, 3), 3)
    assert len(list(tmp_path.glob("checkpoint-3.replaced-*"))) == 2, "within the same second"


def test_one_that_lacked_only_its_name_gets_it(tmp_path: Path) -> None:
    snapshots.publish(begun(tmp_path, 3), 3)
    snapshots.complete(begun(tmp_path, 6), 6)
    assert snapshots.latest(tmp_path) == (tmp_path / "checkpoint-6", [])


def test_ranks_vouch_for_what_they_wrote_and_share_the_reading(tmp_path: Path) -> None:
    folder = begun(tmp_path, 3)
    snapshots.vouch(folder, 0, [folder / "dcp/__0_0.distcp"])
    snapshots.vouch(folder, 1, [])
    found = snapshots.publish(folder, 3, 2, ["dcp/__0_0.distcp"])
    marked = read_json(found / snapshots.MARKER)["files"]
    assert marked == {name: digest(found / name) for name in ("dcp/__0_0.distcp", "state.pt")}
    assert snapshots.files_below(found) and not list(found.glob(".*")) and snapshots.problems(found) == []
    flip(found)
    lose(found)
    parts = [snapshots.problems(found, part, 3) for part in range(3)]
    assert sorted(line for part in parts for line in part) == sorted(snapshots.problems(found)) and len(parts[0]) == 1


def test_a_snapshot_that_lacks_what_a_rank_wrote_is_none(tmp_path: Path) -> None:
    """As where each node has an outbox of its own, or rank 0 is shown the folder as it was."""
    folder = begun(tmp_path, 3)
    snapshots.vouch(folder, 0, [folder / "dcp/__0_0.distcp"])
    with pytest.raises(ValueError, match="the files of rank 1 are not in checkpoint-3: give all nodes one outbox/"):
        snapshots.publish(folder, 3, 2)
    for rank in (0, 1):
        snapshots.vouch(folder, rank, [folder / "dcp/__0_0.distcp"])
    with pytest.raises(ValueError, match=r"no rank vouched for dcp/__1_0\.distcp of checkpoint-3"):
        snapshots.publish(folder, 3, 2, ["dcp/__0_0.distcp", "dcp/__1_0.distcp"])
    assert not (folder / snapshots.MARKER).exists() and not snapshots.listed(tmp_path)


def test_a_rank_touches_only_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank's files may be renamed under it, and a thousand ranks would flush a million files."""
    folder, flushed = begun(tmp_path, 3), list[str]()
    monkeypatch.setattr(snapshots, "flush", lambda path: flushed.append(path.name))
    snapshots.vouch(folder, 0, [folder / "dcp/__0_0.distcp"])
    assert flushed == ["__0_0.distcp"]
    snapshots.publish(folder, 3, 1)
    assert flushed.count("__0_0.distcp") == 1 and flushed.count("state.pt") == 1


def test_a_checkpoint_that_cannot_be_read_is_set_aside_for_one_that_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = checkpoint(tmp_path, 3), checkpoint(tmp_path, 6)
    read = snapshots.digest

    def failing(path: Path) -> str:
        if path == new / "state.pt":
            raise OSError(116, "Stale file handle")
        return read(path)

    monkeypatch.setattr(snapshots, "digest", failing)
    assert snapshots.latest(tmp_path) == (old, ["checkpoint-6/state.pt: can't be read, Stale file handle"])


def test_what_pruning_left_half_deleted_does_not_come_back(tmp_path: Path) -> None:
    (tmp_path / snapshots.PARTIAL).mkdir()
    old, gone = checkpoint(tmp_path, 6), checkpoint(tmp_path, 3)
    gone.rename(tmp_path / snapshots.PARTIAL / "checkpoint-3.deleted")  # and the job was killed
    assert snapshots.latest(tmp_path) == (old, []) and {*tmp_path.iterdir()} == {old}


def test_a_roll_back_sets_the_weights_at_the_end_aside(tmp_path: Path) -> None:
    """`from_pretrained` would prefer an old model.safetensors to the parts that pipeline stages write beside it."""
    old = checkpoint(tmp_path, 3)
    checkpoint(tmp_path, 6)
    (tmp_path / "done.json").write_text("{}")
    for name in snapshots.ENDS:
        (tmp_path / name).mkdir()
    good, aside = snapshots.roll_back(tmp_path, 3)
    assert (good, aside) == (old, ["checkpoint-6", "done.json", "final", "final_ema"])
    assert not any((tmp_path / name).exists() for name in aside)
    assert len([*tmp_path.glob("*.aside-*")]) == 4


def test_what_a_broken_off_save_left_is_removed_and_told(tmp_path: Path) -> None:
    whole = snapshots.publish(begun(tmp_path, 3), 3)
    begun(tmp_path, 6)
    assert snapshots.latest(tmp_path) == (whole, ["checkpoint-6: saving was broken off; removed"])
    assert not (tmp_path / snapshots.PARTIAL).exists()


def dies_at(number: int, act: Callable[[], object]) -> bool:
    """Do `act` in a child that is killed right before its `number`-th change of the disk; whether it came to an end."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    left = [number]

    def counted(function: Callable) -> Callable:
        def call(*given: object, **more: object) -> object:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **more)

        return call

    for owner, names in {os: ("fsync", "unlink", "rmdir"), Path: ("rename", "replace", "write_text", "mkdir")}.items():
        for name in names:
            setattr(owner, name, counted(getattr(owner, name)))
    try:
        act()
        os._exit(0)
    except BaseException:
        os._exit(1)


def test_a_kill_at_any_moment_leaves_the_whole_checkpoint_or_none_that_is_used(tmp_path: Path) -> None:
    """Publish and prune, killed before each thing they do to the disk; the newest whole one is the old or the new."""
    keep, seen = Snapshots(keep_last=1, keep_best=0), []
    for number in range(1, 100):
        home = tmp_path / str(number)
        for step in (1, 5):
            snapshots.publish(begun(home, step), step)
        partial = begun(home, 9)
        ended = dies_at(number, lambda partial=partial, home=home: (
            snapshots.publish(partial, 9), snapshots.prune(home, keep)
        ))  # fmt: skip
        found, complaints = snapshots.latest(home)
        assert found and snapshots.problems(found) == [], complaints
        assert not list(home.glob("*.damaged-*")), "a kill is no damage"
        seen.append(int(found.name[11:]))
        if ended:
            break
    assert ended and len(seen) > 8, "the kills did not reach the end"
    assert seen == sorted(seen) and {*seen} == {5, 9}
    assert list(snapshots.listed(home)) == [5, 9], "5 is the newest before a fault that could still come"


def test_a_folder_beside_them_is_whole_or_not_there_wherever_its_making_is_killed(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_text(name)

    for number in range(1, 30):
        made = tmp_path / f"{number // 2}" / "initial"  # each place twice: what was left there is in nobody's way
        made.parent.mkdir(exist_ok=True)
        ended = made.exists() or dies_at(number, lambda made=made: snapshots.make(made, write))
        assert not made.exists() or [*map(Path.read_text, sorted(made.iterdir()))] == [
            "config.json", "model.safetensors",
        ]  # fmt: skip
        if ended:
            break
    assert ended and number > 6


# --- retention


def test_what_stays(tmp_path: Path) -> None:
    losses = {30: 2.0, 60: 1.0, 90: 1.5, 120: float("nan")}
    stay = snapshots.retained(range(10, 160, 10), losses, Snapshots(keep_last=2, keep_every=50, keep_best=2), [70])
    assert stay == {140, 150, 50, 100, 60, 90, 70}
    assert snapshots.retained([8, 9, 10, 11, 12], {}, Snapshots(keep_last=1, keep_best=0), []) == {9, 10, 11, 12}
    assert snapshots.retained([], {1: 1.0}, Snapshots(), [1]) == set()


POLICY = st.builds(
    Snapshots, keep_last=st.integers(1, 5), keep_every=st.integers(0, 20), keep_best=st.integers(0, 3),
)  # fmt: skip
STEPS = st.sets(st.integers(1, 200), max_size=30)
LOSSES = st.dictionaries(st.integers(1, 200), st.one_of(st.floats(0, 20), st.just(float("nan"))), max_size=15)


@given(STEPS, LOSSES, POLICY, STEPS, st.data())
def test_nothing_that_is_needed_goes(steps: set[int], losses: dict, keep: Snapshots, promoted: set[int], data) -> None:
    stay = snapshots.retained(steps, losses, keep, promoted)
    assert stay <= steps and promoted & steps <= stay
    assert {*sorted(steps)[-keep.keep_last :]} <= stay
    assert not keep.keep_every or {step for step in steps if step % keep.keep_every == 0} <= stay
    told = sorted(loss for step, loss in losses.items() if step in steps and loss == loss)
    assert (
        sorted(losses[step] for step in stay if losses.get(step, float("nan")) == losses.get(step))[: keep.keep_best]
        == told[: keep.keep_best]
    )
    if steps:  # wherever the ladder wants to go back to from the steps that come next, it is there
        fault = (
            max(steps) + data.draw(st.integers(1, 8)) - data.draw(st.integers(0, recovery.MAX_CONSECUTIVE_SKIPS - 1))
        )
        assert max((s for s in stay if s < fault), default=0) == max((s for s in steps if s < fault), default=0)


@given(STEPS, LOSSES, POLICY)
def test_keeping_again_changes_nothing(steps: set[int], losses: dict, keep: Snapshots) -> None:
    stay = snapshots.retained(steps, losses, keep, ())
    assert snapshots.retained(stay, losses, keep, ()) == stay
    near = recovery.MAX_CONSECUTIVE_SKIPS - 1  # checkpoints in which a fault that is not yet known could lie
    every = sum(step % keep.keep_every == 0 for step in steps) if keep.keep_every else 0
    bound = max(keep.keep_last, near) + 1 + keep.keep_best + every
    assert len(stay) <= bound


def test_prune_reads_losses_and_promotions_from_the_checkpoints(tmp_path: Path) -> None:
    for step, loss in {2: 3.0, 4: None, 6: 1.0, 8: "NaN", 10: 2.0, 12: None, 14: None}.items():
        folder = begun(tmp_path, step)
        write_json(folder / snapshots.MANIFEST, {"validation_loss": loss})
        snapshots.publish(folder, step)
    write_json(tmp_path / snapshots.PROMOTED, {"4": "v1 v2"})
    (tmp_path / "checkpoint-8.damaged-x").mkdir()
    unmark(tmp_path / "checkpoint-2")  # nobody knows what it is
    for step, text in {8: '{"validbtion_loss": "NaN"}', 12: "{"}.items():  # no reason not to prune the others
        (tmp_path / f"checkpoint-{step}" / snapshots.MANIFEST).write_text(text)
    assert snapshots.prune(tmp_path, Snapshots(keep_last=1, keep_best=1)) == [8]
    assert list(snapshots.listed(tmp_path)) == [2, 4, 6, 10, 12, 14] and not list((tmp_path / ".saving").iterdir())
    assert snapshots.prune(tmp_path, Snapshots(keep_last=1, keep_best=1)) == []


def test_a_file_is_carried_to_another_checkpoint(tmp_path: Path) -> None:
    source, target = checkpoint(tmp_path / "one", 4), checkpoint(tmp_path / "other", 6)
    before, (mine, theirs) = digest(target), ((folder / "state.pt").read_bytes() for folder in (source, target))
    assert mine != theirs
    made = snapshots.carry("state.pt", source, target)
    assert made == target and snapshots.problems(made) == [] and read_json(made / snapshots.MARKER)["step"] == 6
    assert (made / "state.pt").read_bytes() == mine
    (aside,) = tmp_path.glob("other/checkpoint-6.replaced-*")
    assert digest(aside) == before, "the shards are shared, the one set aside is as it was"
    with pytest.raises(ValueError, match=r"checkpoint-4 has no file router.pt; it has dcp/__0_0.distcp, state.pt"):
        snapshots.carry("router.pt", source, target)
    flip(source)
    with pytest.raises(ValueError, match=r"only whole checkpoints .*: checkpoint-4/dcp/__0_0.distcp: changed"):
        snapshots.carry("state.pt", source, target)
