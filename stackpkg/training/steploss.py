"""The loss of a micro-batch: what is asked of the model, and what the composer makes of the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stackpkg.data.stream import Stream
from stackpkg.objectives import Composer, StepCounts, routing
from stackpkg.objectives.routing import Routed
from stackpkg.params import Params
from stackpkg.telemetry.meter import Meter
from stackpkg.telemetry.probes import retrieval_statistics, router_statistics
from stackpkg.training.mesh import Mesh
from stackpkg.training.riders import Riders


class StepLoss:
    """Where the whole model is at hand: `loss(model, inputs, counts)`. In a pipeline every stage runs its part of the
    `requests`, and the last one takes the `value` of the answers.

    Since they were last cleared: `raw` are the terms of the micro-batches, `asked` the rows and tokens a row of their
    forwards, `probed` what the probes of the latest found, where `meter` let them run.
    """

    def __init__(
        self, network: PreTrainedModel, stream: Stream, p: Params, mesh: Mesh, home: Path, device: torch.device
    ) -> None:
        routers: Sequence[nn.Module | None] = routing.routers(network)
        if p.layout.pp > 1:
            pipeline: Any = network.pipeline
            pipeline.loss, routers = self, pipeline.routers
        self.composer, self.mesh = Composer(p.objectives, routers), mesh
        self.riders = Riders(network, stream, p.objectives, home, mesh.data, device)
        self.raw: list[dict[str, Tensor]] = []
        self.asked: list[tuple[int, int]] = []
        self.probed: dict[str, Tensor] = {}
        every = {str(name): steps for name, steps in p.telemetry.every.items()} | {"norms": p.objectives.norms_every}
        self.meter = Meter(every, p.telemetry.budget)
        self.composer.sometimes = partial(self.meter.run, "norms")
        self.spoil: Callable[[Tensor], Tensor] = lambda total: total  # what a drill does to the loss

    def requests(self, inputs: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
        """Keyword arguments of each forward of a micro-batch, by name, in the order to run them in: `text` first."""
        # With a cache, transformers 5.23 would take the packed documents of a row for one.
        text = {"input_ids": inputs["input_ids"], "position_ids": inputs["position_ids"], "use_cache": False}
        found = {"text": text, **self.riders.requests(inputs)}
        self.asked += [(len(request["input_ids"]), request["input_ids"].shape[1]) for request in found.values()]
        return found

    def __call__(self, model: nn.Module, inputs: Mapping[str, Tensor], counts: StepCounts) -> tuple[Tensor, Any]:
        """The loss to go backward from, and what the model said of the text."""
        asked = self.requests(inputs)
        with routing.watch(model) as routed:
            text = model(**asked.pop("text"))
        answers = {"text": text, **{name: model(**request) for name, request in asked.items()}}
        return self.value(answers, routed, inputs, counts), text

    def value(
        self, answers: Mapping[str, Any], routed: Sequence[Routed], inputs: Mapping[str, Tensor], counts: StepCounts
    ) -> Tensor:
        """The loss from what the model said to each request."""
        talks, preferences, pairs, read = self.riders.read(answers, inputs)
        batch = answers["text"].logits, inputs["labels"], inputs["answer_mask"]
        total, *kinds = self.composer.losses(
            *batch, routed, pairs, counts, preferences=preferences, conversations=talks, read=read,
            group=self.mesh.data,
        )  # fmt: skip
        told = zip(("loss", "weighted", "square"), kinds, strict=True)
        self.raw.append({f"{kind}_{name}": value for kind, values in told for name, value in values.items()})
        estimates = self.composer.bandit.estimates if self.composer.weights.regret else None
        self.probed = self.meter.run("routing", lambda: router_statistics(routed, estimates))
        if pairs is not None:
            self.probed |= self.meter.run("retrieval", lambda: retrieval_statistics(pairs))
        return self.spoil(total)
