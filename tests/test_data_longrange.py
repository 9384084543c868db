import numpy as np
import pytest
from data_corpus import profile
from hypothesis import given, settings
from hypothesis import strategies as st

from stackpkg import params
from stackpkg.data import longrange
from stackpkg.data.tokenizer import QUERY, SPECIALS

NAMED = dict(zip(SPECIALS, range(len(SPECIALS)), strict=True))
KINDS = ["recall", "needle", "variables", "hops"]
NAMES, VALUES = longrange.symbols(params.Auxiliary())


def rows(p, context):
    tasks = longrange.generate(p)
    filler = np.arange(200, 200 + context) % 290 + 110
    made = [longrange.row(task, filler, NAMED) for task in tasks]
    return tasks, np.stack([ids for ids, _ in made]), [answers for _, answers in made]


def far(tasks, ids, answers):
    return longrange.distances(ids, np.stack(answers), NAMED, VALUES)


def big(**auxiliary):
    return profile(auxiliary={"long_range_tasks": 400} | auxiliary)


@pytest.mark.parametrize("context", [64, 128, 777])
@pytest.mark.parametrize("kind", KINDS)
def test_evidence_lies_beyond_the_receptive_field_at_every_context(kind, context):
    tasks, ids, answers = rows(big(long_range_kinds={kind: 1}), context)
    found = far(tasks, ids, answers)
    assert found.min() > tasks[0]["reach"] == 2 * (16 - 1), "two layers, each fifteen tokens back"
    assert len(found) == sum(len(task["asked"]) for task in tasks)


def follow(task, name):
    """The answer by the records alone, and the names on the way to it."""
    told, way = dict(zip(task["subjects"], task["objects"], strict=True)), [name]
    while told[way[-1]] in NAMES:
        way.append(told[way[-1]])
    return told[way[-1]], way


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), count=st.integers(5, 24), hops=st.integers(2, 4), name=st.text(max_size=4))
def test_each_question_is_answered_by_following_its_records(kind, count, hops, name):
    task = longrange.draw(kind, name, count, params.Auxiliary(long_range_hops=hops))
    assert len(set(task["subjects"])) == len(task["subjects"]) <= count, "one record a name"
    ways = []
    for asked, answer in zip(task["asked"], task["answers"], strict=True):
        found, way = follow(task, asked)
        assert found == answer and answer in VALUES
        assert len(way) == (hops if kind in longrange.CHAINED else 1)
        ways += way
    assert len(set(ways)) == len(ways), "two questions that share a record would give each other's answer away"
    if kind == "variables":
        places = [[task["subjects"].index(name) for name in follow(task, asked)[1]] for asked in task["asked"]]
        assert all(way == sorted(way, reverse=True) for way in places), "assigned before it is used"
    if kind == "needle":
        assert len(task["asked"]) == task["far"] == 1 and len(task["subjects"]) == count
    if kind == "hops":
        assert len(task["subjects"]) == count and len({*task["objects"]}) < count, "some lead to the same"


def test_questions_stand_at_the_end_and_the_answer_follows_its_name():
    tasks, ids, answers = rows(profile(), 64)
    assert {task["kind"] for task in tasks} == set(KINDS)
    for task, sequence, mask in zip(tasks, ids, answers, strict=True):
        places = np.flatnonzero(mask)
        assert sequence[places].tolist() == task["answers"] and sequence[places - 1].tolist() == task["asked"]
        assert (sequence[places - 3] == QUERY).all() and places[-1] == 63


def test_distractors_of_a_needle_lie_near_the_question_too():
    _, ids, _ = rows(big(long_range_kinds={"needle": 1}), 64)
    near = [(row[-30:-4] == NAMED["<key>"]).sum() for row in ids]
    assert np.mean(near) > 0.5


def test_the_mix_of_kinds_is_the_one_asked_for():
    mix = {"recall": 0.5, "needle": 0.25, "hops": 0.25, "variables": 0.0}
    kinds = [task["kind"] for task in longrange.generate(big(long_range_kinds=mix))]
    assert {kind: kinds.count(kind) for kind in KINDS} == {"recall": 200, "needle": 100, "hops": 100, "variables": 0}


def test_tasks_depend_on_the_seed_alone():
    assert longrange.generate(profile()) == longrange.generate(profile())
    assert longrange.generate(profile())[0]["answers"] != longrange.generate(profile(seed=18))[0]["answers"]
    splits = [task["split"] for task in longrange.generate(profile())]
    assert splits.count("held_out") == 3 and len(splits) == 24


def test_names_and_answers_are_drawn_from_as_many_as_asked():
    tasks = longrange.generate(big(long_range_names=100, long_range_values=7))
    names, values = longrange.symbols(params.Auxiliary(long_range_names=100, long_range_values=7))
    assert len(names) == 100 and len(values) == 7 and names.stop == values.start
    assert {answer for task in tasks for answer in task["answers"]} == set(values)
    assert {name for task in tasks for name in task["subjects"]} == set(names)


