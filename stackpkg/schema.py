"""The data half of the schema in `stackpkg.params`: sources, curation, curriculum, labelled data."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
ROLES = ("system", "user", "assistant", "tool", "code", "data")
CLASSES = ("CAUSAL", "SEGMENT", "TOOL_SCOPE", "SAFETY_SCOPE", "RET_SCOPE")  # all but the first: a column of `spans`


def allowed(given: object, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest one there is, then all."""
    known = {name.lower(): name for name in names}
    near = [known[name] for name in difflib.get_close_matches(str(given).lower(), known, 1, 0.5)]
    return f"{f'did you mean {near[0]!r}? ' if near else ''}allowed: {', '.join(known.values())}"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Source(Section):
    """Where text comes from. `distributions` reads the Python packages installed on this machine."""

    kind: Literal["distributions", "folder", "jsonl", "parquet", "arrow", "datasets"] = "distributions"
    path: str = Field("", description="file, folder or Hugging Face datasets id; unused by `distributions`")
    split: str = Field("train", description="split of a datasets id")
    text_field: str = Field("text", description="column that holds the text (jsonl, parquet, arrow, datasets)")
    domain: str = Field("", description="domain of every record of this source; empty: told from the file")
    licence: str = Field("", description="SPDX licence of every record of this source; empty: from its metadata")
    max_mb: float = Field(24.0, gt=0, le=1e9, description="megabytes of text to read at most")

    @model_validator(mode="after")
    def _path_given(self) -> Source:
        if self.kind != "distributions" and not self.path:
            raise ValueError(f"a source of kind {self.kind!r} needs `path`: a file, a folder or a datasets id")
        return self


Family = Literal["gopher_quality", "gopher_repetition", "c4", "fineweb", "perplexity"]
DEFAULT_FILTERS: dict[str, list[Family]] = {
    "code": [],
    "licences": [],
    "documentation": ["gopher_repetition", "perplexity"],
    "*": ["gopher_quality", "gopher_repetition", "c4", "fineweb", "perplexity"],
}


class Data(Section):
    """Curation: filters, duplicates, trust, domain mixing, tokenizer, shards (spec: Records)."""

    sources: list[Source] = Field(default_factory=lambda: [Source()], min_length=1)
    part_mb: float = Field(8.0, gt=0, le=4096, description="megabytes of text in one part: what a worker holds at once")
    engine: Literal["processes", "ray"] = Field("processes", description="what runs the stages over the parts")
    workers: int = Field(2, ge=1, le=65_536, description="worker processes of the engine")
    # --- filters
    filters: dict[str, list[Family]] = Field(
        default_factory=lambda: dict(DEFAULT_FILTERS),
        description="families of published heuristics by domain; `*`: every domain not named. Laid over the default, "
        "unless `*` is given",
    )
    thresholds: dict[str, float] = Field(
        default_factory=dict, description="a filter's name -> its threshold, where the paper's default is not wanted"
    )
    min_words: int = Field(20, ge=1, le=10_000, description="shorter documents are dropped, in every domain (words)")
    max_document_kb: float = Field(256.0, gt=0, le=1e5, description="longer documents are dropped (kilobytes)")
    min_alphabetic: Share = Field(0.4, description="smallest share of letters among characters, in every domain")
    languages: list[str] = Field(default_factory=list, description="ISO 639-1 codes of prose to keep; empty: all")
    min_language_score: Share = Field(0.65, description="smallest score of the language (FineWeb 0.65)")
    perplexity_band: tuple[Share, Share] = Field(
        (0.0, 0.98), description="quantiles, in its language, that a document's perplexity must lie between (CCNet)"
    )
    perplexity_model: str = Field("", description="folder of n-gram models to use; empty: trained on this corpus")
    personal_data: Literal["mask", "drop", "keep"] = "mask"
    secrets: Literal["mask", "drop", "keep"] = "drop"
    licences: list[str] = Field(default_factory=list, description="SPDX identifiers to keep; empty: all")
    # --- duplicates
    shingle_words: int = Field(5, ge=1, le=20, description="words per shingle for MinHash")
    jaccard: float = Field(0.8, gt=0, le=1, description="documents at least this similar are near-duplicates")
    paragraph_repeats: int = Field(
        0, ge=0, description="a paragraph in more documents than this stays only in the best; 0: paragraphs stay"
    )
    earlier: list[Source] = Field(default_factory=list, description="an earlier corpus: its duplicates are dropped")
    evaluation_sets: list[Source] = Field(
        default_factory=list, description="documents that share text with these are contaminated and dropped"
    )
    contamination_words: int = Field(13, ge=5, le=100, description="shared words that contaminate (GPT-3: 13)")
    # --- trust
    min_trust: Share = Field(0.6, description="records below this trust are rejected")
    ttl_seconds: int = Field(31_536_000, ge=1, description="time-to-live of a record that states none (seconds)")
    trust_half_life: int = Field(
        157_680_000, ge=1, description="seconds after which the age of a record has halved its trust (five years)"
    )
    signers: str = Field(
        "", description="key list: one `source-prefix ed25519-public-key` a line; empty: no signatures"
    )
    unsigned: Literal["accept", "reject"] = Field("accept", description="what happens to a record without signature")
    # --- mixture
    temperature: float = Field(0.7, gt=0, le=10, description="domain share is proportional to tokens ** temperature")
    max_share: float = Field(1.0, gt=0, le=1, description="largest share of one domain in the mixture")
    max_epochs: float = Field(4.0, gt=0, le=1000, description="times a domain may be repeated in a run at most")
    # --- shards
    tokenizer: str = Field("", description="file or hub id of a tokenizer to load; empty: one is trained here")
    vocab_size: int = Field(4096, ge=300, le=262_144, description="size of the byte-level BPE trained here")
    shard_tokens: int = Field(1_000_000, ge=1_000, description="tokens of a shard, about")
    longest_document: int = Field(
        131_072, ge=32, description="longer documents are divided at line ends, once, when shards are made (tokens)"
    )
    validation_share: float = Field(0.05, gt=0, lt=0.5, description="share of documents held out")

    @field_validator("filters")
    @classmethod
    def _over_the_default(cls, given: dict[str, list[Family]]) -> dict[str, list[Family]]:
        return given if "*" in given else DEFAULT_FILTERS | given

    @model_validator(mode="after")
    def _band_is_ordered(self) -> Data:
        if self.perplexity_band[0] >= self.perplexity_band[1]:
            raise ValueError(f"perplexity_band {list(self.perplexity_band)} is empty; give [low, high] with low < high")
        return self


