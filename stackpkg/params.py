"""The one schema of every profile in `params/`: names, defaults, units and allowed ranges.

A profile is a YAML file whose top-level keys are the fields of `Params`. An unknown key or a bad value
raises `ValueError` with the nearest valid name and the allowed range, before anything runs.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from stackpkg.runs import chain, root
from stackpkg.schema import Auxiliary, Data, Section, Share, Source, Stage, Until, allowed
from stackpkg.schema_training import (
    Cluster,
    Evaluation,
    Governance,
    Layout,
    Optimization,
    Retrieval,
    Snapshots,
    Sweep,
    Telemetry,
    Training,
)

__all__ = [
    "Auxiliary", "Cluster", "Data", "Evaluation", "Governance", "Layout", "Optimization", "Retrieval", "Section",
    "Share", "Snapshots", "Source", "Stage", "Sweep", "Telemetry", "Training", "Until",
]  # fmt: skip


class Model(Section):
    """`stack` builds the reference model of the spec; `auto` any Hugging Face causal LM."""

    kind: Literal["stack", "auto"] = "stack"
    name_or_path: str = Field("", description="`auto`: hub id or folder to load")
    config: dict[str, Any] = Field(
        default_factory=dict, description="overrides of the configuration; `auto` without a name needs `model_type`"
    )

    @model_validator(mode="after")
    def _auto_is_named(self) -> Model:
        if self.kind == "auto" and not self.name_or_path and "model_type" not in self.config:
            raise ValueError("model kind 'auto' needs `name_or_path`, or `config` with a `model_type`")
        return self


Term = Literal[
    "language_modelling", "contrastive", "load_balance", "gate_entropy", "z_loss", "regret", "conformance",
    "long_range", "preference", "reading",
]  # fmt: skip


class Objectives(Section):
    """Weights of the training loss (spec: Objectives and their default weights). A term of weight 0 is not computed."""

    language_modelling: float = Field(1.0, ge=0, le=10)
    contrastive: float = Field(0.2, ge=0, le=10)
    load_balance: float = Field(0.05, ge=0, le=10)
    gate_entropy: float = Field(0.01, ge=0, le=10)
    z_loss: float = Field(0.0, ge=0, le=10, description="squared log-partition of the routers; ST-MoE has 0.001")
    regret: float = Field(0.02, ge=0, le=10, description="expected regret of the gates against the best expert")
    conformance: float = Field(0.1, ge=0, le=10, description="attention and tokens that scopes forbid")
    long_range: float = Field(0.1, ge=0, le=10, description="extra weight of the answer tokens of long-range tasks")
    preference: float = Field(0.0, ge=0, le=10)
    reading: float = Field(
        0.1, ge=0, le=10, description="documents beside retrieved records; of a model that reads them"
    )
    ramp_steps: dict[Term, Annotated[int, Field(ge=1)]] = Field(
        {"contrastive": 100}, description="optimiser steps in which a term grows to its weight"
    )
    norms_every: int = Field(50, ge=0, description="optimiser steps between two gradient norms of each term; 0: never")
    target_entropy: float = Field(0.6, ge=0, le=1, description="normalised gate entropy to hold (band 0.4 to 0.8)")
    usage_decay: float = Field(0.9, ge=0, lt=1, description="EMA decay of each expert's share")
    bias_rate: float = Field(0.0, ge=0, le=1, description="step of the choice bias, which balances without a loss; "
                             "arXiv 2408.15664 has 0.001. Only for routers that have one")  # fmt: skip
    center_rate: float = Field(0.0, ge=0, le=1, description="share of the way that a step moves what is taken from all "
                               "router logits to their mean; only for routers of the reference model")  # fmt: skip
    reward_horizon: int = Field(1024, ge=1, description="optimiser steps the experts' reward estimates look back")
    tau: float = Field(0.05, gt=0, le=1, description="temperature of InfoNCE")
    mined_negatives: int = Field(
        4, ge=0, le=64, description="documents of recent steps that a query likes most, as further negatives; 0: none"
    )
    false_negative_margin: float | None = Field(
        None, ge=-2, le=2, description="negatives of cosine above the positive's less this do not count; None: all do"
    )
    preference_loss: Literal["simpo", "orpo", "dpo"] = Field("simpo", description="dpo refers to the weights at first")
    preference_beta: float = Field(2.0, gt=0, le=100, description="papers: SimPO 2, DPO and ORPO 0.1")
    preference_gamma: float = Field(1.0, ge=0, le=100, description="margin SimPO asks for")


class Params(Section):
    """Everything a run needs. Every top-level key of a profile is one of these fields."""

    run: str = Field("lab", pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", description="folder under outbox/")
    seed: int = Field(17, ge=0, lt=2**31)
    data: Data = Field(default_factory=Data)
    curriculum: list[Stage] = Field(default_factory=lambda: [Stage()], min_length=1)
    auxiliary: Auxiliary = Field(default_factory=Auxiliary)
    model: Model = Field(default_factory=Model)
    objectives: Objectives = Field(default_factory=Objectives)
    optimization: Optimization = Field(default_factory=Optimization)
    training: Training = Field(default_factory=Training)
    snapshots: Snapshots = Field(default_factory=Snapshots)
    layout: Layout = Field(default_factory=Layout)
    cluster: Cluster = Field(default_factory=Cluster)
    telemetry: Telemetry = Field(default_factory=Telemetry)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    retrieval: Retrieval = Field(default_factory=Retrieval)
    sweep: Sweep = Field(default_factory=Sweep)
    governance: Governance = Field(default_factory=Governance)

    @property
    def max_steps(self) -> int:
        return sum(stage.steps for stage in self.curriculum)

    def rows(self, stage: Stage) -> int:
        """Sequences of one optimiser step: as many as make `training.batch_tokens`."""
        return self.training.batch_tokens // stage.context

    @model_validator(mode="after")
    def _another_run(self) -> Params:
        if self.governance.baseline == self.run:
            raise ValueError(f"governance.baseline is {self.run}, this run; leave it empty for its earlier versions")
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Params:
        ranks, accumulation = self.layout.data_parallel, self.training.accumulation
        for stage in self.curriculum:
            if self.training.batch_tokens % (stage.context * ranks * accumulation):
                product = f"{stage.context} x {ranks} x {accumulation} of a curriculum stage"
                what = f"context x data-parallel ranks x training.accumulation = {product}"
                raise ValueError(f"training.batch_tokens = {self.training.batch_tokens} is not a multiple of {what}")
        pp, schedule = self.layout.pp, self.layout.pipeline_schedule
        if pp > 1 and schedule != "gpipe" and (accumulation < pp or (schedule != "1f1b" and accumulation % pp)):
            needed = "at least" if schedule == "1f1b" else "a multiple of"
            raise ValueError(
                f"training.accumulation {accumulation}: the schedule {schedule} needs {needed} layout.pp = {pp} micro-"
                "batches; raise it, or take gpipe"
            )
        if self.curriculum[-1].until:
            raise ValueError("the last curriculum stage can't have `until`: it takes the steps that the others saved")
        return self


def _section(path: tuple[str | int, ...]) -> Any:
    """The schema class that `path` of a validation error points into."""
    here: Any = Params
    for part in path:
        if isinstance(part, str) and isinstance(here, type) and issubclass(here, BaseModel):
            here = here.model_fields[part].annotation if part in here.model_fields else None
        elif get_origin(here) is list:
            here = get_args(here)[0]
        else:
            here = None
        if get_origin(here) in (Union, UnionType):  # an optional section
            here = get_args(here)[0]
    return here if isinstance(here, type) and issubclass(here, BaseModel) else None


def _range(path: tuple[str | int, ...]) -> str:
    """The whole allowed range of a bounded field, as `; allowed: > 0, <= 1`."""
    section = _section(path[:-1])
    field = section.model_fields.get(path[-1]) if section and path else None
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [
        f"{s} {getattr(m, n):g}" for m in (field.metadata if field else ()) for n, s in signs.items() if hasattr(m, n)
    ]
    return f"; allowed: {', '.join(bounds)}" if bounds else ""


def explain(error: ValidationError) -> str:
    """One line per problem: where, what was given, what is allowed, the nearest valid name."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "profile"
        if item["type"] == "extra_forbidden":
            section = _section(tuple(item["loc"][:-1]))
            names = list(section.model_fields) if section else []
            lines.append(f"{where}: unknown key; {allowed(item['loc'][-1], names)}")
        else:
            said = item["msg"].removeprefix("Value error, ")
            given = "" if isinstance(item["input"], dict) else f"; given {item['input']!r}"  # not a whole section
            lines.append(f"{where}: {said}{given}{_range(item['loc'])}"[:400])
    return "\n".join(lines)


