"""The seekable stream: batch `stream[t]` is a pure function of (seed, manifest, curriculum, decisions, t)."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stackpkg.data import conversations, longrange, tokenizer
from stackpkg.data.corpus import Corpus
from stackpkg.data.curriculum import Decision, Plan
from stackpkg.data.schedule import NEVER, Piece, Schedule, shuffle
from stackpkg.params import Params

IGNORE = -100  # label of a token that is not trained on
# of a labelled set: the column that is -1 for none, and what a stage calls the share of steps with it
KEYS = {"pairs": "pair_key", "preferences": "preference_key", "conversations": "conversation_key"}
RATES = {"pairs": "retrieval", "preferences": "preferences", "conversations": "conversations"}
Batch = dict[str, np.ndarray]


class Stream:
    """Batches of the run, `training.batch_tokens` tokens an optimiser step; `folder` is the run's `data/`.

    Documents are packed whole, each ended by `<eos>`, and told apart by `position_ids`, which restart at 0 with each.
    """

    def __init__(self, folder: Path, p: Params, decisions: Iterable[Decision] = ()) -> None:
        self.p, self.corpus = p, Corpus(folder)
        self.schedule = Schedule(self.corpus, p, decisions)
        manifest = self.corpus.manifest
        self.domains, self.manifest_digest = self.schedule.domains, self.corpus.digest
        self.vocab_size, self.pad_id = int(manifest["vocab_size"]), int(manifest["pad_id"])
        self.longest = max(stage.context for stage in p.curriculum)
        self.asking = min([stage.context for stage in p.curriculum if stage.long_range] or [self.longest])
        self._places = np.arange(self.longest)
        tasks = self._set(folder / "long_range.parquet", any(stage.long_range for stage in p.curriculum))
        pairs = self._set(folder / "pairs.parquet", any(stage.retrieval for stage in p.curriculum))
        wanted = any(stage.preferences for stage in p.curriculum)
        answers = self._set(folder / "preferences.parquet", wanted)["train"] if wanted else []
        self.tasks, self.pairs = tasks, {split: self._padded(rows) for split, rows in pairs.items()}
        # the records an item has text of, its own first
        self.origins = {"pairs": [(row["record_id"], *row["negative_records"]) for row in pairs["train"]]}
        self._held_out = [(row["record_id"], *row["negative_records"]) for row in pairs["held_out"]]
        self.labelled = {"pairs": self.pairs["train"]}
        if answers:
            self.origins["preferences"] = [(row["record_id"],) for row in answers]
            self.labelled["preferences"] = self._answers(answers)
        self.forbidden = np.empty(0, np.int64)  # tokens that may not be said inside a protected scope
        if any(stage.conversations for stage in p.curriculum):
            talks = self._set(folder / "conversations.parquet", True)
            self.origins["conversations"] = [tuple(row["record_ids"]) for row in talks["train"]]
            self.labelled["conversations"] = self._turns(talks["train"])
            self._held_talks = [row["record_ids"] for row in talks["held_out"]], self._turns(talks["held_out"])
            self.forbidden = conversations.forbidden(tokenizer.of_shards(folder), p.auxiliary.forbidden)

    def _set(self, file: Path, used: bool) -> dict[str, list[dict[str, Any]]]:
        """Rows of a labelled set by split; a set that no stage asks for may be missing."""
        rows = tokenizer.read_ids(file, self.corpus.manifest[tokenizer.STAMP]) if file.exists() else []
        made = {split: [row for row in rows if row["split"] == split] for split in ("train", "held_out")}
        if rows and file.name == "pairs.parquet" and "negative_records" not in rows[0]:
            raise ValueError(f"{file.name} does not tell the records of its negatives: run notebook 13 again")
        if used and not all(made.values()):
            raise ValueError(f"{file.name} lacks training or held-out rows: raise their number, run notebook 13 again")
        return made

    @property
    def plan(self) -> Plan:
        return self.schedule.plan

    def __len__(self) -> int:
        return self.p.max_steps

    def __getitem__(self, step: int) -> Batch:
        """The batch of optimiser step `step`, from 0."""
        return self.batch(self.plan.rows_at(self.plan.position(step)))

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Rows of one stage, stacked: input_ids, labels, position_ids, answer_mask [n, L]; query_ids [n, Lq],
        positive_ids [n, Ld], negative_ids [n, H, Ld]; domain, pair_key [n]. In a run with preferences also chosen_ids,
        rejected_ids [n, Lq + Ld], answer_start, preference_key [n], in one with conversations conversation_ids,
        conversation_roles [n, Lc], conversation_spans [n, Lc, 4], conversation_key [n]. A key is -1 in a step that does
        not carry its set: then the item counts for nothing.
        """
        rows = [self.plan[i] for i in numbers]
        made = self._blank(len(rows), rows[0].context)
        for k, (i, row) in enumerate(zip(numbers, rows, strict=True)):
            if row.lane < len(self.domains):
                self._fill(made, k, self.schedule.pieces(i), i)
            else:
                self._recall(made, k, "train", row.before + row.ordinal, i)
        made["domain"] = np.array([row.lane for row in rows])
        for name, table in self.labelled.items():
            if not self.origins[name]:
                continue
            chosen, key = [self.ridden(name, i) for i in numbers], KEYS[name]
            made |= {column: values[chosen] for column, values in table.items()}
            carried = [self.carries(i, RATES[name]) for i in numbers]
            made[key] = np.where(carried, made[key], -1)
        return self._learnt(made)

    # ---- text
    def _blank(self, rows: int, context: int) -> Batch:
        ids = np.full((rows, context), self.pad_id, np.int64)
        return {"input_ids": ids, "position_ids": np.empty_like(ids), "answer_mask": np.zeros(ids.shape, bool)}

    def _fill(self, made: Batch, k: int, pieces: list[Piece], i: int = NEVER - 1) -> None:
        """Packed documents into row k. What is withdrawn stays padding; so does the end, as one more document. Held-out
        rows have no number: whatever is withdrawn is missing from them at once."""
        ids, positions, at = made["input_ids"][k], made["position_ids"][k], 0
        for d, begin, count in pieces:
            if self.schedule.gone[d] > i:
                ids[at : at + count] = self.corpus.read(d, begin, count)
            positions[at : at + count] = self._places[:count]
            at += count
        positions[at:] = self._places[: len(ids) - at]

    def _recall(self, made: Batch, k: int, split: str, ordinal: int, i: int = NEVER - 1) -> None:
        """Long-range row `ordinal` of a split into row k: one document, over running text of the same split."""
        ids, text = made["input_ids"][k], "validation" if split == "held_out" else "train"
        self._fill(made, k, self.schedule.filler(text, ordinal, len(ids)), i)
        ids[:], made["answer_mask"][k] = longrange.row(self.task(split, ordinal), ids, self.corpus.manifest["specials"])
        made["position_ids"][k] = self._places[: len(ids)]

    def _learnt(self, made: Batch) -> Batch:
        """With labels: the tokens themselves, but no padding, no first token of a document, which has nothing before
        it, and of a long-range row the answers alone."""
        ids, answers = made["input_ids"], made["answer_mask"]
        hidden = (made["position_ids"] == 0) | (ids == self.pad_id) | (answers.any(1, keepdims=True) & ~answers)
        return {**made, "labels": np.where(hidden, IGNORE, ids)}

    def task(self, split: str, ordinal: int) -> dict[str, Any]:
        """Long-range task of row `ordinal` of the long-range lane."""
        epoch, place = divmod(ordinal, len(self.tasks[split]))
        return self.tasks[split][shuffle(len(self.tasks[split]), self.p.seed, "tasks", epoch)[place]]

    # ---- labelled sets
    def carries(self, i: int, rate: str) -> bool:
        """Whether row i is in a step that carries what the stage injects at `rate`: retrieval, or preferences."""
        position = self.plan.position_of(i)
        return self.plan.carries(position, float(getattr(self.p.curriculum[self.plan.stage_at(position)], rate)))

    def ridden(self, name: str, i: int) -> int:
        """Number of the item of a labelled set that rides along with row i: a permutation per epoch of the set; an item
        whose record is withdrawn gives way to the next."""
        origins = self.origins[name]
        for place in range(i, i + len(origins)):
            epoch, inside = divmod(place, len(origins))
            chosen = shuffle(len(origins), self.p.seed, name, epoch)[inside]
            if all(self.schedule.withdrawn.get(record, NEVER) > i for record in origins[chosen]):
                return chosen
        raise ValueError(f"every record of the {name} is withdrawn: run notebook 13 again on what is left")

    def _pad(self, lists: list[list[int]], length: int) -> np.ndarray:
        padded = [(ids + [self.pad_id] * length)[:length] for ids in lists]
        return np.array(padded, np.int64).reshape(len(lists), length)

    def _padded(self, pairs: list[dict[str, Any]]) -> Batch:
        """query_ids [n, Lq], positive_ids [n, Ld], negative_ids [n, H, Ld], pair_key [n]."""
        sizes = self.p.auxiliary
        hard = [ids for pair in pairs for ids in pair["negative_ids"][: sizes.hard_negatives]]
        return {
            "pair_key": np.array([pair["pair_key"] for pair in pairs], np.int64),
            "query_ids": self._pad([pair["query_ids"] for pair in pairs], sizes.query_tokens),
            "positive_ids": self._pad([pair["positive_ids"] for pair in pairs], sizes.document_tokens),
            "negative_ids": self._pad(hard, sizes.document_tokens).reshape(
                len(pairs), sizes.hard_negatives, sizes.document_tokens
            ),
        }

    def _answers(self, rows: list[dict[str, Any]]) -> Batch:
        """chosen_ids, rejected_ids [n, Lq + Ld]: the prompt, then an answer that starts at answer_start [n]."""
        width = self.p.auxiliary.query_tokens + self.p.auxiliary.document_tokens
        starts = np.array([len(row["prompt_ids"]) for row in rows])
        made = {"answer_start": starts, "preference_key": np.arange(len(rows))}
        for name in ("chosen_ids", "rejected_ids"):
            made[name] = self._pad([row["prompt_ids"] + row[name] for row in rows], width)
        return made

    def _turns(self, rows: list[dict[str, Any]]) -> Batch:
        """conversation_ids, conversation_roles [n, Lc], conversation_spans [n, Lc, 4], conversation_key [n]."""
        width = self.p.auxiliary.conversation_tokens
        roles, spans = np.zeros((len(rows), width), np.int64), np.full((len(rows), width, len(conversations.SPANS)), -1)
        for k, row in enumerate(rows):
            end = len(row["roles"][:width])
            roles[k, :end], spans[k, :end] = row["roles"][:width], row["spans"][:width]
        ids = self._pad([row["input_ids"] for row in rows], width)
        made = {"conversation_ids": ids, "conversation_roles": roles, "conversation_spans": spans}
        return made | {"conversation_key": np.arange(len(rows))}

    # ---- held out
    def validation(self, domain: str, rows: int) -> Batch:
        """At most `rows` rows of a domain's held-out documents, packed into the longest context of the curriculum."""
        held = self.schedule.held_out(domain, self.longest)[:rows]
        made = self._blank(len(held), self.longest)
        for k, pieces in enumerate(held):
            self._fill(made, k, pieces)
        return self._learnt(made)

    def long_range(self, n: int) -> Batch:
        """At most `n` held-out long-range rows in the shortest context that the curriculum asks them in."""
        made = self._blank(min(n, len(self.tasks["held_out"])), self.asking)
        for k in range(len(made["input_ids"])):
            self._recall(made, k, "held_out", k)
        return self._learnt(made)

    def validation_pairs(self, n: int) -> Batch:
        """At most `n` held-out pairs, the first of each record before the second of any, so that as many records as can
        be are asked about: query_ids [n, Lq], positive_ids [n, Ld], pair_key, record_id [n].
        """
        known, before = self.schedule.withdrawn, Counter[str]()
        left = [k for k, origins in enumerate(self._held_out) if origins[0] not in known]
        place = dict[int, int]()  # among the pairs of its record
        for k in left:
            place[k] = before[self._held_out[k][0]]
            before[self._held_out[k][0]] += 1
        left = sorted(left, key=place.__getitem__)[:n]
        found = {name: self.pairs["held_out"][name][left] for name in ("query_ids", "positive_ids", "pair_key")}
        return found | {"record_id": np.array([self._held_out[k][0] for k in left], object)}

    def validation_conversations(self, n: int) -> Batch:
        """At most `n` held-out conversations, as in `batch`; none in a run without."""
        if "conversations" not in self.labelled:
            return {}
        records, columns = self._held_talks
        left = [k for k, used in enumerate(records) if not self.schedule.withdrawn.keys() & set(used)][:n]
        return {name: values[left] for name, values in columns.items()}
