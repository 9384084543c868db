"""The package as a whole: its size, the direction of its imports, and that the files of the project agree."""

import ast
import importlib
import io
import re
import sys
import tokenize
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from stackpkg.cli import app

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "stackpkg").rglob("*.py"))
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = re.compile(r"([\w.-]+)==([\w.!]+)$")
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lock() -> dict[str, str]:
    lines = (ROOT / "requirements.lock.txt").read_text().splitlines()
    found = [PINNED.match(line) for line in lines if line and not line.startswith("#")]
    assert all(found), "a line of the lock is no exact pin"
    return {canonicalize_name(match[1]): match[2] for match in found if match}


# --- size


def code_lines(source: str) -> int:
    """Lines with code on them, as cloc counts: no blank lines, no comments, no docstrings."""
    used: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            used.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if ast.get_docstring(node, clean=False) is not None:
                used -= set(range(first.lineno, (first.end_lineno or 0) + 1))
    return len(used)


def test_the_counter_counts_as_cloc_does() -> None:
    source = '"""Doc.\n\nMore."""\n\n# comment\nx = 1  # y\n\n\n'
    source += 'def f():\n    """Doc."""\n    s = """a\n\n    b"""\n    return s\n'
    assert code_lines(source) == 6


def test_the_package_stays_small() -> None:
    sizes = {name: code_lines(path.read_text()) for name, path in MODULES.items()}
    assert sum(sizes.values()) < 16_000, dict(sorted(sizes.items(), key=lambda item: -item[1])[:10])


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_short_and_says_what_it_is(name: str) -> None:
    text = MODULES[name].read_text()
    assert len(text.splitlines()) < 300
    assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{name} has no docstring"


# --- imports


def imported(source: str, *, everywhere: bool) -> set[str]:
    """Names of the modules that `source` imports, at its top level or everywhere; blocks for type checkers excepted."""
    tree = ast.parse(source)
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if typing_only or (function and not everywhere):
            skipped.update(inner for inner in ast.walk(node) if inner is not node)
    names: set[str] = set()
    for node in set(ast.walk(tree)) - skipped:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import: the runner, which looks for changed sources, does not follow it"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def reached(name: str, *, everywhere: bool) -> set[str]:
    """Modules of the package that importing `name` imports directly; a module brings its parents along."""
    names = imported(MODULES[name].read_text(), everywhere=everywhere) & set(MODULES)
    parents = {".".join(found.split(".")[:n]) for found in names for n in range(1, found.count(".") + 1)}
    return (names | parents) - {name} - {".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 1)}


@pytest.mark.parametrize("everywhere", [False, True], ids=["at the top", "anywhere"])
def test_no_circle_among_the_modules(everywhere: bool) -> None:
    graph = {name: reached(name, everywhere=everywhere) for name in MODULES}
    while free := {name for name, used in graph.items() if not used}:
        graph = {name: used - free for name, used in graph.items() if name not in free}
    assert not graph, f"these import each other, or what does: {graph}"


ROOMS = ["data", "model", "objectives", "telemetry", "evaluation", "training", "governance"]


def test_a_room_never_reaches_forward() -> None:
    """Data flows one way, and so do imports; what the whole stack shares lies below the rooms."""
    for name in MODULES:
        room = name.split(".")[1] if name.count(".") else ""
        if room in ROOMS:
            used = {other.split(".")[1] for other in reached(name, everywhere=True) if other.count(".")}
            later = set(ROOMS[ROOMS.index(room) + 1 :]) & used
            assert not later, f"{name} imports {later}"
            assert not used & {"pipeline", "cli", "book", "sweep"}, f"{name} imports what stands above it"


def test_data_needs_no_torch() -> None:
    waiting, seen = {name for name in MODULES if name.startswith("stackpkg.data")}, set()
    assert len(waiting) > 5
    while waiting:
        name = waiting.pop()
        seen.add(name)
        roots = {found.split(".")[0] for found in imported(MODULES[name].read_text(), everywhere=True)}
        assert not roots & {"torch", "transformers", "accelerate"}, f"{name} imports {roots}"
        waiting |= reached(name, everywhere=True) - seen


def test_every_import_is_a_declared_dependency() -> None:
    distributions = metadata.packages_distributions()
    extras = PROJECT["optional-dependencies"]  # asked for by a profile or a command, never by an import at the top
    optional = ("cluster", "governance", "lm-eval", "signing")
    asked = [*PROJECT["dependencies"], *(line for name in optional for line in extras[name])]
    declared = {canonicalize_name(Requirement(line).name) for line in asked}
    missing = set()
    for name, path in MODULES.items():
        for module in {found.split(".")[0] for found in imported(path.read_text(), everywhere=True)}:
            ours = module in sys.stdlib_module_names or module == "stackpkg"
            owners = distributions.get(module, [module])  # an extra need not be installed
            if not ours and not {canonicalize_name(owner) for owner in owners} & declared:
                missing.add((module, name))
    assert not missing, "imported, but pyproject.toml does not declare it"


def test_nothing_unsafe_is_called() -> None:
    for name, path in MODULES.items():
        text = path.read_text()
        for call in ("pickle", "yaml.load(", "yaml.unsafe_load", "eval(", "exec(", "shell=True", "weights_only=False"):
            for line in text.splitlines():
                assert not re.search(rf"(?<![\w.]){re.escape(call)}", line), f"{name}: {line}"
        loads = len(re.findall(r"\btorch\.load\(", text))
        assert loads == text.count("weights_only=True"), f"{name}: torch.load without weights_only=True"


# --- what the repository says about itself

TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".sh", ".ipynb", ".j2", ""}
NOT_OURS = {".git", ".venv", "outbox", "_build", "__pycache__", ".hypothesis", ".mypy_cache", ".ruff_cache"}


