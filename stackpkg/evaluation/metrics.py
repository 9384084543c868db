"""What is measured on held-out data at the end of each epoch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stackpkg.data.stream import Batch, Stream
from stackpkg.evaluation.retrieval import Retriever
from stackpkg.params import Params
from stackpkg.telemetry.probes import normalised_entropy, routed


@torch.no_grad()
def _losses(model: nn.Module, rows: Batch, device: torch.device, moe: bool) -> dict[str, Any]:
    """Summed next-token loss and correct predictions over labelled positions of `rows`, and the router's logits."""
    batch = {name: torch.as_tensor(value, device=device) for name, value in rows.items()}
    labels = batch["labels"][:, 1:]
    wants = {"output_router_logits": True} if moe else {}
    packed = {name: batch[name] for name in ("input_ids", "position_ids")}
    outputs = model(**packed, use_cache=False, **wants)
    logits = outputs.logits[:, :-1].float()
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    answers = batch["answer_mask"][:, 1:] & (labels >= 0)
    right = (logits.argmax(-1) == labels) & answers
    return {
        "loss": float(losses.sum()),
        "tokens": int((labels >= 0).sum()),
        "answers": int(answers.sum()),
        "right": int(right.sum()),
        "router": [layer.float() for layer in outputs.get("router_logits") or ()],
    }


def _means(parts: dict[str, dict[str, Any]]) -> dict[str, float]:
    return {name: part["loss"] / max(1, part["tokens"]) for name, part in parts.items()}


def router_balance(logits: list[Tensor], top_k: int) -> list[dict[str, Any]]:
    """Per layer: share of the choices each expert got (sums to 1), and the mean normalised gate entropy."""
    layers = []
    for layer in logits:
        chosen = layer.topk(top_k, -1).indices.flatten()
        usage = torch.bincount(chosen, minlength=layer.shape[-1]).float() / chosen.numel()
        layers.append({"usage": usage.tolist(), "entropy": float(normalised_entropy(layer.softmax(-1)).mean())})
    return layers


@torch.no_grad()
def evaluate_epoch(
    model: nn.Module,
    stream: Stream,
    p: Params,
    device: torch.device,
    averaged: Callable[[], AbstractContextManager[None]],
    retriever: Retriever,
) -> dict[str, Any]:
    """One report: loss per domain (nats per token), raw and with averaged weights, retrieval, routing, long range.

    Every rank evaluates the same rows, so that sharded parameters are gathered equally often on all of them.
    """
    model.eval()
    moe = routed(model)
    # a domain of one document holds nothing out
    held = {name: stream.validation(name, p.evaluation.rows) for name in stream.domains}
    rows = {name: batch for name, batch in held.items() if len(batch["labels"])}
    parts = {name: _losses(model, batch, device, moe) for name, batch in rows.items()}
    far = _losses(model, stream.long_range(p.evaluation.rows), device, moe)
    retrieval = retriever.measure(model, device)
    with averaged():
        ema = _means({name: _losses(model, batch, device, moe) for name, batch in rows.items()})
    layers = [torch.cat(layer) for layer in zip(*(part["router"] for part in parts.values()), strict=True)]
    balance = router_balance(layers, getattr(model.config, "num_experts_per_tok", 1)) if layers else []
    model.train()
    losses = _means(parts)
    return {
        "validation_loss": float(np.mean(list(losses.values()))),
        "validation_loss_by_domain": losses,
        "ema_validation_loss": float(np.mean(list(ema.values()))),
        **retrieval,
        "long_range_accuracy": far["right"] / max(1, far["answers"]),
        "long_range_answers": far["answers"],
        "router": balance,
    }
