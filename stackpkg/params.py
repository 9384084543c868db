"""The one schema of every profile in `params/`: names, defaults, units and allowed ranges.

A profile is a YAML file whose top-level keys are the fields of `Params`. An unknown key or a bad value
raises `ValueError` with the nearest valid name and the allowed range, before anything runs.
"""

from __future__ import annotations

import ast
import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Source(Section):
    """Where text comes from. `distributions` reads the Python packages installed on this machine."""

    kind: Literal["distributions", "folder", "jsonl", "parquet", "datasets"] = "distributions"
    path: str = Field("", description="file, folder or Hugging Face datasets id; unused by `distributions`")
    split: str = Field("train", description="split of a datasets id")
    text_field: str = Field("text", description="column that holds the text (jsonl, parquet, datasets)")
    domain: str = Field("", description="domain of every record of this source; empty: told from the file")
    licence: str = Field("", description="SPDX licence of every record of this source; empty: from its metadata")
    max_mb: float = Field(24.0, gt=0, le=1e7, description="megabytes of text to read at most")

    @model_validator(mode="after")
    def _path_given(self) -> Source:
        if self.kind != "distributions" and not self.path:
            raise ValueError(f"a source of kind {self.kind!r} needs `path`: a file, a folder or a datasets id")
        return self


class Data(Section):
    """Curation: filters, near-duplicate removal, domain mixing, tokenizer, shards (spec: Records)."""

    sources: list[Source] = Field(default_factory=lambda: [Source()], min_length=1)
    min_words: int = Field(20, ge=1, le=10_000, description="shorter documents are dropped (words)")
    max_document_kb: float = Field(256.0, gt=0, le=1e5, description="longer documents are dropped (kilobytes)")
    max_repetition: float = Field(0.5, gt=0, le=1, description="largest share of duplicated lines (Gopher)")
    min_alphabetic: float = Field(0.4, ge=0, le=1, description="smallest share of letters among characters")
    shingle_words: int = Field(5, ge=1, le=20, description="words per shingle for MinHash")
    jaccard: float = Field(0.8, gt=0, le=1, description="documents at least this similar are near-duplicates")
    min_trust: float = Field(0.6, ge=0, le=1, description="records below this trust are rejected")
    ttl_seconds: int = Field(31_536_000, ge=1, description="time-to-live of a record (seconds)")
    temperature: float = Field(0.7, gt=0, le=10, description="domain share is proportional to tokens ** temperature")
    vocab_size: int = Field(4096, ge=300, le=262_144, description="size of the byte-level BPE trained here")
    shard_tokens: int = Field(1_000_000, ge=1_000, description="tokens per shard at most")
    validation_share: float = Field(0.05, gt=0, lt=0.5, description="share of documents held out")


class Stage(Section):
    """One stage of the curriculum."""

    steps: int = Field(12, ge=1, description="optimiser steps in this stage")
    context: int = Field(256, ge=16, le=1_048_576, description="tokens per sequence")
    long_range: float = Field(0.125, ge=0, le=0.9, description="share of rows that are long-range tasks")
    retrieval: bool = Field(True, description="retrieval pairs ride along with each row")


class Auxiliary(Section):
    """Labelled data for the auxiliary objectives."""

    pairs: int = Field(1_000, ge=8, description="docstring -> function pairs to mine at most")
    hard_negatives: int = Field(1, ge=1, le=8, description="other functions of the same module, per pair")
    query_tokens: int = Field(32, ge=8, le=1_024, description="tokens of a query")
    document_tokens: int = Field(64, ge=8, le=4_096, description="tokens of a document")
    long_range_tasks: int = Field(512, ge=8, description="associative-recall tasks to generate")


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


class Objectives(Section):
    """Weights of the training loss (spec: Objectives and their default weights)."""

    language_modelling: float = Field(1.0, ge=0, le=10)
    contrastive: float = Field(0.2, ge=0, le=10)
    load_balance: float = Field(0.05, ge=0, le=10)
    gate_entropy: float = Field(0.01, ge=0, le=10)
    long_range: float = Field(0.1, ge=0, le=10, description="extra weight of the answer tokens of long-range tasks")
    target_entropy: float = Field(0.6, ge=0, le=1, description="normalised gate entropy to hold (band 0.4 to 0.8)")
    usage_decay: float = Field(0.9, ge=0, lt=1, description="EMA decay of each expert's share")
    tau: float = Field(0.05, gt=0, le=1, description="temperature of InfoNCE")


