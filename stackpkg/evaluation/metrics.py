"""What is measured on held-out data at the end of each epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import nn

from stackpkg.data.stream import Batch, Stream
from stackpkg.evaluation.retrieval import Retriever
from stackpkg.model import scopes
from stackpkg.objectives import conformance, routing
from stackpkg.objectives.routing import Routed
from stackpkg.params import Params
from stackpkg.telemetry.probes import normalised_entropy


@torch.no_grad()
def _losses(model: nn.Module, rows: Batch, device: torch.device) -> dict[str, Any]:
    """Summed next-token loss and correct predictions over labelled positions of `rows`, and what the routers chose."""
    batch = {name: torch.as_tensor(value, device=device) for name, value in rows.items()}
    labels = batch["labels"][:, 1:]
    with routing.record(model) as routed:
        outputs = model(**{name: batch[name] for name in ("input_ids", "position_ids")}, use_cache=False)
    logits = outputs.logits[:, :-1].float()
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    answers = batch["answer_mask"][:, 1:] & (labels >= 0)
    right = (logits.argmax(-1) == labels) & answers
    return {
        "loss": float(losses.sum()),
        "tokens": int((labels >= 0).sum()),
        "answers": int(answers.sum()),
        "right": int(right.sum()),
        "router": [layer for layer in routed if layer.logits.shape[-1] > 1],  # one expert is no choice
    }


def _means(parts: dict[str, dict[str, Any]]) -> dict[str, float]:
    return {name: part["loss"] / max(1, part["tokens"]) for name, part in parts.items()}


def router_balance(routed: Sequence[Routed]) -> list[dict[str, Any]]:
    """Per layer: share of the choices each expert got (sums to 1), and the mean normalised gate entropy."""
    layers = []
    for layer in routed:
        usage = torch.bincount(layer.chosen.flatten(), minlength=layer.logits.shape[-1]).float() / layer.chosen.numel()
        layers.append({"usage": usage.tolist(), "entropy": float(normalised_entropy(layer.gate()).mean())})
    return layers


@torch.no_grad()
def violations(model: nn.Module, stream: Stream, n: int, device: torch.device) -> dict[str, float]:
    """`conformance.measure` on at most `n` held-out conversations; nothing in a run without. Every rank calls it."""
    rows = stream.validation_conversations(n)
    if not rows:
        return {}
    batch = {name: torch.as_tensor(value, device=device) for name, value in rows.items()}
    rules, forbidden = scopes.load(stream.corpus.folder / "scopes.yaml"), torch.as_tensor(stream.forbidden)
    return conformance.measure(conformance.read(model, batch, rules, forbidden, stream.pad_id))


@torch.no_grad()
def evaluate_epoch(
    model: nn.Module,
    stream: Stream,
    p: Params,
    device: torch.device,
    averaged: Callable[[], AbstractContextManager[None]],
    retriever: Retriever,
) -> dict[str, Any]:
    """One report: loss per domain (nats per token), raw and with averaged weights, retrieval, routing, long range,
    and, in a run with conversations, what `violations` gives.

    Every rank evaluates the same rows, so that sharded parameters are gathered equally often on all of them.
    """
    model.eval()
    # a domain of one document holds nothing out
    held = {name: stream.validation(name, p.evaluation.rows) for name in stream.domains}
    rows = {name: batch for name, batch in held.items() if len(batch["labels"])}
    parts = {name: _losses(model, batch, device) for name, batch in rows.items()}
    far = _losses(model, stream.long_range(p.evaluation.rows), device)
    retrieval = retriever.measure(model, device)
    with averaged():
        ema = _means({name: _losses(model, batch, device) for name, batch in rows.items()})
    by_layer = zip(*(part["router"] for part in parts.values()), strict=True)
    joined = [
        Routed(torch.cat([one.logits for one in layer]), torch.cat([one.chosen for one in layer]), layer[0].sigmoid)
        for layer in by_layer
    ]
    scoped = violations(model, stream, p.evaluation.rows, device)
    model.train()
    losses = _means(parts)
    return {
        "validation_loss": float(np.mean(list(losses.values()))),
        "validation_loss_by_domain": losses,
        "ema_validation_loss": float(np.mean(list(ema.values()))),
        **retrieval,
        "long_range_accuracy": far["right"] / max(1, far["answers"]),
        "long_range_answers": far["answers"],
        **scoped,
        "router": router_balance(joined),
    }
