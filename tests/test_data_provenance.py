import pytest

from stackpkg.data import provenance
from stackpkg.data.provenance import Record
from stackpkg.params import Data

NOW = 1_800_000_000


def record(**changes):
    known = {"source": "pypi:a==1/a.py", "domain": "code", "licence": "MIT", "timestamp": NOW - 10, "text": "x = 1"}
    return Record(**(known | {"hash_status": "verified"} | changes))


def one(**changes):
    return provenance.assess([record(**changes)], ["pypi:"], 100)[0]


def test_trust_is_the_documented_sum():
    assert one().trust == pytest.approx(0.35 + 0.30 + 0.25)
    assert one(hash_status="unpublished").trust == pytest.approx(0.35 + 0.15 + 0.25)
    assert one(licence="").trust == pytest.approx(0.55)
    assert one(source="pypj:a==1/a.py").trust == pytest.approx(0.65)
    twins = provenance.assess([record(), record(source="pypi:b==2/b.py")], ["pypi:"], 100)
    assert [twin.trust for twin in twins] == [1.0, 1.0]


def test_the_same_distribution_does_not_agree_with_itself():
    twins = provenance.assess([record(), record(source="pypi:a==1/b.py")], ["pypi:"], 100)
    assert [twin.trust for twin in twins] == [0.9, 0.9]


def test_rows_of_one_file_do_not_agree_with_each_other():
    twins = provenance.assess([record(source="jsonl:a#0"), record(source="jsonl:a#1")], ["jsonl:"], 100)
    assert [twin.trust for twin in twins] == [0.9, 0.9]


def test_content_that_contradicts_its_hash_has_no_trust():
    assert one(hash_status="mismatch").trust == 0


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"hash_status": "mismatch"}, "trust"),
        ({"source": "http:x", "licence": "", "hash_status": "unpublished"}, "trust"),
        ({"timestamp": NOW - 101}, "time_to_live"),
    ],
)
def test_poison_and_stale_records_are_rejected_and_audited(changes, name):
    audit = []
    admitted = provenance.admit([one(**changes), one()], Data(), NOW, audit)
    assert [r.source for r in admitted] == ["pypi:a==1/a.py"] and admitted[0].timestamp == NOW - 10
    assert [row.filter for row in audit if row.decision == "drop"] == [name] and len(audit) == 4


def test_a_record_lives_to_its_last_second():
    assert provenance.admit([one(timestamp=NOW - 100)], Data(), NOW, [])


@pytest.mark.parametrize(
    ("licence", "copy", "tools"),
    [
        ("MIT", True, True),
        ("MIT AND BSD-3-Clause", True, True),
        ("(MIT OR GPL-3.0-or-later)", False, True),
        ("", False, False),
    ],
)
def test_uses_follow_the_licence(licence, copy, tools):
    made = one(licence=licence)
    assert (made.may_copy, made.may_use_tools) == (copy, tools)


@pytest.mark.parametrize(
    ("stated", "hints", "expected"),
    [
        ("Apache-2.0", ("MIT",), "Apache-2.0"),
        ("", ("Apache License, Version 2.0",), "Apache-2.0"),
        ("", ("", "License :: OSI Approved :: BSD License"), "BSD-3-Clause"),
        ("", ("2-clause BSD",), "BSD-2-Clause"),
        ("", ("GNU Lesser General Public License",), "LGPL-3.0-or-later"),
        ("", ("UNKNOWN", "License :: OSI Approved :: ISC License (ISCL)"), "ISC"),
        ("", ("limited permit",), ""),
    ],
)
def test_spdx(stated, hints, expected):
    assert provenance.spdx(stated, *hints) == expected


def test_records_survive_the_file(tmp_path):
    made = [one(), one(text="Ünï ☃\n", source="pypi:b==1/b.py")]
    path = provenance.write(tmp_path / "records.parquet", map(provenance.row, made))
    assert provenance.load(path) == made
