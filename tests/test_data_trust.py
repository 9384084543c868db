import base64
import hashlib
import re
from itertools import pairwise

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from stackpkg import runs
from stackpkg.data import provenance, records, trust
from stackpkg.params import Data

NOW, DAY = 1_800_000_000, 86_400
LISTED = ["pypi:", "jsonl:rows.jsonl#"]
KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))
SHARE = st.floats(0, 1)
KEEP = [{"filter": "words", "value": 300.0, "threshold": 20.0, "decision": "keep"}]


def row(source="pypi:a==1/a.py", text="x = 1", **changes):
    known = {"source": source, "text": text, "licence": "MIT", "timestamp": NOW, "hash_status": "verified"}
    known |= {"record_id": hashlib.sha256(source.encode()).hexdigest()[:16]}
    return known | {"content_hash": hashlib.sha256(text.encode()).hexdigest()} | changes


def signed(key=KEY, **changes):
    made = row(**changes)
    return made | {"signature": provenance.sign(key, made["source"], made["content_hash"])}


def write(path, rows, group=1000):
    """A part; rows may state kept and decisions as well."""
    part = records.table(rows)
    if any("kept" in item for item in rows):
        part = part.append_column("kept", pa.array([item.get("kept", True) for item in rows]))
    if any("decisions" in item for item in rows):
        lists = pa.array([item.get("decisions", []) for item in rows], records.DECISIONS)
        part = part.append_column("decisions", lists)
    pq.write_table(part, path, row_group_size=group)
    return path


@pytest.fixture(scope="module")
def score(tmp_path_factory):
    def scored(*rows, data=None, history=None, allowed=LISTED):
        path = write(tmp_path_factory.mktemp("part") / "0.parquet", rows)
        return trust.score([path], data or Data(), allowed, NOW, history)

    return scored


@pytest.fixture(scope="module")
def signing(tmp_path_factory):
    """A profile with a key list: KEY signs for pypi:a, OTHER for pypi:b."""
    path = tmp_path_factory.mktemp("keys") / "signers"
    public = (base64.b64encode(key.public_key().public_bytes_raw()).decode() for key in (KEY, OTHER))
    path.write_text("".join(f"pypi:{name}== {key}\n" for name, key in zip("ab", public, strict=True)))
    return Data(signers=str(path))


def of(scored, source="pypi:a==1/a.py"):
    return next(item for item in scored.to_pylist() if item["source"] == source)


def kept(scored, data=None):
    audit, keep = trust.decide(scored, data or Data())
    return set(scored.filter(pc.is_in(scored["record_id"], keep))["source"].to_pylist()), audit


# --- the formula


def test_the_weights_are_a_partition_of_one():
    assert sum(trust.WEIGHTS.values()) == pytest.approx(1) and min(trust.WEIGHTS.values()) > 0


def test_the_sum_is_the_documented_one(score, signing):
    found = of(score(row(decisions=KEEP)))
    assert found["trust"] == pytest.approx(0.25 + 0.32 + 0.15 + 0.08 / 2 + 0.05 * (1 - 20 / 300), abs=1e-4)
    assert of(score(signed(), data=signing))["trust"] == pytest.approx(0.25 + 0.32 + 0.15 + 0.1 + 0.04 + 0.025)
    assert of(score(row(licence="GPL-3.0-or-later")))["licence"] == 0.8
    assert of(score(row(licence="NOASSERTION")))["licence"] == 0
    assert [of(score(row(hash_status=status)))["verified"] for status in ("unpublished", "odd")] == [0.5, 0]


def test_the_formula_above_the_line_is_the_formula():
    text = (runs.root() / "stackpkg/data/trust.py").read_text()
    terms = re.search(r"# trust = \((.*?)\)\n", text)[1].split(" + ")
    assert {name: float(weight) for weight, name in map(str.split, terms)} == trust.WEIGHTS


