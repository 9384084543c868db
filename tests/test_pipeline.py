"""The runner on a small repository of its own: real papermill, real kernels, three tiny notebooks."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.sign import NotebookNotary
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from stackpkg import params, pipeline, runs

PACKAGE = Path(runs.__file__).parent
HEAD = """from stackpkg import params, runs{imports}
p = params.from_notebook(globals())
folder = runs.RunFolder(p.run)
with (runs.root() / "ran").open("a") as stream:
    stream.write("{number}\\n")"""
MAKE = """folder.inputs("raw/*.txt")
number = p.seed + sum(int(path.read_text()) for path in folder.matches("raw/*.txt"))
runs.write_json(folder / "data/number.json", number)
folder.outputs("data/number.json")"""
USE = """folder.inputs("data/number.json")
if (runs.root() / "slow").exists():
    runs.write_text(runs.root() / "kernel", str(os.getpid()))
    time.sleep(120)
limit = (runs.root() / "params/limit.txt").read_text()
worker = "stackpkg.launched"
print("[2/2] halfway", tools.FACTOR)
print("not progress")
runs.write_json(folder / "data/parity.json", [runs.read_json(folder / "data/number.json") % 2, tools.FACTOR])
folder.outputs("data/parity.json")"""
END = """folder.inputs("data/parity.json")
folder.record("30_end_run", parity=runs.read_json(folder / "data/parity.json")[0])"""

QUICK = (
    "def DataFrame(rows, columns):\n    return rows\n"  # stands in for pandas in the kernels, which then start sooner
)


def notebook(path: Path, code: str, parameters: str, imports: str = "", prose: str = "Why.") -> None:
    cells = [
        new_markdown_cell(prose),
        new_code_cell("# Parameters\n" + parameters, metadata={"tags": ["parameters"]}),
        new_code_cell(HEAD.format(number=path.name[:2], imports=imports)),
        new_code_cell(code),
    ]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
    made = new_notebook(cells=cells)
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(exist_ok=True)
    nbformat.write(made, path)


class Repository:
    def __init__(self, place: Path) -> None:
        self.root, self.folder = place, place / "outbox/demo"
        self.values: dict[str, Any] = {"run": "demo"}
        self.sealed: list[str] = []

    def write(self, **changed: str) -> None:
        """The notebooks anew; `changed` replaces the code, or adds to the prose, of one of them."""
        imports = {"use": "\nfrom stackpkg import tools\nimport os, time"}
        for stem, code, parameters in (
            ("10_make", MAKE, 'run = "lab"\nseed = 17\n'),
            ("20_use", USE, 'run = "lab"\nsweep = {}\n'),
            ("30_end_run", END, 'run = "lab"\n'),
        ):
            name = stem.split("_")[1]
            code, prose = changed.get(name, code), changed.get(f"{name}_prose", "Why.")
            notebook(self.root / f"notebooks/{stem}.ipynb", code, parameters, imports.get(name, ""), prose)

    def run(self, **options: Any) -> list[str]:
        """The numbers of the notebooks that were executed, as they themselves say."""
        (self.root / "ran").write_text("")
        self.log = io.StringIO()
        pipeline._uses.cache_clear()  # it caches for the life of a process, in which sources do not change
        self.result = pipeline.run(params.validate(self.values), self.log, **options)
        return self.executed()

    def executed(self) -> list[str]:
        return (self.root / "ran").read_text().split()

    def fails(self, error: str, **options: Any) -> list[str]:
        with pytest.raises(Exception, match=error):
            self.run(**options)
        return self.executed()

    def lock(self, stage: str) -> dict[str, Any]:
        return runs.read_json(self.folder / f"lock/{stage}.json")

    def command(self, *arguments: str) -> subprocess.Popen[str]:
        """`stackpkg run` in a process of its own."""
        profile = runs.write_text(self.root / "params/demo.yaml", "run: demo\n")
        # a shell's background job ignores SIGINT, and so would what it starts
        code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        code += "from stackpkg.cli import app; app()"
        return subprocess.Popen(
            [sys.executable, "-c", code, "run", str(profile), *arguments],
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a copy of the package whose three notebooks ran once; each test changes a copy of it."""
    repository = Repository(tmp_path_factory.mktemp("template"))
    shutil.copytree(PACKAGE, repository.root / "stackpkg", ignore=shutil.ignore_patterns("__pycache__"))
    runs.write_text(repository.root / "stackpkg/tools.py", "from stackpkg.deeper import FACTOR\n")
    runs.write_text(repository.root / "stackpkg/deeper.py", "FACTOR = 1\n")
    runs.write_text(repository.root / "stackpkg/launched.py", "")
    runs.write_text(repository.root / "params/limit.txt", "3")
    runs.write_text(repository.root / "pandas.py", QUICK)
    runs.write_text(repository.folder / "raw/a.txt", "1")
    repository.write()
    with pytest.MonkeyPatch.context() as patch:
        adopt(repository, patch)
        assert repository.run() == ["10", "20", "30"]
        assert repository.result == {"sealed": "demo"}
    return repository.root


