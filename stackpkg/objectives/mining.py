"""Hard negatives mined in the loop: of the documents of recent steps, those that a query likes most."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

STEPS = 32  # whole optimiser steps that are remembered, so that what is does not depend on how a step is split


class Recent:
    """Embeddings of the documents of the last `STEPS` optimiser steps, of all ranks, as they were then (cross-batch
    memory: Wang et al., arXiv 1912.06798, whose slow drift holds once the rate is small). Fixed within a step; must be
    checkpointed.
    """

    def __init__(self) -> None:
        self.steps: deque[tuple[Tensor, Tensor]] = deque(maxlen=STEPS)
        self.new: list[tuple[Tensor, Tensor]] = []  # since the last `after_step`, this rank

    @torch.no_grad()
    def hardest(self, query: Tensor, key: Tensor, count: int) -> Tensor:
        """The `count` documents nearest to each of `query` [rows, hidden], without those of the row's own `key` [rows]:
        [rows, count, hidden], without gradient; fewer, the same number for each row, where there are fewer.
        """
        if not self.steps:
            return query.new_empty(len(query), 0, query.shape[-1])
        documents, keys = (torch.cat(parts).to(query.device) for parts in zip(*self.steps, strict=True))
        documents, own = documents.to(query.dtype), key[:, None] == keys
        there = min(count, int((~own).sum(-1).min()))
        # argmax_(d: key(d) != key(q)) q . d
        nearest = (query @ documents.T).masked_fill(own, -torch.inf).topk(there, -1).indices
        return documents[nearest]

    def observe(self, documents: Tensor, key: Tensor) -> None:
        """A micro-batch: embeddings [rows, hidden] and the keys [rows] of their documents."""
        self.new.append((documents.detach().float(), key))

    @torch.no_grad()
    def after_step(self, group: dist.ProcessGroup | None = None) -> None:
        """Once an optimiser step, on all ranks, which hold equally many rows: what all of them saw is remembered."""
        if not self.new:
            return
        seen = [torch.cat(parts).contiguous() for parts in zip(*self.new, strict=True)]
        self.new = []
        if dist.is_initialized() and dist.get_world_size(group) > 1:
            for place, mine in enumerate(seen):
                everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
                dist.all_gather(everyone, mine, group)
                seen[place] = torch.cat(everyone)
        self.steps.append((seen[0], seen[1]))

    def drop(self) -> None:
        """Forget the step: its update was skipped."""
        self.new = []

    def state_dict(self) -> dict[str, list[Tensor]]:
        """State between two steps, on the CPU: embeddings and keys, a tensor a step."""
        return {name: [step[k].cpu() for step in self.steps] for k, name in enumerate(("documents", "keys"))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = deque(zip(state["documents"], state["keys"], strict=True), maxlen=STEPS)