class Until(Section):
    """A condition, looked at after each evaluation, that ends a stage of the curriculum before its last step."""

    metric: str = Field("validation_loss", description="a number of the epoch report")
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Until:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give one of `at_least` and `at_most`, not both and not none")
        return self


class Stage(Section):
    """One stage of the curriculum. Steps that `until` saves are added to the last stage."""

    steps: int = Field(12, ge=1, description="optimiser steps in this stage, at most")
    context: int = Field(256, ge=16, le=1_048_576, description="tokens per sequence; longer documents wait")
    long_range: float = Field(0.125, ge=0, le=0.9, description="share of rows that are long-range tasks")
    retrieval: Share = Field(1.0, description="share of steps that carry retrieval pairs")
    preferences: Share = Field(0.0, description="share of steps that carry preferences")
    conversations: Share = Field(0.0, description="share of steps that carry conversations with roles and scopes")
    temperature: float | None = Field(None, gt=0, le=10, description="of the mixture in this stage; null: the data's")
    until: Until | None = None


LongRange = Literal["recall", "needle", "variables", "hops"]
MIX: dict[LongRange, float] = {"recall": 0.4, "needle": 0.2, "variables": 0.2, "hops": 0.2}


class Auxiliary(Section):
    """Labelled data for the auxiliary objectives."""

    pairs: int = Field(1_000, ge=8, description="docstring -> function pairs to mine at most")
    hard_negatives: int = Field(1, ge=1, le=8, description="negatives per pair, mined among the other documents")
    negative_margin: float = Field(
        0.95, gt=0, le=1, description="a negative scores at most this share of its positive: above it may be an answer"
    )
    query_tokens: int = Field(32, ge=8, le=1_024, description="tokens of a query")
    document_tokens: int = Field(64, ge=8, le=4_096, description="tokens of a document")
    long_range_tasks: int = Field(512, ge=8, description="long-range tasks to generate")
    long_range_kinds: dict[LongRange, Annotated[float, Field(ge=0)]] = Field(
        default_factory=lambda: dict(MIX),
        description="weight of each kind of long-range task",
    )
    long_range_records: int = Field(
        8, ge=1, le=64, description="records of a long-range task, where the context allows"
    )
    long_range_hops: int = Field(
        2, ge=2, le=8, description="records to follow from a question to its answer, in chains"
    )
    long_range_distance: int = Field(
        0, ge=0, description="least tokens between evidence and answer; 0: just beyond what the layers reach"
    )
    long_range_names: int = Field(64, ge=2, le=128, description="names that long-range tasks draw from")
    long_range_values: int = Field(32, ge=2, le=128, description="answers that long-range tasks draw from")
    retrieval_set: str = Field("", description="folder in BEIR's format, or JSONL of triples, to use besides")
    preference_set: str = Field("", description="JSONL or Parquet in one of TRL's formats, to use besides")
    conversations: int = Field(512, ge=8, description="conversations with roles and scopes to make")
    conversation_tokens: int = Field(256, ge=64, le=65_536, description="tokens of a conversation")
    conversation_set: str = Field("", description="JSONL or Parquet of messages with roles, to use besides")
    forbidden: str = Field(
        "0123456789", description="no token that holds one of these characters may be said inside a protected scope"
    )

    @model_validator(mode="after")
    def _tasks_can_be_drawn(self) -> Auxiliary:
        if not any(self.long_range_kinds.values()):
            raise ValueError("long_range_kinds gives every kind weight 0: give one a positive weight")
        if self.long_range_names < self.long_range_records:
            raise ValueError(
                f"long_range_records {self.long_range_records} need as many names: raise long_range_names "
                f"{self.long_range_names}"
            )
        return self
