"""The report of an epoch, `eval/<job>/epoch_NNN.json`: its schema, held to when it is written and when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from stackpkg.runs import read_json, write_json

SLACK = 1e-6  # rounding of float32


def _share(value: float) -> float:
    if value < -SLACK or value > 1 + SLACK:  # NaN is neither: it is a finding, not a fault of the report
        raise ValueError("a share is between 0 and 1")
    return value


Share = Annotated[float, AfterValidator(_share), Field(json_schema_extra={"minimum": -SLACK, "maximum": 1 + SLACK})]
Count = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """No key that is not described; a number may be NaN or infinite, which strict JSON holds as a string."""

    model_config = ConfigDict(extra="forbid")


class Numbers(Part):
    """The main numbers of one set of weights."""

    validation_loss: float = Field(description="nats per token, mean over domains")
    validation_loss_by_domain: dict[str, float]
    calibration_error: Share = Field(description="expected calibration error of next-token predictions")
    precision_at_k: Share = Field(description="labelled held-out pairs, as are recall_at_k, mrr and ndcg_at_10")
    recall_at_k: Share
    mrr: Share
    ndcg_at_10: Share
    long_range_accuracy: Share
    violations: Share | None = Field(None, description="of protected positions; with conversations alone")
    forbidden_probability: Share | None = None
    forbidden_attention: Share | None = None
    reading_loss: float | None = Field(
        None, description="nats per token beside retrieved records; of a model that reads"
    )
    reading_gain: float | None = Field(None, description="how far that lies below the loss without records")


class Layer(Part):
    usage: list[Share] = Field(description="share of the choices each expert got")
    entropy: Share = Field(description="mean normalised gate entropy")


class Distance(Part):
    """Answers whose evidence lies `up_to` so many tokens away, beyond those before; with an interval of 95 %."""

    up_to: Count
    value: Share
    low: Share
    high: Share
    n: Count


class Calibration(Part):
    """Predictions by confidence, in bins of equal width: how many, the sum of confidences, how many are right."""

    count: list[float]
    confidence: list[float]
    right: list[float]


class Ranked(Part):
    """A set in BEIR's format, at 10."""

    precision_at_10: Share
    recall_at_10: Share
    ndcg_at_10: Share
    mrr: Share
    queries: Count
    documents: Count


class Guard(BaseModel):
    """What the retrieval guard did; a retriever may tell more."""

    model_config = ConfigDict(extra="allow")
    on: bool
    sigma_min: float
    accepted: Count
    relevant: Count
    rejected: dict[str, int]
    similarities: list[int]


class EpochReport(Numbers):
    run: str
    attempt: Count
    epoch: Count
    step: Count = Field(description="optimiser steps done")
    k: Count = Field(description="of precision_at_k and recall_at_k")
    pairs: Count
    long_range_answers: Count
    long_range_by_distance: list[Distance]
    validation_loss_by_row: dict[str, list[float]] = Field(description="of each held-out row, by domain")
    calibration: Calibration
    retrieval_sets: dict[str, Ranked]
    guard: Guard
    router: list[Layer] = Field(description="one entry a layer with a choice of experts")
    ema: Numbers = Field(description="with averaged weights")


def checked(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The report with every number a number. Raises `ValueError` that names each key against the schema."""
    try:
        return EpochReport.model_validate(report).model_dump(exclude_unset=True)
    except ValidationError as error:
        found = ((".".join(map(str, item["loc"])), item["msg"], item["input"]) for item in error.errors())
        wrong = "; ".join(f"{where}: {said}, given {given!r:.60}" for where, said, given in found)
        raise ValueError(f"{name} is no epoch report: {wrong}; evaluate again with notebook 31") from None


def write(path: Path, report: Mapping[str, Any]) -> None:
    write_json(path, checked(report, path.name))


def read(path: Path) -> dict[str, Any]:
    return checked(read_json(path), path.name)
