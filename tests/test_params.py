"""A profile is refused before anything runs, and the message says how to mend it."""

import keyword
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from papermill.translators import PythonTranslator
from pydantic import BaseModel

from stackpkg import params, runs

ROOT = Path(__file__).parents[1]
PROFILES = sorted(
    path
    for path in (ROOT / "params").glob("*.yaml")
    if path.name not in ("checklist.yaml", "alerts.yaml", "kpis.yaml", "scopes.yaml")
)
SECTIONS = {
    name: field.annotation
    for name, field in params.Params.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}
PLACES: dict[str, tuple[type[BaseModel], Any]] = {
    "": (params.Params, lambda values: values),
    "curriculum.0.": (params.Stage, lambda values: {"curriculum": [values]}),
    "data.sources.0.": (params.Source, lambda values: {"data": {"sources": [values]}}),
    "curriculum.0.until.": (params.Until, lambda values: {"curriculum": [{"until": values}, {}]}),
} | {
    f"{name}.": (section, lambda values, name=name: {name: values}) for name, section in SECTIONS.items()
}  # where a key can stand -> its schema, and a profile with the values at that place


def message(values: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as caught:
        params.validate(values)
    return str(caught.value)


def test_every_section_of_the_schema_is_covered_here() -> None:
    covered = {section for section, _ in PLACES.values()}
    for section in covered:
        for field in section.model_fields.values():
            inner = [field.annotation, *get_args(field.annotation)]
            assert {kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)} <= covered


@pytest.mark.parametrize("place", PLACES)
def test_an_unknown_key_names_the_nearest_and_all_allowed_ones(place: str) -> None:
    section, profile = PLACES[place]
    for name in section.model_fields:
        wrong = name[:-1] + "_" + name[-1] if len(name) > 1 else name + "_"
        said = message(profile({wrong: None}))
        assert f"{place}{wrong}: unknown key; did you mean {name!r}? allowed: " in said
        assert said.partition("allowed: ")[2].split("\n")[0].split(", ") == list(section.model_fields)


@pytest.mark.parametrize("place", PLACES)
def test_a_key_like_nothing_known_gets_no_guess(place: str) -> None:
    section, profile = PLACES[place]
    said = message(profile({"zzzzqqqq": 1}))
    assert f"{place}zzzzqqqq: unknown key; allowed: {next(iter(section.model_fields))}" in said
    assert "did you mean" not in said


