"""What rides in a batch beside its text: conversations, preferences and retrieval pairs, each one forward for all.

Every rank calls the model equally often, as FSDP needs: whether a step carries a set is decided for the whole step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from stackpkg.data.stream import Stream
from stackpkg.model import StackForCausalLM, scopes
from stackpkg.model.embedding import embed
from stackpkg.model.scopes import PROTECTED
from stackpkg.objectives import Pairs, conformance
from stackpkg.objectives.conformance import Conversations
from stackpkg.objectives.preference import Answers, Preferences, answers
from stackpkg.params import Objectives


def carried(inputs: Mapping[str, Tensor], key: str) -> bool:
    """Whether the step carries a set: the keys of one that it does not carry are -1."""
    return key in inputs and int(inputs[key][0]) >= 0


def units(batches: Sequence[Mapping[str, Tensor]], pad_id: int, device: torch.device) -> Tensor:
    """int64[6] of the micro-batches of this rank: label tokens, answers among them, rows, preferences, tokens of
    conversations, protected ones among them.
    """
    parts: list[list[Any]] = []
    for batch in batches:
        labelled = batch["labels"][:, 1:] >= 0
        parts.append([labelled.sum(), (batch["answer_mask"][:, 1:] & labelled).sum(), len(labelled)])
        parts[-1].append((batch["preference_key"] >= 0).sum() if "preference_key" in batch else 0)
        talks = carried(batch, "conversation_key")
        parts[-1].append((batch["conversation_ids"] != pad_id).sum() if talks else 0)
        parts[-1].append((batch["conversation_spans"][:, 1:, PROTECTED] >= 0).sum() if talks else 0)
    return torch.stack([torch.stack([torch.as_tensor(n, device=device) for n in part]) for part in parts]).sum(0)


class Riders:
    """Reads what a step carries: `riders(model, inputs)` gives conversations, preferences and pairs, each or None."""

    def __init__(
        self, network: PreTrainedModel, stream: Stream, weights: Objectives, name: str, device: torch.device
    ) -> None:
        self.weights, self.pad_id = weights, stream.pad_id
        if "conversations" in stream.labelled:
            self.rules = scopes.load(stream.corpus.folder / "scopes.yaml")
            self.forbidden = torch.as_tensor(stream.forbidden, device=device)
            if dist.get_rank() == 0 and not isinstance(network, StackForCausalLM):
                kind = network.config.model_type
                print(f"[{name}] {kind} knows no scopes: conformance is that of tokens alone", flush=True)

    def __call__(
        self, model: nn.Module, inputs: Mapping[str, Tensor]
    ) -> tuple[Conversations | None, Preferences | None, Pairs | None]:
        wanted = (
            (self.weights.conformance, "conversation_key"),
            (self.weights.preference, "preference_key"),
            (self.weights.contrastive, "pair_key"),
        )
        talk, prefer, pair = (bool(weight) and carried(inputs, key) for weight, key in wanted)
        # pairs last: under FSDP2 (torch 2.13) the backward crashes when a forward follows one without use of its logits
        return (
            conformance.read(model, inputs, self.rules, self.forbidden, self.pad_id) if talk else None,
            preferences(model, inputs, self.pad_id) if prefer else None,
            pairs(model, inputs, self.pad_id) if pair else None,
        )


def pairs(model: nn.Module, inputs: Mapping[str, Tensor], pad_id: int) -> Pairs:
    """Embeddings of query_ids [n, Lq], positive_ids [n, Ld] and negative_ids [n, H, Ld]."""
    parts = [inputs["query_ids"], inputs["positive_ids"], inputs["negative_ids"].flatten(0, 1)]
    width = max(ids.shape[1] for ids in parts)
    stacked = torch.cat([F.pad(ids, (0, width - ids.shape[1]), value=pad_id) for ids in parts])
    query, positive, negatives = embed(model, stacked, pad_id).split([len(ids) for ids in parts])
    return Pairs(query, positive, negatives.view(len(query), -1, query.shape[-1]), inputs["pair_key"])


def preferences(model: nn.Module, inputs: Mapping[str, Tensor], pad_id: int) -> Preferences:
    """Log-probabilities of the answers in chosen_ids and rejected_ids [n, L], from answer_start [n] on."""
    ids = torch.cat([inputs["chosen_ids"], inputs["rejected_ids"]])
    logits = model(input_ids=ids, attention_mask=(ids != pad_id).long(), use_cache=False).logits
    found = answers(logits, ids, inputs["answer_start"].repeat(2), pad_id)
    chosen, rejected = (Answers(*half) for half in zip(*(part.chunk(2) for part in found), strict=True))
    return Preferences(chosen, rejected, inputs["preference_key"])