def adopt(repository: Repository, patch: pytest.MonkeyPatch) -> None:
    """This process and the kernels it starts take `repository` for theirs; sealing is only noted."""
    patch.setattr(runs, "root", lambda: repository.root)
    patch.setattr(pipeline, "root", lambda: repository.root)
    patch.setattr(pipeline, "__file__", str(repository.root / "stackpkg/pipeline.py"))
    patch.setenv("PYTHONPATH", str(repository.root))

    def finish(folder: runs.RunFolder, p: params.Params) -> dict[str, str]:
        repository.sealed.append(folder.name)
        return {"sealed": folder.name}

    patch.setattr(pipeline, "finish", finish)


@pytest.fixture
def repo(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    repository = Repository(Path(shutil.copytree(template, tmp_path / "repository")))
    adopt(repository, monkeypatch)
    yield repository
    pipeline._uses.cache_clear()


def test_nothing_changed_nothing_runs_and_the_run_is_sealed_all_the_same(repo: Repository) -> None:
    before = {path: path.stat().st_mtime_ns for path in runs.files_below(repo.folder)}
    assert repo.run() == []
    assert repo.log.getvalue().count("unchanged") == 3
    assert {path: path.stat().st_mtime_ns for path in runs.files_below(repo.folder)} == before
    assert repo.sealed == ["demo"]


def test_prose_and_the_order_of_metadata_decide_nothing(repo: Repository) -> None:
    repo.write(make_prose="# Another telling\n\nwith `folder.inputs('x')` in it", use_prose="New.", end_prose="")
    assert repo.run() == []


def test_a_source_no_notebook_reaches_decides_nothing(repo: Repository) -> None:
    runs.write_text(repo.root / "stackpkg/cli.py", "changed = True\n")
    runs.write_text(repo.root / "params/demo.yaml", "run: demo\n")
    assert repo.run() == []


CHANGES: dict[str, tuple[Callable[[Repository], object], list[str]]] = {
    "code": (lambda repo: repo.write(end=END + "\nprint(1)"), ["30"]),
    "code that leaves the same bytes: early cut-off": (lambda repo: repo.write(make="# new\n" + MAKE), ["10"]),
    "code that leaves other bytes": (
        lambda repo: repo.write(make=MAKE.replace("p.seed +", "1 + p.seed +")),
        ["10", "20", "30"],
    ),
    "a declared parameter": (lambda repo: repo.values.update(seed=18), ["10", "20", "30"]),
    "a declared parameter, cut off one stage later": (lambda repo: repo.values.update(seed=19), ["10", "20"]),
    "another declared parameter": (lambda repo: repo.values.update(sweep={"trials": 9}), ["20"]),
    "a parameter nobody declares": (lambda repo: repo.values.update(training={"epoch_steps": 5}), []),
    "an input": (lambda repo: runs.write_text(repo.folder / "raw/a.txt", "2"), ["10", "20", "30"]),
    "an input written again with the same bytes": (lambda repo: runs.write_text(repo.folder / "raw/a.txt", "1"), []),
    "one more input that the pattern finds": (lambda repo: runs.write_text(repo.folder / "raw/b.txt", "0"), ["10"]),
    "a file beside the inputs": (lambda repo: runs.write_text(repo.folder / "raw/b.bin", "0"), []),
    "a package source": (lambda repo: runs.write_text(repo.root / "stackpkg/tools.py", "FACTOR = 1\n"), ["20"]),
    "a package source two imports away": (
        lambda repo: runs.write_text(repo.root / "stackpkg/deeper.py", "FACTOR = 2\n"),
        ["20", "30"],
    ),
    "a module that is only named, to be launched": (
        lambda repo: runs.write_text(repo.root / "stackpkg/launched.py", "x = 1\n"),
        ["20"],
    ),
    "the package itself": (
        lambda repo: runs.write_text(repo.root / "stackpkg/__init__.py", '__version__ = "9"\n'),
        ["10", "20", "30"],
    ),
    "a file of params/ that the code names": (
        lambda repo: runs.write_text(repo.root / "params/limit.txt", "4"),
        ["20"],
    ),
    "an output that was deleted": (lambda repo: (repo.folder / "data/number.json").unlink(), ["10"]),
    "an output that was changed": (lambda repo: runs.write_text(repo.folder / "data/parity.json", "[9, 1]"), ["20"]),
    "evidence that was deleted": (lambda repo: (repo.folder / "evidence/30_end_run.json").unlink(), ["30"]),
    "evidence that was changed": (
        lambda repo: runs.write_json(repo.folder / "evidence/30_end_run.json", {"parity": 0.5}),
        ["30"],
    ),
    "an executed notebook that was deleted": (lambda repo: (repo.folder / "nb/20_use.ipynb").unlink(), ["20"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_runs_exactly_what_it_must(repo: Repository, name: str) -> None:
    change, expected = CHANGES[name]
    change(repo)
    repo.run(dry_run=True)
    first = [line.split()[1][:2] for line in repo.log.getvalue().replace("[ ", "[").splitlines() if "would run" in line]
    assert first[:1] == expected[:1], "a dry run names the first stage that must run; it cannot know what that changes"
    assert repo.run() == expected
    assert repo.run() == [], "what ran must be valid afterwards"
    assert runs.read_json(repo.folder / "evidence/30_end_run.json")["parity"] in (0, 1)


def test_a_dry_run_writes_nothing(repo: Repository) -> None:
    repo.write(make=MAKE + "\nprint(1)")
    before = {path: path.stat().st_mtime_ns for path in runs.files_below(repo.folder)}
    assert repo.run(dry_run=True) == []
    assert "10_make                    would run: its code changed" in repo.log.getvalue()
    assert "20_use                     unchanged, unless a stage above remakes its inputs" in repo.log.getvalue()
    assert {path: path.stat().st_mtime_ns for path in runs.files_below(repo.folder)} == before
    assert repo.sealed == [] and repo.result is None
    repo.values["run"] = "another"
    assert repo.run(dry_run=True) == [] and not (repo.root / "outbox/another").exists()


def test_from_only_and_force(repo: Repository) -> None:
    repo.write(make=MAKE + "\nprint(1)", end=END + "\nprint(1)")
    assert repo.run(first="20") == ["30"]
    assert repo.sealed == [] and repo.result is None, "a run whose first stage is out of date must not be sealed"
    assert repo.log.getvalue().endswith("not sealed; these stages have to run first: 10_make\n")
    assert repo.run(only="10_make") == ["10"]
    assert repo.sealed == ["demo"]
    assert repo.run(only="20", force=True) == ["20"]
    assert repo.run(first="20_use", force=True) == ["20", "30"]
    assert repo.run(only="2") == []
    for options in ({"first": "40"}, {"only": "use"}):
        with pytest.raises(ValueError, match=r"0 notebooks start with .*; give one of: 10_make, 20_use, 30_end_run"):
            repo.run(**options)
    with pytest.raises(ValueError, match="--only 20 and --from 10: give one of them"):
        repo.run(first="10", only="20")
    assert repo.run(last="20", force=True) == ["10", "20"]
    with pytest.raises(ValueError, match="--from 30 lies behind --to 20"):
        repo.run(first="30", last="20")


def test_an_executed_notebook_tells_the_parameters_and_no_path_of_this_machine(repo: Repository) -> None:
    made = nbformat.read(repo.folder / "nb/10_make.ipynb", as_version=4)
    nbformat.validate(made)
    assert NotebookNotary().check_signature(made), "JupyterLab would not show its figures"
    injected = next(cell for cell in made.cells if "injected-parameters" in cell.metadata.get("tags", []))
    assert params.assigned(injected.source) == {"run": "demo", "seed": 17}
    assert made.metadata["papermill"]["input_path"] == made.metadata["papermill"]["output_path"] == "10_make.ipynb"
    template = runs.read_json(repo.folder / "lock/10_make.json")
    for path in runs.files_below(repo.folder):
        text = path.read_text()
        assert "/tmp" not in text and str(Path.home()) not in text and str(Path(sys.prefix)) not in text, path
    assert template["state"] == "ok" and "pid" not in template
    assert list(template["outputs"]) == ["data/number.json"]


def test_in_a_pipe_a_stage_is_one_line(repo: Repository) -> None:
    repo.run(only="20", force=True)
    assert re.fullmatch(r"\[ 1/1\] 20_use {21}ok in [\d.]+ s \(forced\)\n", repo.log.getvalue())


def test_a_failed_notebook_is_kept_and_the_next_run_resumes_at_it(repo: Repository) -> None:
    repo.write(make="# new\n" + MAKE, use=USE.replace("limit =", "1 / 0\nlimit ="))
    where = r'20_use failed in code cell 4 of 4: folder\.inputs\("data/number\.json"\)'
    told = (
        where
        + r"\n  cause  ZeroDivisionError: division by zero\n  see    outbox/demo/nb/20_use\.ipynb.*\n  next   mend"
    )
    assert repo.fails(told) == ["10", "20"]
    lock = repo.lock("20_use")
    assert lock["cell"].startswith("code cell 4 of 4")
    assert lock["state"] == "failed" and "ZeroDivisionError: division by zero" in lock["error"]
    kept = nbformat.read(repo.folder / "nb/20_use.ipynb", as_version=4)
    assert any(
        out.output_type == "error" and out.ename == "ZeroDivisionError"
        for c in kept.cells
        for out in c.get("outputs", [])
    )
    assert "/" not in kept.metadata["papermill"]["output_path"]
    assert repo.sealed == []
    assert repo.fails("ZeroDivisionError") == ["20"], "a failed stage is tried again, the one before it is not"
    assert repo.run(only="30") == [] and repo.sealed == [], "sealed over a failed stage"
    repo.write(make="# new\n" + MAKE)
    assert repo.run() == ["20"]
    assert re.search(r"20_use {21}ok in [\d.]+ s \(failed before\)", repo.log.getvalue())
    assert repo.sealed == ["demo"]


def test_an_acceptance_check_that_fails_fails_the_stage(repo: Repository) -> None:
    repo.write(end=END + '\nassert p.seed == 3, f"seed is {p.seed}, must be 3"')
    assert repo.fails("seed is 17, must be 3") == ["30"]
    assert repo.lock("30_end_run")["state"] == "failed"


def test_a_stage_that_does_not_write_its_output_fails(repo: Repository) -> None:
    (repo.folder / "data/parity.json").unlink()
    repo.write(use=USE.replace("runs.write_json(", "print("))
    repo.fails("outbox/demo/data/parity.json was not written by this notebook")
    assert repo.lock("20_use")["state"] == "failed"


def test_a_misspelt_parameter_of_a_notebook_is_an_error(repo: Repository) -> None:
    path = repo.root / "notebooks/10_make.ipynb"
    notebook(path, MAKE, 'run = "lab"\nseed = 17\n')
    runs.write_text(path, path.read_text().replace("seed = 17", "sead = 17"))
    repo.fails("sead")


def test_a_dead_kernel_is_a_failure_whatever_papermill_writes(repo: Repository) -> None:
    repo.write(use=USE.replace("limit =", "os.kill(os.getpid(), 9)\nlimit ="))
    repo.fails(r"(?is)code cell 4 of 4.*kernel died.*next   the kernel died, most often for want of memory")
    lock = repo.lock("20_use")
    assert lock["state"] == "failed" and "DeadKernelError" in lock["error"] and "outputs" not in lock
    assert (repo.folder / "nb/20_use.ipynb").exists()
    repo.write()
    assert repo.run() == ["20"]


# --- processes


def wait_for(what: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def slow(repo: Repository) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`stackpkg run` in the middle of 20_use, and the process of its kernel."""
    (repo.root / "ran").write_text("")
    runs.write_text(repo.root / "slow", "")
    runs.write_text(repo.folder / "raw/a.txt", "2")
    process = repo.command()
    try:
        wait_for((repo.root / "kernel").exists)
        kernel = int((repo.root / "kernel").read_text())
        assert alive(kernel)
        yield process, kernel
    finally:
        process.kill()
        process.wait()


def test_two_runs_on_one_folder_are_refused(repo: Repository, slow: tuple[subprocess.Popen[str], int]) -> None:
    process, kernel = slow
    before = {path: path.stat().st_mtime_ns for path in runs.files_below(repo.folder)}
    with pytest.raises(BlockingIOError, match=f"run 'demo' is being executed by process {process.pid} on .*; wait"):
        repo.run()
    second = repo.command("--force")
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 1 and f"executed by process {process.pid}" in said
    assert "executed notebook is kept" not in said, "nothing was executed"
    assert {path: path.stat().st_mtime_ns for path in runs.files_below(repo.folder)} == before
    assert process.poll() is None and alive(kernel), "the refused runs disturbed the first"
    repo.values["run"] = "other"
    runs.write_text(repo.root / "outbox/other/raw/a.txt", "1")
    assert repo.run(only="10") == ["10"], "another folder is free"


def test_after_kill_9_the_next_run_goes_on_and_no_kernel_is_left(
    repo: Repository, slow: tuple[subprocess.Popen[str], int]
) -> None:
    process, kernel = slow
    assert pipeline.lock_of(runs.RunFolder("demo"), "20_use")["state"] == "running"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert pipeline.lock_of(runs.RunFolder("demo"), "20_use")["state"] == "cut off", "what status says of it"
    lock = repo.lock("20_use")
    assert lock["state"] == "running" and lock["pid"] == process.pid
    wait_for(lambda: not alive(kernel), 20)
    assert repo.executed() == ["10", "20"]
    (repo.root / "slow").unlink()
    assert repo.run() == ["20", "30"]
    assert "10_make                    unchanged" in repo.log.getvalue()
    assert re.search(r"20_use {21}ok in [\d.]+ s \(was cut off\)", repo.log.getvalue())
    assert repo.sealed == ["demo"]
    assert runs.read_json(repo.folder / "evidence/30_end_run.json") == {"parity": 1}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_interrupting_stops_the_kernel_and_says_how_to_go_on(
    repo: Repository, slow: tuple[subprocess.Popen[str], int], number: signal.Signals, status: int
) -> None:
    process, kernel = slow
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert said.splitlines()[-1] == "interrupted; run the same command again to go on where it stopped"
    wait_for(lambda: not alive(kernel), 20)
    assert repo.lock("20_use")["state"] == "failed"
    (repo.root / "slow").unlink()
    assert repo.run() == ["20", "30"]


def test_the_command_seals_signs_and_verifies(repo: Repository) -> None:
    """The whole way through a process of its own, with the real seal."""
    shutil.rmtree(repo.folder / "lock")
    runs.write_text(repo.root / "params/demo.yaml", "run: demo\ngovernance: {demonstration_keys: true}\n")
    code = f"import sys; sys.argv = ['stackpkg', 'run', {str(repo.root / 'params/demo.yaml')!r}]\n"
    code += "from stackpkg.cli import app; app()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=os.sep, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\[ 1/3\] 10_make {20}ok in [\d.]+ s \(never ran\)", done.stdout)
    assert "sealed outbox/demo, manifest " in done.stdout and "DEMONSTRATION KEYS: not an approval" in done.stdout
    assert (repo.folder / "SHA256SUMS").exists() and len(list((repo.folder / "signoffs").iterdir())) == 6
