"""Perplexity under a word n-gram model of the document's language, trained on the corpus it judges (after CCNet).

A model holds the counts of two folds; a document's fold is a function of its content hash, and it is scored by the
counts of the other one. So no document, and no exact copy of it, is among the text that judges it.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numba import njit

from stackpkg import runs
from stackpkg.data.mixing import CACHE, GOLDEN, mix
from stackpkg.params import Data

ORDER, SLOTS = 3, np.uint64(1 << 22)  # counts of all orders share the slots of one table a fold
SAMPLE, LEAST = 16_000_000, 200_000  # characters a model is trained on, at most; a language with less has no model
PRIOR = np.array([10_000.0, 20.0, 20.0])  # pseudo-counts with which each order falls back on the one below
UNSEEN = 1e-6  # probability of any word before counting: one of a million
GRID = np.linspace(0, 1, 1001)
CODES = np.arange(0x110000, dtype=np.uint32)
# 0 between words, 1 inside one, 2 a word by itself: Chinese characters and kana, written without spaces
KIND = np.strings.isalnum(CODES.view("U1")).astype(np.uint8)
KIND[0x3040:0x3100], KIND[0x3400:0xA000], KIND[0x20000:0x32000] = 2, 2, 2
FOLD = np.where(np.strings.isdigit(CODES.view("U1")), np.uint32(ord("0")), CODES)  # every digit is 0 (CCNet)
mixed = njit(inline="always")(mix)


class Model(NamedTuple):
    """`counts` uint32[2 folds, slots], `words` int64[2], and `quantiles` float64[1001] of the corpus' perplexities."""

    counts: np.ndarray
    words: np.ndarray
    quantiles: np.ndarray

    def band(self, low: float, high: float) -> tuple[float, float]:
        """The perplexities at two quantiles of the corpus."""
        return float(np.interp(low, GRID, self.quantiles)), float(np.interp(high, GRID, self.quantiles))


