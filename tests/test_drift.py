"""Drift: the tests alarm as seldom as they promise where nothing changed, and do alarm where something did."""

import numpy as np
import pandas as pd
import pytest
from data_corpus import corpus
from scipy.stats import binom

from stackpkg.data.corpus import Corpus
from stackpkg.evaluation import drift

N = 1_000


def allowed(n: int, rate: float) -> int:
    """Alarms that a test of this rate stays below but for once in a thousand."""
    return int(binom.ppf(0.999, n, rate))


@pytest.mark.parametrize("rows", [8, 24, 80])
def test_an_epoch_that_did_not_change_seldom_alarms(rows: int) -> None:
    rng = np.random.default_rng(rows)
    level = rng.normal(5, 2, rows)  # rows differ far more from each other than from epoch to epoch
    changes = [rng.standard_t(3, rows) * level * 0.01 for _ in range(N)]
    alarms = sum(drift.rows(change) < drift.ALPHA for change in changes)
    assert alarms <= allowed(N, drift.ALPHA), alarms
    missed = sum(drift.rows(change + 0.03 * level) >= drift.ALPHA for change in changes)
    assert missed < {8: 0.9, 24: 0.1, 80: 0.01}[rows] * N, missed


def some(rng: np.random.Generator, n: int, licences: int = 12) -> pd.DataFrame:
    """Documents of which a few licences are common and many are rare, as in a real corpus."""
    weights = 1 / np.arange(1, licences + 1) ** 1.5
    names = rng.choice([f"L{k}" for k in range(licences)], n, p=weights / weights.sum())
    trust = rng.choice([0.6, 0.7, 0.8], n)  # with ties
    return pd.DataFrame({"tokens": rng.lognormal(5, 1, n).astype(int), "trust": trust, "licence": names})


@pytest.mark.parametrize(("one", "other"), [(60, 60), (400, 50), (1_000, 1_000)])
def test_two_draws_of_one_corpus_seldom_alarm(one: int, other: int) -> None:
    rng, n = np.random.default_rng(one), N // 2
    alarms = sum(drift.corpora(some(rng, one), some(rng, other)).drifted.any() for _ in range(n))
    assert alarms <= allowed(n, drift.ALPHA), alarms


def test_what_changed_is_named() -> None:
    rng = np.random.default_rng(1)
    one, other = some(rng, 400), some(rng, 400)
    longer = other.assign(tokens=other.tokens * 2)
    relabelled = other.assign(licence=other.licence.where(rng.random(400) < 0.7, "new"))
    for changed, feature in ((longer, "tokens"), (relabelled, "licence")):
        found = drift.corpora(one, changed)
        assert found[found.drifted].feature.tolist() == [feature]
    assert found.test.tolist() == ["Kolmogorov-Smirnov", "Kolmogorov-Smirnov", "chi-square"]
    same = drift.corpora(one.assign(licence="MIT"), other.assign(licence="MIT"))
    assert same.p[2] == 1 and not same.drifted.any(), "one name alone cannot differ"


def test_a_loss_that_is_no_number_is_a_drift_and_one_that_stays_is_none() -> None:
    assert drift.rows(np.array([0.0, np.nan])) == 0 and drift.rows(np.zeros(9)) == 1
    reports = [{"epoch": e, "validation_loss_by_row": {"code": [1.0 - 0.1 * e] * 5, "docs": [2.0 - 0.3 * e] * 6}}
               for e in (1, 2)]  # fmt: skip
    table = drift.epochs([*reports, {**reports[1], "epoch": 3}])
    assert table.epoch.tolist() == [2, 3] and table["median"].round(3).tolist() == [-0.3, 0.0]
    assert table.drifted.tolist() == [True, False] and table.rows.tolist() == [11, 11]
    assert len(drift.epochs(reports[:1])) == 0


def test_documents_are_those_of_the_corpus() -> None:
    found = Corpus(corpus())
    table = drift.documents(found)
    assert table.tokens.sum() == found.tokens.sum() and set(table.domain) == {"code", "docs"}
    assert set(table.split) == {"train", "validation"} and len(table) == len(set(found.records))
    kept = ["tokens", "trust", "licence", "language"]
    train, held = (table[table.split == split][kept] for split in ("train", "validation"))
    assert not drift.corpora(train, held).drifted.any(), "the split is random"
    code, docs = (table[table.domain == domain][kept] for domain in ("code", "docs"))
    assert drift.corpora(code, docs).set_index("feature").drifted["tokens"]