def validate(values: Mapping[str, Any]) -> Params:
    """Raises `ValueError` that names every bad key and value."""
    try:
        return Params.model_validate(dict(values))
    except ValidationError as error:
        raise ValueError(f"the parameters are not valid:\n{explain(error)}") from None


NO_PROFILES = ("alerts", "checklist", "kpis", "scopes")  # that lie in params/ as well


def load(path: str | os.PathLike[str]) -> Params:
    """Read and validate one profile."""
    if not Path(path).is_file():
        there = sorted(found.stem for found in (root() / "params").glob("*.yaml") if found.stem not in NO_PROFILES)
        raise ValueError(f"there is no profile {path}; params/ has {', '.join(there)}")
    text = Path(path).read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of {', '.join(Params.model_fields)}")
    return validate(values)


LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "minItems": "entries ≥",
          "pattern": "matches"}  # fmt: skip


class Described(NamedTuple):
    """A parameter in words; `below` names the section whose values it holds."""

    name: str
    kind: str
    below: str
    default: str
    allowed: list[str]
    meaning: str


def reference() -> dict[str, tuple[str, list[Described]]]:
    """Section -> what it is for, and its parameters; `Params` are the top-level keys of a profile."""
    schema, found = Params.model_json_schema(), dict[str, tuple[str, list[Described]]]()
    classes = {name: made for name, made in globals().items() if isinstance(made, type) and issubclass(made, BaseModel)}
    for name in ["Params", *sorted(schema["$defs"])]:
        section = schema if name == "Params" else schema["$defs"][name]
        fields = classes[name].model_fields
        rows = [_described(key, value, fields[key]) for key, value in section["properties"].items()]
        found[name] = section.get("description", ""), rows
    return found


