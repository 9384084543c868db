import base64
import json
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from stackpkg.data import manifest, provenance, records
from stackpkg.params import Data

LONG, INT64 = 2**63 - 1, st.integers(-(2**63), 2**63 - 1)
KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))


def public(key):
    return base64.b64encode(key.public_key().public_bytes_raw()).decode()


def listed(tmp_path, *lines):
    path = tmp_path / "signers"
    path.write_text("\n".join(lines))
    return provenance.signers(path)


def checked(keys, *rows):
    return provenance.check(records.table(rows), keys).to_pylist()


def signed(key=KEY, source="pypi:a==1/a.py", content_hash="ab" * 32, **changes):
    row = {"source": source, "content_hash": content_hash, "signature": provenance.sign(key, source, content_hash)}
    return row | changes


# --- licences


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


@pytest.mark.parametrize(
    ("licence", "copy", "tools"),
    [
        ("MIT", True, True),
        ("MIT AND BSD-3-Clause", True, True),
        ("(MIT AND Apache-2.0) OR (ISC)", True, True),
        ("(MIT OR GPL-3.0-or-later)", False, True),
        ("Apache-2.0 WITH LLVM-exception", False, True),
        ("NOASSERTION", False, False),
        ("MIT AND NONE", False, False),
        ("", False, False),
    ],
)
def test_uses_follow_the_licence(licence, copy, tools):
    assert records.uses(licence) == (copy, tools)


def test_a_file_of_rows_carries_its_stamp(tmp_path):
    path = provenance.write(tmp_path / "rows.parquet", iter([{"a": 1}, {"a": 2}]), maker="x")
    assert pq.read_table(path)["a"].to_pylist() == [1, 2] and pq.read_schema(path).metadata[b"maker"] == b"x"


# --- signatures


def test_a_signature_covers_its_content_and_its_source(tmp_path):
    keys = listed(tmp_path, "# who signs", "", f"pypi:a== {public(KEY)} the maker of a")
    good = signed()
    rows = {
        "signed": good,
        "unsigned": good | {"signature": ""},
        "content": good | {"content_hash": "cd" * 32},
        "source": good | {"source": "pypi:a==1/b.py"},
        "key": signed(OTHER),
        "unlisted": signed(source="pypi:ab==1/a.py"),
        "truncated": good | {"signature": good["signature"][:-4]},
        "not base64": good | {"signature": "é!"},
    }
    found = dict(zip(rows, checked(keys, *rows.values()), strict=True))
    assert found.pop("signed") == "signed" and found.pop("unsigned") == "unsigned"
    assert set(found.values()) == {"bad"}, found


@given(st.integers(0, 63), st.integers(1, 255))
def test_no_changed_signature_is_confirmed(at, flip):
    row = signed()
    raw = bytearray(base64.b64decode(row["signature"]))
    raw[at] ^= flip
    assert checked({"pypi:": [KEY.public_key()]}, row | {"signature": base64.b64encode(raw).decode()}) == ["bad"]


def test_keys_rotate_and_may_nest(tmp_path):
    old_and_new = listed(tmp_path, f"pypi: {public(OTHER)}", f"pypi:a== {public(KEY)}", f"pypi:a== {public(OTHER)}")
    assert checked(old_and_new, signed(KEY), signed(OTHER), signed(source="pypi:b==1/b.py")) == [
        "signed",
        "signed",
        "bad",
    ]


def test_without_a_key_list_nothing_counts_as_signed():
    assert checked({}, signed(), signed(signature="forged")) == ["unsigned", "unsigned"]
    assert checked({"pypi:": [KEY.public_key()]}) == []


@pytest.mark.parametrize(
    "line",
    ["pypi:", "pypi: short", "pypi: AAAA", "pypi: " + "A" * 44, "pypi: " + base64.b64encode(bytes(33)).decode(), "é é"],
)
def test_a_bad_line_of_the_key_list_is_named(tmp_path, line):
    with pytest.raises(ValueError, match=r"signers line 2 is not `prefix base64-ed25519-key \[name\]`"):
        listed(tmp_path, f"pypi: {public(KEY)}", line)


# --- the last date


def expires(timestamp, ttl, **profile):
    part = records.table([{"timestamp": timestamp, "ttl_seconds": ttl}])
    return provenance.expiry(part, Data(**profile)).to_pylist()[0]


def test_a_time_to_live_of_zero_is_the_profile_s():
    assert expires(1_000, 0, ttl_seconds=50) == 1_050 and expires(1_000, 60, ttl_seconds=50) == 1_060


@given(INT64, INT64)
def test_expiry_is_the_sum_and_never_wraps(timestamp, ttl):
    sum_ = max(timestamp, 0) + (ttl or Data().ttl_seconds)
    assert expires(timestamp, ttl) == (0 if ttl < 0 else min(sum_, LONG))