def test_a_context_inside_the_receptive_field_is_refused():
    deep = profile(model={"config": {"sliding_window": 16, "num_hidden_layers": 4}})
    with pytest.raises(ValueError, match=r"receptive field 60 .* by 3 records: .* 92 tokens or more"):
        longrange.generate(deep)
    with pytest.raises(ValueError, match="receptive field 24528"):
        longrange.generate(profile(model={"kind": "stack"}))
    with pytest.raises(ValueError, match="no num_hidden_layers"):
        longrange.reach_of(profile(model={"kind": "auto", "config": {"model_type": "llama", "sliding_window": 16}}))
    with pytest.raises(ValueError, match="cannot hold"):
        longrange.row(longrange.generate(profile())[0], np.zeros(40, np.int64), NAMED)
    with pytest.raises(ValueError, match="every kind weight 0"):
        profile(auxiliary={"long_range_kinds": {"recall": 0}})


def test_only_the_stages_that_ask_tasks_must_outrun_the_reach():
    stages = [{"steps": 2, "context": 16, "long_range": 0.0}, {"steps": 2, "context": 64, "long_range": 0.25}]
    assert longrange.generate(profile(curriculum=stages)) == longrange.generate(profile())


def test_a_model_without_a_window_is_held_to_a_quarter_of_the_context():
    assert longrange.reach_of(profile(model={"kind": "auto", "config": {"model_type": "qwen3_moe"}})) == 16


@pytest.mark.parametrize(
    "changes, reach",
    [
        ({}, 30),
        ({"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 30),
        ({"use_sliding_window": False}, 16),
        ({"layer_types": ["sliding_attention", "full_attention"]}, 16),
    ],
    ids=str,
)
def test_a_model_of_transformers_with_a_layer_that_sees_all_has_no_window(changes, reach):
    config = {"model_type": "qwen3", "sliding_window": 16, "num_hidden_layers": 2} | changes
    assert longrange.reach_of(profile(model={"kind": "auto", "config": config})) == reach


def test_rows_that_are_read_without_a_window_are_refused():
    stages = [{"steps": 2, "context": 128, "long_range": 0.0}, {"steps": 2, "context": 64, "long_range": 0.25}]
    config = {"sliding_window": 16, "num_hidden_layers": 2, "linear_from": 64}
    assert longrange.reach_of(profile(curriculum=stages, model={"config": config})) == 30
    with pytest.raises(ValueError, match=r"64 tokens, and rows of over linear_from 63 are read without a window"):
        longrange.reach_of(profile(curriculum=stages, model={"config": config | {"linear_from": 63}}))


@pytest.mark.parametrize("kind", KINDS)
def test_evidence_keeps_the_distance_that_is_asked_for(kind):
    mix = {"long_range_kinds": {kind: 1}}
    tasks, ids, answers = rows(big(long_range_distance=30, **mix), 64)
    assert [task["reach"] for task in tasks] == [30] * len(tasks), "the reach of the model is a least distance too"
    far_apart = [{"steps": 2, "context": 256, "long_range": 0.25}]
    apart = profile(curriculum=far_apart, auxiliary={"long_range_tasks": 40, "long_range_distance": 150} | mix)
    assert far(*rows(apart, 256)).min() > 150 > far(tasks, ids, answers).max()


def test_a_distance_that_no_context_has_room_for_is_refused():
    with pytest.raises(ValueError, match=r"outrun the auxiliary.long_range_distance 50 .*model's, 30"):
        longrange.generate(profile(auxiliary={"long_range_distance": 50}))


def test_the_nearest_record_of_a_name_counts_and_a_question_without_one_is_refused():
    _, ids, answers = rows(big(long_range_kinds={"recall": 1}), 64)
    place = int(np.flatnonzero(answers[0])[0])
    ids[0, place - 9 : place - 5] = NAMED["<key>"], ids[0, place - 1], NAMED["<value>"], ids[0, place]
    assert longrange.distances(ids[:1], answers[0][None], NAMED, VALUES)[0] == 5
    ids[0, place - 1] = NAMES.stop - 1 if ids[0, place - 1] != NAMES.stop - 1 else NAMES.start
    ids[0, : place - 4][ids[0, : place - 4] == ids[0, place - 1]] = 300
    with pytest.raises(ValueError, match="no record tells it"):
        longrange.distances(ids[:1], answers[0][None], NAMED, VALUES)


def test_control_tokens_are_those_of_the_tokenizer():
    task, filler = longrange.generate(profile())[0], np.full(64, 300)
    elsewhere = {token: 900 + k for k, token in enumerate(SPECIALS)}
    (ids, answers), (usual, places) = (longrange.row(task, filler, named) for named in (elsewhere, NAMED))
    moved = np.isin(usual, [NAMED[mark] for mark in longrange.MARKS])
    assert np.array_equal(ids[moved], usual[moved] + 900) and np.array_equal(ids[~moved], usual[~moved])
    assert np.array_equal(answers, places)
    assert moved.sum() == 2 * (len(task["subjects"]) + len(task["asked"]))
    with pytest.raises(ValueError, match="control tokens where tasks draw"):
        longrange.row(task, filler, NAMED | {"<eos>": task["answers"][0]})
