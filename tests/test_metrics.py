"""Retrieval metrics against a definition, and the evaluation of an epoch on a small model and real rows."""

import json
import math
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from data_corpus import conversing, corpus, profile
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import DEEPSEEK, LLAMA, QWEN, STACK

from stackpkg import params
from stackpkg.data import longrange
from stackpkg.data.stream import Stream
from stackpkg.evaluation import calibration, epoch, sets
from stackpkg.evaluation.metrics import by_distance, evaluate_epoch, router_balance, violations
from stackpkg.evaluation.ranking import CUT, ranking
from stackpkg.evaluation.retrieval import BINS, Retriever
from stackpkg.model import build, scopes
from stackpkg.objectives.routing import Routed


def by_definition(scores: np.ndarray, relevant: np.ndarray, k: int) -> dict[str, float]:
    """One query at a time: a relevant document stands behind everything else that scores as high."""
    precision, recall, reciprocal, discounted = [], [], [], []
    for row, good in zip(scores.tolist(), relevant.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda d: (-row[d], good[d]))
        hits = [good[d] for d in order]
        precision.append(sum(hits[:k]) / k)
        recall.append(sum(hits[:k]) / sum(good))
        reciprocal.append(1 / (1 + hits.index(True)))
        gains = [hit / math.log2(place + 2) for place, hit in enumerate(hits[:CUT])]
        ideal = [1 / math.log2(place + 2) for place in range(min(CUT, sum(good)))]
        discounted.append(sum(gains) / sum(ideal))
    parts = {f"precision_at_{k}": precision, f"recall_at_{k}": recall, "mrr": reciprocal, "ndcg_at_10": discounted}
    return {name: sum(values) / len(values) for name, values in parts.items()}


def test_a_ranking_worked_out_by_hand() -> None:
    scores = np.array([[0.9, 0.8, 0.1, 0.0], [0.2, 0.9, 0.7, 0.1], [0.5, 0.4, 0.3, 0.2]])
    relevant = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 1]], bool)
    # first: rank 1; second: rank 3; third: ranks 2 and 4
    # discounted: 1, 1 / log2(4), and (1 / log2(3) + 1 / log2(5)) of (1 + 1 / log2(3))
    ndcg = (1 + 1 / 2 + (1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3))) / 3
    assert ranking(scores, relevant, 1) == pytest.approx(
        {"precision_at_1": 1 / 3, "recall_at_1": 1 / 3, "mrr": (1 + 1 / 3 + 1 / 2) / 3, "ndcg_at_10": ndcg}
    )
    at_2 = {"precision_at_2": (1 / 2 + 0 + 1 / 2) / 3, "recall_at_2": (1 + 0 + 1 / 2) / 3, "mrr": 11 / 18}
    assert ranking(scores, relevant, 2) == pytest.approx(at_2 | {"ndcg_at_10": ndcg})
    assert ranking(scores, relevant, 4)["recall_at_4"] == 1.0


def test_ties_count_against_the_system() -> None:
    relevant = np.array([[1, 0, 0]], bool)
    assert ranking(np.array([[0.7, 0.7, 0.1]]), relevant, 1)["precision_at_1"] == 0.0
    assert ranking(np.array([[0.7, 0.7, 0.1]]), relevant, 2)["mrr"] == 0.5
    assert ranking(np.array([[0.7, 0.6999, 0.1]]), relevant, 1)["precision_at_1"] == 1.0


@pytest.mark.parametrize("constant", [0.0, 1.0, -3.0, math.nan])
def test_constant_scores_never_look_good(constant: float) -> None:
    for relevant in (np.eye(20, dtype=bool), np.eye(20, dtype=bool)[::-1]):
        found = ranking(np.full((20, 20), constant), relevant, 1)
        assert found == pytest.approx({"precision_at_1": 0.0, "recall_at_1": 0.0, "mrr": 1 / 20, "ndcg_at_10": 0.0})


def test_a_higher_grade_is_a_larger_gain() -> None:
    grades, best = np.array([[2, 1, 0]]), 2 + 1 / math.log2(3)
    found = ranking(np.array([[0.1, 0.9, 0.5]]), grades, 1)  # the better document comes last
    assert found["ndcg_at_10"] == pytest.approx((1 + 2 / math.log2(4)) / best)
    assert ranking(np.array([[0.9, 0.5, 0.1]]), grades, 1)["ndcg_at_10"] == pytest.approx(1)


