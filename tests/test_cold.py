"""A run goes into cold storage and comes back proved; an archive that attacks comes back not at all."""

import io
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from attacks import EVIDENCE, SAFETY, make, verdicts

from stackpkg import runs
from stackpkg.governance import cold, rehearsal, seal

pytestmark = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="ssh-keygen is not installed")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cold.archive(make(tmp_path_factory.mktemp("outbox")))


@pytest.fixture
def packed(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original.parent, tmp_path / "outbox")
    return tmp_path / "outbox" / original.name


def test_the_same_run_gives_the_same_bytes(packed: Path) -> None:
    before, folder = packed.read_bytes(), packed.with_name("demo")
    for path in runs.files_below(folder):
        path.touch()
        path.chmod(0o600)
    make(packed.parent, "other")  # the log goes on
    assert cold.archive(folder).read_bytes() == before
    subprocess.run(["sha256sum", "--check", "--strict", f"{packed.name}.sha256"], cwd=packed.parent, check=True)


def test_what_comes_back_is_what_went_in_and_both_verifiers_accept_it(packed: Path, tmp_path: Path) -> None:
    shutil.move(packed.with_name("demo"), tmp_path / "gone")
    shutil.move(packed.with_name(".demonstration"), tmp_path / "keys")
    folder, problems = cold.restore(packed, tmp_path / "back")
    assert problems == [] and seal.trust_for(folder)[1], "a demonstration stays one"
    assert runs.digest(folder) == runs.digest(tmp_path / "gone")
    assert verdicts(folder, tmp_path / "keys/demo") == ([], [])
    assert not list(tmp_path.rglob("safety.pub")) or not list((tmp_path / "back").rglob("safety.pub"))
    assert {path.name for path in (tmp_path / "back/.demonstration/demo").iterdir()} == {
        "allowed_signers", "policy.yaml", "revoked_keys",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda run: (run / "SHA256SUMS").unlink(), "SHA256SUMS: missing"),
        (lambda run: (run / EVIDENCE).write_text("{}"), "changed since the seal"),
        (lambda run: (run / SAFETY).unlink(), "not what was entered in LOG.jsonl"),
        (lambda run: (run.parent / "LOG.jsonl").write_text("x\n"), "breaks the chain"),
    ],
)
def test_a_run_that_is_not_sealed_or_broken_is_not_archived(packed: Path, change: Callable, told: str) -> None:
    before = packed.read_bytes()
    change(packed.with_name("demo"))
    with pytest.raises(ValueError, match=told):
        cold.archive(packed.with_name("demo"))
    assert packed.read_bytes() == before
    assert {path.name for path in packed.parent.glob("*.tar*")} == {packed.name, f"{packed.name}.sha256"}


