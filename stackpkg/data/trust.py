"""Trust in [0, 1] of every record as a documented sum of signals that fades with age, and the policy over it."""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import NonNegativeInt, TypeAdapter

from stackpkg import runs
from stackpkg.data import records
from stackpkg.data.provenance import Keys, check, expiry, signers
from stackpkg.data.records import uses
from stackpkg.params import Data

# Outside the allow-list and unsigned, nothing else that a record says of itself is enough: 1 - listed - signed = 0.58.
WEIGHTS = {"licence": 0.25, "listed": 0.32, "verified": 0.15, "signed": 0.10,
           "history": 0.08, "quality": 0.05, "agreement": 0.05}  # fmt: skip
STATES = ["sound", "bad signature", "hash mismatch", "from the future", "contradicted"]  # all but sound: no trust
SKEW = 86_400  # seconds a clock may be ahead
MEMORY = 1_000  # records of a source that its history remembers; older ones fade, so that a good name can be lost
READ = ["record_id", "source", "licence", "timestamp", "content_hash", "hash_status", "signature", "ttl_seconds"]
History = dict[str, tuple[NonNegativeInt, NonNegativeInt]]  # origin -> records kept, records dropped


def combine(signals: pa.Table) -> np.ndarray:
    """float64[rows], trust to 4 digits, of a table with the signals of `WEIGHTS`, each in [0, 1], and halvings."""
    total = sum(weight * signals[name].to_numpy() for name, weight in WEIGHTS.items())
    # trust = (0.25 licence + 0.32 listed + 0.15 verified + 0.10 signed + 0.08 history + 0.05 quality + 0.05 agreement)
    #         x 0.5 ^ (age / half-life)
    return np.round(total * 0.5 ** signals["halvings"].to_numpy(), 4)


