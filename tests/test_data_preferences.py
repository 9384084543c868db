import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackpkg.data import preferences, tokenizer
from stackpkg.data.problems import check

ASK, YES, NO = (
    {"role": role, "content": text}
    for role, text in [("user", "Sky?"), ("assistant", "Blue."), ("assistant", "Green.")]
)
GOOD = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
TALK = {"prompt": [ASK], "chosen": [YES], "rejected": [NO]}


def written(path, rows):
    """JSONL; a row that is bytes is written as it stands."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


SKY, ASKED = ["The sky is", " blue.", " green."], ["<|user|>\nSky?\n<|assistant|>\n", "Blue.\n", "Green.\n"]
SHARED = {"chosen": [ASK, YES], "rejected": [ASK, NO]}


@pytest.mark.parametrize(
    ("row", "texts", "format"),
    [
        (GOOD, SKY, "standard, explicit prompt"),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, SKY, "standard, implicit prompt"),
        ({"chosen": "I am", "rejected": "I am now"}, ["I a", "m", "m now"], "standard, implicit prompt"),
        (TALK, ASKED, "conversational, explicit prompt"),
        (SHARED, ASKED, "conversational, implicit prompt"),
        (SHARED | {"prompt": "Sky?"}, ASKED, "conversational, implicit prompt"),
    ],
    ids=["standard", "implicit", "prefix", "conversational", "conversational implicit", "prompt as text"],
)
def test_each_format_becomes_text_with_its_prompt(tmp_path, row, texts, format):
    rows, problems = preferences.read(written(tmp_path / "p.jsonl", [row]))
    assert problems == [] and rows[0]["source"] == "p.jsonl/1" and len(rows[0]["record_id"]) == 16
    assert [rows[0][name] for name in preferences.TEXTS] == texts and rows[0]["format"] == format


def test_several_turns_and_tools_are_rendered():
    tool, system = {"role": "tool", "content": "42"}, {"role": "system", "content": "Be brief."}
    assert preferences.render([system, ASK, YES, tool]) == (
        "<|system|>\nBe brief.\n<|user|>\nSky?\n<|assistant|>\nBlue.\n<|tool|>\n42\n"
    )


WRONG = [
    ({"prompt": "a", "chosen": "b"}, "`rejected` is missing"),
    ({"chosen": "b c", "text": "x"}, "`rejected` is missing"),
    (GOOD | {"chosen": " "}, "`chosen` is empty"),
    (GOOD | {"prompt": ""}, "`prompt` is empty"),
    (GOOD | {"rejected": 3}, "`rejected` is a int"),
    (GOOD | {"rejected": GOOD["chosen"]}, "are identical"),
    (GOOD | {"rejected": [NO]}, "some of it is text, some are messages"),
    (GOOD | {"prompt": [ASK]}, "some of it is text, some are messages"),
    ({"chosen": "abc", "rejected": "xyz"}, "share no beginning"),
    ({"chosen": "The sky  ", "rejected": "The sky is"}, "an answer is empty"),
    (TALK | {"rejected": [{"role": "bot", "content": "Red."}]}, "role 'bot' is unknown in message 1 of `rejected`"),
    (TALK | {"rejected": [{"role": "assistant"}]}, "`content` is missing in message 1 of `rejected`"),
    (TALK | {"rejected": [{"role": "assistant", "content": ["x"]}]}, "`content` is a list in message 1"),
    (TALK | {"rejected": ["Red."]}, "no message in message 1 of `rejected`"),
    (TALK | {"rejected": []}, "no message in message 1 of `rejected`"),
    (TALK | {"rejected": [NO, ASK]}, "the last message of `rejected` is of role user"),
    (TALK | {"chosen": [ASK, YES], "rejected": [ASK, NO]}, "begins with role user: prompts differ or are repeated"),
    ({"chosen": [YES, ASK, YES], "rejected": [YES, ASK | {"content": "Sea?"}, NO]}, "prompts differ or are repeated"),
    ({"prompt": "Sea?", "chosen": [ASK, YES], "rejected": [ASK, NO]}, "`prompt` is no message of the prompt"),
    (b"[1, 2]", "a list, no object"),
    (b'{"prompt": "a", ', "no JSON in UTF-8"),
    (b'{"prompt": "\xff", "chosen": "b", "rejected": "c"}', "no JSON in UTF-8"),
    (b'{"prompt": "\\ud800", "chosen": "b", "rejected": "c"}', "no JSON in UTF-8"),
    (b"[" * 100_000, "no JSON in UTF-8"),
]


@pytest.mark.parametrize(("row", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_line_is_named_with_its_number_and_remedy(tmp_path, row, message):
    talk = isinstance(row, dict) and isinstance(row.get("chosen"), list)
    good = TALK if talk else GOOD
    rows, problems = preferences.read(written(tmp_path / "p.jsonl", [good, b"", row, b"  "]))
    assert len(rows) == 1 and len(problems) == 1
    assert problems[0].file == "p.jsonl" and problems[0].line == 3 and problems[0].mend
    assert message in problems[0].wrong


def test_lines_that_contradict_those_before_are_named(tmp_path):
    swapped = GOOD | {"chosen": GOOD["rejected"], "rejected": GOOD["chosen"]}
    rows, problems = preferences.read(written(tmp_path / "p.jsonl", [b"{}", GOOD, TALK, GOOD, swapped]))
    assert [(item.line, item.wrong.split(",")[0]) for item in problems] == [
        (1, "`chosen` is missing"),
        (3, "format is conversational"),
        (4, "duplicate of line 2"),
        (5, "prefers what line 2 rejects"),
    ]
    assert len(rows) == 1


def test_packed_files_and_parquet_say_the_same(tmp_path):
    rows = [GOOD | {"prompt": f"The sky {k}"} for k in range(5)] + [GOOD | {"chosen": None}]
    plain = written(tmp_path / "p.jsonl", rows)
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    with pa.output_stream(tmp_path / "p.jsonl.zst") as stream:
        stream.write(plain.read_bytes())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    pq.write_table(pa.Table.from_pylist([TALK]), tmp_path / "talk.parquet")
    found = [preferences.read(tmp_path / name) for name in ("p.jsonl", "p.jsonl.gz", "p.jsonl.zst", "p.parquet")]
    texts = [[[row[name] for name in preferences.TEXTS] for row in kept] for kept, _ in found]
    assert len(texts[0]) == 5 and all(text == texts[0] for text in texts)
    assert [[(item.line, item.wrong) for item in bad] for _, bad in found] == [[(6, "`chosen` is missing")]] * 4
    assert preferences.read(tmp_path / "talk.parquet")[0][0]["chosen"] == "Blue.\n"


def test_a_file_of_which_a_tenth_is_wrong_is_refused(tmp_path):
    good = [GOOD | {"prompt": f"The sky {k}"} for k in range(18)]
    for bad, refused in ((2, False), (3, True)):
        path = written(tmp_path / "p.jsonl", good + [b"{}"] * bad)
        rows, problems = preferences.read(path)
        if refused:
            with pytest.raises(ValueError, match=r"(?s)18 usable rows, 3 problems.*p.jsonl:19: `chosen` is missing"):
                check(path, len(rows), problems)
        else:
            check(path, len(rows), problems)
    with pytest.raises(ValueError, match="0 usable rows"):
        check(path, 0, [])


LETTERS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
ANSWERS = st.tuples(LETTERS, LETTERS).filter(lambda pair: pair[0] != pair[1] and pair[0].strip() and pair[1].strip())


@settings(max_examples=60, deadline=None)
@given(LETTERS.filter(str.strip), ANSWERS)
def test_the_prompt_is_found_again(tmp_path_factory, prompt, answers):
    chosen, rejected = answers
    folder = tmp_path_factory.mktemp("p")
    explicit = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    rows, problems = preferences.read(written(folder / "a.jsonl", [explicit]))
    assert problems == [] and {name: rows[0][name] for name in explicit} == explicit
    implicit = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    for row in preferences.read(written(folder / "b.jsonl", [implicit]))[0]:
        assert row["prompt"] + row["chosen"] == prompt + chosen and row["prompt"] + row["rejected"] == prompt + rejected
        apart = row["chosen"].removeprefix(" ")[:1] != row["rejected"].removeprefix(" ")[:1]
        assert apart or min(map(len, (row["chosen"], row["rejected"]))) <= 2, "all that is shared is the prompt's"
    ask = {"role": "user", "content": prompt}
    said, unsaid = ({"role": "assistant", "content": text} for text in answers)
    texts = []
    for row in (
        {"prompt": [ask], "chosen": [said], "rejected": [unsaid]},
        {"chosen": [ask, said], "rejected": [ask, unsaid]},
    ):
        rows, problems = preferences.read(written(folder / "c.jsonl", [row]))
        assert problems == []
        texts.append([rows[0][name] for name in preferences.TEXTS])
    assert texts[0] == texts[1] and texts[0][0] + texts[0][1] == preferences.render([ask, said])


def test_statistics_by_hand():
    rows = [
        {"prompt": "ab", "chosen": "cccc", "rejected": "d", "format": "x", "split": "train"},
        {"prompt": "ab", "chosen": "c", "rejected": "dd", "format": "x", "split": "train"},
        {"prompt": "abcd", "chosen": "cc", "rejected": "dd", "format": "y", "split": "held_out"},
        {"prompt": "abcd", "chosen": "cc", "rejected": "dd", "format": "y", "split": "held_out"},
    ]
    assert preferences.statistics(rows) == {
        "rows": 4, "prompts": 2, "duplicates": 1, "format": {"x": 2, "y": 2}, "split": {"train": 2, "held_out": 2},
        "prompt_characters": 3.0, "chosen_characters": 2.25, "rejected_characters": 1.75, "length_bias": 0.5,
        "longer_chosen": 0.25,
    }  # fmt: skip
    assert preferences.statistics([])["rows"] == 0


def test_a_prompt_is_in_one_split_whatever_its_company():
    rows = [GOOD | {"prompt": f"{'The  sky' if k % 2 else 'the sky'} {k // 4}", "chosen": f"{k}"} for k in range(2000)]
    made = preferences.split(rows, 0.2)
    sides = {
        side: {" ".join(row["prompt"].lower().split()) for row in made if row["split"] == side}
        for side in ("train", "held_out")
    }
    assert len(sides["train"] | sides["held_out"]) == 500 and not sides["train"] & sides["held_out"]
    assert 65 <= len(sides["held_out"]) <= 135  # binomial: 100 and four standard deviations
    shuffled = random.Random(0).sample(rows, len(rows))
    assert {row["chosen"]: row["split"] for row in preferences.split(shuffled, 0.2)} == {
        row["chosen"]: row["split"] for row in made
    }


def test_ids_keep_the_end_of_the_prompt_and_the_start_of_the_answers():
    model = tokenizer.train_tokenizer(["the sky is blue or green or red"] * 3, 300)
    rows = [
        {"prompt": "the sky is blue or green", "chosen": " or red", "rejected": " blue or green or red"},
        {"prompt": "the", "chosen": " sky is blue or red", "rejected": " sky is blue or green"},
    ]
    made = preferences.encode(rows, model, 3, 4)
    assert len(made) == 1 and made[0]["prompt"] == rows[0]["prompt"], "the second differs behind the cut"
    whole = {name: tokenizer.encode(model, [rows[0][name]])[0] for name in preferences.TEXTS}
    assert len(whole["prompt"]) > 3 and len(whole["rejected"]) > 4
    assert made[0]["prompt_ids"] == whole["prompt"][-3:] and made[0]["rejected_ids"] == whole["rejected"][:4]
    assert made[0]["chosen_ids"] == [*whole["chosen"], tokenizer.EOS][:4]
    long = preferences.encode(rows, model, 100, 100)
    assert len(long) == 2 and long[0]["chosen_ids"] == [*whole["chosen"], tokenizer.EOS]