def test_a_missing_date_has_expired():
    assert expires(None, None) == Data().ttl_seconds


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


ROW = {"record_id": "0123456789abcdef", "date": 1_700_000_000, "reason": "asked by its author"}


def test_withdrawals_survive_the_file_and_the_earliest_counts(tmp_path):
    path = tmp_path / "withdrawn.jsonl"
    assert provenance.withdrawals(path) == {}
    for record_id, date in (("a" * 16, 30), ("b" * 16, 20), ("a" * 16, 10), ("a" * 16, 40)):
        provenance.withdraw(path, record_id, date, 'line\nend, "quoted}" é')
    assert provenance.withdrawals(path) == {"a" * 16: 10, "b" * 16: 20}
    assert len(path.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    "bad",
    [
        "not json",
        "[]",
        "",
        json.dumps(ROW | {"record_id": "0123456789ABCDEF"}),
        json.dumps(ROW | {"record_id": ROW["record_id"] + "\n"}),
        json.dumps(ROW | {"date": -1}),
        json.dumps(ROW | {"date": "2026-01-01"}),
        json.dumps(ROW | {"date": 1.5}),
        json.dumps(ROW | {"date": True}),
        json.dumps(ROW | {"reason": ""}),
        json.dumps({name: ROW[name] for name in ("record_id", "date")}),
        json.dumps(ROW | {"reasons": "x"}),
    ],
)
def test_a_bad_withdrawal_is_named(tmp_path, bad):
    path = tmp_path / "withdrawn.jsonl"
    path.write_text(lines(ROW) + bad + "\n" + lines(ROW))
    with pytest.raises(ValueError, match=r"withdrawn\.jsonl line 2 "):
        provenance.withdrawals(path)


@pytest.mark.parametrize("bad", [{"record_id": "x"}, {"date": -1}, {"reason": ""}])
def test_a_bad_withdrawal_is_not_written(tmp_path, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        provenance.withdraw(tmp_path / "withdrawn.jsonl", **(ROW | bad))
    assert not (tmp_path / "withdrawn.jsonl").exists()


@settings(max_examples=30)
@given(st.integers(1, len(lines(ROW)) - 2))
def test_a_torn_last_line_is_reported_and_the_next_withdrawal_is_whole(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("torn") / "withdrawn.jsonl"
    path.write_text(lines(ROW | {"record_id": "a" * 16}) + lines(ROW)[:cut])
    with pytest.warns(UserWarning, match=r"withdrawn\.jsonl line 2 is unfinished"):
        assert set(provenance.withdrawals(path)) == {"a" * 16}
    provenance.withdraw(path, "b" * 16, 5, "again")
    assert set(provenance.withdrawals(path)) == {"a" * 16, "b" * 16}


def test_a_row_that_only_lacks_its_line_end_counts_and_stays(tmp_path):
    path = tmp_path / "withdrawn.jsonl"
    path.write_text(lines(ROW).rstrip("\n"))
    assert set(provenance.withdrawals(path)) == {ROW["record_id"]}
    provenance.withdraw(path, "b" * 16, 5, "another")
    assert set(provenance.withdrawals(path)) == {ROW["record_id"], "b" * 16}


def test_withdrawals_at_the_same_time_all_stay(tmp_path):
    path = tmp_path / "withdrawn.jsonl"
    names = [f"{n:016x}" for n in np.arange(32)]
    threads = [threading.Thread(target=provenance.withdraw, args=(path, name, 1, "x" * 500)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(provenance.withdrawals(path)) == set(names)


def test_due_is_what_is_withdrawn_or_will_have_expired(tmp_path: Path) -> None:
    rows = [
        {"record_id": f"{k:016x}", "source": f"s{k}", "timestamp": 1000, "ttl_seconds": ttl}
        for k, ttl in enumerate((100, 200, 0))
    ]
    (tmp_path / "records").mkdir()
    pq.write_table(records.table(rows), tmp_path / "records/00000.parquet")
    manifest.commit(tmp_path, {"format": manifest.FORMAT, "records": [{"name": "00000"}]})
    data = Data(ttl_seconds=5000)
    assert provenance.withdrawals_due(tmp_path, data, 1099) == {}
    assert provenance.withdrawals_due(tmp_path, data, 1100) == {f"{0:016x}": "expired"}
    provenance.withdraw(tmp_path / "withdrawn.jsonl", f"{2:016x}", 1150, "asked to")
    assert set(provenance.withdrawals_due(tmp_path, data, 1149)) == {f"{0:016x}"}
    both = provenance.withdrawals_due(tmp_path, data, 1150)
    assert both == {f"{0:016x}": "expired", f"{2:016x}": "withdrawn"}
    assert set(provenance.withdrawals_due(tmp_path, data, 6000)) == {f"{k:016x}" for k in range(3)}
