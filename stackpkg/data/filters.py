"""Quality filters after Gopher (Rae et al. 2021, A1.1) and C4 (Raffel et al. 2020, 2.2); every decision is audited."""

from collections.abc import Iterable

from stackpkg.data.provenance import Audit, Record, decide
from stackpkg.params import Data


def duplicate_line_fraction(text: str) -> float:
    """Share of non-empty lines that repeat an earlier one (Gopher, A1.1)."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def alphabetic_share(text: str) -> float:
    """Letters among the characters that are not white space; 0 for an empty text."""
    return sum(map(str.isalpha, text)) / max(1, sum(map(len, text.split())))


def apply(records: Iterable[Record], data: Data, audit: list[Audit]) -> list[Record]:
    """The records that pass every filter; each adds one audit row a filter."""

    def limits(text: str) -> dict[str, tuple[float, str, float]]:
        return {
            "gopher_word_count": (len(text.split()), ">=", data.min_words),
            "document_kilobytes": (len(text.encode()) / 1e3, "<=", data.max_document_kb),
            "gopher_duplicate_line_fraction": (duplicate_line_fraction(text), "<=", data.max_repetition),
            "alphabetic_share": (alphabetic_share(text), ">=", data.min_alphabetic),
        }

    return [record for record in records if decide(audit, record, **limits(record.text))]
