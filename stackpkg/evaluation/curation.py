"""The corpus before and after every stage of curation, number by number, as an evidently page."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from stackpkg.evaluation.report import Measured
from stackpkg.runs import replacing

COUNTED = ("documents", "mb", "words")  # metrics that are amounts; the others are medians, means and shares


def report(stages: Mapping[str, pd.DataFrame], path: Path) -> Path:
    """An evidently page (HTML, opens offline) of the `metrics` after each stage, in order: each number of each domain,
    with the one before the stage as reference.

    A domain that is gone counts 0 documents. Names are escaped; nothing is sent (`DO_NOT_TRACK`).
    """
    os.environ.setdefault("DO_NOT_TRACK", "1")
    from evidently import Dataset, Report  # slow to import, and only the report needs it

    def flat(frame: pd.DataFrame, stage: str) -> dict[str, float]:
        numbers = frame.reindex(first.index).fillna(dict.fromkeys(COUNTED, 0)).select_dtypes("number")
        found = numbers.stack(future_stack=True).items()
        return {f"{stage}, {html.escape(str(domain))}: {name}": float(value) for (domain, name), value in found}

    first, before, after = next(iter(stages.values())), dict[str, float](), dict[str, float]()
    for (_, earlier), (stage, later) in pairwise(stages.items()):
        before |= flat(earlier, html.escape(stage))
        after |= flat(later, html.escape(stage))
    shown = [name for name in before if not (np.isnan(before[name]) or np.isnan(after[name]))]
    data = [Dataset.from_pandas(pd.DataFrame([{k: numbers[k] for k in shown}])) for numbers in (after, before)]
    snapshot = Report([Measured(column=name) for name in shown]).run(*data)
    with replacing(path) as temporary:
        snapshot.save_html(str(temporary))
    return path
