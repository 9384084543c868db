"""The training half of the schema in `stackpkg.params`: optimiser, layout, cluster, evaluation, sweep, governance."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from stackpkg.schema import Section, Share


class Optimization(Section):
    """Optimiser, schedule and clipping (spec: Optimisation)."""

    optimizer: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: float = Field(2e-4, gt=0, le=1)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    weight_decay: float = Field(0.1, ge=0, le=1)
    warmup_steps: int = Field(8_000, ge=0)
    schedule: Literal["cosine", "wsd"] = Field(
        "cosine", description="after warm-up: half a cosine, or stable, then decay"
    )
    decay_steps: int = Field(1_000, ge=1, description="last steps of `wsd`, in which the rate falls to the floor")
    floor: float = Field(1e-5, ge=0, le=1, description="learning rate at the end of the schedule")
    clip: float = Field(1.0, gt=0, description="largest global gradient norm")
    ema_decay: float = Field(0.999, ge=0, lt=1)

    @model_validator(mode="after")
    def _floor_below_peak(self) -> Optimization:
        if self.floor > self.learning_rate:
            raise ValueError(f"floor {self.floor} is above learning_rate {self.learning_rate}; give a smaller floor")
        return self


class Training(Section):
    """The size of the run. Its length is the sum of the curriculum's stages."""

    batch_tokens: int = Field(2_048, ge=1, description="tokens per optimiser step over all ranks, in every stage")
    accumulation: int = Field(1, ge=1, le=1_024, description="micro-batches per optimiser step and rank")
    epoch_steps: int = Field(12, ge=1, description="optimiser steps between two evaluations")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="compute type; master weights are fp32")
    deterministic: bool = Field(False, description="refuse kernels whose result depends on their order; slow on a GPU")
    activation_checkpointing: int = Field(0, ge=0, description="recompute every n-th layer in the backward; 0: none")


class Snapshots(Section):
    """When a job writes a checkpoint, behind the training, and which of them stay."""

    every_steps: int = Field(6, ge=1, description="optimiser steps between two checkpoints")
    every_minutes: float = Field(0.0, ge=0, description="and one when so long after the last; 0: by steps alone")
    keep_last: int = Field(3, ge=1, description="newest that stay; what the recovery ladder may need stays beside them")
    keep_every: int = Field(0, ge=0, description="those of steps that are a multiple of it stay for good; 0: none")
    keep_best: int = Field(1, ge=0, description="of least validation loss that stay, where a step was evaluated")


class Layout(Section):
    """Processes and how the model is spread over them: processes = pp x replicas x fsdp x tp."""

    processes: int = Field(2, ge=1, le=65_536, description="ranks over all nodes")
    nodes: int = Field(1, ge=1, le=8_192)
    fsdp: int = Field(2, ge=1, description="ranks the parameters are sharded over (FSDP2); more ranks are replicas")
    tp: int = Field(1, ge=1, description="ranks that share one batch and split every matrix")
    ep: int = Field(1, ge=1, description="ranks that hold different experts, out of fsdp x tp of them")
    pp: int = Field(1, ge=1, description="ranks in a pipeline of layers; its micro-batches are training.accumulation")
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = Field(
        "1f1b", description="order of the micro-batches; the last two give every rank two stages, not one"
    )
    restarts: int = Field(1, ge=0, le=100, description="times torch elastic restarts all ranks after one died")
    timeout_minutes: float = Field(20.0, gt=0, description="a launch that runs longer is stopped")
    hang_minutes: float = Field(
        8.0, gt=0, le=1440, description="a rank without a forward pass for so long writes its stacks and ends"
    )

    @property
    def replicas(self) -> int:  # copies of the whole model (HSDP)
        return self.processes // (self.pp * self.fsdp * self.tp)

    @property
    def data_parallel(self) -> int:  # ranks that read different rows
        return self.processes // (self.pp * self.tp)

    @property
    def stages(self) -> int:  # of the pipeline, over all its ranks
        return self.pp * (2 if self.pp > 1 and self.pipeline_schedule in ("interleaved", "zero_bubble") else 1)

    @model_validator(mode="after")
    def _divides(self) -> Layout:
        parts = {
            "fsdp": self.fsdp,
            "fsdp x tp =": self.fsdp * self.tp,
            "pp x fsdp x tp =": self.pp * self.fsdp * self.tp,
        }
        for name, size in {"nodes": self.nodes, **parts}.items():
            if self.processes % size:
                raise ValueError(f"processes {self.processes} is not a multiple of {name} {size}")
        if self.ep > 1 and (self.ep % self.tp or self.fsdp * self.tp % self.ep):
            raise ValueError(f"ep {self.ep} must be a multiple of tp {self.tp} and divide fsdp x tp")
        return self


class Cluster(Section):
    """Where a job runs that this machine does not run itself. How many nodes it has is in `layout`."""

    scheduler: Literal["none", "slurm", "kubernetes"] = Field("none", description="none: this machine, or by hand")
    gpus_per_node: int = Field(0, ge=0, description="GPUs to ask for on each node")
    grace_seconds: int = Field(300, ge=30, description="from notice to kill: must do for a step and a checkpoint")
    partition: str = Field("", description="Slurm's; empty: its default")
    account: str = Field("", description="Slurm's; empty: its default")
    image: str = Field("", description="Kubernetes: container image with the environment")
    claim: str = Field("", description="Kubernetes: volume claim that holds the repository")