class Optimization(Section):
    """Optimiser, schedule and clipping (spec: Optimisation)."""

    optimizer: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: float = Field(2e-4, gt=0, le=1)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    weight_decay: float = Field(0.1, ge=0, le=1)
    warmup_steps: int = Field(8_000, ge=0)
    floor: float = Field(1e-5, ge=0, le=1, description="learning rate at the end of the cosine")
    clip: float = Field(1.0, gt=0, description="largest global gradient norm")
    ema_decay: float = Field(0.999, ge=0, lt=1)

    @model_validator(mode="after")
    def _floor_below_peak(self) -> Optimization:
        if self.floor > self.learning_rate:
            raise ValueError(f"floor {self.floor} is above learning_rate {self.learning_rate}; give a smaller floor")
        return self


class Training(Section):
    """The size of the run. Its length is the sum of the curriculum's stages."""

    batch_rows: int = Field(8, ge=1, description="sequences per optimiser step, over all ranks")
    accumulation: int = Field(1, ge=1, le=1_024, description="micro-batches per optimiser step and rank")
    epoch_steps: int = Field(12, ge=1, description="optimiser steps between two evaluations and snapshots")
    checkpoint_steps: int = Field(6, ge=1, description="optimiser steps between two checkpoints")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="compute type; master weights are fp32")
    activation_checkpointing: bool = False


class Layout(Section):
    """Processes and how the model is spread over them."""

    processes: int = Field(2, ge=1, le=65_536, description="ranks over all nodes")
    nodes: int = Field(1, ge=1, le=8_192)
    fsdp: int = Field(2, ge=1, description="ranks the parameters are sharded over (FSDP2); more ranks are replicas")
    restarts: int = Field(1, ge=0, le=100, description="times torch elastic restarts all ranks after one died")
    timeout_minutes: float = Field(20.0, gt=0, description="a launch that runs longer is stopped")

    @model_validator(mode="after")
    def _divides(self) -> Layout:
        for name in ("nodes", "fsdp"):
            if self.processes % getattr(self, name):
                raise ValueError(f"processes {self.processes} is not a multiple of {name} {getattr(self, name)}")
        return self


class Evaluation(Section):
    """What is measured each epoch and the targets it must meet."""

    rows: int = Field(16, ge=1, description="validation sequences per domain")
    pairs: int = Field(64, ge=4, description="held-out retrieval pairs")
    k: int = Field(1, ge=1, le=100, description="precision@k, recall@k; a mined query has one relevant document")
    min_precision_at_k: float = Field(0.75, ge=0, le=1, description="target; the specification has 0.75")
    entropy_band: tuple[Share, Share] = Field((0.2, 0.9), description="normalised router entropy must stay inside")


class Sweep(Section):
    """The automated sweep over loss weights and learning rate."""

    trials: int = Field(4, ge=1)
    steps: int = Field(8, ge=2, description="optimiser steps per trial")


class Governance(Section):
    """Keys of the sign-off."""

    demonstration_keys: bool = Field(False, description="sign with throw-away keys made on the spot; never an approval")


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
    layout: Layout = Field(default_factory=Layout)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    sweep: Sweep = Field(default_factory=Sweep)
    governance: Governance = Field(default_factory=Governance)

    @property
    def max_steps(self) -> int:
        return sum(stage.steps for stage in self.curriculum)

    @model_validator(mode="after")
    def _batch_divides(self) -> Params:
        parts = self.layout.processes * self.training.accumulation
        if self.training.batch_rows % parts:
            raise ValueError(
                f"training.batch_rows = {self.training.batch_rows} is not a multiple of "
                f"layout.processes x training.accumulation = {parts}"
            )
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
            near = difflib.get_close_matches(str(item["loc"][-1]), names, 1, 0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            lines.append(f"{where}: unknown key; {hint}allowed: {', '.join(names)}")
        else:
            lines.append(f"{where}: {item['msg']}; given {item['input']!r}{_range(item['loc'])}"[:400])
    return "\n".join(lines)


def validate(values: Mapping[str, Any]) -> Params:
    """Raises `ValueError` that names every bad key and value."""
    try:
        return Params.model_validate(dict(values))
    except ValidationError as error:
        raise ValueError(f"the parameters are not valid:\n{explain(error)}") from None


def load(path: str | os.PathLike[str]) -> Params:
    """Read and validate one profile."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of {', '.join(Params.model_fields)}")
    return validate(values)


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
    papermill only warns about it.
    """
    values: dict[str, Any] = {}
    for source in namespace["In"]:
        values |= assigned(source)
    if not values:  # a front end that keeps no history of its cells, such as nbval
        values = {name: namespace[name] for name in Params.model_fields if name in namespace}
    if not values:
        raise ValueError("no cell that starts with `# Parameters` has run yet: run it first")
    return validate(values)
