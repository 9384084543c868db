"""The corpus before and after curation, number by number, as an evidently page."""

from __future__ import annotations

import html
import os
from pathlib import Path

import numpy as np
import pandas as pd

from stackpkg.evaluation.report import Measured
from stackpkg.runs import replacing

COUNTED = ("documents", "mb", "words")  # metrics that are amounts; the others are medians, means and shares


def report(before: pd.DataFrame, after: pd.DataFrame, path: Path) -> Path:
    """An evidently page (HTML, opens offline) of two `metrics`: each number by domain, the one before as reference.

    A domain that is gone counts 0 documents. Names are escaped; nothing is sent (`DO_NOT_TRACK`).
    """
    os.environ.setdefault("DO_NOT_TRACK", "1")
    from evidently import Dataset, Report  # slow to import, and only the report needs it

    def flat(frame: pd.DataFrame) -> dict[str, float]:
        numbers = frame.reindex(before.index).fillna(dict.fromkeys(COUNTED, 0)).select_dtypes("number")
        found = numbers.stack(future_stack=True).items()
        return {f"{html.escape(str(domain))}: {name}": float(value) for (domain, name), value in found}

    first, second = flat(before), flat(after)
    shown = [name for name in first if not (np.isnan(first[name]) or np.isnan(second[name]))]
    data = [Dataset.from_pandas(pd.DataFrame([{k: numbers[k] for k in shown}])) for numbers in (second, first)]
    snapshot = Report([Measured(column=name) for name in shown]).run(*data)
    with replacing(path) as temporary:
        snapshot.save_html(str(temporary))
    return path
