"""A vector index, the guard every retrieved record must pass, and its calibration."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stackpkg import runs

EXACT = 100_000  # records searched exactly: 1.4 ms a query of 64 numbers on one core; above, by inverted lists


@dataclasses.dataclass(frozen=True)
class Record:
    """What the guard must know of a retrieved record. `timestamp` in unix seconds, `trust` in [0, 1]."""

    name: str
    source: str
    timestamp: float
    trust: float


Found = list[tuple[Record, float]]  # records with their cosine similarity


def guard(
    found: Found,
    now: float,
    sources: set[str],
    sigma_min: float = 0.45,
    t_max: float = 604_800.0,
    min_trust: float = 0.6,
) -> tuple[Found, dict[str, int]]:
    """The records that are similar, at most `t_max` seconds old at unix time `now`, from an allowed source and trusted;
    and how many each filter rejected. A rejection counts for the first filter that made it.
    """
    accepted, rejected = [], dict.fromkeys(("similarity", "age", "source", "trust"), 0)
    for record, cosine in found:
        fresh = 0 <= now - record.timestamp <= t_max  # a timestamp in the future is not believed
        passed = (cosine >= sigma_min, fresh, record.source in sources, record.trust >= min_trust)
        if all(passed):
            accepted.append((record, cosine))
        else:
            rejected[list(rejected)[passed.index(False)]] += 1
    return accepted, rejected


class Index:
    """Cosine search over records by faiss (Douze et al., arXiv 2401.08281): exact up to `EXACT` records, beyond it an
    inverted file that visits an eighth of its lists. Lists and not a graph: a graph can't forget a withdrawn record.
    """

    def __init__(self, dimension: int) -> None:
        self.dimension, self._next, self._trained = dimension, 0, 0
        self._records: dict[int, Record] = {}
        self._ids: dict[str, int] = {}
        self._index: Any = faiss.index_factory(dimension, "IDMap2,Flat", faiss.METRIC_INNER_PRODUCT)

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, name: str) -> bool:
        return name in self._ids

    def _checked(self, vectors: Tensor) -> np.ndarray:
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension or not vectors.isfinite().all():
            given = f"{list(vectors.shape)}{'' if vectors.isfinite().all() else ' with NaN or infinity'}"
            raise ValueError(f"vectors are {given}; allowed: finite [n, {self.dimension}]")
        return np.ascontiguousarray(F.normalize(vectors.detach().float(), dim=-1).cpu().numpy())

    def add(self, vectors: Tensor, records: Sequence[Record]) -> None:
        """Add one of `vectors` [n, dimension] for each record; a record of a name that is here replaces it.

        Raises `ValueError` for other shapes, for NaN or infinity, and for a name given twice. Nothing is added then.
        """
        rows, names = self._checked(vectors), [record.name for record in records]
        if len(rows) != len(names) or len(set(names)) != len(names):
            raise ValueError(
                f"{len(rows)} vectors for {len(set(names))} names of {len(names)} records; give one a record"
            )
        self.remove(names)
        ids = np.arange(self._next, self._next + len(rows))
        self._next += len(rows)
        self._index.add_with_ids(rows, ids)
        self._records |= zip(ids.tolist(), records, strict=True)
        self._ids |= zip(names, ids.tolist(), strict=True)
        if len(self) > max(EXACT, 2 * self._trained):
            self._to_lists()

    def remove(self, names: Iterable[str]) -> int:
        """Withdraw records: their vectors leave the index too. Returns how many were here."""
        ids = [self._ids.pop(name) for name in names if name in self._ids]
        for i in ids:
            del self._records[i]
        return int(self._index.remove_ids(np.array(ids, np.int64)))

    def _to_lists(self) -> None:
        """Lists of about sqrt(n) records, trained anew whenever the index has doubled."""
        ids, rows = self._stored()
        lists = max(8, int(len(rows) ** 0.5))
        self._index = faiss.index_factory(self.dimension, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
        self._index.set_direct_map_type(faiss.DirectMap.Hashtable)  # type: ignore[attr-defined]  # not in its stubs
        self._index.nprobe, self._trained = lists // 8, len(rows)
        self._index.train(rows)
        self._index.add_with_ids(rows, ids)

    def _stored(self) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array(list(self._records), np.int64)
        return ids, self._index.reconstruct_batch(ids)

    def search(self, queries: Tensor, k: int = 8) -> list[Found]:
        """The k records nearest to each of `queries` [n, dimension], best first; fewer where there are fewer."""
        cosines, ids = self._index.search(self._checked(queries), k)
        rows = zip(ids.tolist(), cosines.tolist(), strict=True)
        return [[(self._records[i], c) for i, c in zip(*row, strict=True) if i >= 0] for row in rows]

    def retrieve(
        self, queries: Tensor, now: float, sources: set[str], k: int = 8, **limits: float
    ) -> tuple[list[Found], dict[str, int]]:
        """`search`, then `guard` with its `limits`: what each query may use, and all rejections by filter."""
        guarded = [guard(found, now, sources, **limits) for found in self.search(queries, k)]
        names = guard([], now, sources)[1]
        return [found for found, _ in guarded], {name: sum(count[name] for _, count in guarded) for name in names}

    def save(self, path: Path) -> None:
        """Vectors as they are, records as JSON, in one .npz file without code."""
        _, rows = self._stored()
        told = json.dumps([dataclasses.asdict(record) for record in self._records.values()])
        with runs.replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, vectors=rows, records=np.frombuffer(told.encode(), np.uint8))

    @classmethod
    def load(cls, path: Path) -> Index:
        """Raises `ValueError` for a file that holds anything but arrays, or not one vector a record."""
        with np.load(path, allow_pickle=False) as file:
            vectors, told = torch.from_numpy(file["vectors"]), file["records"].tobytes()
        index = cls(vectors.shape[1])
        index.add(vectors, [Record(**record) for record in json.loads(told)])
        return index


class Calibration(NamedTuple):
    sigma_min: float
    precision: float  # of what is accepted
    coverage: float  # share of queries left with a record


def calibrate(
    similarities: Tensor, relevant: Tensor, target: float, between: tuple[float, float] = (0.35, 0.6)
) -> Calibration:
    """The smallest sigma_min in the closed range `between` at which precision@k of what is accepted reaches `target`.

    `similarities` and bool `relevant` [queries, k]: the k records found for each labelled query. Precision is a ratio
    of sums, so a query without an accepted record does not count; coverage says how many of those there are.
    Raises `ValueError` when no threshold in the range reaches the target, naming the best.
    """
    if similarities.shape != relevant.shape or similarities.ndim != 2 or not similarities.isfinite().all():
        raise ValueError(
            f"similarities {list(similarities.shape)}, relevant {list(relevant.shape)}; allowed: two of one shape "
            "[queries, k], similarities finite"
        )
    low, high = between
    values = similarities.double()
    inside = values[(values > low) & (values < high)]
    best = Calibration(low, 0.0, 0.0)
    for sigma in torch.cat((values.new_tensor([low]), inside.unique(), values.new_tensor([high]))).tolist():
        accepted = values >= sigma
        if not accepted.any():
            break
        # precision = sum_(q,r) 1[s >= sigma] relevant / sum_(q,r) 1[s >= sigma]; Manning et al. 2008, eq. 8.1
        precision = float((accepted & relevant.bool()).sum() / accepted.sum())
        found = Calibration(sigma, precision, float(accepted.any(1).double().mean()))
        if precision >= target:
            return found
        best = max(best, found, key=lambda c: c.precision)
    raise ValueError(
        f"no sigma_min in [{low}, {high}] reaches precision {target}; the best is {best.precision:.3f} at "
        f"{best.sigma_min:.3f}, coverage {best.coverage:.3f}; train the embeddings further or lower the target"
    )


class Switch:
    """Retrieval on or off. An alert turns it off; a calibration on labelled pairs turns it on again. Its state belongs
    in the checkpoint.
    """

    def __init__(self, sigma_min: float = 0.45) -> None:
        self.on, self.sigma_min = True, sigma_min

    def recalibrate(
        self, similarities: Tensor, relevant: Tensor, target: float, between: tuple[float, float] = (0.35, 0.6)
    ) -> Calibration:
        """As `calibrate`; on success retrieval is on, with the new sigma_min. On `ValueError` nothing changes."""
        found = calibrate(similarities, relevant, target, between)
        self.sigma_min, self.on = found.sigma_min, True
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"on": self.on, "sigma_min": self.sigma_min}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.on, self.sigma_min = state["on"], state["sigma_min"]