def test_the_calibration_error_is_that_of_its_formula() -> None:
    def of(confidence: float, right: int, n: int) -> torch.Tensor:
        """Reliability of n predictions between two tokens, all this sure, so many right."""
        logits = torch.tensor([[math.log(confidence), math.log(1 - confidence)]]).repeat(n, 1)
        return calibration.reliability(logits, torch.tensor([0] * right + [1] * (n - right)))

    assert calibration.expected_error(of(0.9, 9, 10)) == pytest.approx(0, abs=1e-6)
    assert calibration.expected_error(of(0.9, 5, 10)) == pytest.approx(0.4)
    both = of(0.9, 5, 10) + of(0.6, 30, 30)  # 10 / 40 x 0.4 + 30 / 40 x 0.4
    assert calibration.expected_error(both) == pytest.approx(0.4) and both[0].sum() == 40
    hidden = calibration.reliability(torch.zeros(2, 3, 5), torch.full((2, 3), -100))
    assert hidden.sum() == 0 and calibration.expected_error(hidden) == 0, "nothing is labelled"


@given(st.integers(0, 2**31), st.floats(0.1, 5))
def test_predictions_drawn_from_their_own_probabilities_are_calibrated(seed: int, sharpness: float) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(4_000, 7) * sharpness
    labels = torch.multinomial(logits.softmax(-1), 1)[:, 0]
    honest = calibration.expected_error(calibration.reliability(logits, labels))
    assert honest < 0.05, "15 bins of 4,000 draws"
    boasting = calibration.expected_error(calibration.reliability(logits * 4, labels))
    assert boasting > honest


def test_a_query_without_a_relevant_document_is_refused() -> None:
    with pytest.raises(ValueError, match="every query needs"):
        ranking(np.ones((2, 3)), np.array([[1, 0, 0], [0, 0, 0]], bool), 1)


@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 9), st.data())
def test_a_ranking_is_what_its_definition_says(queries: int, documents: int, k: int, data: st.DataObject) -> None:
    values = st.lists(st.integers(0, 3), min_size=queries * documents, max_size=queries * documents)
    scores = np.array(data.draw(values), float).reshape(queries, documents)
    relevant = np.array(data.draw(values)).reshape(queries, documents) == 0
    relevant[:, data.draw(st.integers(0, documents - 1))] = True
    assert ranking(scores, relevant, k) == pytest.approx(by_definition(scores, relevant, k))


def chosen(logits: torch.Tensor, k: int) -> Routed:
    return Routed(logits, logits.topk(k, -1).indices)


def test_router_balance_counts_choices_and_sums_to_one() -> None:
    always = torch.tensor([[9.0, 8.0, 0.0, 0.0]]).repeat(10, 1)
    evenly = torch.eye(4).repeat(5, 1) * 20 + torch.eye(4).roll(1, 1).repeat(5, 1) * 10
    both = router_balance([chosen(always, 2), chosen(evenly, 2)])
    assert both[0]["usage"] == pytest.approx([0.5, 0.5, 0, 0]) and both[1]["usage"] == pytest.approx([0.25] * 4)
    assert router_balance([chosen(always, 1)])[0]["usage"] == [1.0, 0.0, 0.0, 0.0]
    assert all(sum(layer["usage"]) == pytest.approx(1) and 0 <= layer["entropy"] <= 1 for layer in both)
    assert router_balance([chosen(torch.zeros(6, 4), 1)])[0]["entropy"] == pytest.approx(1)


@pytest.fixture(scope="module")
def stream() -> Stream:
    return Stream(corpus(), profile())


