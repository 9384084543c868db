"""The seekable batch stream: row i is a pure function of (seed, manifest, curriculum, i), on any number of ranks."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from stackpkg import runs
from stackpkg.data import longrange, mixing, shards
from stackpkg.data.curriculum import Plan
from stackpkg.params import Params

IGNORE = -100  # label of a token that is not trained on
FILES = ("long_range.parquet", "pairs.parquet")
Piece = tuple[int, int, int]  # document, first token inside it, tokens


class Corpus:
    """Token shards, memory-mapped. Raises `ValueError` that names every file that is not the manifest's."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "manifest.json").exists():
            raise ValueError("data/manifest.json is missing: run notebook 10, or let its build end")
        if broken := shards.verify(folder):
            raise ValueError(f"corrupt or missing: {', '.join(broken)}; notebook 11 shows the way back")
        self.manifest, self.digest = runs.read_json(folder / "manifest.json"), runs.digest(folder / "manifest.json")
        self.names = [entry["name"] for entry in self.manifest["shards"]]
        self.maps = [np.memmap(folder / "shards" / name, self.manifest["dtype"], "r") for name in self.names]
        index = pq.read_table(folder / "shards/index.parquet").to_pandas()
        self.records, self.offset, self.tokens = (index[name].to_numpy() for name in ("record_id", "offset", "tokens"))
        self.shard = index["shard"].map({name: k for k, name in enumerate(self.names)}).to_numpy()
        self.members = index.groupby(["split", "domain"]).indices

    def span(self, order: np.ndarray, ends: np.ndarray, start: int, length: int) -> Iterator[Piece]:
        """Pieces that cover `length` tokens from `start` of documents in `order`; `ends`: their cumulated lengths."""
        k = int(np.searchsorted(ends, start, side="right"))
        while length > 0 and k < len(order):
            count = min(length, int(ends[k]) - start)
            yield int(order[k]), int(self.tokens[order[k]] - ends[k]) + start, count
            start, length, k = start + count, length - count, k + 1

    def read(self, pieces: Iterator[Piece]) -> np.ndarray:
        """int64[tokens] of the pieces, one after another."""
        starts = ((self.maps[self.shard[d]], int(self.offset[d]) + begin, count) for d, begin, count in pieces)
        return np.concatenate([tokens[first : first + count] for tokens, first, count in starts]).astype(np.int64)