@given(st.lists(st.fixed_dictionaries(dict.fromkeys([*trust.WEIGHTS], SHARE)), min_size=1, max_size=4), SHARE)
def test_trust_is_in_range_and_monotone_in_each_signal(rows, halvings):
    table = pa.Table.from_pylist([item | {"halvings": halvings} for item in rows])
    before = trust.combine(table)
    assert (before >= 0).all() and (before <= 1).all()
    for name in trust.WEIGHTS:
        raised = table.set_column(table.column_names.index(name), name, pa.array([1.0] * len(table)))
        assert (trust.combine(raised) >= before).all(), name
    older = table.set_column(table.column_names.index("halvings"), "halvings", pa.array([halvings + 1] * len(table)))
    assert trust.combine(older) == pytest.approx(before / 2, abs=1e-4)


@given(st.integers(1, NOW // 5), st.floats(0, 5))
@settings(max_examples=25)
def test_trust_halves_with_each_half_life(score, half_life, lives):
    data, age = Data(trust_half_life=half_life), round(half_life * lives)
    fresh, old = (of(score(row(timestamp=NOW - seconds), data=data))["trust"] for seconds in (0, age))
    assert old == pytest.approx(fresh * 0.5 ** (age / half_life), abs=1.01e-4)  # both are rounded


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "http:x"},
        {"licence": ""},
        {"hash_status": "unpublished"},
        {"licence": "GPL-3.0-or-later"},
        {"timestamp": NOW - 90 * DAY},
        {"decisions": [KEEP[0] | {"value": 21.0}]},
    ],
)
def test_each_fault_costs_trust(score, changes):
    worse = row(**({"decisions": KEEP} | changes))
    assert of(score(worse), worse["source"])["trust"] < of(score(row(decisions=KEEP)))["trust"]


def test_quality_is_the_mean_margin(score):
    def quality(*decisions):
        made = [{"filter": "f", "value": v, "threshold": t, "decision": d} for v, t, d in decisions]
        return of(score(row(decisions=made)))["quality"]

    assert quality() == 0.5 == of(score(row()))["quality"]
    assert quality((40.0, 20.0, "keep")) == 0.5 and quality((0.0, 0.3, "keep")) == 1
    assert quality((40.0, 20.0, "keep"), (0.0, 0.3, "keep")) == 0.75
    assert quality((2.0, 0.0, "mask")) == 0 and quality((2.0, 0.0, "mask"), (0.0, 0.3, "keep")) == 0.5
    assert quality((1.0, 1.0, "keep"), (0.0, 0.0, "keep"), (0.0, 0.3, "keep")) == 1  # flags and counts of nothing
    assert quality((-9.0, 3.0, "keep")) == 1  # never above one
    assert 0 <= quality((float("inf"), 3.0, "keep"), (float("nan"), 3.0, "keep"), (None, 3.0, "keep")) <= 1


def test_agreement_counts_other_listed_origins(score):
    def agreement(*sources):
        return of(score(*(row(source=source) for source in sources)), sources[0])["agreement"]

    assert agreement("pypi:a==1/a.py") == 0
    assert agreement("pypi:a==1/a.py", "pypi:a==1/b.py", "pypi:a==2/a.py") == 0  # the same distribution
    assert agreement("jsonl:rows.jsonl#0", "jsonl:rows.jsonl#1") == 0  # rows of one file
    assert agreement("pypi:a==1/a.py", "pypi:b==1/b.py") == 0.5
    assert agreement("pypi:a==1/a.py", "pypi:b==1/b.py", "jsonl:rows.jsonl#0") == 0.75
    assert agreement("pypi:a==1/a.py", "http:x", "http:y") == 0  # strangers are no witnesses
    assert agreement("http:x", "pypi:a==1/a.py") == 0.5
    liar = row(source="pypi:b==1/b.py", hash_status="mismatch")
    assert of(score(row(), liar))["agreement"] == 0


# --- the policy


def test_honest_records_pass_with_room(score):
    least = Data().min_trust + 0.1
    honest = [row(decisions=KEEP), row(source="jsonl:rows.jsonl#0", hash_status="unpublished", text="y")]
    assert all(item["trust"] >= least for item in score(*honest).to_pylist())
    year = [item | {"timestamp": NOW - Data().ttl_seconds + 1} for item in honest]
    assert len(kept(score(*year))[0]) == 2