def evaluated(model: torch.nn.Module, stream: Stream, **changes: object) -> dict:
    calls = []

    @contextmanager
    def averaged():
        calls.append("in")
        kept = model.lm_head.weight.detach().clone()
        with torch.no_grad():
            model.lm_head.weight.zero_()  # every token equally likely: log(vocabulary) nats
        yield
        with torch.no_grad():
            model.lm_head.weight.copy_(kept)
        calls.append("out")

    p = profile(**changes)
    report = evaluate_epoch(model, stream, p, torch.device("cpu"), averaged, Retriever(stream, p))
    assert calls == ["in", "out"] and model.training
    told = report | {"run": "t", "attempt": 1, "epoch": 1, "step": 6}
    assert set(epoch.checked(told, "epoch")) == set(told), "the schema describes what is measured"
    return report


def test_an_epoch_of_a_stack_model(stream: Stream) -> None:
    model = build(params.Model(config=STACK), stream.vocab_size, stream.pad_id, 3)
    report = evaluated(model, stream, evaluation={"rows": 3, "pairs": 8, "k": 2})
    expected = {}
    model.eval()
    for domain in stream.domains:  # the plain definition: the mean over tokens that transformers computes
        rows = {name: torch.as_tensor(value) for name, value in stream.validation(domain, 3).items()}
        del rows["answer_mask"]
        expected[domain] = float(model(**rows).loss)
    assert report["validation_loss_by_domain"] == pytest.approx(expected, rel=1e-5)
    assert report["validation_loss"] == pytest.approx(sum(expected.values()) / len(expected), rel=1e-5)
    assert report["ema"]["validation_loss"] == pytest.approx(math.log(stream.vocab_size), rel=1e-5)
    assert report["ema"]["calibration_error"] < 0.1 and set(report["ema"]) <= set(epoch.Numbers.model_fields)
    for domain, losses in report["validation_loss_by_row"].items():
        rows = stream.validation(domain, 3)["labels"]
        weight = (rows >= 0).sum(1)
        assert np.average(losses, weights=weight) == pytest.approx(expected[domain], rel=1e-5), domain
    labelled = sum((stream.validation(d, 3)["labels"] >= 0).sum() for d in stream.domains)
    assert sum(report["calibration"]["count"]) == labelled
    assert report["k"] == 2 and 0 <= report["precision_at_k"] <= 0.5 and report["recall_at_k"] <= 1
    assert report["pairs"] == len(stream.validation_pairs(8)["pair_key"]) > 1
    answers = int(stream.long_range(3)["answer_mask"].sum())
    assert report["long_range_answers"] == answers > 0 and 0 <= report["long_range_accuracy"] <= 1
    told = report["long_range_by_distance"]
    assert sum(row["n"] for row in told) == answers
    assert sum(row["n"] * row["value"] for row in told) == pytest.approx(report["long_range_accuracy"] * answers)
    assert [row["up_to"] for row in told] == sorted({row["up_to"] for row in told}) and told[0]["low"] <= told[0][
        "high"
    ]
    assert len(report["router"]) == 2
    for layer in report["router"]:
        assert len(layer["usage"]) == 4 and sum(layer["usage"]) == pytest.approx(1) and 0 < layer["entropy"] <= 1


def test_answers_are_told_apart_by_how_far_their_evidence_is(stream: Stream) -> None:
    rows = stream.long_range(4)
    away = longrange.distances(rows["input_ids"], rows["answer_mask"], stream.corpus.manifest["specials"],
                               longrange.symbols(stream.p.auxiliary)[1])  # fmt: skip
    near = away <= 2 * 30  # the reach is that of 2 layers of a window of 16
    found = {row["up_to"]: row for row in by_distance(stream, rows, near)}
    assert sum(row["n"] for row in found.values()) == len(away) and (away > 30).all()
    assert {up_to: row["value"] for up_to, row in found.items()} == {up_to: float(up_to <= 60) for up_to in found}
    assert by_distance(stream, rows, np.array([], bool)) == []