def bounded() -> list[tuple[str, str, str, float]]:
    """(place, name, sign, bound) of every bound in the schema."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    return [
        (place, name, sign, getattr(limit, attribute))
        for place, (section, _) in PLACES.items()
        for name, field in section.model_fields.items()
        for limit in field.metadata
        for attribute, sign in signs.items()
        if hasattr(limit, attribute)
    ]


@pytest.mark.parametrize(("place", "name", "sign", "bound"), bounded())
def test_a_number_beyond_its_range_shows_the_range(place: str, name: str, sign: str, bound: float) -> None:
    section, profile = PLACES[place]
    step = 0 if sign in "><" else 1 if section.model_fields[name].annotation is int else 1e-6
    wrong = bound - step if sign[0] == ">" else bound + step
    said = message(profile({name: wrong}))
    line = next(line for line in said.splitlines() if line.startswith(f"{place}{name}: "))
    assert f"given {wrong!r}" in line
    assert f"{sign} {bound:g}" in line.partition("; allowed: ")[2]


@pytest.mark.parametrize(("place", "name"), sorted({(place, name) for place, name, _, _ in bounded()}))
def test_infinity_and_nan_are_outside_every_range(place: str, name: str) -> None:
    _, profile = PLACES[place]
    assert f"{place}{name}: " in message(profile({name: float("nan")}))
    assert f"{place}{name}: " in message(profile({name: float("inf")}))
    assert f"{place}{name}: " in message(profile({name: float("-inf")}))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"run": "Upper Case"}, "run: "),
        ({"run": "../escape"}, "run: "),
        ({"run": ".hidden"}, "run: "),
        ({"run": ""}, "run: "),
        ({"seed": "seventeen"}, "seed: "),
        ({"seed": 1.5}, "seed: "),
        ({"seed": None}, "seed: "),
        ({"curriculum": []}, "curriculum: "),
        ({"curriculum": {"steps": 3}}, "curriculum: "),
        ({"data": {"sources": []}}, "data.sources: "),
        ({"data": {"sources": [{"kind": "csv", "path": "x"}]}}, "'distributions', 'folder', 'jsonl'"),
        ({"data": {"sources": [{"kind": "jsonl"}]}}, "a source of kind 'jsonl' needs `path`"),
        ({"model": {"kind": "auto"}}, "model kind 'auto' needs `name_or_path`"),
        ({"optimization": {"optimizer": "sgd"}}, "'adamw' or 'adafactor'"),
        ({"optimization": {"betas": [0.9, 1.0]}}, "optimization.betas.1: "),
        ({"optimization": {"betas": [0.9]}}, "optimization.betas"),
        ({"optimization": {"floor": 0.1}}, "floor 0.1 is above learning_rate 0.0002"),
        ({"training": {"batch_tokens": 300}}, "training.batch_tokens = 300 is not a multiple of"),
        ({"training": {"precision": "fp16"}}, "'fp32' or 'bf16'"),
        ({"layout": {"processes": 4, "fsdp": 3}}, "processes 4 is not a multiple of fsdp 3"),
        ({"layout": {"processes": 4, "tp": 4}}, "processes 4 is not a multiple of fsdp x tp = 8"),
        ({"layout": {"processes": 4, "fsdp": 2, "tp": 2, "ep": 3}}, "ep 3 must be a multiple of tp 2"),
        ({"layout": {"processes": 4, "pp": 4}}, "processes 4 is not a multiple of pp x fsdp x tp = 8"),
        ({"layout": {"processes": 4, "pp": 2}}, "the schedule 1f1b needs at least layout.pp = 2 micro-batches"),
        ({"layout": {"processes": 4, "nodes": 3}}, "processes 4 is not a multiple of nodes 3"),
        ({"governance": {"demonstration_keys": "perhaps"}}, "governance.demonstration_keys: "),
        ({"data": 3}, "data: "),
        ({"data": {"sources": [3]}}, "data.sources.0: "),
        ({"run": "a", "governance": {"baseline": "a"}}, "governance.baseline is a, this run; leave it empty"),
        ({"evaluation": {"entropy_band": [float("nan"), 1]}}, "evaluation.entropy_band.0: "),
        ({3: 4}, "3: "),
    ],
)
def test_other_bad_values(values: dict[str, Any], expected: str) -> None:
    assert expected in message(values)


def test_every_problem_is_named_at_once() -> None:
    said = message({"sed": 1, "training": {"batch_token": 8, "epoch_steps": 0}, "curriculum": [{"context": 1}]})
    for line in ("sed: unknown key; did you mean 'seed'", "did you mean 'batch_tokens'", "training.epoch_steps: "):
        assert line in said
    assert re.search(r"^curriculum\.0\.context: .*allowed: >= 16, <= 1.04858e\+06$", said, re.MULTILINE)


def test_a_profile_can_not_be_changed_after_it_was_checked() -> None:
    p = params.validate({})
    with pytest.raises(ValueError, match="frozen"):
        p.seed = 3
    with pytest.raises(ValueError, match="frozen"):
        p.training.batch_tokens = 300


def test_the_model_s_own_configuration_is_left_to_the_model() -> None:
    """The one open mapping: its keys are those of a model class this schema does not know."""
    assert params.validate({"model": {"config": {"hidden_size": 8}}}).model.config == {"hidden_size": 8}


# --- nothing is silently accepted

KEY = st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1, max_size=20)


@given(place=st.sampled_from(sorted(PLACES)), key=KEY, value=st.none() | st.integers() | st.text(max_size=5))
def test_no_unknown_key_is_accepted_anywhere(place: str, key: str, value: object) -> None:
    section, profile = PLACES[place]
    if key not in section.model_fields:
        assert f"{place}{key}: unknown key" in message(profile({key: value}))


SHARE = st.floats(0, 0.9)


@given(
    seed=st.integers(0, 2**31 - 1),
    stages=st.lists(
        st.fixed_dictionaries(
            {"steps": st.integers(1, 99), "context": st.integers(4, 20).map(lambda n: 2**n), "long_range": SHARE}
        ),
        min_size=1,
        max_size=4,
    ),
    rate=st.floats(1e-5, 1),
)
def test_what_is_accepted_is_kept_through_yaml(seed: int, stages: list[dict[str, Any]], rate: float) -> None:
    tokens = {"batch_tokens": 2**21}
    given_values = {"seed": seed, "curriculum": stages, "optimization": {"learning_rate": rate}, "training": tokens}
    p = params.validate(given_values)
    assert p.max_steps == sum(stage["steps"] for stage in stages)
    assert params.validate(yaml.safe_load(yaml.safe_dump(p.model_dump(mode="json")))) == p
    dumped = p.model_dump()
    assert dumped["seed"] == seed and dumped["optimization"]["learning_rate"] == rate
    assert [{name: stage[name] for name in stages[0]} for stage in dumped["curriculum"]] == stages


# --- profiles


def test_the_profiles_of_the_readme_are_there() -> None:
    assert {path.stem for path in PROFILES} == {"smoke", "dry_run", "cluster"}


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_profile_loads_and_keeps_what_it_says(path: Path) -> None:
    p, said = params.load(path), yaml.safe_load(path.read_text())
    assert p.run == path.stem
    assert p.governance.demonstration_keys == (path.stem != "cluster")

    def holds(here: Any, wanted: Any) -> bool:
        if isinstance(wanted, dict) and not isinstance(here, dict):
            return all(holds(getattr(here, name), value) for name, value in wanted.items())
        if isinstance(wanted, list):
            return len(here) == len(wanted) and all(map(holds, here, wanted))
        return bool(here == wanted)

    assert holds(p, said)


@pytest.mark.parametrize("text", ["", "- 1\n", "seed", "seed: [1\n", "run: !!python/object/apply:os.getcwd []\n"])
def test_a_file_that_is_no_profile(tmp_path: Path, text: str) -> None:
    path = runs.write_text(tmp_path / "p.yaml", text)
    with pytest.raises(ValueError, match=r"p\.yaml (is not YAML|must hold a mapping of run, seed)"):
        params.load(path)


# --- notebooks

DEFAULTS = '# Parameters\nrun = "lab"  # folder\nseed = 17\ntraining = {"batch_tokens": 2048}\n'


def test_injected_values_replace_defaults_and_nothing_else_counts() -> None:
    defaults = DEFAULTS.replace("lab", "mine")
    cells = ["", "import os\nseed = 5", defaults, "# Parameters\nseed = 3\ntraining = {}", "# parameter\nrun = 'x'"]
    p = params.from_notebook({"In": cells, "seed": 99, "anything": 1})
    assert p == params.validate({"run": "mine", "seed": 3, "training": {}})


def test_without_injection_the_defaults_hold() -> None:
    assert params.from_notebook({"In": ["", DEFAULTS]}).training.batch_tokens == 2048


def test_a_cell_run_again_by_hand_wins_over_its_earlier_self() -> None:
    assert params.from_notebook({"In": ["", DEFAULTS, DEFAULTS.replace("17", "18")]}).seed == 18


def test_a_front_end_without_history_gives_what_the_cells_assigned() -> None:
    """nbval executes cells so that `In` stays empty; the defaults of the schema must not step in unseen."""
    p = params.from_notebook({"In": [""], "seed": 3, "training": {"batch_tokens": 1024}, "other": 5})
    assert p == params.validate({"seed": 3, "training": {"batch_tokens": 1024}})
    with pytest.raises(ValueError, match="no cell that starts with `# Parameters` has run yet"):
        params.from_notebook({"In": ["", "import os"], "os": 1})


def test_a_misspelt_injected_key_is_refused() -> None:
    with pytest.raises(ValueError, match="sede: unknown key; did you mean 'seed'"):
        params.from_notebook({"In": ["", DEFAULTS, "# Parameters\nsede = 3\n"]})
    with pytest.raises(ValueError, match=r"training\.batch_token: unknown key; did you mean 'batch_tokens'"):
        params.from_notebook({"In": ["", DEFAULTS, '# Parameters\ntraining = {"batch_token": 3}\n']})


@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,9}", fullmatch=True).filter(lambda name: name.isidentifier()),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
            max_leaves=6,
        ),
        max_size=4,
    )
)
def test_a_parameters_cell_reads_back_as_papermill_writes_it(values: dict[str, Any]) -> None:
    values = {name: value for name, value in values.items() if not keyword.iskeyword(name)}
    assert params.assigned(PythonTranslator.codify(values)) == values


def test_a_default_that_is_no_literal_is_an_error_and_not_skipped() -> None:
    with pytest.raises(ValueError, match="malformed"):
        params.assigned("# Parameters\nseed = int('3')\n")


def test_in_jupyterlab_the_place_in_the_chain_is_shown(monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    names = {"In": ["# Parameters\nrun = 'lab'"]}
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    params.from_notebook(names)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("JPY_SESSION_NAME", "/somewhere/notebooks/31_train.ipynb")
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda made: shown.append(made.data))
    params.from_notebook(names)
    assert "<b>31_train</b>" in shown[0] and "Run <code>lab</code>" in shown[0]
