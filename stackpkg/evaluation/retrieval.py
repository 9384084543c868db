"""Retrieval on held-out pairs, each epoch: how well it ranks, what the guard rejects, and the switch."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import torch
import torch.distributed as dist
from torch import nn

from stackpkg.data import manifest
from stackpkg.data.stream import Batch, Stream
from stackpkg.evaluation import sets
from stackpkg.evaluation.ranking import ranking
from stackpkg.model.embedding import embed
from stackpkg.model.retrieval import Found, Index, Record, Switch
from stackpkg.objectives import reading
from stackpkg.params import Params

BINS = np.linspace(-1, 1, 41)  # edges of the similarity histogram


class Retriever:
    """The documents of the held-out pairs behind the guard. `switch` is what a checkpoint keeps of it; the guard's
    alerts turn it off, the next calibration that reaches the target on.
    """

    def __init__(self, stream: Stream, p: Params) -> None:
        self.stream, self.p, self.switch = stream, p, Switch(p.retrieval.sigma_min)
        self.sets = sets.load(stream.corpus.folder, p, stream.pad_id)
        self._known: dict[str, tuple[str, int, float]] = {}

    def _records(self, pairs: Batch) -> list[Record]:
        """What the guard must know of each pair's document, named by its key. A given set's document, of which the
        corpus has no record, comes from no source and has no trust."""
        wanted = set(pairs["record_id"].tolist())
        if wanted - self._known.keys():
            corpus, names = self.stream.corpus, ["record_id", "domain", "timestamp", "trust"]
            files = ds.dataset(manifest.records(corpus.folder, corpus.version))
            rows = files.to_table(columns=names, filter=ds.field("record_id").isin(sorted(wanted))).to_pylist()
            self._known = dict.fromkeys(wanted, ("", 0, 0.0)) | {
                row["record_id"]: (row["domain"], row["timestamp"], row["trust"]) for row in rows
            }
        about = [self._known[name] for name in pairs["record_id"].tolist()]
        return [Record(str(key), *facts) for key, facts in zip(pairs["pair_key"].tolist(), about, strict=True)]

    @torch.no_grad()
    def measure(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """Ranking of all held-out documents for each held-out query, and `guard`: of the `fan_in` nearest, how many it
        accepts, how many are relevant among these, what each filter rejects, and the histogram of similarities over
        `BINS`. Of a model that reads records also what reading brings (`read`). Every rank must call it. While the
        switch is off, a calibration is tried first.
        """
        self.agree()
        pairs, limits, k = self.stream.validation_pairs(self.p.evaluation.pairs), self.p.retrieval, self.p.evaluation.k
        query, document = (
            embed(model, torch.as_tensor(pairs[name], device=device), self.stream.pad_id).float().cpu()
            for name in ("query_ids", "positive_ids")
        )
        keys = pairs["pair_key"]
        found = ranking((query @ document.T).numpy(), keys[:, None] == keys[None], k)
        index, (_, first) = Index(document.shape[1]), np.unique(keys, return_index=True)
        records = self._records(pairs)
        index.add(document[first], [records[i] for i in first])
        near = index.search(query, min(limits.fan_in, len(index)))
        tried = {} if self.switch.on else {"calibration": self._calibrate(near, keys)}
        accepted, rejected = index.retrieve(
            query, time.time(), set(limits.sources or self.stream.domains), limits.fan_in,
            sigma_min=self.switch.sigma_min, t_max=limits.max_age, min_trust=limits.min_trust,
        )  # fmt: skip
        right = sum(record.name == str(key) for key, row in zip(keys, accepted, strict=True) for record, _ in row)
        told = {"accepted": sum(map(len, accepted)), "relevant": right, "rejected": rejected}
        cosines = [cosine for row in near for _, cosine in row]
        told |= {"similarities": np.histogram(np.clip(cosines, -1, 1), BINS)[0].tolist()}
        return {
            "k": k, "precision_at_k": found.pop(f"precision_at_{k}"), "recall_at_k": found.pop(f"recall_at_{k}"),
            **found, "pairs": len(query), "guard": self.switch.state_dict() | told | tried,
            **(self.read(model, device, pairs, accepted) if reading.reads(model) else {}),
        }  # fmt: skip

    def agree(self) -> None:
        """All ranks take the switch of rank 0, which alone hears the alerts. A collective."""
        if dist.is_initialized():
            state = [self.switch.state_dict()]
            dist.broadcast_object_list(state)
            self.switch.load_state_dict(state[0])

    def read(self, model: nn.Module, device: torch.device, pairs: Batch, accepted: list[Found]) -> dict[str, float]:
        """`reading_loss`: next-token loss of each query's document, nats a token, beside the records `accepted` for the
        query, none while the switch is off; `reading_gain`: how far that lies below the loss without any.
        """
        ids, pad_id, limit = torch.as_tensor(pairs["positive_ids"]), self.stream.pad_id, self.p.retrieval.fan_in
        place = {str(key): i for i, key in enumerate(pairs["pair_key"].tolist())}
        records = ids.new_full((len(ids), limit, ids.shape[1]), pad_id)
        for found, row in zip(accepted if self.switch.on else [], records, strict=False):
            for k, (record, _) in enumerate(found):
                row[k] = ids[place[record.name]]
        batch, losses = {"positive_ids": ids.to(device)}, []
        for beside in (records, records[:, :0]):
            logits = model(**reading.request(batch["positive_ids"], beside.to(device), pad_id)).logits
            losses.append(reading.reading(reading.said(logits, batch, pad_id)))
        tokens = max(1, int((ids[:, 1:] != pad_id).sum()))
        with_records, alone = (float(loss) / tokens for loss in losses)
        return {"reading_loss": with_records, "reading_gain": alone - with_records}

    def _calibrate(self, near: list[Found], keys: np.ndarray) -> dict[str, Any]:
        cosines = torch.tensor([[cosine for _, cosine in row] for row in near])
        relevant = [[record.name == str(key) for record, _ in row] for key, row in zip(keys, near, strict=True)]
        target, between = self.p.evaluation.min_precision_at_k, self.p.retrieval.sigma_range
        try:
            return self.switch.recalibrate(cosines, torch.tensor(relevant), target, between)._asdict()
        except ValueError as error:
            return {"failed": str(error)}