@njit(cache=CACHE)
def _hashes(codes: np.ndarray, ends: np.ndarray, kind: np.ndarray, fold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    out, stops = np.empty(len(codes), np.uint64), np.zeros(len(ends), np.int64)
    total = 0
    for d in range(len(ends) - 1):
        word, inside = np.uint64(0), False
        for i in range(ends[d], ends[d + 1]):
            here = kind[codes[i]]
            if inside and here != 1:
                out[total], total, word, inside = word, total + 1, np.uint64(0), False
            if here:
                word = mixed(word + np.uint64(fold[codes[i]]) + GOLDEN)
                inside = here == 1
                if not inside:
                    out[total], total, word = word, total + 1, np.uint64(0)
        if inside:
            out[total], total = word, total + 1
        stops[d + 1] = total
    return out[:total], stops


def hashes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """uint64[words], int64[texts + 1]: hashes of the lower-cased words of all texts, and where each text's end."""
    folded = [text.lower().encode("utf-32-le", "surrogatepass") for text in texts]
    codes = np.frombuffer(b"".join(folded), np.uint32)
    return _hashes(codes, np.array([0, *accumulate(len(text) // 4 for text in folded)]), KIND, FOLD)


@njit(cache=CACHE)
def _count(words: np.ndarray, stops: np.ndarray, counts: np.ndarray) -> None:
    for d in range(len(stops) - 1):
        for i in range(stops[d], stops[d + 1]):
            gram = np.uint64(0)
            for k in range(min(ORDER, i - stops[d] + 1)):
                gram = mixed(gram * GOLDEN + words[i - k])
                counts[gram % SLOTS] += np.uint32(1)


@njit(cache=CACHE)
def _nats(words: np.ndarray, stops: np.ndarray, counts: np.ndarray, total: int) -> np.ndarray:
    """float64[documents]: mean negative log probability of a word; 0 for a document without one."""
    out, before, here = np.zeros(len(stops) - 1), np.zeros(ORDER), np.zeros(ORDER)
    for d in range(len(stops) - 1):
        for i in range(stops[d], stops[d + 1]):
            gram, p = np.uint64(0), UNSEEN
            for k in range(min(ORDER, i - stops[d] + 1)):
                gram = mixed(gram * GOLDEN + words[i - k])
                context = before[k - 1] if k else float(total)
                here[k] = min(float(counts[gram % SLOTS]), context)  # two grams may share a slot
                # p_k(w | h) = (c(h w) + a p_{k-1}(w | h')) / (c(h) + a)      (MacKay and Peto 1995, eq. 23)
                p = (here[k] + PRIOR[k] * p) / (context + PRIOR[k])
            out[d] -= np.log(p)
            before[:] = here
        out[d] /= max(1, stops[d + 1] - stops[d])
    return out


def perplexities(texts: Sequence[str], content: Sequence[str], model: Model) -> np.ndarray:
    """float64[texts]; `content` holds the content hashes, which decide the fold."""
    fold, out = np.array([_draw(item) & 1 for item in content], np.int64), np.ones(len(texts))
    for side in (0, 1):
        mine = np.flatnonzero(fold == side)
        words, stops = hashes([texts[k] for k in mine.tolist()])
        out[mine] = np.exp(_nats(words, stops, model.counts[1 - side], int(model.words[1 - side])))
    return out


def _draw(content: str) -> int:
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "little")


def _train(texts: Sequence[str], content: Sequence[str]) -> Model:
    model = Model(np.zeros((2, int(SLOTS)), np.uint32), np.zeros(2, np.int64), np.zeros(len(GRID)))
    for side in (0, 1):
        words, stops = hashes([text for text, item in zip(texts, content, strict=True) if _draw(item) & 1 == side])
        _count(words, stops, model.counts[side])
        model.words[side] = len(words)
    return model._replace(quantiles=np.quantile(perplexities(texts, content, model), GRID))


def _lowest(texts: dict[str, str]) -> dict[str, str]:
    """By content hash, those with the lowest draws until they hold `SAMPLE` characters."""
    ranked = sorted(texts, key=_draw)
    below = accumulate((len(texts[content]) for content in ranked), initial=0)
    return {content: texts[content] for content, size in zip(ranked, below, strict=False) if size < SAMPLE}


def fit(parts: Sequence[Path], folder: Path, data: Data) -> list[Path]:
    """Train `<language>.npz` in `folder` for each language whose prose in `parts` has `LEAST` characters.

    Prose: domains whose families contain perplexity, where the language is known with `data.min_language_score`.
    Trained on the documents with the lowest hash of content, once each, up to `SAMPLE` characters: the order of the
    parts does not matter. Holds `SAMPLE` a language, and a part. With `data.perplexity_model` nothing is trained.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)
    columns = ["domain", "language", "language_score", "content_hash", "text"]
    for path in () if data.perplexity_model else parts:
        for domain, language, score, content, text in zip(
            *(column.to_pylist() for column in pq.read_table(path, columns=columns)), strict=True
        ):
            prose = "perplexity" in data.filters.get(domain, data.filters.get("*", []))
            if prose and score >= data.min_language_score and re.fullmatch("[a-z]{2,3}", language):
                found[language][content] = text
        found = defaultdict(dict, {language: _lowest(texts) for language, texts in found.items()})
    made = []
    for language, texts in sorted(found.items()):
        if sum(map(len, texts.values())) >= LEAST:
            made.append(folder / f"{language}.npz")
            with runs.replacing(made[-1]) as temporary, temporary.open("wb") as stream:
                np.savez_compressed(stream, **_train(list(texts.values()), list(texts))._asdict())
    return made


@lru_cache(maxsize=8)
def _read(path: Path, _changed: int) -> Model:
    with np.load(path, allow_pickle=False) as arrays:
        model = Model(*(arrays[name] for name in Model._fields))
    if model.counts.shape != (2, int(SLOTS)) or model.quantiles.shape != GRID.shape:
        raise ValueError(f"{path} holds counts {model.counts.shape}, expected {(2, int(SLOTS))}: train it again")
    return model


def load(folder: Path, language: str) -> Model | None:
    """The model of a language, if `folder` has one. Raises `ValueError` when the file is not of this format."""
    path = folder / f"{language}.npz"
    return _read(path, path.stat().st_mtime_ns) if language.isalpha() and path.is_file() else None


def score(part: pa.Table, models: Path) -> list[tuple[float, Model] | None]:
    """For each row its perplexity and the model of its language, or None where there is no model."""
    out: list[tuple[float, Model] | None] = [None] * len(part)
    texts, content, codes = (part[name].to_pylist() for name in ("text", "content_hash", "language"))
    for code in sorted(set(codes)):
        if model := load(models, code):
            rows = [k for k, item in enumerate(codes) if item == code]
            values = perplexities([texts[k] for k in rows], [content[k] for k in rows], model)
            for k, value in zip(rows, values.tolist(), strict=True):
                out[k] = value, model
    return out
