"""What rides in a batch beside its text: conversations, preferences, retrieval pairs, and documents beside the records
that retrieval finds for them; each one forward for all.

Every rank calls the model equally often, as FSDP needs: whether a step carries a set is decided for the whole step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from stackpkg.data.stream import Stream
from stackpkg.model import StackForCausalLM, embedding, scopes
from stackpkg.model.scopes import PROTECTED
from stackpkg.objectives import Pairs, conformance, preference, reading
from stackpkg.objectives.conformance import Conversations
from stackpkg.objectives.preference import Answers, Preferences
from stackpkg.objectives.reading import Reading
from stackpkg.params import Objectives
from stackpkg.training import reference


def carried(inputs: Mapping[str, Tensor], key: str) -> bool:
    """Whether the step carries a set: the keys of one that it does not carry are -1."""
    return key in inputs and int(inputs[key][0]) >= 0


def units(batches: Sequence[Mapping[str, Tensor]], pad_id: int, device: torch.device) -> Tensor:
    """int64[7] of the micro-batches of this rank: label tokens, answers among them, rows, preferences, tokens of
    conversations, protected ones among them, tokens of the pairs' documents but the first of each.
    """
    parts: list[list[Any]] = []
    for batch in batches:
        labelled = batch["labels"][:, 1:] >= 0
        parts.append([labelled.sum(), (batch["answer_mask"][:, 1:] & labelled).sum(), len(labelled)])
        parts[-1].append((batch["preference_key"] >= 0).sum() if "preference_key" in batch else 0)
        talks = carried(batch, "conversation_key")
        parts[-1].append((batch["conversation_ids"] != pad_id).sum() if talks else 0)
        parts[-1].append((batch["conversation_spans"][:, 1:, PROTECTED] >= 0).sum() if talks else 0)
        parts[-1].append((batch["positive_ids"][:, 1:] != pad_id).sum() if carried(batch, "pair_key") else 0)
    return torch.stack([torch.stack([torch.as_tensor(n, device=device) for n in part]) for part in parts]).sum(0)


class Riders:
    """What a step carries: `requests` are the forwards that it needs, `read` makes objectives of their answers."""

    def __init__(
        self, network: PreTrainedModel, stream: Stream, weights: Objectives, home: Path, data: dist.ProcessGroup,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.weights, self.pad_id, self.rules, self.reference = weights, stream.pad_id, None, None
        self.reads, self.open = reading.reads(network), True  # `open`: retrieval is switched on
        if weights.preference and weights.preference_loss == "dpo" and "preferences" in stream.labelled:
            pairs = stream.labelled["preferences"]
            self.reference = reference.log_probs(network, pairs, self.pad_id, home, data, device)
        if "conversations" in stream.labelled:
            self.forbidden = torch.as_tensor(stream.forbidden, device=device)
            if isinstance(network, StackForCausalLM):
                self.rules = scopes.load(stream.corpus.folder / "scopes.yaml")
            elif dist.get_rank() == 0:
                kind = network.config.model_type
                print(f"[{home.name}] {kind} knows no scopes: conformance is that of tokens alone", flush=True)

    def requests(self, inputs: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
        """Keyword arguments of each forward, by name, in the order to run them in."""
        weights, found = self.weights, dict[str, dict[str, Any]]()
        if weights.conformance and carried(inputs, "conversation_key"):
            found["conversations"] = conformance.request(inputs, self.rules, self.pad_id)
        if weights.preference and carried(inputs, "preference_key"):
            found["preferences"] = preference.stacked(inputs, self.pad_id)
        if weights.reading and self.reads and self.open and carried(inputs, "pair_key"):
            found["reading"] = reading.asked(inputs, self.pad_id)
        # last: under FSDP2 (torch 2.13) the backward crashes when a forward follows one without use of its logits
        if weights.contrastive and carried(inputs, "pair_key"):
            found["pairs"] = embedding.request(stacked(inputs, self.pad_id), self.pad_id)
        return found

    def read(
        self, answers: Mapping[str, Any], inputs: Mapping[str, Tensor]
    ) -> tuple[Conversations | None, Preferences | None, Pairs | None, Reading | None]:
        """Conversations, preferences, pairs and reading, each None where `answers` lacks it."""
        names = "conversations", "preferences", "pairs", "reading"
        talk, preferred, pair, read = (answers.get(name) for name in names)
        return (
            None if talk is None else conformance.said(talk, inputs, self.forbidden, self.pad_id),
            None if preferred is None else preferences(preferred.logits, inputs, self.pad_id, self.reference),
            None if pair is None else pairs(pair, inputs, self.pad_id),
            None if read is None else reading.said(read.logits, inputs, self.pad_id),
        )


def stacked(inputs: Mapping[str, Tensor], pad_id: int) -> Tensor:
    """query_ids [n, Lq], positive_ids [n, Ld] and negative_ids [n, H, Ld] in one tensor [n (2 + H), L]."""
    parts = [inputs["query_ids"], inputs["positive_ids"], inputs["negative_ids"].flatten(0, 1)]
    width = max(ids.shape[1] for ids in parts)
    return torch.cat([F.pad(ids, (0, width - ids.shape[1]), value=pad_id) for ids in parts])


def pairs(out: Any, inputs: Mapping[str, Tensor], pad_id: int) -> Pairs:
    """Embeddings of what was `stacked`, taken apart."""
    n, hard = inputs["negative_ids"].shape[:2]
    query, positive, negatives = embedding.pooled(out, stacked(inputs, pad_id), pad_id).split([n, n, n * hard])
    return Pairs(query, positive, negatives.view(n, hard, -1), inputs["pair_key"])


def preferences(
    logits: Tensor, inputs: Mapping[str, Tensor], pad_id: int, reference: Tensor | None = None
) -> Preferences:
    """Log-probabilities of the answers in chosen_ids and rejected_ids [n, L], from answer_start [n] on; beside them
    those of the `reference` [set, 2].
    """
    ids = torch.cat([inputs["chosen_ids"], inputs["rejected_ids"]])
    found = preference.answers(logits, ids, inputs["answer_start"].repeat(2), pad_id)
    chosen, rejected = (Answers(*half) for half in zip(*(part.chunk(2) for part in found), strict=True))
    key = inputs["preference_key"]
    return Preferences(chosen, rejected, key, None if reference is None else (reference[key, 0], reference[key, 1]))
