"""A sealed run as one file for cold storage, the same bytes each time, and the proof that it comes back whole."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

import pyarrow as pa

from stackpkg import runs
from stackpkg.governance import runlog, seal, statements
from stackpkg.governance.tree import differences

_PLAIN = re.compile(r"[ -\[\]-~]+")  # printable ASCII without a backslash, as the seal takes them


def archive(folder: Path) -> Path:
    """Write `<run>.tar.zst` and `<run>.tar.zst.sha256` beside the run: its files, the log as far as it tells of it,
    and of demonstration keys the public halves. Every time, owner and mode is the same.

    Raises `ValueError` for a run that is not sealed or differs from its seal or its log; then nothing is written.
    """
    folder = folder.resolve()
    if broken := differences(folder) + runlog.problems(folder):
        raise ValueError(f"{folder.name} is not archived, seal it first:\n" + "\n".join(broken))
    trust, demonstration = seal.trust_for(folder)
    public = [trust / name for name in statements.TRUSTED] if demonstration else []
    path, told = folder.with_name(f"{folder.name}.tar.zst"), folder.with_name(f"{folder.name}.tar.zst.sha256")
    told.unlink(missing_ok=True)
    log = runlog.until(folder).encode()
    with (
        runs.replacing(path) as temporary,
        pa.output_stream(temporary, compression="zstd") as stream,
        tarfile.open(fileobj=stream, mode="w|") as tar,
    ):
        tar.addfile(_entry(runlog.LOG, len(log)), io.BytesIO(log))
        for file in [*public, *runs.files_below(folder)]:
            with file.open("rb") as content:
                size = file.stat().st_size
                tar.addfile(_entry(file.relative_to(folder.parent).as_posix(), size), content)
    runs.write_text(told, f"{runs.digest(path)}  {path.name}\n")
    return path


def _entry(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    return entry


def restore(path: Path, target: Path) -> tuple[Path, list[str]]:
    """Unpack an archive into `target`, which must not exist, and prove it: digest, seal and log. Returns the run's
    folder and what verification of the sign-offs finds today (keys may have expired since).

    Only plain files are made, below `target`; it appears whole, when all is proved, or not at all. Raises `ValueError`
    for a file that is not what its `.sha256` says, no archive, an entry that is not allowed, or a run that fails.
    """
    told = path.with_name(f"{path.name}.sha256")
    if not told.is_file() or told.read_text(errors="replace") != f"{runs.digest(path)}  {path.name}\n":
        raise ValueError(f"{path.name} is not what {told.name} beside it says, or that is missing; fetch both again")
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target} is there already; give a folder that is not")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        try:
            with pa.input_stream(path, compression="zstd") as stream:
                name = _unpack(cast(BinaryIO, stream), temporary)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ValueError(f"{path.name} can't be unpacked: {error}") from None
        folder = temporary / name
        if broken := differences(folder) + runlog.problems(folder):
            raise ValueError(f"{path.name} does not hold a whole run:\n" + "\n".join(broken))
        problems = seal.verify(folder, seal.trust_for(folder)[0])
        temporary.chmod(0o755)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target / name, problems


def _unpack(stream: BinaryIO, place: Path) -> str:
    """Make every entry below `place`; returns the name of the one run. Raises `ValueError` at the first bad entry."""
    names: set[str] = set()
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for entry in tar:
            parts = PurePosixPath(entry.name).parts
            if not _PLAIN.fullmatch(entry.name) or entry.name != "/".join(parts) or {"..", "/"} & set(parts):
                raise ValueError(f"{entry.name!r}: a path out of the archive, or a name that can deceive")
            if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or entry.issparse():
                raise ValueError(f"{entry.name}: a link, a device or another thing that is no plain file")
            if entry.size > shutil.disk_usage(place).free:
                raise ValueError(f"{entry.name}: {entry.size:,} bytes do not fit on this disk")
            content, path = tar.extractfile(entry), place.joinpath(*parts)
            assert content is not None
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:  # an entry that comes twice is an error
                shutil.copyfileobj(content, file, 1 << 20)
            names.add(parts[0] if len(parts) > 1 else "")
    found = names - {"", ".demonstration"}
    if len(found) != 1:
        raise ValueError(f"one run is expected, there are: {', '.join(sorted(found)) or 'none'}")
    return found.pop()
