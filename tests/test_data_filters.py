import pytest

from stackpkg.data import filters
from stackpkg.data.provenance import Record
from stackpkg.params import Data

GOOD = " ".join(f"word{chr(97 + k % 26)}{chr(97 + k // 26)}" for k in range(60))
BAD = {
    "gopher_word_count": "too short",
    "document_kilobytes": GOOD * 1000,
    "gopher_duplicate_line_fraction": "the same line again and again\n" * 20,
    "alphabetic_share": "1234 5678 90 == ++ -- " * 30,
}


def decisions(text):
    audit = []
    kept = filters.apply([Record("folder:t/a", "d", "MIT", 0, text)], Data(), audit)
    return kept, {row.filter: row.decision for row in audit}


def test_good_text_passes_every_filter():
    kept, found = decisions(GOOD)
    assert len(kept) == 1 and set(found) == set(BAD) and set(found.values()) == {"keep"}


@pytest.mark.parametrize("name", BAD)
def test_each_filter_drops_what_it_is_for_and_says_so(name):
    kept, found = decisions(BAD[name])
    assert not kept and [k for k, verdict in found.items() if verdict == "drop"] == [name]


def test_measures():
    assert filters.duplicate_line_fraction("a\n\n b\na\n") == pytest.approx(1 / 3)
    assert filters.duplicate_line_fraction("") == 0
    assert filters.alphabetic_share("ab 12") == 0.5
    assert filters.alphabetic_share("äöü") == 1
    assert filters.alphabetic_share(" \n") == 0