def own_files() -> list[Path]:
    below = (path for path in ROOT.rglob("*") if not NOT_OURS & set(path.relative_to(ROOT).parts))
    return [path for path in below if path.is_file() and path.suffix in TEXT and ".pytest_cache" not in path.parts]


def test_no_registry_and_no_path_of_a_machine_is_named() -> None:
    registry = re.compile(r"https?://[\w.-]*(pypi|pythonhosted|anaconda|conda\.io|npmjs|artifactory|nexus)", re.I)
    place = re.compile(rf"(?<![\w.])(/(home|Users|root)|{re.escape(str(ROOT))})/")
    files = own_files()
    assert len(files) > 80
    for path in files:
        text = path.read_text(encoding="utf-8")
        if path != Path(__file__):
            assert not registry.search(text) and not place.search(text), path


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    ".ci/run",
    ".github/workflows/book.yml",
    "outbox/README.md",
    "governance/README.md",
]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page: str) -> None:
    """Commands stand in backticks or indented by four; paths with capitals only are placeholders."""
    text = (ROOT / page).read_text()
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert set(re.findall(r"(?:^ {4,}|`|exec |run: )make (\w+)", text, re.MULTILINE)) <= makefile_targets()
    assert set(re.findall(r"(?:^ {4,}|`|/)stackpkg (\w+)", text, re.MULTILINE)) <= commands
    for path in re.findall(r"(?<![\w/])((?:params|notebooks|governance|book)/[\w./-]+\w)", text):
        if not re.search(r"\b[A-Z]{2,}[_.]", path) and "_build" not in path:
            assert (ROOT / path).exists(), f"{page} names {path}"


def test_the_readme_gives_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert "    make run " in text and "    make test " in text
    assert {"run", "test", "lab", "book", "clean"} <= makefile_targets()


# --- the environment


def test_torch_is_pinned_the_same_everywhere() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
    assert pip == ["torch==2.13.0", "-r requirements.lock.txt", "-e ."]
    assert "pip install --quiet --disable-pip-version-check torch==2.13.0" in (ROOT / "Makefile").read_text()
    assert lock()["torch"] == "2.13.0"
    assert "python=3.11" in conda["dependencies"] and PROJECT["requires-python"] == ">=3.11,<3.12"


def test_the_lock_holds_every_dependency_at_a_version_its_range_allows() -> None:
    locked = {name: lines for name, lines in PROJECT["optional-dependencies"].items() if name != "lm-eval"}
    extras = [line for lines in locked.values() for line in lines]  # that one is not installed beside the lock
    for line in [*PROJECT["dependencies"], *extras]:
        wanted = Requirement(line)
        version = lock().get(canonicalize_name(wanted.name))
        assert version, f"{wanted.name} is not in the lock"
        assert wanted.specifier.contains(version), f"{line} does not allow {version}"


def test_the_lock_is_complete_and_consistent() -> None:
    """What each locked package requires is locked too, at a version that it allows."""
    pinned = lock()
    for name in pinned:
        for line in metadata.requires(name) or []:
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                version = pinned.get(canonicalize_name(wanted.name))
                assert version, f"{name} requires {wanted.name}, which is not in the lock"
                assert wanted.specifier.contains(version, prereleases=True), (
                    f"{name} requires {line}, locked: {version}"
                )


def test_this_environment_is_the_lock() -> None:
    wrong = {name: metadata.version(name) for name, version in lock().items() if metadata.version(name) != version}
    wrong = {name: version for name, version in wrong.items() if version.split("+")[0] != lock()[name]}
    assert not wrong, f"installed, but not as the lock says: {wrong}; run: make env"


def test_every_loss_has_a_paper_a_function_and_a_test() -> None:
    lines = (ROOT / "book/papers.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:5]] for line in lines if line.startswith("| ")][2:]
    assert len(rows) > 10
    for loss, paper, function, test in rows:
        module, _, name = function.rpartition(".")
        home, _, case = test.partition(".")
        assert re.search(r"\b(eqs?\.|sec\.|alg\.|ours\b)", paper), f"{loss}: where in the paper, or ours"
        assert callable(getattr(importlib.import_module(f"stackpkg.{module}"), name)), loss
        assert f"def {case}(" in (ROOT / f"tests/{home}.py").read_text(encoding="utf-8"), f"{loss}: {test}"
    losses = {function.split(".")[-1] for _, _, function, _ in rows}
    source = (ROOT / "stackpkg/objectives/losses.py").read_text(encoding="utf-8")
    assert set(re.findall(r"^def (\w+)", source, re.MULTILINE)) - {"balance_divergence"} <= losses