class Stream:
    """Rows of the run, `p.training.batch_rows` of them an optimiser step; `folder` is the run's `data/`.

    Each domain is read in epochs: its training documents permuted, each ended by `<eos>`, concatenated, cut to the
    context. A row costs O(log documents) once its epoch's permutation is made.
    """

    def __init__(self, folder: Path, p: Params) -> None:
        self.p, self.corpus, self.shortest = p, Corpus(folder), min(stage.context for stage in p.curriculum)
        manifest = self.corpus.manifest
        self.domains, self.manifest_digest = list(manifest["mixture"]), self.corpus.digest
        self.vocab_size, self.pad_id = int(manifest["vocab_size"]), int(manifest["pad_id"])
        self.plan = Plan(p, manifest["mixture"])
        tasks, pairs = (shards.read_ids(folder / name, manifest[shards.STAMP]) for name in FILES)
        self.tasks = {split: [task for task in tasks if task["split"] == split] for split in ("train", "held_out")}
        self.pairs = {split: self._padded([row for row in pairs if row["split"] == split]) for split in self.tasks}
        self._order = lru_cache(maxsize=64)(lambda n, *key: mixing.permutation(n, p.seed, *key))
        self._epoch = lru_cache(maxsize=4 * len(self.domains))(self._permuted)

    def _padded(self, pairs: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        """query_ids[n, Lq], positive_ids[n, Ld], negative_ids[n, H, Ld], pair_key[n]."""
        if not pairs:
            raise ValueError("pairs.parquet lacks training or held-out pairs: raise auxiliary.pairs, run 13 again")

        def pad(lists: list[list[int]], length: int) -> np.ndarray:
            return np.array([(ids + [self.pad_id] * length)[:length] for ids in lists], np.int64)

        sizes = self.p.auxiliary
        made = {"pair_key": np.array([pair["pair_key"] for pair in pairs])}
        made["query_ids"] = pad([pair["query_ids"] for pair in pairs], sizes.query_tokens)
        made["positive_ids"] = pad([pair["positive_ids"] for pair in pairs], sizes.document_tokens)
        hard = [pad(pair["negative_ids"][: sizes.hard_negatives], sizes.document_tokens) for pair in pairs]
        return made | {"negative_ids": np.stack(hard)}

    def _permuted(self, domain: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents of a domain in the order of an epoch, and their cumulated lengths in tokens."""
        members = self.corpus.members["train", self.domains[domain]]
        order = members[mixing.permutation(len(members), self.p.seed, "documents", self.domains[domain], epoch)]
        return order, np.cumsum(self.corpus.tokens[order])

    def _pieces(self, domain: int, start: int, length: int) -> Iterator[Piece]:
        """Pieces of `length` tokens from token `start` of a domain's epochs."""
        total = int(self._epoch(domain, 0)[1][-1])
        while length > 0:
            epoch, inside = divmod(start, total)
            take = min(length, total - inside)
            yield from self.corpus.span(*self._epoch(domain, epoch), inside, take)
            start, length = start + take, length - take

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """Row i: input_ids, labels, answer_mask [L]; query_ids [Lq], positive_ids [Ld], negative_ids [H, Ld];
        domain [], pair_key []. In a stage without retrieval pair_key is -1: the pair counts for nothing."""
        row, pairs = self.plan[i], self.pairs["train"]
        if row.lane == len(self.domains):
            made = self._long_range("train", row.ordinal, row.context)
        else:
            ids = self.corpus.read(self._pieces(row.lane, row.start, row.context))
            made = self._text(ids, row.lane, row.context)
        epoch, place = divmod(i, len(pairs["pair_key"]))
        chosen = self._order(len(pairs["pair_key"]), "pairs", epoch)[place]
        made |= {name: np.asarray(values[chosen]) for name, values in pairs.items()}
        return made if self.p.curriculum[row.stage].retrieval else made | {"pair_key": np.array(-1)}

    def _text(self, ids: np.ndarray, domain: int, context: int) -> dict[str, np.ndarray]:
        tokens, labels = (np.pad(ids, (0, context - len(ids)), constant_values=fill) for fill in (self.pad_id, IGNORE))
        mask, lane = np.zeros(context, bool), np.array(domain)
        return {"input_ids": tokens, "labels": labels, "answer_mask": mask, "domain": lane}

    def _task(self, split: str, ordinal: int) -> dict[str, Any]:
        epoch, place = divmod(ordinal, len(self.tasks[split]))
        return self.tasks[split][self._order(len(self.tasks[split]), "tasks", epoch)[place]]

    def _long_range(self, split: str, ordinal: int, context: int) -> dict[str, np.ndarray]:
        """Long-range row `ordinal` of a split, filled with running text of that split; only answers are labelled."""
        kind = "validation" if split == "held_out" else "train"
        texts = [text for text, name in zip(self.corpus.maps, self.corpus.names, strict=True) if name.startswith(kind)]
        which, where = (int(number) for number in mixing.hashed(2, self.p.seed, "filler", split, ordinal))
        text = texts[which % len(texts)]
        filler = np.resize(text[where % max(1, len(text) - context) :][:context], context)
        ids, answers = longrange.row(self._task(split, ordinal), filler)
        labels, lane = np.where(answers, ids, IGNORE), np.array(len(self.domains))
        return {"input_ids": ids, "labels": labels, "answer_mask": answers, "domain": lane}

    def documents(self, step: int) -> list[dict[str, Any]]:
        """What was in optimiser step `step`: row, domain, record_id, shard, offset and tokens of each piece."""
        found: list[dict[str, Any]] = []
        for i in range(step * self.plan.batch_rows, (step + 1) * self.plan.batch_rows):
            row, corpus = self.plan[i], self.corpus
            about: dict[str, Any] = {"row": i, "domain": self.plan.lanes[row.lane]}
            if row.lane == len(self.domains):
                about |= {"record_id": self._task("train", row.ordinal)["task_id"], "shard": FILES[0]}
                found.append(about | {"offset": 0, "tokens": row.context})
                continue
            for d, begin, count in self._pieces(row.lane, row.start, row.context):
                about |= {"record_id": corpus.records[d], "shard": corpus.names[corpus.shard[d]]}
                found.append(about | {"offset": int(corpus.offset[d]) + begin, "tokens": count})
        return found

    def validation(self, domain: str, rows: int) -> list[dict[str, np.ndarray]]:
        """At most `rows` rows of a domain's held-out documents in the context of the first stage, the last padded."""
        context, order = self.p.curriculum[0].context, self.corpus.members.get(("validation", domain), [])
        ends = np.cumsum(self.corpus.tokens[order]) if len(order) else np.zeros(1, np.int64)
        starts = range(0, min(rows * context, int(ends[-1])), context)
        ids = [self.corpus.read(self.corpus.span(order, ends, start, context)) for start in starts]
        return [self._text(part, self.domains.index(domain), context) for part in ids]

    def validation_pairs(self, n: int) -> dict[str, np.ndarray]:
        """At most `n` held-out pairs: query_ids[n, Lq], positive_ids[n, Ld], pair_key[n]."""
        return {name: self.pairs["held_out"][name][:n] for name in ("query_ids", "positive_ids", "pair_key")}

    def long_range_rows(self, n: int) -> list[dict[str, np.ndarray]]:
        """At most `n` held-out long-range rows in the shortest context of the curriculum."""
        return [self._long_range("held_out", k, self.shortest) for k in range(min(n, len(self.tasks["held_out"])))]
