"""Which documents each row holds: epochs of whole documents, packed, and the withdrawals decided under way."""

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from stackpkg.data import mixing
from stackpkg.data.corpus import Corpus
from stackpkg.data.curriculum import Decision, Plan
from stackpkg.data.packing import Pack, pack
from stackpkg.params import Params, Stage

NEVER = np.iinfo(np.int64).max
Piece = tuple[int, int, int]  # document, first token inside it, tokens
shuffle = lru_cache(maxsize=256)(mixing.Shuffle)


class Epochs(NamedTuple):
    """Rows of a domain in a stage: first what the epoch under way has not read yet, then whole epochs."""

    rest: Pack
    whole: Pack


class Schedule:
    """The documents of every row, a pure function of (seed, manifest, curriculum, decisions, row).

    A domain is read in epochs, without replacement. Documents longer than the context of a stage wait for a later one,
    which reads them first together with what the epoch under way had left; the others are packed whole.
    """

    def __init__(self, corpus: Corpus, p: Params, decisions: Iterable[Decision] = ()) -> None:
        self.corpus, self.p = corpus, p
        self.domains = sorted(corpus.manifest["tokens"]["train"])
        self._packs: dict[tuple[str, int], Pack] = {}
        self.mixtures, read = list[dict[str, float]](), Counter[str]()
        for stage in p.curriculum:
            self.mixtures.append(self._mixture(stage, read))
            tokens = stage.steps * p.training.batch_tokens * (1 - stage.long_range)
            read.update({domain: share * tokens for domain, share in self.mixtures[-1].items()})
        self.use(decisions)

    @cached_property
    def running(self) -> dict[str, np.ndarray]:
        """int64[documents] of each split, in order."""
        members, nothing = self.corpus.members, np.empty(0, np.int64)
        found = {split: [nothing, *(members[k] for k in members if k[0] == split)] for split in ("train", "validation")}
        return {split: np.sort(np.concatenate(parts)) for split, parts in found.items()}

    def use(self, decisions: Iterable[Decision]) -> None:
        """Take decisions into account. Nothing that was read before the step of a decision changes."""
        self.decisions = list(decisions)
        self.plan = Plan(self.p, self.mixtures, self.decisions)
        self.epochs = [self._epochs(lane) for lane in range(len(self.domains))]
        self.withdrawn: dict[str, int] = {}  # record -> first row that it is missing from
        for d in self.decisions:
            if d["kind"] == "withdraw":
                row = self.plan.rows_at(self.plan.position(d["step"])).start
                self.withdrawn[d["record_id"]] = min(row, self.withdrawn.get(d["record_id"], NEVER))
        self.gone = np.full(len(self.corpus.tokens), NEVER)
        if self.withdrawn:  # to look is to read all records of the index
            found = self.corpus.find(self.withdrawn)
            self.gone = np.array([*self.withdrawn.values(), NEVER])[found]  # the last where there is none

    def _mixture(self, stage: Stage, read: Mapping[str, float]) -> dict[str, float]:
        """Share of each domain among the text rows of a stage, after `read` tokens of each; only documents that fit its
        context count."""
        data, tokens = self.p.data, {}
        for domain in self.domains:
            lengths = self.corpus.tokens[self.corpus.members["train", domain]]
            tokens[domain] = int(lengths[lengths <= stage.context].sum())
        present = {domain: count for domain, count in tokens.items() if count}
        if not present:
            raise ValueError(f"no training document fits a context of {stage.context} tokens: begin with a longer one")
        budget = int(stage.steps * self.p.training.batch_tokens * (1 - stage.long_range))
        temperature = stage.temperature or data.temperature
        caps = data.max_share, data.max_epochs, budget, read
        return dict.fromkeys(tokens, 0.0) | mixing.shares(present, temperature, *caps)

    def _epochs(self, lane: int) -> list[Epochs]:
        members = self.corpus.members["train", self.domains[lane]]
        lengths, seen, made = self.corpus.tokens[members], np.zeros(len(self.corpus.tokens), bool), list[Epochs]()
        for number, stage in enumerate(self.p.curriculum):
            fits, rows = lengths <= stage.context, int(self.plan.counts[number, lane])
            key = (self.domains[lane], stage.context)
            if key not in self._packs:
                self._packs[key] = pack(members[fits], lengths[fits], stage.context)
            whole, fresh = self._packs[key], fits & ~seen[members]
            rest = pack(members[fresh], lengths[fresh], stage.context) if seen.any() else whole
            made.append(Epochs(rest, whole))
            if number == len(self.p.curriculum) - 1:
                break
            epoch, left = divmod(rows - len(rest), len(whole)) if rows > len(rest) else (-1, rows)
            if epoch >= 0:
                seen[:] = False
            read = whole if epoch >= 0 else rest
            seen[read.documents(self.order(len(read), lane, number, epoch).at(np.arange(left)))] = True
        return made

    def order(self, rows: int, lane: int, stage: int, epoch: int) -> mixing.Shuffle:
        """The order that the rows of an epoch are read in; epoch -1 is what the epoch under way had left."""
        return shuffle(rows, self.p.seed, "rows", self.domains[lane], stage, epoch)

    def pieces(self, i: int) -> list[Piece]:
        """What row i holds, in its order; of a long-range row, the running text under it."""
        row = self.plan[i]
        if row.lane == len(self.domains):
            return self.filler("train", row.before + row.ordinal, row.context)
        epochs, epoch, place = self.epochs[row.lane][row.stage], -1, row.ordinal
        if row.ordinal >= len(epochs.rest):
            epoch, place = divmod(row.ordinal - len(epochs.rest), len(epochs.whole))
        rows = epochs.whole if epoch >= 0 else epochs.rest
        found = rows.row(self.order(len(rows), row.lane, row.stage, epoch)[place])
        return [(int(d), 0, int(self.corpus.tokens[d])) for d in found]

    def places(self, batches: Iterable[Iterable[int]]) -> dict[str, list[Any]]:
        """Where the text of micro-batches lies, a value per document that was read: `batch_shards`; `batch_offsets` in
        it and `batch_tokens`, in tokens."""
        read = [piece for rows in batches for i in rows for piece in self.pieces(i) if self.gone[piece[0]] > i]
        return {
            "batch_shards": [self.corpus.names[self.corpus.shard[d]] for d, _, _ in read],
            "batch_offsets": [int(self.corpus.offset[d]) + begin for d, begin, _ in read],
            "batch_tokens": [count for _, _, count in read],
        }

    def filler(self, split: str, ordinal: int, context: int) -> list[Piece]:
        """Running text of `context` tokens: documents of a split from a random one on, the last cut to size."""
        members = self.running[split]
        if not len(members):
            raise ValueError(f"no {split} text: raise data.validation_share, run notebook 10 again")
        place = int(mixing.hashed(1, self.p.seed, "filler", split, ordinal)[0] % np.uint64(len(members)))
        left, found = context, list[Piece]()
        while left:
            d = int(members[place % len(members)])
            found.append((d, 0, min(left, int(self.corpus.tokens[d]))))
            left, place = left - found[-1][2], place + 1
        return found

    def held_out(self, domain: str, context: int) -> list[list[Piece]]:
        """Packed rows of a domain's validation documents; one longer than `context` is left out."""
        members = self.corpus.members.get(("validation", domain), np.empty(0, np.int64))
        fits = self.corpus.tokens[members] <= context
        held = pack(members[fits], self.corpus.tokens[members][fits], context)
        return [[(int(d), 0, int(self.corpus.tokens[d])) for d in held.row(r)] for r in range(len(held))]

    def rows_of(self, document: int) -> list[int]:
        """Numbers of the text rows that hold a document, in order: the inverse of `pieces`."""
        domain, found = str(self.corpus.domain[document]), list[int]()
        if self.corpus.split[document] != "train":
            return found
        lane = self.domains.index(domain)
        for stage, epochs in enumerate(self.epochs[lane]):
            count, first = int(self.plan.counts[stage, lane]), len(epochs.rest)
            whole = range(-(-max(0, count - first) // max(1, len(epochs.whole))))
            for epoch, rows in [(-1, epochs.rest), *((epoch, epochs.whole) for epoch in whole)]:
                start = first + epoch * len(epochs.whole) if epoch >= 0 else 0
                for row in rows.rows_of(document):
                    ordinal = start + self.order(len(rows), lane, stage, epoch).place(int(row))
                    if ordinal < count:
                        found.append(self.plan.row_number(stage, lane, ordinal))
        return found