def _described(name: str, value: dict[str, Any], field: Any) -> Described:
    inner = value.get("items", {}) if isinstance(value.get("items"), dict) else {}
    below = (value.get("$ref") or inner.get("$ref", "")).rpartition("/")[2]
    default = "" if below or field.is_required() else json.dumps(field.get_default(call_default_factory=True))
    allowed = [f"{sign} {value[key]}" for key, sign in LIMITS.items() if key in value]
    allowed += [json.dumps(given) for given in value.get("enum", [])]
    kind = ("list of " * bool(inner)) if below else value.get("type", "")
    return Described(name, kind, below, default, allowed, value.get("description", ""))


HEADER = "# parameters"


def assigned(source: str) -> dict[str, Any]:
    """Names and literal values that a `# Parameters` cell assigns; empty for any other cell."""
    if not source.lstrip().lower().startswith(HEADER):
        return {}
    pairs = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in pairs if isinstance(node.targets[0], ast.Name)}


def from_notebook(namespace: Mapping[str, Any]) -> Params:
    """The validated parameters of the notebook that calls this with `globals()`.

    Takes what the cells that start with `# Parameters` assign, in the order they ran: the notebook's own defaults,
    then the cell papermill injects. So a misspelt key of `papermill -f profile.yaml` stops here too, although
    papermill only warns about it. In JupyterLab it shows where in the chain of notebooks one stands.
    """
    values: dict[str, Any] = {}
    for source in namespace["In"]:
        values |= assigned(source)
    if not values:  # a front end that keeps no history of its cells, such as nbval
        values = {name: namespace[name] for name in Params.model_fields if name in namespace}
    if not values:
        raise ValueError("no cell that starts with `# Parameters` has run yet: run it first")
    p = validate(values)
    if opened := os.environ.get(
        "JPY_SESSION_NAME"
    ):  # in JupyterLab, which names the notebook; elsewhere nothing is shown
        from IPython.display import HTML, display  # half a second that a command need not pay

        display(HTML(chain(p.run, Path(opened).stem)))
    return p
