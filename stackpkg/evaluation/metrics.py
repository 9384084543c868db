"""What is measured on held-out data at the end of each epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import nn

from stackpkg.data import longrange
from stackpkg.data.stream import Batch, Stream
from stackpkg.evaluation import calibration, epoch, sets
from stackpkg.evaluation.construction import proportion
from stackpkg.evaluation.retrieval import Retriever
from stackpkg.model import scopes
from stackpkg.objectives import conformance, routing
from stackpkg.objectives.routing import Routed
from stackpkg.params import Params
from stackpkg.telemetry.probes import normalised_entropy


@torch.no_grad()
def _read(model: nn.Module, rows: Batch, device: torch.device) -> dict[str, Any]:
    """Of the labelled positions of `rows`: summed next-token loss and their number of each row [rows], whether each
    answer is right [answers], `calibration.reliability`; and what the routers chose."""
    batch = {name: torch.as_tensor(value, device=device) for name, value in rows.items()}
    labels = batch["labels"][:, 1:]
    with routing.record(model) as routed:
        outputs = model(**{name: batch[name] for name in ("input_ids", "position_ids")}, use_cache=False)
    logits = outputs.logits[:, :-1].float()
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    answers = batch["answer_mask"][:, 1:] & (labels >= 0)
    return {
        "loss": losses.sum(1).cpu().numpy(),
        "tokens": (labels >= 0).sum(1).cpu().numpy(),
        "right": (logits.argmax(-1) == labels)[answers].cpu().numpy(),
        "reliability": calibration.reliability(logits, labels),
        "router": [layer for layer in routed if layer.logits.shape[-1] > 1],  # one expert is no choice
    }


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


def by_distance(stream: Stream, rows: Batch, right: np.ndarray) -> list[dict[str, float]]:
    """Accuracy, with its interval of 95 %, by distance of the evidence of an answer in tokens: `up_to` the reach of the
    tasks, then in four steps to twice that, and so on."""
    if not len(right):
        return []
    values = longrange.symbols(stream.p.auxiliary)[1]
    away = longrange.distances(rows["input_ids"], rows["answer_mask"], stream.corpus.manifest["specials"], values)
    reach = stream.tasks["held_out"][0]["reach"]
    place = np.ceil(4 * np.log2(np.maximum(away / reach, 1)) - 1e-9).astype(int)
    return [{"up_to": round(reach * 2 ** (k / 4)), **proportion(right[place == k])} for k in np.unique(place).tolist()]


@torch.no_grad()
def measure(model: nn.Module, stream: Stream, p: Params, device: torch.device, retriever: Retriever) -> dict[str, Any]:
    """What `evaluate_epoch` reports of one set of weights."""
    # a domain of one document holds nothing out
    held = {name: stream.validation(name, p.evaluation.rows) for name in stream.domains}
    parts = {name: _read(model, batch, device) for name, batch in held.items() if len(batch["labels"])}
    asked = stream.long_range(p.evaluation.rows)
    far = _read(model, asked, device)
    by_layer = zip(*(part["router"] for part in parts.values()), strict=True)
    joined = [
        Routed(torch.cat([one.logits for one in layer]), torch.cat([one.chosen for one in layer]), layer[0].sigmoid)
        for layer in by_layer
    ]
    losses = {name: float(part["loss"].sum() / max(1, part["tokens"].sum())) for name, part in parts.items()}
    rows = {name: (part["loss"] / np.maximum(1, part["tokens"])).tolist() for name, part in parts.items()}
    bins = torch.stack([part["reliability"] for part in parts.values()]).sum(0)
    return {
        "validation_loss": float(np.mean(list(losses.values()))),
        "validation_loss_by_domain": losses,
        "validation_loss_by_row": rows,
        "calibration_error": calibration.expected_error(bins),
        "calibration": dict(zip(("count", "confidence", "right"), bins.tolist(), strict=True)),
        **retriever.measure(model, device),
        "retrieval_sets": {
            name: sets.measure(model, judged, stream.pad_id, device) for name, judged in retriever.sets.items()
        },
        "long_range_accuracy": float(far["right"].mean()) if len(far["right"]) else 0.0,
        "long_range_answers": len(far["right"]),
        "long_range_by_distance": by_distance(stream, asked, far["right"]),
        **violations(model, stream, p.evaluation.rows, device),
        "router": router_balance(joined),
    }


def evaluate_epoch(
    model: nn.Module,
    stream: Stream,
    p: Params,
    device: torch.device,
    averaged: Callable[[], AbstractContextManager[None]],
    retriever: Retriever,
) -> dict[str, Any]:
    """One report, as `epoch.EpochReport` describes it: loss per domain (nats per token) and of each row, calibration,
    retrieval, long range, routing, and, in a run with conversations, what `violations` gives; `ema`, the main numbers
    with averaged weights.

    Every rank evaluates the same rows, so that sharded parameters are gathered equally often on all of them.
    """
    model.eval()
    report, state = measure(model, stream, p, device, retriever), retriever.switch.state_dict()
    with averaged():
        ema = measure(model, stream, p, device, retriever)
    retriever.switch.load_state_dict(state)  # the average decides nothing
    model.train()
    return report | {"ema": {name: ema[name] for name in epoch.Numbers.model_fields if name in ema}}
