"""The notebooks: their anatomy, and one execution of the whole smoke profile with everything it must leave behind."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat import NotebookNode

from stackpkg import interactive, params, pipeline, runs
from stackpkg.governance import checklist, seal

ROOT = Path(__file__).parents[1]
NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
REQUIRED = ["Purpose", "Steps", "Acceptance checks", "What a reviewer signs"]
VERBS = "check curate track schedule prepare configure launch survive compose train promote sweep evaluate watch drill"
every = pytest.mark.parametrize("name", NOTEBOOKS)


def code(name: str) -> list[NotebookNode]:
    return [cell for cell in NOTEBOOKS[name].cells if cell.cell_type == "code"]


def tagged(name: str, tag: str) -> list[NotebookNode]:
    return [cell for cell in NOTEBOOKS[name].cells if tag in cell.metadata.get("tags", [])]


def imports(source: str) -> bool:
    return any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(ast.parse(source)))


# --- anatomy


def test_the_notebooks_of_the_design_are_all_there() -> None:
    assert len(NOTEBOOKS) >= 17
    assert list(NOTEBOOKS) == [stage.name for stage in pipeline.stages()], "a notebook that the runner does not see"


@every
def test_name_title_and_promise(name: str) -> None:
    verb = re.fullmatch(r"\d\d_([a-z]+)(_[a-z]+)*", name)
    assert verb and verb[1] in {*VERBS.split(), "archive", "sign"}
    first = NOTEBOOKS[name].cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# \w[^\n]*\n+(> [^\n]+\n?)+", first.source), "a title, then the promise as a quotation"


def test_the_overview_leads_to_every_notebook_with_its_promise() -> None:
    page = (ROOT / "notebooks/README.md").read_text(encoding="utf-8")
    found = dict(re.findall(r"^\| \[(\w+)\]\(\1\.ipynb\) \| (.+) \|$", page, re.MULTILINE))
    said = {name: [line.lstrip("> ") for line in notebook.cells[0].source.splitlines() if line.startswith(">")]
            for name, notebook in NOTEBOOKS.items()}  # fmt: skip
    assert found == {name: " ".join(lines) for name, lines in said.items()}


@every
def test_headings_stand_in_order(name: str) -> None:
    markdown = [cell.source for cell in NOTEBOOKS[name].cells if cell.cell_type == "markdown"]
    text = re.sub(r"```.*?```", "", "\n".join(markdown), flags=re.DOTALL)
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert [heading for heading in headings if heading not in ("Inputs", "Outputs")] == REQUIRED
    stage = pipeline.Stage.read(ROOT / f"notebooks/{name}.ipynb")
    assert ("Inputs" in headings) == bool(stage.inputs) and ("Outputs" in headings) == (len(stage.outputs) > 1)
    order = ["Purpose", "Inputs", "Steps", "Outputs", "Acceptance checks", "What a reviewer signs"]
    assert headings == [heading for heading in order if heading in headings]
    sections = re.split(r"^## .+$", text, flags=re.MULTILINE)[1:]
    assert len(sections[0].split()) >= 40, "the purpose says too little"
    assert len(sections[-1].split()) >= 8, "the reviewer is told too little"
    assert text.count("\n### ") >= 2, "steps need headings of their own"


@every
def test_the_parameters_cell(name: str) -> None:
    cell = code(name)[0]
    assert tagged(name, "parameters") == [cell], "exactly one, and the first code cell"
    assert cell.source.splitlines()[0] == "# Parameters"
    for node in ast.parse(cell.source).body:
        assert isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name), "assignments of literals only"
        lines = cell.source.splitlines()[node.lineno - 1 : node.end_lineno]
        assert any(re.search(r"  # (?!fmt:)\w", line) for line in lines), f"{node.targets[0].id} has no comment"
    values = params.assigned(cell.source)
    assert set(values) <= set(params.Params.model_fields) and "run" in values
    assert params.validate(values).run == "lab"


@every
def test_what_the_code_asks_of_the_parameters_is_declared(name: str) -> None:
    """What a notebook does not declare, papermill does not inject, and the default would silently be used."""
    declared = params.assigned(code(name)[0].source)
    tree = ast.parse("\n".join(cell.source for cell in code(name)))
    used = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "p"]
    used = ["curriculum" if attribute == "max_steps" else attribute for attribute in used]
    assert set(used) & set(params.Params.model_fields) <= set(declared)


@every
@pytest.mark.parametrize("profile", ["smoke", "dry_run", "cluster", "one process"])
def test_the_declared_part_of_a_valid_profile_is_valid(name: str, profile: str) -> None:
    if profile == "one process":
        p = params.validate({"layout": {"processes": 1, "fsdp": 1}, "training": {"batch_tokens": 768}})
    else:
        p = params.load(ROOT / f"params/{profile}.yaml")
    declared = params.assigned(code(name)[0].source)
    part = params.validate({key: value for key, value in p.model_dump(mode="json").items() if key in declared})
    assert {key: getattr(part, key) for key in declared} == {key: getattr(p, key) for key in declared}


OF_ITS_OWN = {"run": "what JupyterLab's reader makes is theirs, and no run of the profile is overwritten by it"}


@every
def test_run_all_gets_the_numbers_of_the_smoke_profile(name: str) -> None:
    """Only the profile is run to its end each time; defaults that differ from it would fail where nobody looks."""
    given, profile = params.assigned(code(name)[0].source), params.load(ROOT / "params/smoke.yaml")
    made = params.validate(given)
    differing = {key for key in given if getattr(made, key) != getattr(profile, key)}
    assert differing == set(OF_ITS_OWN), f"differs from params/smoke.yaml: {sorted(differing - set(OF_ITS_OWN))}"


@every
def test_one_import_cell_right_after_the_parameters(name: str) -> None:
    assert [number for number, cell in enumerate(code(name)) if imports(cell.source)] == [1]
    assert all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(code(name)[1].source).body), (
        "the import cell does something else"
    )
    assert "p = params.from_notebook(globals())" in code(name)[2].source


@every
def test_inputs_and_outputs_are_literal(name: str) -> None:
    calls = [
        node
        for cell in code(name)
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("inputs", "outputs")
    ]
    for call in calls:
        assert ast.unparse(call.func.value) == "folder" and call.args and not call.keywords
        for argument in call.args:
            assert isinstance(argument, ast.Constant) and isinstance(argument.value, str), ast.unparse(call)
            assert not argument.value.startswith(("/", "..")) and "evidence/" + name not in argument.value


@every
def test_acceptance_checks_assert(name: str) -> None:
    cells = tagged(name, "accept")
    assert cells, "no acceptance check"
    for cell in cells:
        found = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Assert)]
        assert found and all(node.msg is not None for node in found), "an assertion must say the numbers"
    names = [cell.metadata.get("tags", []) for cell in NOTEBOOKS[name].cells]
    headings = [
        re.search("^## Acceptance checks$", cell.source, re.MULTILINE) is not None for cell in NOTEBOOKS[name].cells
    ]
    first = headings.index(True)
    assert min(number for number, tags in enumerate(names) if "accept" in tags) > first
    recorded = re.findall(r'folder\.record\(\s*"(\w+)"', "\n".join(cell.source for cell in code(name)))
    assert recorded == [name]


@every
def test_cells_are_short(name: str) -> None:
    lengths = [len(cell.source.splitlines()) for cell in code(name)]
    assert max(lengths) <= 40 and statistics.median(lengths) <= 12
    for cell in code(name):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 15, f"{node.name} belongs into the package"


@every
def test_the_source_is_stripped_and_its_kernel_is_python3(name: str) -> None:
    notebook = NOTEBOOKS[name]
    nbformat.validate(notebook)
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    identifiers = [cell.id for cell in notebook.cells]
    assert len(set(identifiers)) == len(identifiers)
    for cell in code(name):
        assert cell.outputs == [] and cell.execution_count is None
        assert set(cell.metadata) <= {"tags"}


def test_inputs_come_from_earlier_notebooks_and_never_from_later_ones() -> None:
    """An input that a later notebook writes would run its reader again and again."""
    stages = pipeline.stages()
    for number, stage in enumerate(stages):
        earlier = [made for before in stages[:number] for made in (*before.outputs, f"nb/{before.name}.ipynb")]
        later = [made for after in stages[number:] for made in (*after.outputs, f"nb/{after.name}.ipynb")]
        for wanted in stage.inputs:
            assert any(fnmatch(made, wanted) for made in earlier), f"{stage.name}: nobody makes {wanted}"
            clash = [made for made in later if fnmatch(made, wanted) or fnmatch(wanted, made)]
            assert not clash, f"{stage.name} reads {wanted}, which is written at or after it"


def test_every_line_of_the_checklist_has_a_notebook_and_every_notebook_a_line() -> None:
    items = checklist.definitions()
    assert len(items) == 24
    for item in items:
        assert item.notebooks and {*item.notebooks, *(check.evidence for check in item.checks)} <= set(NOTEBOOKS)
    assert {name for item in items for name in item.notebooks} == set(NOTEBOOKS)


def test_a_parameter_that_is_a_limit_of_the_checklist_is_declared_where_it_is_evaluated() -> None:
    limits = [str(check.limit) for item in checklist.definitions() for check in item.checks]
    sections = {limit.split(".")[1] for limit in limits if limit.startswith("params.")}
    sections = {"curriculum" if section == "max_steps" else section for section in sections}
    assert sections <= set(params.assigned(code("90_sign_off")[0].source))


# what the stream reads, and what a job computes with and where; see `launch.WHERE` for what changes no number
STREAM = {"run", "seed", "data", "curriculum", "auxiliary", "training", "layout", "evaluation", "retrieval"}
JOB = {*params.Params.model_fields} - {"sweep", "governance"}


@every
def test_what_is_streamed_or_launched_gets_the_whole_profile(name: str) -> None:
    """A section that the parameters cell does not declare is not injected: the notebook would run with its defaults."""
    stage, source = pipeline.Stage.read(ROOT / f"notebooks/{name}.ipynb"), "\n".join(c.source for c in code(name))
    if "launch.launch(" in source or "sweeps.run(" in source:
        assert stage.parameters >= JOB, f"not declared: {sorted(JOB - stage.parameters)}"
    if "Stream(" in source and name[:2] > "13":
        assert stage.parameters >= STREAM, f"not declared: {sorted(STREAM - stage.parameters)}"


# --- the smoke profile, executed once

RUN = "test-smoke"


class Smoke:
    """The run, and what its first execution said."""

    def __init__(self, p: params.Params, sealed: dict[str, object] | None) -> None:
        self.p, self.sealed, self.folder = p, sealed, runs.RunFolder(p.run)
        self.path = self.folder.path
        self.trust, self.demonstration = seal.trust_for(self.path)

    def problems(self) -> list[str]:
        return seal.verify(self.path, self.trust)


@pytest.fixture(scope="session")
def smoke(request: pytest.FixtureRequest) -> Smoke:
    """Executes every notebook of the smoke profile from nothing; the run stays in outbox/ to be looked at."""
    outbox = runs.root() / "outbox"
    for old in (outbox / RUN, outbox / ".demonstration" / RUN, outbox / ".previous" / RUN):
        shutil.rmtree(old, ignore_errors=True)
    values = yaml.safe_load((ROOT / "params/smoke.yaml").read_text())
    p = params.validate(values | {"run": RUN})
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():  # four minutes: show how far it is
        sys.stdout.write("\n")
        sealed = pipeline.run(p, sys.stdout)
    return Smoke(p, sealed)


@pytest.fixture
def untouched(smoke: Smoke) -> Iterator[Smoke]:
    """The run; whatever a test does to it, it must verify afterwards."""
    assert smoke.problems() == []
    yield smoke
    assert smoke.problems() == []


@pytest.mark.pipeline
def test_every_stage_ended_well_and_the_run_is_sealed(smoke: Smoke) -> None:
    states = {stage.name: pipeline.lock_of(smoke.folder, stage.name)["state"] for stage in pipeline.stages()}
    assert states == dict.fromkeys(NOTEBOOKS, "ok")
    assert {path.stem for path in smoke.folder.matches("nb/*.ipynb")} == set(NOTEBOOKS)
    assert smoke.sealed and smoke.sealed["problems"] == [] and smoke.sealed["notice"] == seal.LOUD
    assert runs.digest(smoke.path / "SHA256SUMS") == smoke.sealed["manifest_sha256"]
    for path in smoke.folder.matches("nb/*.ipynb"):
        errors = [o for c in nbformat.read(path, 4).cells for o in c.get("outputs", []) if o.output_type == "error"]
        assert not errors, path.name


def command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:  # it ended meanwhile
        return ""


@pytest.mark.pipeline
def test_no_process_is_left_behind(smoke: Smoke) -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not [pid for pid in children if "ipykernel" in command_line(pid)], "a kernel outlived its notebook"
    others = [path.name for path in Path("/proc").glob("[0-9]*") if path.name != str(os.getpid())]
    assert not [pid for pid in others if f"outbox/{RUN}" in command_line(pid)], "a rank outlived its notebook"


@pytest.mark.pipeline
def test_a_second_run_executes_nothing_and_changes_no_byte(untouched: Smoke) -> None:
    before = {path: path.stat().st_mtime_ns for path in runs.files_below(untouched.path)}
    manifest = (untouched.path / "SHA256SUMS").read_bytes()
    for stage in pipeline.stages():
        assert pipeline.reason_to_run(stage, untouched.p, untouched.folder) == "", stage.name
    assert pipeline.run(untouched.p, sys.stdout) == untouched.sealed
    assert (untouched.path / "SHA256SUMS").read_bytes() == manifest
    assert {path: path.stat().st_mtime_ns for path in runs.files_below(untouched.path)} == before


@pytest.mark.pipeline
def test_no_item_of_the_checklist_is_red_but_for_what_twelve_steps_and_one_seed_can_not_show(smoke: Smoke) -> None:
    items = checklist.read(smoke.folder)
    assert len(items) == 24
    red = {item["id"]: item["reasons"] for item in items if item["status"] == "red"}
    for reason in red.pop("V3", []):  # the limits are the specification's, whatever a profile asks for
        assert re.match("40_evaluate: (precision_at_k|router_entropy_max) is 0", reason)
    assert red.pop("A3") == ["40_evaluate: control_seeds is 1, must be >= 3.0"]
    assert red.pop("V2") == ["33_sweep_loss_weights: seeds is 1, must be >= 3.0"]
    assert not red
    assert all(item["reasons"] for item in items if item["status"] == "amber")
    for item in items:
        assert item["files"] or item["status"] != "green"
        for name, sha in item["files"].items():
            assert runs.digest(smoke.path / name) == sha, (
                f"{item['id']}: {name} is not what the checklist was made from"
            )


@pytest.mark.pipeline
def test_the_job_was_launched_with_the_profile(smoke: Smoke) -> None:
    job = runs.read_json(smoke.path / "checkpoints/train/job.json")["params"]
    profile = smoke.p.model_dump(mode="json")
    assert {name: value for name, value in job.items() if name in JOB} == {name: profile[name] for name in JOB}


@pytest.mark.pipeline
def test_each_kind_of_spreading_was_launched(smoke: Smoke) -> None:
    found = smoke.folder.evidence("21_launch_distributed")
    assert (found["kinds_launched"], found["kinds_refused"]) == (3, 0)
    assert 0 < found["kinds_max_difference"] < 1e-4


@pytest.mark.pipeline
def test_each_figure_carries_its_words(smoke: Smoke) -> None:
    cells = [(path.name, cell) for path in smoke.folder.matches("nb/*.ipynb") for cell in nbformat.read(path, 4).cells]
    outputs = [(name, output.get("data", {})) for name, cell in cells for output in cell.get("outputs", [])]
    begun = [
        (name, cell) for name, cell in cells if re.search(r"^[\w, ()]+ = plt\.(subplots|figure)", cell.source, re.M)
    ]
    lost = [f"{name}: {cell.source}" for name, cell in begun if "image/png" not in str(cell.get("outputs"))]
    assert len(begun) > 10 and not lost, lost
    figures = [(name, data["text/plain"]) for name, data in outputs if "image/png" in data]
    assert len(figures) > 20 and not [said for said in figures if said[1].startswith("<Figure")]
    drawn = {name for name, data in outputs if interactive.KIND in data}
    assert drawn >= {"31_train.ipynb", "40_evaluate.ipynb", "50_watch_telemetry.ipynb"}


@pytest.mark.pipeline
def test_evidence_is_strict_json_of_every_notebook(smoke: Smoke) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    evidence = smoke.folder.matches("evidence/*.json")
    assert {path.stem for path in evidence} == set(NOTEBOOKS)
    for path in [*evidence, *smoke.folder.matches("lock/*.json"), *smoke.folder.matches("eval/*/*.json")]:
        read = json.loads(path.read_text(), parse_constant=refuse)
        assert read and isinstance(read, dict), path
    used = {(check.evidence, check.value) for item in checklist.definitions() for check in item.checks}
    for stage, value in used:
        number = smoke.folder.evidence(stage)[value]
        assert isinstance(number, int | float), f"{stage}: {value} is {number!r}, which is no number"


@pytest.mark.pipeline
@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="ssh-keygen is not installed")
def test_the_archive_verifies_without_our_software(smoke: Smoke) -> None:
    assert smoke.demonstration and smoke.problems() == []
    command = ["sh", ROOT / "governance/verify.sh", smoke.path, smoke.trust]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


VICTIMS = [
    "nb/31_train.ipynb",
    "checkpoints/train/final/*.safetensors",
    "telemetry/train.parquet",
    "config/params.yaml",
    "data/shards/*",
    "evidence/40_evaluate.json",
    "eval/epoch_*.html",
    "lock/00_check_readiness.json",
    "checklist.yaml",
]


@pytest.mark.pipeline
@pytest.mark.parametrize("pattern", VICTIMS)
def test_one_byte_anywhere_is_found_and_its_file_named(untouched: Smoke, pattern: str) -> None:
    path = untouched.folder.matches(pattern)[0]
    content = path.read_bytes()
    middle = len(content) // 2
    try:
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        name = path.relative_to(untouched.path).as_posix()
        assert untouched.problems() == [f"{name}: changed since the seal"]
    finally:
        path.write_bytes(content)


@pytest.mark.pipeline
def test_no_path_of_this_machine_is_in_the_archive(smoke: Smoke) -> None:
    places = [f"{place}/".encode() for place in (ROOT, Path.home(), sys.prefix) if str(place) != "/"]
    found = []
    for path in runs.files_below(smoke.path):
        content = path.read_bytes()
        if b"\0" not in content:
            found += [(path.relative_to(smoke.path).as_posix(), place) for place in places if place in content]
    assert not found


# --- a notebook by itself


def papermill(place: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """papermill as the README calls it, from another working directory."""
    command = [Path(sys.executable).with_name("papermill"), *arguments]
    return subprocess.run(list(map(str, command)), cwd=place, capture_output=True, text=True, check=False)


def profile(place: Path, **changes: object) -> Path:
    values = yaml.safe_load((ROOT / "params/smoke.yaml").read_text()) | {"run": RUN}
    return runs.write_text(place / "profile.yaml", yaml.safe_dump(values | changes))


@pytest.mark.pipeline
def test_nbval_executes_the_notebooks_with_the_parameters_of_the_run(untouched: Smoke, tmp_path: Path) -> None:
    """Executed again, in another folder, by another tool: they pass, and write the very bytes they wrote before."""
    for name in ("12_schedule_curriculum", "20_configure_optimization"):
        source, target = ROOT / f"notebooks/{name}.ipynb", tmp_path / f"{name}.ipynb"
        done = papermill(tmp_path, source, target, "-f", profile(tmp_path), "--prepare-only")
        assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "-p", "no:cacheprovider", "-q", "-c", os.devnull, "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    cells = sum(len(code(name)) + 1 for name in ("12_schedule_curriculum", "20_configure_optimization"))
    assert done.returncode == 0 and f"{cells} passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.pipeline
def test_papermill_runs_a_notebook_from_any_working_directory(untouched: Smoke, tmp_path: Path) -> None:
    source = ROOT / "notebooks/20_configure_optimization.ipynb"
    done = papermill(tmp_path, source, "out.ipynb", "-f", profile(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.ipynb", "profile.yaml"]
    made = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    injected = next(cell for cell in made.cells if "injected-parameters" in cell.metadata.get("tags", []))
    assert params.assigned(injected.source)["optimization"] == {
        "learning_rate": 3e-3,
        "warmup_steps": 3,
        "floor": 3e-4,
        "ema_decay": 0.9,
    }


@pytest.mark.pipeline
def test_papermill_with_a_misspelt_key_stops_and_names_the_right_one(untouched: Smoke, tmp_path: Path) -> None:
    source = ROOT / "notebooks/20_configure_optimization.ipynb"
    done = papermill(tmp_path, source, "out.ipynb", "-f", profile(tmp_path, optimisation={"clip": 2.0}))
    assert done.returncode != 0
    assert "optimisation: unknown key; did you mean 'optimization'?" in done.stderr
    done = papermill(tmp_path, source, "out.ipynb", "-f", profile(tmp_path, optimization={"warmup": 2}))
    assert done.returncode != 0
    assert "optimization.warmup: unknown key; did you mean 'warmup_steps'?" in done.stderr


@pytest.mark.slow
def test_run_all_from_a_clean_state_works_on_every_notebook_in_turn(tmp_path: Path) -> None:
    """Without a profile, as who opens JupyterLab does it; in a copy, so that a run of the reader's stays."""
    place = tmp_path / "copy"
    left = shutil.ignore_patterns(".*", "__pycache__", "_build", "outbox")
    shutil.copytree(ROOT, place, ignore=left)
    environment = os.environ | {"PYTHONPATH": str(place), "DO_NOT_TRACK": "1"}
    for name in NOTEBOOKS:
        command = [Path(sys.executable).with_name("papermill"), f"{name}.ipynb", tmp_path / f"{name}.ipynb"]
        cwd = place / "notebooks"  # where JupyterLab starts a kernel
        done = subprocess.run(
            [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
    assert {path.stem for path in (place / "outbox/lab/evidence").glob("*.json")} == set(NOTEBOOKS)
