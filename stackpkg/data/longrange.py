"""Associative-recall tasks whose evidence lies beyond the local window, and the certificate that it does."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import chdtrc

from stackpkg.data import mixing
from stackpkg.data.tokenizer import SPECIALS
from stackpkg.params import Params

KEYS = range(len(SPECIALS), len(SPECIALS) + 64)  # token ids: single bytes, which every vocabulary here has
VALUES = range(KEYS.stop, KEYS.stop + 32)
MARKS = ("<query>", "<key>", "<value>")
PIECE = 4  # tokens: <key> k <value> v, or <query> k <value> v


def window_of(p: Params) -> int:
    """Local window of the model in tokens; without one, a quarter of the shortest context."""
    everything = min(stage.context for stage in p.curriculum) // 4
    return int(p.model.config.get("sliding_window") or (512 if p.model.kind == "stack" else everything))


def generate(p: Params) -> list[dict[str, Any]]:
    """Tasks: keys, their values, and the order they are asked in. One in eight is held out.

    Values are uniform and independent, so what the window shows tells nothing about an answer. Raises `ValueError` when
    a context of the curriculum does not outrun the window.
    """
    window, context = window_of(p), min(stage.context for stage in p.curriculum)
    pairs, tasks = min(8, (context - window) // (4 * PIECE)), []
    if pairs < 1:
        raise ValueError(
            f"context {context} does not outrun the local window {window}: give every curriculum stage "
            f"{window + 4 * PIECE} tokens or more, or the model a smaller sliding_window"
        )
    for number in range(p.auxiliary.long_range_tasks):
        name, split = f"recall-{p.seed}-{number:06d}", "held_out" if number % 8 == 7 else "train"
        keys = mixing.permutation(len(KEYS), name, "keys")[:pairs] + KEYS.start
        values = mixing.hashed(pairs, name, "values") % np.uint64(len(VALUES)) + np.uint64(VALUES.start)
        drawn = {"keys": keys.tolist(), "values": values.tolist(), "asked": mixing.permutation(pairs, name).tolist()}
        tasks.append({"task_id": name, "split": split, "window": window} | drawn)
    return tasks


def row(task: Mapping[str, Any], filler: np.ndarray, specials: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64[L], answers bool[L]): pairs scattered in `filler` [L], over `window` tokens of it, questions.

    `specials` are the tokenizer's, of the manifest.
    """
    query, named, said = (specials[token] for token in MARKS)
    if used := {token: number for token, number in specials.items() if KEYS.start <= number < VALUES.stop}:
        raise ValueError(
            f"the tokenizer has control tokens where tasks draw words, ids {KEYS.start}-{VALUES.stop}: {used}"
        )
    count, ids, answers = len(task["keys"]), filler.astype(np.int64), np.zeros(len(filler), bool)
    slots = (len(ids) - PIECE * count - task["window"]) // PIECE
    if slots < count:
        raise ValueError(
            f"context {len(ids)} cannot hold {count} pairs beyond window {task['window']}: run notebook 13"
        )
    places = PIECE * mixing.permutation(slots, task["task_id"], "slots")[:count]
    for place, key, value in zip(places, task["keys"], task["values"], strict=True):
        ids[place : place + PIECE] = named, key, said, value
    ids[-PIECE * count :] = np.ravel([(query, task["keys"][k], said, task["values"][k]) for k in task["asked"]])
    answers[-PIECE * count :] = np.tile([False, False, False, True], count)
    return ids, answers


def distances(ids: np.ndarray, answers: np.ndarray, specials: Mapping[str, int]) -> np.ndarray:
    """int64[answers], tokens from the nearest evidence of each answer to the token that predicts it, in rows [n, L]."""
    found = []
    for r, place in np.argwhere(answers).tolist():
        seen = np.lib.stride_tricks.sliding_window_view(ids[r, : place - 3], PIECE)
        match = (
            (seen[:, 0] == specials["<key>"]) & (seen[:, 1] == ids[r, place - 2]) & (seen[:, 2] == specials["<value>"])
        )
        found.append(place - PIECE - int(np.flatnonzero(match)[-1]))
    return np.array(found)


def certificate(ids: np.ndarray, answers: np.ndarray, window: int, specials: Mapping[str, int]) -> dict[str, float]:
    """Read rows [n, L] as a sceptic: how far is the evidence of each answer, and what can be guessed without it?

    `share_beyond`: answers whose evidence is over `window` tokens away; `uniform_p`: p-value of uniform answers;
    `copy_accuracy`: of repeating the value last seen in the window, the best rule that has no evidence.
    """
    counts = np.bincount(ids[answers] - VALUES.start, minlength=len(VALUES))
    # chi^2 = sum_v (n_v - n/V)^2 / (n/V) with V - 1 degrees of freedom        (Pearson 1900)
    uniform = float(chdtrc(len(VALUES) - 1, ((counts - counts.mean()) ** 2 / counts.mean()).sum()))
    both = answers[:, PIECE:] & answers[:, :-PIECE]
    copied = float((ids[:, PIECE:] == ids[:, :-PIECE])[both].mean()) if both.any() else 0.0
    far = float((distances(ids, answers, specials) > window).mean())
    return {"share_beyond": far, "uniform_p": uniform, "copy_accuracy": copied, "chance": 1 / len(VALUES)}