Probe = Literal["routing", "retrieval", "update", "attention"]
EVERY: dict[Probe, int] = {"routing": 10, "retrieval": 10, "update": 50, "attention": 100}


class Telemetry(Section):
    """What a job tells while it runs: its rows, and beside them."""

    export: bool = Field(False, description="gauges for Prometheus on a free port of loopback, as outbox/.targets says")
    report_to: list[Literal["tensorboard", "mlflow", "wandb", "trackio"]] = Field(
        [], description="what `Trainer` tells each step as well, offline unless the environment says otherwise"
    )
    hash_sources: bool = Field(
        False, description="sources as salted SHA-256 where provenance is told: trace, query, data cards"
    )
    every: dict[Probe, Annotated[int, Field(ge=0)]] = Field(
        default_factory=lambda: dict(EVERY),
        description="optimiser steps between two runs of a probe, laid over the default; 0: never. At most this often: "
        "see `budget`",
    )
    budget: Share = Field(
        0.01, description="largest share of a job's time that its probes take; over it the dearest runs half as often"
    )
    peak_tflops: float = Field(
        0.0, ge=0, description="what one device can do in the type of `precision`; 0: measured at the start by a matmul"
    )

    @field_validator("every")
    @classmethod
    def _over_the_default(cls, given: dict[Probe, int]) -> dict[Probe, int]:
        return EVERY | given


class Evaluation(Section):
    """What is measured each epoch and the targets it must meet."""

    rows: int = Field(16, ge=1, description="validation sequences per domain")
    pairs: int = Field(64, ge=4, description="held-out retrieval pairs")
    k: int = Field(1, ge=1, le=100, description="precision@k, recall@k; a mined query has one relevant document")
    retrieval_sets: list[str] = Field(
        [], description="folders in BEIR's format to be measured on besides: their dev and test judgements"
    )
    min_precision_at_k: float = Field(0.75, ge=0, le=1, description="target; the specification has 0.75")
    entropy_band: tuple[Share, Share] = Field((0.2, 0.9), description="normalised router entropy must stay inside")
    max_violations: Share = Field(
        0.0, description="largest share of protected positions whose most probable token is forbidden"
    )
    max_forbidden_attention: Share = Field(0.05, description="largest share of attention on edges that scopes forbid")
    max_data_wait: Share = Field(0.005, description="largest median share of a step that is spent waiting for data")
    control_seeds: int = Field(3, ge=1, le=32, description="models with summaries, and without, of the certificate")
    control_steps: int = Field(200, ge=1, description="optimiser steps that each of these models learns")


class Retrieval(Section):
    """The guard on retrieved records, and the search for its threshold (spec: The model, retrieval guard)."""

    sigma_min: float = Field(0.45, ge=-1, le=1, description="least cosine similarity of a record, to begin with")
    sigma_range: tuple[float, float] = Field((0.35, 0.6), description="where a calibration looks for sigma_min")
    max_age: float = Field(604_800, gt=0, description="seconds since a record was written")
    min_trust: Share = 0.6
    sources: list[str] = Field([], description="domains that a record may come from; empty: all of the corpus")
    fan_in: int = Field(8, ge=1, le=16, description="records looked at for a query")


class Sweep(Section):
    """The automated sweep over loss weights, learning rate, warm-up and clip."""

    trials: int = Field(4, ge=1)
    steps: int = Field(8, ge=2, description="optimiser steps per trial")
    max_violations: Share = Field(
        0.0,
        description="of a trial, which may be too short to unlearn all; the run's own "
        "limit is evaluation.max_violations",
    )
    min_precision_at_k: Share | None = Field(
        None, description="of a trial, which may be too short to learn it; null: evaluation.min_precision_at_k"
    )
    entropy_band: tuple[Share, Share] | None = Field(
        None, description="of the routers of a trial, as young as that; null: evaluation.entropy_band"
    )
    finalists: int = Field(3, ge=1, description="best trials that run again, beside the profile")
    seeds: int = Field(3, ge=1, description="seeds of each finalist, none of which the search saw")
    hot: list[Annotated[float, Field(gt=0)]] = Field(
        [30.0, 100.0, 300.0],
        description="multiples of the learning rate that runs of the profile get from their middle on, to diverge",
    )
    min_guardrails: int = Field(
        1, ge=0, description="alerts whose shipped threshold must lie between runs that diverged and runs that did not"
    )


class Governance(Section):
    """Keys of the sign-off, the version to beat, and limits of the privacy review."""

    demonstration_keys: bool = Field(False, description="sign with throw-away keys made on the spot; never an approval")
    baseline: str = Field(
        "",
        description="run in outbox/, of the same data, whose version in use no candidate may be worse than; empty: the "
        "last in use of this run that has other weights",
    )
    scan_mb: float = Field(
        4.0, gt=0, le=1e6, description="megabytes of records that the second detector looks at, drawn by chance"
    )
    max_personal: float = Field(
        10.0, ge=0, description="findings of personal data that may be left after scrubbing, per million characters"
    )