@given(st.lists(st.sampled_from(["MIT", ""]), min_size=1, max_size=5), st.integers(0, 10**6), st.data())
@settings(max_examples=30)
def test_no_stranger_passes_unsigned_whatever_it_says_of_itself(tmp_path_factory, score, licences, good, data):
    path = runs.write_json(tmp_path_factory.mktemp("h") / "history.json", {"http:x": [good, 0]})
    rows = [
        row(source=f"http:x/{n}", licence=licence, hash_status=data.draw(st.sampled_from(["verified", "unpublished"])))
        | {"decisions": [KEEP[0] | {"value": 1e9}]}
        for n, licence in enumerate(licences)
    ]
    witnesses = [row(source=f"pypi:d{n}==1/a.py") for n in range(9)]
    found = score(*rows, *witnesses, history=path)
    assert {source for source in kept(found)[0] if source.startswith("http:")} == set()
    assert len(kept(found)[0]) == 9


POISON = {
    "unlisted": (row(source="http:x"), "trust"),
    "no licence, no hash": (row(licence="", hash_status="unpublished"), "trust"),
    "another content than published": (row(hash_status="mismatch"), "trust"),
    "prefix of the allow-list": (row(source="pypi"), "trust"),
    "expired": (row(timestamp=NOW - 100, ttl_seconds=100), "time_to_live"),
    "expired by the profile": (row(timestamp=NOW - Data().ttl_seconds), "time_to_live"),
    "from the future": (row(timestamp=NOW + DAY + 1), "trust"),
    "from the far future": (row(timestamp=2**63 - 1), "trust"),
    "before all time": (row(timestamp=-(2**63)), "time_to_live"),
    "negative time-to-live": (row(ttl_seconds=-1), "time_to_live"),
    "without a date": (row(timestamp=None), "time_to_live"),
    "wrong key": (signed(OTHER), "signature"),
    "replayed for another source": (row(source="pypi:a==1/b.py", signature=signed()["signature"]), "signature"),
    "replayed for another content": (row(text="import os", signature=signed()["signature"]), "signature"),
    "a signature of nobody": (row(signature="AAAA"), "signature"),
}


@pytest.mark.parametrize("name", POISON)
def test_poison_is_rejected_and_the_honest_record_beside_it_is_not(score, signing, name):
    bad, by = POISON[name]
    honest = row(source="pypi:honest==1/a.py", text="honest")
    sources, audit = kept(score(bad, honest, data=signing), signing)
    assert sources == {honest["source"]}
    drops = {(item["source"], item["filter"]) for item in audit.to_pylist() if item["decision"] == "drop"}
    assert (bad["source"], by) in drops and {source for source, _ in drops} == {bad["source"]}
    assert len(audit) == 6 and audit.schema == records.AUDIT


def test_a_mismatch_or_bad_signature_leaves_nothing_whatever_else_is_known(score, signing):
    past = [row(source=f"pypi:{n}==1/a.py") for n in "cd"]
    for bad, state in ((signed(hash_status="mismatch"), "hash mismatch"), (signed(OTHER), "bad signature")):
        found = of(score(bad, *past, data=signing))
        assert (found["trust"], found["state"]) == (0, state)
    assert len(kept(score(signed(OTHER), data=signing), Data(min_trust=0))[0]) == 0


def test_an_id_with_two_contents_is_believed_in_neither(score):
    found = score(row(text="x = 1"), row(text="import os"), row(source="pypi:b==1/b.py"))
    assert kept(found)[0] == {"pypi:b==1/b.py"} and of(found)["state"] == "contradicted"
    twice = score(row(), row())
    assert kept(twice)[0] == {row()["source"]} and len(twice) == 2  # read twice is no contradiction


def test_an_id_that_one_of_its_rows_fails_is_not_kept(score):
    assert kept(score(row(), row(timestamp=NOW - Data().ttl_seconds)))[0] == set()


def test_a_record_lives_to_the_second_before_its_end_and_clocks_may_differ_by_a_day(score):
    assert len(kept(score(row(timestamp=NOW - 99, ttl_seconds=100)))[0]) == 1
    found = of(score(row(timestamp=NOW + DAY)))
    assert found["state"] == "sound" and found["halvings"] == 0
    ancient = of(score(row(timestamp=-(2**63))))  # as old as 1970, not wrapped into the future
    assert ancient["state"] == "sound" and 0 < ancient["trust"] < 0.01 and ancient["seconds_left"] < 0