def _codes(names: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """int64[rows] and the different names they stand for."""
    encoded = names.dictionary_encode().combine_chunks()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def _is(column: pa.ChunkedArray | pa.Array, value: str) -> np.ndarray:
    return np.asarray(pc.equal(column, value))


def _origins(sources: pa.ChunkedArray) -> pa.ChunkedArray:
    """Who vouches for a source: its distribution in any version, its folder, its file."""
    return pc.replace_substring_regex(sources, pattern="(?s)(==|[/#]).*", replacement="")


def _quality(part: pa.Table) -> np.ndarray:
    """float64[rows], the mean margin of the filters that looked at a record; 0.5 where none did.

    A filter passed exactly at its threshold (a flag, a count of nothing) tells nothing; one that masked counts 0.
    """
    if "decisions" not in part.column_names:
        return np.full(len(part), 0.5)
    lists = part["decisions"].combine_chunks()
    rows, found = pc.list_parent_indices(lists).to_numpy(), pc.list_flatten(lists)
    value, limit = (np.nan_to_num(np.asarray(pc.struct_field(found, name), float)) for name in ("value", "threshold"))
    kept = _is(pc.struct_field(found, "decision"), "keep")
    # margin = min(1, |value - threshold| / max(|value|, |threshold|))
    margin = np.abs(value - limit) / np.maximum(np.maximum(np.abs(value), np.abs(limit)), 1e-9)
    sums = np.bincount(rows, np.minimum(margin, 1) * kept, len(part))
    counts = np.bincount(rows, (value != limit) | ~kept, len(part))
    return np.where(counts > 0, sums / np.maximum(counts, 1), 0.5)


def _metadata(part: Path) -> Iterator[pa.Table]:
    """The kept records of a part, some row groups at a time, without their text."""
    with pq.ParquetFile(part) as file:
        extra = [name for name in ("kept", "decisions") if name in file.schema_arrow.names]
        for batch in file.iter_batches(columns=READ + extra):
            filled = {name: pc.fill_null(batch[name], records.EMPTY.get(name, "")) for name in READ}
            yield records.kept(pa.table(filled | {name: batch[name] for name in extra}))


def _signals(part: pa.Table, data: Data, allowed: Sequence[str], now: int, keys: Keys, past: History) -> pa.Table:
    """What a record shows by itself: the columns of `score` without agreement and trust, `state` as its number."""
    (licence, licences), (origin, origins) = _codes(part["licence"]), _codes(_origins(part["source"]))
    status, signature, age = part["hash_status"], check(part, keys), now - part["timestamp"].to_numpy().clip(0)
    made: dict[str, object] = {name: part[name] for name in ("record_id", "source", "content_hash")}
    # licence = 1 when it permits copying, 0.8 when it is known, 0 when it is not
    made["licence"] = np.array([(0, 0.8, 1)[sum(uses(name))] for name in licences], float)[licence]
    # listed = 1 when the source is on the allow-list
    prefixed = (np.asarray(pc.starts_with(part["source"], prefix)) for prefix in allowed)
    made["listed"] = np.any([np.zeros(len(part)), *prefixed], axis=0).astype(float)
    # verified = 1 when the content has the hash that its source published, 0.5 when none was published
    made["verified"] = _is(status, "verified") + 0.5 * _is(status, "unpublished")
    # history = (kept + 1) / (kept + dropped + 2), the beta reputation (Josang and Ismail 2002); 0.5 for a stranger
    earlier = (past.get(name, (0, 0)) for name in origins)
    made["history"] = np.array([(kept + 1) / (kept + dropped + 2) for kept, dropped in earlier])[origin]
    made |= {"quality": _quality(part), "halvings": np.maximum(age, 0) / data.trust_half_life}
    made |= {"signed": _is(signature, "signed").astype(float), "seconds_left": np.asarray(expiry(part, data)) - now}
    made["state"] = np.select([_is(signature, "bad"), _is(status, "mismatch"), age < -SKEW], [1, 2, 3], 0)
    return pa.table(made)


def _distinct(groups: np.ndarray, members: np.ndarray, size: int = 0) -> np.ndarray:
    """int64[size or more], how many different members each group has."""
    width = int(members.max(initial=0)) + 1
    return np.bincount(np.unique(groups * width + members) // width, minlength=size)


def score(parts: Sequence[Path], data: Data, allowed: Sequence[str], now: int, history: Path | None = None) -> pa.Table:
    """One row for every kept record, by record_id: source, the signals of `WEIGHTS`, halvings (age in half-lives),
    seconds_left (of its time-to-live at `now`, unix seconds), state (one of `STATES`) and trust.

    `allowed` holds the prefixes of the allow-list's sources, `history` a file of what `learn` made. A record ahead of
    the clock by more than `SKEW`, and every record of an id that has two contents, has no trust, like one that
    contradicts its hash or its signature. No text is read, and the order of the parts does not matter.
    """
    keys = signers(runs.root() / data.signers) if data.signers else {}
    past, read = read_history(history), chain([records.table([])], chain.from_iterable(map(_metadata, parts)))
    made = pa.concat_tables([_signals(table, data, allowed, now, keys, past) for table in read])
    columns = made["record_id"], made["content_hash"], _origins(made["source"])
    ids, contents, origins = (_codes(column)[0] for column in columns)
    state = made["state"].to_numpy()
    state = np.where((state == 0) & (_distinct(ids, contents)[ids] > 1), STATES.index("contradicted"), state)
    witness = (made["listed"].to_numpy() > 0) & (state == 0)
    # agreement = 1 - 0.5 ^ (other listed origins that hold the same content)
    others = _distinct(contents[witness], origins[witness], len(made))[contents] - witness
    made = made.drop_columns(["content_hash", "state"]).append_column("agreement", pa.array(1 - 0.5**others))
    made = made.append_column("trust", pa.array(np.where(state == 0, combine(made), 0)))
    made = made.append_column("state", pa.array(STATES).take(pa.array(state)))
    return made.sort_by([("record_id", "ascending"), ("trust", "ascending")])


def decide(scored: pa.Table, data: Data) -> tuple[pa.Table, pa.Array]:
    """The policy: (`records.AUDIT` with rows trust, signature and time_to_live for each record, ids to keep).

    Kept is what has a trust of at least `min_trust`, a signature that is not bad (nor absent where
    `unsigned` is reject) and time left. An id that one of its rows fails is not kept.
    """
    signature = np.where(_is(scored["state"], "bad signature"), -1.0, scored["signed"].to_numpy())
    values = scored["trust"].to_numpy(), signature, scored["seconds_left"].to_numpy()
    limits = {"trust": data.min_trust, "signature": float(data.unsigned == "reject"), "time_to_live": 1.0}
    passed, audit, size = np.ones(len(scored), bool), [], len(scored)
    for (name, limit), value in zip(limits.items(), values, strict=True):
        good = value >= limit
        passed &= good
        columns = [scored["record_id"], scored["source"], pa.repeat(name, size), value.astype(float)]
        audit.append(pa.table([*columns, pa.repeat(limit, size), np.where(good, "keep", "drop")], schema=records.AUDIT))
    ids = scored["record_id"].combine_chunks()
    failed = pc.is_in(ids, value_set=ids.filter(pa.array(~passed)))
    return pa.concat_tables(audit), ids.filter(pc.invert(failed)).unique()


def some(scored: pa.Table, audit: pa.Table, trusted: pa.Array) -> pa.Array:
    """The ids to keep, as `decide` said. Raises `ValueError` when there are none, with what to do about it."""
    if not len(trusted):
        fell = pc.value_counts(audit["filter"].filter(pc.equal(audit["decision"], "drop"))).to_pylist()
        said = ", ".join(f"{row['values']} ({row['counts']})" for row in fell)
        unknown = int((scored["licence"].to_numpy() == 0).sum())
        raise ValueError(
            f"no record of {len(scored)} is admitted; dropped by {said or 'the filters'}. {unknown} have no known "
            "licence: state it in the source (`licence`) or in its rows, have them signed, or lower data.min_trust"
        )
    return trusted


def explain(row: dict, data: Data) -> str:
    """Why a row of `score` has its trust, as the sum it is, and what the policy makes of it."""
    audit, _ = decide(pa.Table.from_pylist([row]), data)
    reasons = {"trust": f"below {data.min_trust:g}", "signature": "signature bad or missing", "time_to_live": "expired"}
    drops = [reasons[item["filter"]] for item in audit.to_pylist() if item["decision"] == "drop"]
    terms = " + ".join(f"{weight:g} x {name} {row[name]:.4g}" for name, weight in WEIGHTS.items())
    why = f"{terms}, halved {row['halvings']:.4g} times by age" if row["state"] == "sound" else row["state"]
    return f"{row['trust']:.4g} = {why}; {'dropped: ' + ', '.join(drops) if drops else 'kept'}"


def read_history(path: Path | None) -> History:
    """origin -> (records kept, records dropped) in earlier runs; empty without a file. `runs.write_json` writes it.

    Raises `ValueError` naming the entry that is not two counts.
    """
    return TypeAdapter(History).validate_json(path.read_bytes()) if path and path.exists() else {}


def learn(history: History, audit: pa.Table) -> History:
    """The history after a run with these `records.AUDIT` rows. Having expired is no fault of a source."""
    fault = pc.and_(pc.equal(audit["decision"], "drop"), pc.not_equal(audit["filter"], "time_to_live"))
    each = audit.select(["record_id", "source"]).append_column("fault", fault).group_by(["record_id", "source"])
    found, made = each.aggregate([("fault", "max")]), dict(history)
    codes, names = _codes(_origins(found["source"]))
    faults = np.bincount(codes, np.asarray(found["fault_max"]), len(names)).tolist()
    for name, seen, bad in zip(names, np.bincount(codes).tolist(), faults, strict=True):
        kept, dropped = np.add(history.get(name, (0, 0)), (seen - bad, bad))
        fade = min(1.0, MEMORY / (kept + dropped))
        made[name] = round(kept * fade), round(dropped * fade)
    return made


def admit(part: pa.Table, verdicts: Path) -> pa.Table:
    """A stage: `kept` is false where the policy said no; `verdicts` has record_id and admitted."""
    said = pq.read_table(verdicts, columns=["record_id", "admitted"], filters=[("admitted", "=", True)])
    kept = pc.is_in(part["record_id"], value_set=said["record_id"].combine_chunks())
    if "kept" in part.column_names:
        kept, part = pc.and_(kept, part["kept"]), part.drop_columns("kept")
    return part.append_column("kept", kept)
