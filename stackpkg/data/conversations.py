"""Conversations with roles and scopes: turns of the run's own text in drawn acts, and chat data of others."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from stackpkg import runs
from stackpkg.data import mixing, preferences, problems, retrieval_sets, tokenizer
from stackpkg.data.corpus import Corpus
from stackpkg.data.problems import Problem, Wrong
from stackpkg.params import Params
from stackpkg.schema import CLASSES, ROLES, Auxiliary

Message = dict[str, Any]  # role, content or ids; what shares a value of a key of `SPANS` shares that span
SPANS = dict(zip(("segment", "tool_call", "scope", "record"), CLASSES[1:], strict=True))
NEEDS = {"tool": "tool_call", "data": "record"}  # without it the rules let no token of this role read even itself
TURN = (8, 24)  # fewest and most tokens of text in a turn that is made here
SECRET = 4  # forbidden tokens planted in a turn
# The secret is known to the operator and to the tool that shares its protected scope; the assistant there leaks it.
GUARDED: list[Message] = [
    {"role": "system", "scope": 0, "secret": True},
    {"role": "tool", "scope": 0, "tool_call": 0},
    {"role": "assistant", "scope": 0, "secret": True},
]
ACTS: list[list[Message]] = [
    [{"role": "user"}, {"role": "assistant"}],
    [{"role": "data", "record": 0, "segment": 0}, {"role": "user", "segment": 0}, {"role": "assistant"}],
    [{"role": "data", "record": 0}, {"role": "data", "record": 1}, {"role": "assistant"}],
    [{"role": "tool", "tool_call": 0}, {"role": "code", "tool_call": 0}, {"role": "user"}],
    GUARDED,
]


def forbidden(model: Tokenizer, characters: str) -> np.ndarray:
    """int64[n], the tokens whose text holds one of `characters`: what may not be said inside a protected scope."""
    texts = model.decode_batch([[token] for token in range(model.get_vocab_size())])
    return np.flatnonzero([not set(characters).isdisjoint(text) for text in texts])


def marks(model: Tokenizer) -> dict[tuple[str, bool], list[int]]:
    """The line before a message of each role, outside and inside a protected scope: only text tells a model of them."""
    kinds = [(role, guarded) for role in ROLES for guarded in (False, True)]
    texts = [f"\n<|{role}{' protected' * guarded}|>\n" for role, guarded in kinds]
    return dict(zip(kinds, tokenizer.encode(model, texts), strict=True))


def lay_out(messages: Iterable[Message], known: Mapping[tuple[str, bool], list[int]], tokens: int) -> dict[str, Any]:
    """`input_ids`, `roles` [L] and `spans` [L, 4] of messages with `ids`, each behind its mark; cut to `tokens`.

    A role is its index in `ROLES`. The columns of `spans` are `CLASSES` but CAUSAL: numbers of segment, tool call,
    protected scope and retrieved record in their order here, -1 for none. A message is a segment unless it says which.
    """
    made: dict[str, Any] = {"input_ids": [], "roles": [], "spans": []}
    numbers: dict[str, dict[Any, int]] = {name: {} for name in SPANS}
    for place, message in enumerate(messages):
        keys = {"segment": ("message", place)} | {name: message[name] for name in SPANS if name in message}
        where = [numbers[name].setdefault(keys[name], len(numbers[name])) if name in keys else -1 for name in SPANS]
        ids = [*known[message["role"], "scope" in message], *message["ids"]]
        made["input_ids"] += ids
        made["roles"] += [ROLES.index(message["role"])] * len(ids)
        made["spans"] += [where] * len(ids)
    return {name: values[:tokens] for name, values in made.items()}


def generate(p: Params, corpus: Corpus, model: Tokenizer) -> list[dict[str, Any]]:
    """`auxiliary.conversations` rows to store, a function of (seed, corpus, sizes); one in eight is held out, and made
    of held-out documents. Each begins with a system prompt and a protected scope that holds a secret.

    Raises `ValueError` when no document is long enough, no token is forbidden or the width cuts the protected scope.
    """
    secrets, known = forbidden(model, p.auxiliary.forbidden), marks(model)
    if not len(secrets):
        raise ValueError(f"auxiliary.forbidden {p.auxiliary.forbidden!r}: no token has such a character; give others")
    long = corpus.tokens > TURN[1]  # the last token is <eos>
    pools = {split: np.flatnonzero(long & (corpus.split == split)) for split in ("train", "validation")}
    if short := [split for split, pool in pools.items() if not len(pool)]:
        raise ValueError(f"no {short[0]} document has over {TURN[1]} tokens: add longer text, run notebook 10 again")
    made = []
    for number in range(p.auxiliary.conversations):
        name, held = f"conversation-{p.seed}-{number:06d}", number % 8 == 7
        messages, used = _talk(name, pools["validation" if held else "train"], corpus, secrets, known, p.auxiliary)
        made.append(
            {"source": name, "licence": "", "split": "held_out" if held else "train"}
            | {"record_ids": list(dict.fromkeys(str(corpus.records[d]) for d in used))}
            | lay_out(messages, known, p.auxiliary.conversation_tokens)
        )
    return made


def _talk(
    name: str,
    pool: np.ndarray,
    corpus: Corpus,
    secrets: np.ndarray,
    known: Mapping[tuple[str, bool], list[int]],
    sizes: Auxiliary,
) -> tuple[list[Message], list[int]]:
    """Messages that fill the width, and the documents they are of: one for each act, of data one for each record."""
    draws = (int(value) for block in count() for value in mixing.hashed(256, name, block))
    secret = [int(secrets[next(draws) % len(secrets)]) for _ in range(SECRET)]
    width, filled, act = sizes.conversation_tokens, 0, 0
    messages: list[Message] = []
    used: list[int] = []
    while filled < width:
        turns = [[{"role": "system"}], GUARDED][act] if act < 2 else ACTS[next(draws) % len(ACTS)]
        own = int(pool[next(draws) % len(pool)])
        for turn in turns:
            d = int(pool[next(draws) % len(pool)]) if "record" in turn else own
            size = TURN[0] + next(draws) % (TURN[1] - TURN[0] + 1)
            ids = corpus.read(d, next(draws) % (int(corpus.tokens[d]) - size), size).tolist()
            if "secret" in turn:
                place = next(draws) % (size + 1)
                ids[place:place] = secret
            messages.append({"role": turn["role"], "ids": ids} | {k: (act, turn[k]) for k in SPANS if k in turn})
            used += [d] if filled < width else []
            filled += len(known[turn["role"], "scope" in turn]) + len(ids)
        act += 1
    if act < 3 and filled > width:
        wrong = f"auxiliary.conversation_tokens {width} cuts the protected scope, of {filled} tokens with what precedes"
        raise ValueError(f"{wrong}: give more")
    return messages, used


def read(path: Path) -> tuple[list[dict[str, Any]], list[Problem]]:
    """(rows, problems) of chat data, {"messages": [{"role", "content", ...}]} on each line of JSONL (.gz, .zst) or in
    rows of Parquet. A message may name its `tool_call`, protected `scope`, retrieved `record` and `segment`; one of a
    tool needs the first, one of data the third.
    """

    def parse(number: int, line: Any) -> dict[str, Any]:
        messages = problems.row(line).get("messages")
        preferences.check_messages(messages if isinstance(messages, list) else [], "messages", ROLES)
        kept = []
        for place, message in enumerate(messages or [], 1):
            found = {key: message[key] for key in SPANS if message.get(key) is not None}
            where = f" in message {place} of `messages`"
            if odd := [key for key, value in found.items() if not isinstance(value, int | str)]:
                raise Wrong(f"`{odd[0]}` is a {type(found[odd[0]]).__name__}{where}", "give a number or a name")
            if (need := NEEDS.get(message["role"])) and need not in found:
                raise Wrong(f"role {message['role']} without `{need}`{where}", f"say which `{need}` it belongs to")
            kept.append({"role": message["role"], "content": message["content"]} | found)
        return problems.origin(f"{path.name}/{number}") | {"messages": kept}

    return problems.sift(path, parse)


def load(sizes: Auxiliary, model: Tokenizer) -> tuple[list[dict[str, Any]], list[Problem]]:
    """The rows of `sizes.conversation_set`, if there is one, as `generate` makes them, and the lines set aside.

    About a tenth of the conversations is held out, one that occurs twice on one side. Raises `ValueError`, with the
    lines to mend first, when over a tenth of the file is wrong.
    """
    if not sizes.conversation_set:
        return [], []
    stated, found = read(path := runs.root() / sizes.conversation_set)
    problems.check(path, len(stated), found)
    keys = [{"prompt": preferences.render(row["messages"])} for row in stated]
    sides = [row["split"] for row in preferences.split(keys, retrieval_sets.HELD_OUT)]
    return [_encoded(row, side, model, sizes) for row, side in zip(stated, sides, strict=True)], found


def _encoded(row: Mapping[str, Any], split: str, model: Tokenizer, sizes: Auxiliary) -> dict[str, Any]:
    texts: Sequence[str] = [message["content"] for message in row["messages"]]
    ids = tokenizer.encode(model, list(texts))
    messages = [message | {"ids": part} for message, part in zip(row["messages"], ids, strict=True)]
    records = [message["record"] for message in row["messages"] if isinstance(message.get("record"), str)]
    about = {"source": row["source"], "licence": row["licence"], "split": split}
    about["record_ids"] = list(dict.fromkeys((row["record_id"], *records)))
    return about | lay_out(messages, marks(model), sizes.conversation_tokens)
