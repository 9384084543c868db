"""The certificate: each leg passes on a reader that deserves it and fails on one that does not."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import bdtr, bdtrc

from stackpkg import params
from stackpkg.data import longrange
from stackpkg.evaluation import certificate, construction, control
from stackpkg.evaluation.construction import Rows
from stackpkg.evaluation.control import NAMED, REACH, VALUES
from stackpkg.model import StackConfig, build
from stackpkg.runs import read_json

SIZE = VALUES.stop + control.FILLERS


class Reader:
    """The best predictor that sees `reach` tokens back: certain where a record tells the answer, else uniform. With
    `copies` it repeats the last value it sees instead."""

    def __init__(self, reach: int, copies: bool = False) -> None:
        self.reach, self.copies = reach, copies

    def __call__(self, input_ids: torch.Tensor) -> SimpleNamespace:
        logits = torch.full((*input_ids.shape, SIZE), -math.inf)
        for r, ids in enumerate(input_ids.tolist()):
            for t in range(len(ids)):
                seen, first = ids[: t + 1], max(0, t - self.reach)
                told = [
                    seen[s + 3]
                    for s in range(first, t - 3)
                    if (seen[s], seen[s + 1], seen[s + 2]) == (NAMED["<key>"], ids[t], NAMED["<value>"])
                ]
                if self.copies:
                    told = [token for token in seen[first:] if token in VALUES][-1:]
                logits[r, t, VALUES.start : VALUES.stop] = 0.0
                if told:
                    logits[r, t] = -math.inf
                    logits[r, t, told[-1]] = 0.0
        return SimpleNamespace(logits=logits)


@pytest.fixture(scope="module")
def rows() -> Rows:
    return control.draw("test", 60)


@pytest.fixture(scope="module")
def single(rows: Rows) -> Rows:
    return certificate.one_each(rows)


def with_near_evidence(rows: Rows, every: int) -> Rows:
    """One answer each; in every `every`-th row its record is repeated just before the question."""
    single = certificate.one_each(rows)
    ids = single.ids.copy()
    for r in range(0, len(ids), every):
        t = int(single.answers[r].argmax()) - 1
        ids[r, t - 6 : t - 2] = NAMED["<key>"], ids[r, t], NAMED["<value>"], ids[r, t + 1]
    return Rows(ids, single.answers)


# --- numbers and intervals


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 300), data=st.data())
def test_the_interval_of_a_share_is_that_of_clopper_and_pearson(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    found = construction.proportion([True] * k + [False] * (n - k))
    assert 0 <= found["low"] <= found["value"] == k / n <= found["high"] <= 1
    assert k == 0 or bdtrc(k - 1, n, found["low"]) == pytest.approx(0.025)
    assert k == n or bdtr(k, n, found["high"]) == pytest.approx(0.025)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-9, 0), st.floats(-9, 0)), min_size=2, max_size=40), st.floats(-5, -0.1))
def test_a_share_of_signal_is_a_share(logs: list[tuple[float, float]], prior: float) -> None:
    full, window = (np.array(part) for part in zip(*logs, strict=True))
    found = certificate.share(full, window, prior)
    assert 0 <= found["low"] <= found["high"] <= 1 and 0 <= found["value"] <= 1
    assert certificate.share(full, full, prior)["value"] == 0, "a window that tells as much leaves nothing beyond"
    lost = certificate.share(full, np.full(len(full), -50.0), prior)
    assert lost == certificate.share(full, np.full(len(full), prior), prior), "a lost model is no evidence"
    assert lost["value"] == pytest.approx(1) or (full <= prior).all()


def test_the_bootstrap_is_wide_where_rows_disagree() -> None:
    full, window = np.zeros(40), np.where(np.arange(40) % 4, -3.0, 0.0)
    found = certificate.share(full, window, -3.0)
    # standard error of a share of 3/4 over 40 answers
    assert found["value"] == pytest.approx(0.75) and found["low"] == pytest.approx(0.75 - 2 * 0.0685, abs=0.03)


def test_the_interval_over_seeds_is_that_of_student() -> None:
    found = certificate.over_seeds([0.9, 1.0, 0.8])
    assert found["high"] - found["value"] == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    assert math.isnan(certificate.over_seeds([0.9])["low"]), "one seed tells nothing about the spread"


# --- leg 1


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("pattern", ["sliding", "dilated", "block", "hybrid"])
def test_the_reach_is_exactly_what_a_windowed_stack_can_see(pattern: str, layers: int) -> None:
    changes = {"attention_pattern": pattern, "dilation": 3, "num_hidden_layers": layers, "summaries_per_block": 0}
    model = params.Model(config=control.MODEL | changes)
    reach, last = longrange.reach_of(params.Params(model=model)), 159  # the end of a block, which sees farthest
    x = torch.randn(1, last + 10, 64, requires_grad=True)
    build(model, SIZE, 0, 1)(inputs_embeds=x).logits[0, last].sum().backward()
    seen = x.grad[0].abs().sum(-1).nonzero()[:, 0]
    assert seen.min() == last - reach and seen.max() == last
    assert pattern != "sliding" or layers != 2 or reach == REACH


def test_the_reach_of_a_profile_that_states_no_sizes_is_the_model_s() -> None:
    default = StackConfig()
    reach = longrange.reach_of(params.Params(model=params.Model(kind="stack")))
    assert reach == default.num_hidden_layers * (default.sliding_window - 1)


@pytest.mark.parametrize("every", [1, 2, 1000])
def test_the_bayes_loss_is_what_the_best_windowed_reader_gets(rows: Rows, every: int) -> None:
    mixed = with_near_evidence(rows, every)
    mixed = mixed if every < 1000 else certificate.one_each(rows)
    found = construction.construction(mixed, REACH, NAMED, VALUES)
    logs, right = certificate.measured(Reader(REACH), mixed)
    share = {1: 0.0, 2: 0.5, 1000: 1.0}[every]
    assert found["beyond"]["value"] == share and found["bayes_loss"] == pytest.approx(share * math.log(16))
    assert -logs.mean() == pytest.approx(found["bayes_loss"], abs=1e-6)
    assert found["ceiling"] == pytest.approx(1 - share * 15 / 16)
    assert abs(right.mean() - found["ceiling"]) < 4 * math.sqrt(1 / 16 / len(right)) + 1e-9


@settings(max_examples=25, deadline=None)
@given(name=st.text(max_size=5), kind=st.sampled_from(["recall", "needle", "variables", "hops"]))
def test_what_is_in_reach_is_the_same_whatever_the_answer(name: str, kind: str) -> None:
    """Every value of an answer gives the same text in reach, so all are equally likely: the loss is log V exactly."""
    task = longrange.draw(kind, name, 6, control.TASKS) | {"task_id": name, "reach": REACH}
    filler = np.full(control.CONTEXT, SIZE - 1)
    first, answers = longrange.row(task, filler, NAMED)
    for answer in VALUES:
        told = {task["answers"][0]: answer}
        where = longrange.evidence(first[None], answers[None], NAMED, VALUES)
        (_, t, at), *_ = where
        other = first.copy()
        other[at] = told[task["answers"][0]]
        assert np.array_equal(first[max(0, t - REACH) : t + 1], other[max(0, t - REACH) : t + 1])


# --- leakage


def test_rows_as_drawn_leak_nothing() -> None:
    found = construction.leakage(control.draw("leak", 200), REACH, VALUES)
    assert construction.no_leak(found), found
    assert found["position"]["low"] < found["chance"] < found["position"]["high"]


@pytest.mark.parametrize("leak", ["frequency", "last_token", "position", "copy", "window_frequency"])
def test_each_leak_is_caught_by_its_baseline(leak: str) -> None:
    rows = control.draw("leak", 200)
    ids, places = rows.ids.copy(), np.argwhere(rows.answers)
    r, t = places.T
    if leak == "frequency":
        ids[rows.answers] = np.where(np.arange(len(r)) % 4, ids[rows.answers], VALUES.start)
    elif leak == "last_token":
        ids[rows.answers] = VALUES.start + ids[r, t - 1] % len(VALUES)
    elif leak == "position":
        ids[rows.answers] = VALUES.start + t // 4 % len(VALUES)
    elif leak == "copy":
        ids[r, t - 3] = ids[r, t]
    else:
        ids[r[:, None], t[:, None] - np.array([3, 2])] = ids[r, t][:, None]
    found = construction.leakage(Rows(ids, rows.answers), REACH, VALUES)
    assert found[leak]["low"] > found["chance"] and not construction.no_leak(found)


# --- legs 3 and 4, on readers whose result is known


def test_what_is_cut_holds_no_evidence_and_keeps_the_question(single: Rows) -> None:
    cut = certificate.truncated(single, REACH, 4)
    assert cut.ids.shape[1] <= REACH + 2 and np.array_equal(cut.ids[cut.answers], single.ids[single.answers])
    logs, _ = certificate.measured(Reader(10**6), cut)
    np.testing.assert_allclose(logs, -math.log(len(VALUES)), atol=1e-6)


@pytest.mark.parametrize("every, expected", [(1000, 1.0), (2, 0.5), (1, 0.0)])
def test_the_truncation_share_is_the_share_of_far_evidence(rows: Rows, every: int, expected: float) -> None:
    mixed = with_near_evidence(rows, every) if every < 1000 else certificate.one_each(rows)
    far, _ = certificate.measured(Reader(10**6), mixed)
    local, _ = certificate.measured(Reader(10**6), certificate.truncated(mixed, REACH, 4))
    found = certificate.share(far, local, -math.log(len(VALUES)))
    assert found["value"] == pytest.approx(expected) and found["low"] <= expected <= found["high"] + 1e-9


def test_a_reader_follows_the_evidence_and_ignores_near_text(single: Rows) -> None:
    found = certificate.counterfactual(Reader(10**6), single, REACH, NAMED, VALUES)
    assert found["follows"]["value"] == found["stays"]["value"] == 1


def test_a_reader_of_near_text_fails_the_counterfactual(single: Rows) -> None:
    found = certificate.counterfactual(Reader(REACH, copies=True), single, REACH, NAMED, VALUES)
    assert max(found["follows"]["high"], found["stays"]["high"]) < certificate.ACCURACY


# --- the whole


def test_models_that_learnt_nothing_are_refused_and_found_again(tmp_path) -> None:
    made = certificate.certify(tmp_path, [3], 1)
    assert made["holds"]["construction"] and made["holds"]["no_leak"] and made["holds"]["control_at_ceiling"]
    assert not made["holds"]["full_learns"] and not made["holds"]["counterfactual"]
    assert read_json(tmp_path / "certificate.json")["trained"][0]["seed"] == 3
    before = (tmp_path / "full-3" / "model.safetensors").stat().st_mtime_ns
    again = certificate.certify(tmp_path, [3], 1)
    assert again == made, "a second call trains nothing and finds the same"
    assert (tmp_path / "full-3" / "model.safetensors").stat().st_mtime_ns == before
    assert control.found(tmp_path, True, 3, 1) and not control.found(tmp_path, True, 3, 2), (
        "another length, another one"
    )


def test_full_model_and_control_differ_in_summaries_alone(tmp_path) -> None:
    full, window = (control.train(tmp_path, kind, 5, 1) and control.load(tmp_path, kind, 5) for kind in (True, False))
    apart = {name for name in control.MODEL if getattr(full.config, name) != getattr(window.config, name)}
    assert apart == {"summaries_per_block"}
    assert [p.shape for p in full.parameters()] == [p.shape for p in window.parameters()]
