import os
import signal
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from stackpkg import runs
from stackpkg.data import engine

ENGINES = [("processes", 1), ("processes", 2), ("ray", 2)]


def longer(table: pa.Table, least: int, mark: str) -> pa.Table:
    """Rows of at least `least` characters, marked."""
    kept = table.filter(pc.greater_equal(pc.utf8_length(table["text"]), least))
    return kept.append_column("mark", pa.array([mark] * len(kept)))


def broken_on_two(table: pa.Table) -> pa.Table:
    if "2" in table["text"].to_pylist():
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a fault")  # an exception that needs its arguments
    return table


def killed_on_two(table: pa.Table) -> pa.Table:
    if "2" in table["text"].to_pylist():
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    return table


def counted(table: pa.Table, log: Path) -> pa.Table:
    with Path(f"{log}.calls").open("a") as stream:
        stream.write("x")
    return table


@pytest.fixture(scope="module", autouse=True)
def ray_ends(tmp_path_factory):
    """Workers of Ray import this module too; what Ray started for these tests ends with them."""
    quick = tmp_path_factory.mktemp("quick")  # each process of Ray imports jsonschema: spare it seconds of a grammar
    (quick / "rfc3987_syntax.py").write_text("raise ImportError\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(quick), *filter(None, sys.path)]))
        yield
        if ray := sys.modules.get("ray"):
            ray.shutdown()


@pytest.fixture
def parts(tmp_path):
    tables = [pa.table({"text": [str(k), "x" * k, "é" * k] * 50}) for k in range(6)]
    return [engine.write(tmp_path / "parts" / f"{k:05d}.parquet", table) for k, table in enumerate(tables)]


def test_the_same_bytes_with_any_engine_and_any_number_of_workers(parts, tmp_path, capfd):
    digests = set()
    for name, workers in ENGINES:
        made = engine.run(longer, parts, tmp_path / f"{name}{workers}", 3, "m", engine=name, workers=workers)
        assert [path.name for path in made] == [path.name for path in parts]
        digests.add(tuple(runs.digest(path) for path in made))
    assert len(digests) == 1 and len(set(digests.pop())) == 4  # of part 0, 1 and 2 nothing is left
    assert pq.read_table(made[5])["text"].to_pylist() == ["xxxxx", "ééééé"] * 50
    assert capfd.readouterr().out.count("[test_data_engine.longer] 6/6 parts") == 3


@pytest.mark.parametrize(("name", "workers"), ENGINES)
def test_an_exception_names_the_part_and_leaves_the_finished_ones(parts, tmp_path, name, workers):
    with pytest.raises(RuntimeError, match=r"broken_on_two failed on 00002.parquet: UnicodeDecodeError: .*a fault"):
        engine.run(broken_on_two, parts, tmp_path / "out", engine=name, workers=workers)
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert {"00000.parquet", "00000.key", "00001.parquet"} <= set(left) and "00002.parquet" not in left
    assert not [name for name in left if name.startswith(".")]


@pytest.mark.parametrize("name", ["processes", "ray"])
def test_a_killed_worker_is_said_and_a_second_run_does_the_rest(parts, tmp_path, name, monkeypatch):
    with pytest.raises(RuntimeError, match=r"a worker was killed.* parts left.*lower data.part_mb"):
        engine.run(killed_on_two, parts, tmp_path / "out", engine=name)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    monkeypatch.setattr(os, "kill", lambda *_: None)
    made = engine.run(killed_on_two, parts, tmp_path / "out", workers=1)
    assert [pq.read_table(path).equals(pq.read_table(part)) for path, part in zip(made, parts, strict=True)] == [
        True
    ] * 6
    assert before and all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())


def test_a_part_is_done_again_only_when_something_it_depends_on_changed(parts, tmp_path, monkeypatch):
    model, out = tmp_path / "model", tmp_path / "out"
    model.write_text("one")

    def calls(**options):
        Path(f"{model}.calls").write_text("")
        made = engine.run(counted, parts, out, model, workers=1, **options)
        return len(Path(f"{model}.calls").read_text()), made

    assert calls()[0] == 6 and calls()[0] == 0
    assert calls(key="another")[0] == 6 and calls(key="another")[0] == 0
    model.write_text("two")
    assert calls()[0] == 6
    engine.write(parts[3], pa.table({"text": ["new"]}))
    count, made = calls()
    assert count == 1 and pq.read_table(made[3])["text"].to_pylist() == ["new"]
    made[1].write_bytes(made[1].read_bytes()[:-1])
    made[4].unlink()
    assert calls()[0] == 2
    monkeypatch.setattr(engine.inspect, "getsource", lambda module: "a new version of the stage's module")
    assert calls()[0] == 6
    assert len(engine.run(counted, parts[:2], out, model, workers=1)) == 2 and len(list(out.iterdir())) == 4


def test_wrong_use_is_said(parts, tmp_path):
    with pytest.raises(ValueError, match="engine 'spark' is none of processes, ray"):
        engine.run(longer, parts, tmp_path / "out", engine="spark")
    with pytest.raises(ValueError, match="give another folder"):
        engine.run(longer, parts, tmp_path / "parts")


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(table, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine.pq, "write_table", full)
    with pytest.raises(OSError, match=r"parts/00000.parquet was not written \(No space left on device\)") as error:
        engine.write(tmp_path / "parts" / "00000.parquet", pa.table({"text": ["x"]}))
    assert error.value.errno == 28 and not list((tmp_path / "parts").iterdir())