def test_an_archive_that_breaks_off_leaves_nothing_half_written(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real = packed.with_name("demo"), cold._entry
    packed.unlink()

    def entry(name: str, size: int) -> tarfile.TarInfo:
        if name.endswith("SHA256SUMS"):
            raise OSError("the disk is full")
        return real(name, size)

    monkeypatch.setattr(cold, "_entry", entry)
    with pytest.raises(OSError, match="the disk is full"):
        cold.archive(folder)
    assert not [path for path in packed.parent.iterdir() if ".tar" in path.name]


def repack(
    packed: Path, *, change: dict[str, bytes] | None = None, also: list[tuple[tarfile.TarInfo, bytes]] = ()
) -> None:
    """Write the archive anew with other contents and entries, and a digest that fits."""
    with pa.input_stream(packed, compression="zstd") as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        kept = [(entry, tar.extractfile(entry).read()) for entry in tar]
    with pa.output_stream(packed, compression="zstd") as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for entry, content in [*kept, *also]:
            content = (change or {}).get(entry.name, content)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    packed.with_name(f"{packed.name}.sha256").write_text(f"{runs.digest(packed)}  {packed.name}\n")


def odd(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> list[tuple[tarfile.TarInfo, bytes]]:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, link
    return [(entry, b"")]


ENTRIES = {
    "a path above": (odd("../evil"), "a path out of the archive"),
    "a path above, further down": (odd("demo/a/../../../evil"), "a path out of the archive"),
    "an absolute path": (odd("/tmp/evil"), "a path out of the archive"),
    "an odd spelling of a path": (odd("demo/./evil"), "a path out of the archive"),
    "a look-alike name": (odd("demo/\N{CYRILLIC SMALL LETTER A}"), "can deceive"),
    "a link out": (odd("demo/link", tarfile.SYMTYPE, "/etc"), "no plain file"),
    "a link out, then a file through it": (
        [*odd("demo/link", tarfile.SYMTYPE, "/tmp"), *odd("demo/link/evil")], "no plain file"
    ),
    "a hard link": (odd("demo/hard", tarfile.LNKTYPE, "demo/SHA256SUMS"), "no plain file"),
    "a device": (odd("demo/device", tarfile.CHRTYPE), "no plain file"),
    "a pipe": (odd("demo/pipe", tarfile.FIFOTYPE), "no plain file"),
    "a folder": (odd("demo/folder", tarfile.DIRTYPE), "no plain file"),
    "a file twice": (odd("demo/SHA256SUMS"), "can't be unpacked"),
    "a file where a folder is": (odd("demo/config"), "can't be unpacked"),
    "a second run": (odd("second/file"), "one run is expected, there are: demo, second"),
    "one file more": (odd("demo/added"), "added: added since the seal"),
}  # fmt: skip


@pytest.mark.parametrize("what", ENTRIES)
def test_an_archive_that_attacks_leaves_nothing(packed: Path, tmp_path: Path, what: str) -> None:
    also, told = ENTRIES[what]
    repack(packed, also=also)
    place = tmp_path / "place"
    with pytest.raises(ValueError, match=told):
        cold.restore(packed, place / "back")
    assert not list(place.iterdir()) and not (tmp_path / "evil").exists() and not Path("/tmp/evil").exists()


@pytest.mark.parametrize("name", [f"demo/{EVIDENCE}", "demo/SHA256SUMS", f"demo/{SAFETY}", "LOG.jsonl"])
def test_an_archive_with_other_contents_is_refused_though_its_digest_fits(
    packed: Path, tmp_path: Path, name: str
) -> None:
    repack(packed, change={name: b"{}\n"})
    with pytest.raises(ValueError, match="does not hold a whole run"):
        cold.restore(packed, tmp_path / "place/back")
    assert not list((tmp_path / "place").iterdir())


def test_an_archive_cut_short_changed_or_without_its_digest_is_refused(packed: Path, tmp_path: Path) -> None:
    content, told = packed.read_bytes(), packed.with_name(f"{packed.name}.sha256")
    packed.write_bytes(content[:-9])
    with pytest.raises(ValueError, match="is not what"):
        cold.restore(packed, tmp_path / "back")
    told.write_text(f"{runs.digest(packed)}  {packed.name}\n")
    with pytest.raises(ValueError, match=r"can't be unpacked|does not hold"):
        cold.restore(packed, tmp_path / "back")
    told.unlink()
    packed.write_bytes(content)
    with pytest.raises(ValueError, match="is missing"):
        cold.restore(packed, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_folder_that_is_there_is_not_touched(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "back").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("back", "dangling"):
        with pytest.raises(ValueError, match="is there already"):
            cold.restore(packed, tmp_path / name)


def test_sign_offs_that_do_not_hold_today_are_told(packed: Path, tmp_path: Path) -> None:
    name = ".demonstration/demo/allowed_signers"
    text = (packed.parent / name).read_text().replace('readiness-safety"', 'readiness-safety",valid-before="20200101"')
    repack(packed, change={name: text.encode()})
    folder, problems = cold.restore(packed, tmp_path / "back")
    assert folder.is_dir() and any("has expired" in problem for problem in problems)


def test_drills_of_a_lost_disk_and_a_lost_key(packed: Path) -> None:
    copy = packed.with_name("demo")
    trust = seal.trust_for(copy)[0]
    disk = rehearsal.lost_disk(copy)
    assert "is not what" in disk["refused"] and disk["problems"] == [] and disk["files"] > 10
    assert 0 <= disk["detect_seconds"] < disk["recover_seconds"]
    assert not packed.with_name("damaged").exists() and seal.verify(packed.with_name("restored") / "demo", trust) == []
    key = rehearsal.lost_key(copy, trust, "safety")
    assert "is revoked" in key["refused"] and "architecture" not in key["refused"] and key["problems"] == []
    told = seal.verify(packed.with_name("restored") / "demo", trust)
    assert {problem.split(": ")[0] for problem in told} == {"signoffs/safety.json"}, "the old signature still counts"
