"""Language identification with py3langid: byte n-gram naive Bayes over 142 languages, its model inside the wheel."""

from functools import cache

import pyarrow as pa
from py3langid.langid import MODEL_FILE, LanguageIdentifier

SLICE = 600  # characters read at the beginning, in the middle and at the end: enough to decide, whatever the length


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def sample(text: str) -> str:
    """At most three slices of a text."""
    if len(text) <= 3 * SLICE:
        return text
    middle = len(text) // 2
    return "\n".join((text[:SLICE], text[middle - SLICE // 2 : middle + SLICE // 2], text[-SLICE:]))


def language_of(text: str) -> tuple[str, float]:
    """(ISO 639-1 code, share of the probability in [0, 1]); ("", 0.0) without a letter or without such a code."""
    piece = sample(text)
    # Lui and Baldwin 2012, langid.py; py3langid's softmax is tempered by the square root of the length in bytes
    code, score = _identifier().classify(piece.encode(errors="replace"))
    if len(code) != 2 or not any(map(str.isalpha, piece)):
        return "", 0.0
    return code, min(1.0, max(0.0, float(score)))


def identify(part: pa.Table) -> pa.Table:
    """The part with `language` and `language_score` appended (or made anew)."""
    kept = [name for name in part.column_names if name not in ("language", "language_score")]
    found = [language_of(text.as_py()) for text in part["text"]]
    codes, scores = pa.array([code for code, _ in found], pa.string()), pa.array([s for _, s in found], pa.float64())
    return part.select(kept).append_column("language", codes).append_column("language_score", scores)
