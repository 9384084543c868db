import numpy as np
import pytest
from data_corpus import profile

from stackpkg.data import longrange
from stackpkg.data.tokenizer import KEY, QUERY, SPECIALS, VALUE

NAMED = dict(zip(SPECIALS, range(len(SPECIALS)), strict=True))


def rows(p, context):
    tasks = longrange.generate(p)
    filler = np.arange(200, 200 + context) % 290 + 110
    made = [longrange.row(task, filler, NAMED) for task in tasks]
    return tasks, np.stack([ids for ids, _ in made]), np.stack([answers for _, answers in made])


def big(**changes):
    return profile(auxiliary={"long_range_tasks": 600}, **changes)


@pytest.mark.parametrize("context", [64, 128, 777])
def test_evidence_lies_beyond_the_window_at_every_context(context):
    tasks, ids, answers = rows(big(), context)
    found = longrange.certificate(ids, answers, 16, NAMED)
    assert found["share_beyond"] == 1 and longrange.distances(ids, answers, NAMED).min() > 16
    assert answers.sum() == sum(len(task["keys"]) for task in tasks)


def test_answers_are_uniform_and_cannot_be_copied():
    _, ids, answers = rows(big(), 128)
    found = longrange.certificate(ids, answers, 16, NAMED)
    assert found["uniform_p"] > 1e-4 and found["chance"] == 1 / 32
    assert abs(found["copy_accuracy"] - found["chance"]) < 4 * np.sqrt(found["chance"] / answers.sum())


def test_each_question_has_one_answer_and_it_is_in_the_row():
    tasks, ids, answers = rows(profile(), 64)
    for task, sequence, mask in zip(tasks, ids, answers, strict=True):
        told = dict(zip(task["keys"], task["values"], strict=True))
        assert len(told) == len(task["keys"])
        for place in np.flatnonzero(mask):
            assert sequence[place - 3] == QUERY and sequence[place - 1] == VALUE
            assert told[int(sequence[place - 2])] == sequence[place]
        assert (sequence == KEY).sum() == len(told)


def test_the_certificate_notices_evidence_inside_the_window():
    _, ids, answers = rows(profile(), 64)
    place = int(np.flatnonzero(answers[0])[0])
    ids[0, place - 9 : place - 5] = KEY, ids[0, place - 2], VALUE, ids[0, place]
    found = longrange.certificate(ids, answers, 16, NAMED)
    assert found["share_beyond"] == pytest.approx(1 - 1 / answers.sum())


def test_the_certificate_notices_answers_that_can_be_guessed():
    _, ids, answers = rows(big(), 64)
    ids[answers] = longrange.VALUES.start
    found = longrange.certificate(ids, answers, 16, NAMED)
    assert found["uniform_p"] < 1e-9 and found["copy_accuracy"] == 1


def test_tasks_depend_on_the_seed_alone():
    assert longrange.generate(profile()) == longrange.generate(profile())
    assert longrange.generate(profile())[0]["values"] != longrange.generate(profile(seed=18))[0]["values"]
    splits = [task["split"] for task in longrange.generate(profile())]
    assert splits.count("held_out") == 3 and len(splits) == 24


def test_a_context_inside_the_window_is_refused():
    with pytest.raises(ValueError, match=r"local window 64.*80 tokens or more"):
        longrange.generate(profile(model={"config": {"sliding_window": 64}}))
    with pytest.raises(ValueError, match="local window 512"):
        longrange.generate(profile(model={"kind": "stack"}))
    with pytest.raises(ValueError, match="cannot hold"):
        longrange.row(longrange.generate(profile())[0], np.zeros(24, np.int64), NAMED)


def test_a_model_without_a_window_is_measured_against_a_quarter_of_the_context():
    assert longrange.window_of(profile(model={"kind": "auto", "config": {"model_type": "qwen3_moe"}})) == 16


def test_control_tokens_are_those_of_the_tokenizer():
    task, filler = longrange.generate(profile())[0], np.full(64, 300)
    elsewhere = {token: 900 + k for k, token in enumerate(SPECIALS)}
    (ids, answers), (usual, places) = (longrange.row(task, filler, named) for named in (elsewhere, NAMED))
    moved = np.isin(usual, [QUERY, KEY, VALUE])
    assert np.array_equal(ids[moved], usual[moved] + 900) and np.array_equal(ids[~moved], usual[~moved])
    assert np.array_equal(answers, places) and moved.sum() == 4 * len(task["keys"])
    found = longrange.certificate(ids[None], answers[None], 16, elsewhere)
    assert found == longrange.certificate(usual[None], answers[None], 16, NAMED)