def test_a_set_in_beir_s_format_is_measured_with_its_grades(stream: Stream, tmp_path: Path) -> None:
    texts = {f"d{k}": f"alpha{k} beta{k * 7} gamma{k}" for k in range(6)}
    home = tmp_path / "fiqa"
    (home / "qrels").mkdir(parents=True)
    lines = [json.dumps({"_id": name, "title": "", "text": text}) + "\n" for name, text in texts.items()]
    (home / "corpus.jsonl").write_text("".join(lines))
    (home / "queries.jsonl").write_text("".join(lines))  # a query is its document: found at the first place
    judged = [f"{name}\t{name}\t2\n" for name in texts] + ["d0\td1\t1\n", "d0\td2\t0\n"]
    (home / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
    p = profile(evaluation={"pairs": 4, "retrieval_sets": [str(home)]},
                auxiliary={"query_tokens": 16, "document_tokens": 16})  # fmt: skip
    found = sets.load(stream.corpus.folder, p, stream.pad_id)["fiqa"]
    assert found.grades.tolist()[0] == [2, 1, 0, 0, 0, 0] and found.grades.shape == (4, 6)
    model = build(params.Model(config=STACK), stream.vocab_size, stream.pad_id, 3).eval()
    report = evaluated(model, stream, evaluation={"rows": 2, "pairs": 8, "retrieval_sets": [str(home)]},
                       auxiliary=p.auxiliary.model_dump())["retrieval_sets"]["fiqa"]  # fmt: skip
    assert report["mrr"] == 1 and report["ndcg_at_10"] > 0.8 and report["documents"] == 6
    for wrong, message in (("d0\td1\t0\n", "no relevant document"), ("d0\td9\t1\n", "1 wrong lines")):
        (home / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + wrong)
        with pytest.raises(ValueError, match=message):
            sets.load(stream.corpus.folder, p, stream.pad_id)


def test_an_epoch_of_other_models(stream: Stream) -> None:
    for config in (QWEN, DEEPSEEK):  # the latter returns no router_logits of its own
        mixture = build(params.Model(kind="auto", config=config), stream.vocab_size, stream.pad_id, 3)
        assert [len(layer["usage"]) for layer in evaluated(mixture, stream)["router"]] == [4, 4]
    alone = STACK | {"num_experts": 1, "num_experts_per_tok": 1}  # one expert is a dense network: nothing is routed
    dense = build(params.Model(config=alone), stream.vocab_size, stream.pad_id, 3)
    report = evaluated(dense, stream)
    assert report["router"] == [] and math.isfinite(report["validation_loss"])


def test_a_domain_that_holds_nothing_out_is_left_out(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Stream.validation
    monkeypatch.setattr(Stream, "validation", lambda self, name, n: held(self, name, n * (name != "docs")))
    model = build(params.Model(config=STACK), stream.vocab_size, stream.pad_id, 3)
    report = evaluated(model, stream)
    assert list(report["validation_loss_by_domain"]) == ["code"]
    assert report["validation_loss"] == report["validation_loss_by_domain"]["code"]


def guarded(stream: Stream, model: torch.nn.Module, **limits: object) -> tuple[dict, Retriever]:
    p = profile(evaluation={"rows": 3, "pairs": 8, "k": 1, "min_precision_at_k": 1.0}, retrieval=limits)
    retriever = Retriever(stream, p)
    return retriever.measure(model, torch.device("cpu")), retriever


OPEN = {"sigma_min": -1.0, "max_age": 1e12, "min_trust": 0.0, "fan_in": 4}


def test_the_guard_rejects_by_what_the_corpus_says_of_each_record(stream: Stream) -> None:
    model = build(params.Model(config=STACK), stream.vocab_size, stream.pad_id, 3).eval()
    found, _ = guarded(stream, model, **OPEN)
    pairs = stream.validation_pairs(8)
    documents = len(set(pairs["pair_key"].tolist()))
    looked_at = len(pairs["pair_key"]) * min(4, documents)
    assert found["guard"]["accepted"] == looked_at == sum(found["guard"]["similarities"])
    assert len(found["guard"]["similarities"]) == len(BINS) - 1 and not any(found["guard"]["rejected"].values())
    at_4 = guarded(stream, model, **OPEN | {"fan_in": 1})[0]  # the nearest alone: what of it is relevant is precision@1
    assert at_4["guard"]["relevant"] / len(pairs["pair_key"]) == pytest.approx(at_4["precision_at_k"])
    for name, limit in {
        "age": {"max_age": 1e-3},
        "source": {"sources": ["nowhere"]},
        "similarity": {"sigma_min": 1.0},
    }.items():
        rejected = guarded(stream, model, **OPEN | limit)[0]["guard"]["rejected"]
        assert rejected[name] == looked_at and sum(rejected.values()) == looked_at, name


def test_what_the_guard_lets_through_is_read_and_nothing_else(stream: Stream) -> None:
    config = STACK | {"retrieval": True}
    model = build(params.Model(config=config), stream.vocab_size, stream.pad_id, 3).eval()
    read, retriever = guarded(stream, model, **OPEN)
    shut = guarded(stream, model, **OPEN | {"sigma_min": 1.0})[0]
    assert read["reading_gain"] != 0 and shut["reading_gain"] == 0
    assert read["reading_loss"] + read["reading_gain"] == pytest.approx(shut["reading_loss"])
    retriever.switch.on = False
    off = retriever.measure(model, torch.device("cpu"))
    assert off["guard"]["on"] or off["reading_gain"] == 0
    plain = build(params.Model(config=STACK), stream.vocab_size, stream.pad_id, 3).eval()
    assert "reading_loss" not in guarded(stream, plain, **OPEN)[0]


def test_an_evaluation_calibrates_what_is_switched_off(stream: Stream) -> None:
    model = build(params.Model(config=STACK), stream.vocab_size, stream.pad_id, 3).eval()
    found, retriever = guarded(stream, model, **OPEN, sigma_range=[-1.0, 1.0])
    assert found["guard"]["on"] and "calibration" not in found["guard"]
    retriever.switch.on = False
    tried = retriever.measure(model, torch.device("cpu"))["guard"]
    if "failed" in tried["calibration"]:
        assert not tried["on"] and tried["sigma_min"] == -1.0
    else:
        assert tried["on"] and tried["sigma_min"] == retriever.switch.sigma_min == tried["calibration"]["sigma_min"]
        assert tried["relevant"] == tried["accepted"] > 0, "the target is a precision of 1"


def test_violations_are_counted_at_protected_positions_of_held_out_conversations(
    tmp_path: Path, stream: Stream
) -> None:
    p = profile(curriculum=[{"steps": 4, "context": 64, "conversations": 1.0}])
    talking, cpu = Stream(conversing(tmp_path) / "data", p), torch.device("cpu")
    model = build(params.Model(config=STACK), talking.vocab_size, talking.pad_id, 3).eval()
    found, rows = violations(model, talking, 2, cpu), talking.validation_conversations(2)
    report = evaluated(model, talking, evaluation={"rows": 2, "pairs": 8})
    assert {name: report[name] for name in found} == pytest.approx(found, rel=1e-5)
    model.eval()
    ids, roles, spans = (torch.as_tensor(rows[f"conversation_{name}"]) for name in ("ids", "roles", "spans"))
    rules = scopes.load(talking.corpus.folder / "scopes.yaml")
    with torch.no_grad():
        seen = scopes.compile(rules, roles, spans, enforce=False)
        out = model(input_ids=ids, scopes=seen, output_forbidden_mass=True)
    inside, banned = spans[:, 1:, scopes.PROTECTED] >= 0, torch.as_tensor(talking.forbidden)
    p_of = out.logits[:, :-1].softmax(-1)[inside]
    by_hand = {
        "violations": torch.isin(p_of.argmax(-1), banned).float().mean(),
        "forbidden_probability": p_of[:, banned].sum(-1).mean(),
        "forbidden_attention": torch.stack(out.forbidden_mass).mean(),
    }
    assert found == pytest.approx({name: float(value) for name, value in by_hand.items()}, rel=1e-4)
    assert 0 < found["forbidden_attention"] < 1 and inside.any() and len(banned)
    with torch.no_grad():  # all other logits are 0
        model.lm_head.weight.zero_()
        model.lm_head.weight[banned[0]], model.lm_head.weight[banned[1]] = 1.0, -1.0
    assert violations(model, talking, 2, cpu)["violations"] == 1.0, "of x and -x one is above 0"
    other = build(params.Model(kind="auto", config=LLAMA), talking.vocab_size, talking.pad_id, 3).eval()
    assert set(violations(other, talking, 2, cpu)) == {"violations", "forbidden_probability"}, "it knows no scopes"
    assert violations(other, stream, 2, cpu) == {}, "a run without conversations"