def test_unsigned_records_pass_only_where_the_profile_accepts_them(score, signing):
    strict = signing.model_copy(update={"unsigned": "reject"})
    rows = [signed(), signed(OTHER, source="pypi:b==1/b.py"), row(source="pypi:c==1/c.py")]
    found = score(*rows, data=strict)
    assert kept(found, strict)[0] == {"pypi:a==1/a.py", "pypi:b==1/b.py"}
    assert len(kept(found, signing)[0]) == 3
    keyless = Data(unsigned="reject")  # without a key list no signature counts
    assert kept(score(*rows, data=keyless), keyless)[0] == set()


def test_trust_varies_over_a_mixed_corpus(score):
    rows = [
        row(f"pypi:d{n}==1/a.py", f"text {n // 2}", timestamp=NOW - n * 5 * DAY, licence=("MIT", "MPL-2.0", "")[n % 3])
        for n in range(30)
    ]
    assert len(set(score(*rows)["trust"].to_pylist())) > 20


# --- why


def parsed(text):
    """The trust that an explanation adds up to."""
    total = sum(float(weight) * float(value) for weight, value in re.findall(r"([\d.e-]+) x \w+ ([\d.e-]+)", text))
    halvings = re.search(r"halved ([\d.e+-]+) times", text)
    return total * 0.5 ** float(halvings[1]) if halvings else 0.0


@given(
    st.sampled_from(["pypi:a==1/a.py", "jsonl:rows.jsonl#7", "http:x"]),
    st.sampled_from(["MIT", "MPL-2.0", ""]),
    st.sampled_from(["verified", "unpublished", "mismatch"]),
    st.integers(NOW - 20 * 365 * DAY, NOW + 3 * DAY),
    st.floats(0, 1e6),
    SHARE,
)
@settings(max_examples=60)
def test_an_explanation_adds_up_to_the_score_and_says_the_verdict(score, source, licence, status, when, value, least):
    data = Data(min_trust=least)
    decisions = [KEEP[0] | {"value": value}]
    made = row(source, licence=licence, hash_status=status, timestamp=when, decisions=decisions)
    found = score(made, data=data)
    text = trust.explain(of(found, source), data)
    assert parsed(text) == pytest.approx(of(found, source)["trust"], abs=5e-4), text
    assert text.startswith(f"{of(found, source)['trust']:.4g} = ")
    assert text.endswith("; kept") == bool(kept(found, data)[0])


def test_explanations_name_every_reason(score, signing):
    strict = signing.model_copy(update={"unsigned": "reject"})
    poor = row(source="http:x", licence="", timestamp=NOW - 2 * 365 * DAY)
    reasons = "dropped: below 0.6, signature bad or missing, expired"
    assert trust.explain(of(score(poor, data=strict), "http:x"), strict).endswith(reasons)
    future = trust.explain(of(score(row(timestamp=NOW + 2 * DAY))), Data())
    assert future == "0 = from the future; dropped: below 0.6"


# --- history


def test_history_moves_trust_up_and_down(score, tmp_path):
    def after(kept_, dropped):
        path = runs.write_json(tmp_path / f"{kept_}-{dropped}.json", {"pypi:a": [kept_, dropped]})
        return of(score(row(), history=path))

    stranger = of(score(row(), history=tmp_path / "absent.json"))
    assert stranger["history"] == 0.5 and after(0, 0)["trust"] == stranger["trust"]
    rising = [after(*counts)["trust"] for counts in ((0, 90), (5, 10), (0, 0), (10, 5), (90, 0))]
    assert rising == sorted(set(rising))
    assert after(8, 0)["history"] == 0.9  # (8 + 1) / (8 + 2)


