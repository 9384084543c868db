"""Preferences in TRL's formats: a prompt given or shared by two answers, as text or as conversation; validated."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tokenizers import Tokenizer

from stackpkg.data import mixing, problems, tokenizer
from stackpkg.data.problems import Problem, Wrong

ROLES = ("system", "user", "assistant", "tool")
MARKER = "<|assistant|>\n"  # ends a prompt of messages: the answer is what follows
EXPLICIT = "standard, explicit prompt"
TEXTS = ("prompt", "chosen", "rejected")
Preference = dict[str, Any]  # prompt, chosen, rejected, and where they come from


def render(messages: Sequence[dict[str, str]]) -> str:
    """A conversation as text: each message after a line that names its role, `<|user|>`, and ended by a newline."""
    return "".join(f"<|{message['role']}|>\n{message['content']}\n" for message in messages)


def read(path: Path) -> tuple[list[Preference], list[Problem]]:
    """(rows, problems) of JSONL (.gz, .zst) or Parquet: `prompt`, `chosen`, `rejected` as text, `format`, and where
    it is from: `record_id`, `source`, `licence`.

    A file has one format, its first row's. A row seen before, or seen with its answers exchanged, is set aside.
    """
    formats: list[str] = []
    seen: dict[tuple[str, ...], int] = {}

    def parse(number: int, line: Any) -> Preference:
        row = _standard(problems.row(line))
        formats.append(row["format"])
        if row["format"] != formats[0]:
            raise Wrong(f"format is {row['format']}, of the rows before {formats[0]}", "keep one format in a file")
        if same := seen.get((row["prompt"], row["chosen"], row["rejected"])):
            raise Wrong(f"duplicate of line {same}", "drop one of them")
        if opposite := seen.get((row["prompt"], row["rejected"], row["chosen"])):
            raise Wrong(f"prefers what line {opposite} rejects", "drop the one that is wrong")
        seen[row["prompt"], row["chosen"], row["rejected"]] = number
        return problems.origin(f"{path.name}/{number}") | row

    return problems.sift(path, parse)


def _standard(row: dict[str, Any]) -> Preference:
    """A row as text with explicit prompt. Raises `Wrong` when it has none of the formats."""
    talks = {name: isinstance(row[name], list) for name in TEXTS if name in row}
    for name in ("chosen", "rejected", *talks):
        check_messages(row[name], name) if talks.get(name) else problems.text(row, name)
    given, chosen, rejected, talk = row.get("prompt"), row["chosen"], row["rejected"], talks["chosen"]
    if talk != talks["rejected"] or talks.get("prompt", talk) > talk:
        raise Wrong("some of it is text, some are messages", "give prompt, chosen and rejected all in one way")
    if chosen == rejected:
        raise Wrong("`chosen` and `rejected` are identical", "drop the line: it prefers nothing")
    prompt, kind = given, "explicit"
    if talks.get("prompt") != talk:  # none, or a text that says the first question of the messages once more
        cut = _shared(chosen, rejected)
        kind, prompt, chosen, rejected = "implicit", chosen[:cut], chosen[cut:], rejected[cut:]
    if not prompt:
        raise Wrong("`chosen` and `rejected` share no beginning: their prompts differ", "give one prompt")
    if talk:
        for name, answer in (("chosen", chosen), ("rejected", rejected)):
            if answer[-1]["role"] != "assistant":
                raise Wrong(f"the last message of `{name}` is of role {answer[-1]['role']}", "end with the assistant")
            if answer[0]["role"] != "assistant":
                wrong = f"the answer in `{name}` begins with role {answer[0]['role']}: prompts differ or are repeated"
                raise Wrong(wrong, "give one prompt, once")
        if isinstance(given, str) and given not in [message["content"] for message in prompt]:
            raise Wrong("`prompt` is no message of the prompt that the answers share", "leave `prompt` out")
        prompt, chosen, rejected = (render(part) for part in (prompt, chosen, rejected))
        prompt, chosen, rejected = prompt + MARKER, chosen.removeprefix(MARKER), rejected.removeprefix(MARKER)
    if not (chosen.strip() and rejected.strip()):
        raise Wrong("an answer is empty behind the shared prompt", "give `prompt` apart from the answers")
    kind = f"{'conversational' if talk else 'standard'}, {kind} prompt"
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "format": kind}


def check_messages(messages: list[Any], name: str, roles: Sequence[str] = ROLES) -> None:
    """Raises `Wrong` unless each of the messages below the key `name` has a content and one of the roles."""
    for number, message in enumerate(messages or [None], 1):
        where = f" in message {number} of `{name}`"
        if not isinstance(message, dict):
            raise Wrong(f"no message{where}", "give messages of role and content")
        problems.text(message, "content", where)
        if problems.text(message, "role", where) not in roles:
            raise Wrong(f"role {message['role']!r} is unknown{where}", f"use {', '.join(roles)}")


def _shared(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Length of the longest common prefix that leaves both an answer; a space before the answers belongs to them."""
    # as `extract_prompt` of TRL cuts a preference with implicit prompt (TRL documentation, Dataset formats)
    shortest = min(len(chosen), len(rejected)) - 1
    cut = next((k for k in range(shortest) if chosen[k] != rejected[k]), shortest)
    return cut - (cut > 0 and chosen[cut - 1] == " ")


def statistics(rows: Sequence[Preference]) -> dict[str, Any]:
    """Rows, of each format and split, distinct prompts, repeated rows; mean lengths (characters) and how they differ.

    `longer_chosen` is the share of rows whose chosen answer is the longer one: far from 0.5, length alone tells.
    """
    gaps = [len(row["chosen"]) - len(row["rejected"]) for row in rows]
    made: dict[str, Any] = {"rows": len(rows), "prompts": len({row["prompt"] for row in rows})}
    made |= {"duplicates": len(rows) - len({tuple(row[name] for name in TEXTS) for row in rows})}
    made |= {name: dict(Counter(row[name] for row in rows if name in row)) for name in ("format", "split")}
    made |= {f"{name}_characters": fmean(len(row[name]) for row in rows) for name in TEXTS if rows}
    return made | ({"length_bias": fmean(gaps), "longer_chosen": fmean(gap > 0 for gap in gaps)} if rows else {})


def split(rows: Iterable[Preference], share: float) -> list[Preference]:
    """The rows with `split`: held_out for about `share` of the prompts, train for the others, never both for one."""
    places = ((row, mixing.hashed(1, "prompt", " ".join(row["prompt"].lower().split()))[0]) for row in rows)
    return [row | {"split": "held_out" if place / 2.0**64 < share else "train"} for row, place in places]


def encode(rows: Sequence[Preference], model: Tokenizer, prompt_tokens: int, answer_tokens: int) -> list[Preference]:
    """The rows with prompt_ids, the last `prompt_tokens`, and chosen_ids, rejected_ids, the first `answer_tokens`.

    An answer that is whole ends with `<eos>`. Rows whose answers differ only behind the cut are left out.
    """
    made, ids = [], iter(tokenizer.encode(model, [row[name] for row in rows for name in TEXTS]))
    for row in rows:
        prompt, *answers = next(ids), next(ids), next(ids)
        chosen, rejected = ([*answer, tokenizer.specials(model)["<eos>"]][:answer_tokens] for answer in answers)
        if chosen != rejected:
            made.append(row | {"prompt_ids": prompt[-prompt_tokens:], "chosen_ids": chosen, "rejected_ids": rejected})
    return made