def test_a_run_is_learned_by_origin_and_age_is_no_fault(score):
    rows = [row(f"pypi:a==1/{n}.py", f"a{n}") for n in range(3)]
    rows += [row("pypi:a==2/x.py", "x", hash_status="mismatch"), row("pypi:a==2/y.py", "y", timestamp=NOW - 900 * DAY)]
    audit = kept(score(*rows, row("http:x/1", "z")))[1]
    audit = audit.filter(pc.not_equal(audit["record_id"], rows[4]["record_id"]))
    late = kept(score(row("pypi:b==1/y.py", "y", ttl_seconds=5, timestamp=NOW - 9)))[1]
    before = {"pypi:a": (7, 1), "pypi:z": (2, 2)}
    assert trust.learn(before, pa.concat_tables([audit, late])) == {
        "pypi:a": (10, 2), "pypi:z": (2, 2), "http:x": (0, 1), "pypi:b": (1, 0),
    }  # fmt: skip
    assert before == {"pypi:a": (7, 1), "pypi:z": (2, 2)}
    assert trust.learn(before, records.AUDIT.empty_table()) == before


def test_a_good_name_can_be_lost_and_won(score, tmp_path):
    bad = kept(score(*(row(f"pypi:a==1/{n}.py", f"{n}", hash_status="mismatch") for n in range(1_000))))[1]
    good = kept(score(*(row(f"pypi:a==1/{n}.py", f"{n}") for n in range(1_000))))[1]
    spoiled = trust.learn({"pypi:a": (10**9, 0)}, bad)
    assert spoiled == {"pypi:a": (1_000, 0)}  # a thousand among so many are nothing; from now on they count
    spoiled = trust.learn(spoiled, bad)
    assert spoiled == {"pypi:a": (500, 500)}
    assert trust.learn(spoiled, good) == {"pypi:a": (750, 250)}
    path = runs.write_json(tmp_path / "history.json", spoiled)
    assert trust.read_history(path) == spoiled


@pytest.mark.parametrize(
    "content", ['{"pypi:a": [1, -1]}', '{"pypi:a": [1]}', '{"pypi:a": [0.5, 1]}', "[]", "{", '{"a": null}']
)
def test_a_history_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / "history.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="validation error"):
        trust.read_history(path)


# --- parts


@given(st.permutations(range(12)), st.lists(st.integers(0, 12), max_size=4), st.integers(1, 5))
@settings(max_examples=25)
def test_neither_order_nor_boundaries_of_the_parts_matter(tmp_path_factory, order, cuts, group):
    rows = [
        row(f"pypi:d{n % 5}==1/{n}.py", f"t{n % 4}", timestamp=NOW - n * DAY, kept=n != 3, decisions=KEEP)
        for n in range(12)
    ]
    folder = tmp_path_factory.mktemp("parts")
    whole = trust.score([write(folder / "whole.parquet", rows)], Data(), LISTED, NOW)
    edges, mixed = [0, *sorted(cuts), 12], [rows[n] for n in order]
    groups = [mixed[a:b] for a, b in pairwise(edges) if a < b]
    parts = [write(folder / f"{n}.parquet", part, group) for n, part in enumerate(groups)]
    assert trust.score(parts, Data(), LISTED, NOW).equals(whole)
    assert len(whole) == 11 and whole["record_id"].to_pylist() == sorted(whole["record_id"].to_pylist())


def test_no_text_is_read(tmp_path, monkeypatch):
    read = []
    batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda self, columns: read.extend(columns) or batches(self, columns=columns)
    )
    trust.score([write(tmp_path / "0.parquet", [row()])], Data(), LISTED, NOW)
    assert read and "text" not in read


def test_nothing_to_score_is_no_error(score):
    assert len(trust.score([], Data(), LISTED, NOW)) == 0
    audit, keep = trust.decide(score(row(kept=False)), Data())
    assert len(audit) == len(keep) == 0


def test_when_nothing_is_admitted_the_reasons_and_the_ways_out_are_said(score):
    table = score(*(row(licence="", source=f"jsonl:mine#{k}") for k in range(2)), allowed=[])
    audit, trusted = trust.decide(table, Data())
    with pytest.raises(
        ValueError, match=r"no record of 2 is admitted; dropped by trust \(2\)\. 2 have no known licence"
    ):
        trust.some(table, audit, trusted)
    _, both = trust.decide(table, Data(min_trust=0))
    assert trust.some(table, audit, both) is both
