"""Tasks whose evidence lies beyond what a windowed model can reach: recall, needle, variables, hops over records.

Every kind is made of records `<key> a <value> b` scattered in text, and of questions `<query> <key> a b` at the end of
the row. b is the answer, or the name of the next record of a chain.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from stackpkg.data import mixing
from stackpkg.data.tokenizer import SPECIALS
from stackpkg.params import Params
from stackpkg.schema import Auxiliary

MARKS = ("<query>", "<key>", "<value>")
PIECE = 4  # tokens of a record and of a question
CHAINED = ("variables", "hops")


def symbols(a: Auxiliary) -> tuple[range, range]:
    """Token ids of names and of answers: single bytes, which every vocabulary here has."""
    names = range(len(SPECIALS), len(SPECIALS) + a.long_range_names)
    return names, range(names.stop, names.stop + a.long_range_values)


def contexts(p: Params) -> list[int]:
    """Contexts of the stages that ask for tasks; where none does, that of the last."""
    return [stage.context for stage in p.curriculum if stage.long_range] or [p.curriculum[-1].context]


def reach_of(p: Params) -> int:
    """Tokens back that information can travel in the model without summaries: the receptive field of the whole stack,
    not the window of one layer. A model without a window, or with a layer that has none, is held to a quarter of the
    shortest context.

    Raises `ValueError` when the depth is unknown, or rows are so long that the model reads them without its window.
    """
    config, ours = p.model.config, p.model.kind == "stack"
    window, layers = (
        config.get("sliding_window", 512 if ours else 0),
        config.get("num_hidden_layers", 48 if ours else 0),
    )
    if not ours and (
        config.get("use_sliding_window") is False or set(config.get("layer_types") or ()) - {"sliding_attention"}
    ):
        window = 0
    if not window:
        return min(stage.context for stage in p.curriculum) // 4
    if not layers:
        raise ValueError("model.config has a sliding_window but no num_hidden_layers: give it, the reach depends on it")
    pattern, linear_from = config.get("attention_pattern", "sliding"), config.get("linear_from", 65_536)
    if ours and max(contexts(p)) > linear_from:
        raise ValueError(
            f"a stage with long_range has {max(contexts(p))} tokens, and rows of over linear_from {linear_from} are "
            "read without a window, so that no evidence is beyond reach: give the stage fewer, or raise linear_from"
        )
    if ours and pattern == "block":  # from the end of a block to the start of the one before; then from start to start
        return int(window - 1 + (layers - 1) * (window // 2))
    # R = sum_l (w - 1) d_l: layer l looks w - 1 times d_l tokens back   (Jiang et al. 2023, arXiv 2310.06825, sec. 2)
    dilated = {"dilated": layers, "hybrid": layers // 2}.get(pattern, 0) if ours else 0
    return int((window - 1) * (layers - dilated + dilated * config.get("dilation", 4)))


def draw(kind: str, name: str, count: int, a: Auxiliary) -> dict[str, list[int]]:
    """A task of at most `count` records, a function of its `name`: `subjects` and `objects` of the records in the order
    of the text, the names `asked`, their `answers`; the first `far` records must lie beyond the reach.

    `recall`: every name is asked (MQAR, Zoology, arXiv 2312.04927). `needle`: one is, and the other records may lie
    anywhere, near the question too. `variables`: chains of assignments, v = 7, w = v (RULER, arXiv 2404.06654, variable
    tracking). `hops`: the same in any order, and names that nobody asks lead to the same answers. Answers are uniform
    and independent.
    """
    names, values = symbols(a)
    hops = a.long_range_hops if kind in CHAINED else 1
    chains = count // (hops + (kind == "hops"))
    last = count - chains * (hops - 1) if kind == "hops" else chains  # several records lead to one
    level = np.repeat(np.arange(hops), [chains] * (hops - 1) + [last])
    drawn = mixing.permutation(len(names), name, "names")[: len(level)] + names.start
    answers = mixing.hashed(chains, name, "answers") % np.uint64(len(values)) + np.uint64(values.start)
    before = np.maximum(level - 1, 0) * chains + (np.arange(len(level)) - level * chains) % chains
    told = np.where(level == 0, answers[before % chains].astype(np.int64), drawn[before])
    order = mixing.permutation(len(level), name, "order")
    if kind == "variables":  # assigned before they are used: the places of each chain in order
        order = np.argsort(np.sort(order.reshape(hops, chains), 0).ravel())
    if kind == "needle":
        order = np.arange(len(level))
    asked = mixing.permutation(1 if kind == "needle" else chains, name, "asked")
    return {
        "subjects": drawn[order].tolist(),
        "objects": told[order].tolist(),
        "asked": drawn[(hops - 1) * chains + asked].tolist(),
        "answers": answers[asked].tolist(),
        "far": 1 if kind == "needle" else len(level),
    }


def generate(p: Params) -> list[dict[str, Any]]:
    """Tasks in the mix of kinds of the profile, as rows to store. One in eight is held out. Their `reach`, which the
    evidence lies beyond, is that of the model, or `auxiliary.long_range_distance` where it is more.

    Raises `ValueError` when a context of the curriculum does not outrun the reach, or there are too few names.
    """
    a, field, context = p.auxiliary, reach_of(p), min(contexts(p))
    reach = max(field, a.long_range_distance)
    kinds = {kind: weight for kind, weight in a.long_range_kinds.items() if weight}
    least = a.long_range_hops + ("hops" in kinds) if set(kinds) & set(CHAINED) else 1
    count = min(a.long_range_records, (context - reach) // (2 * PIECE) - 1)
    if count < least:
        what, or_else = f"receptive field {reach} of the windowed model", "the model fewer layers or a smaller window"
        if reach > field:
            what, or_else = f"auxiliary.long_range_distance {reach}", f"a smaller distance (0: the model's, {field})"
        raise ValueError(
            f"context {context} does not outrun the {what} by {least} records: give every stage with long_range "
            f"{reach + 2 * PIECE * (least + 1)} tokens or more, or {or_else}; auxiliary.long_range_records must be as "
            "many too"
        )
    tasks, parts = [], np.array(list(kinds.values()))
    lanes, _ = mixing.interleave(parts / parts.sum(), a.long_range_tasks, p.seed, "kinds")
    for number, lane in enumerate(lanes.tolist()):
        kind, split = list(kinds)[lane], "held_out" if number % 8 == 7 else "train"
        name = f"{kind}-{p.seed}-{number:06d}"
        tasks.append({"task_id": name, "kind": kind, "split": split, "reach": reach} | draw(kind, name, count, a))
    return tasks


def row(task: Mapping[str, Any], filler: np.ndarray, specials: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64[L], answers bool[L]): records scattered in `filler` [L], over `reach` tokens of it, questions.

    `specials` are the tokenizer's, of the manifest.
    """
    query, named, said = (specials[token] for token in MARKS)
    drawn = {*task["subjects"], *task["objects"]}
    if used := {token: number for token, number in specials.items() if number in drawn}:
        raise ValueError(f"the tokenizer has control tokens where tasks draw names and answers: {used}")
    ids, answers, end = filler.astype(np.int64), np.zeros(len(filler), bool), PIECE * len(task["asked"])
    beyond, slots = (len(ids) - end - task["reach"]) // PIECE, (len(ids) - end) // PIECE
    if beyond < task["far"] or slots < len(task["subjects"]):
        raise ValueError(
            f"context {len(ids)} cannot hold {task['far']} records beyond reach {task['reach']}: run notebook 13"
        )
    far = np.sort(mixing.permutation(beyond, task["task_id"], "places")[: task["far"]])
    free = np.setdiff1d(np.arange(slots), far)
    rest = free[mixing.permutation(len(free), task["task_id"], "rest")[: len(task["subjects"]) - len(far)]]
    places = PIECE * np.concatenate((far, rest))
    for place, subject, told in zip(places.tolist(), task["subjects"], task["objects"], strict=True):
        ids[place : place + PIECE] = named, subject, said, told
    ids[-end:] = np.ravel([(query, named, *asked) for asked in zip(task["asked"], task["answers"], strict=True)])
    answers[-end:] = np.tile([False, False, False, True], len(task["asked"]))
    return ids, answers


def evidence(
    ids: np.ndarray, answers: np.ndarray, specials: Mapping[str, int], values: range
) -> list[tuple[int, int, int]]:
    """(row, token that predicts it, nearest token that tells it) of each answer in rows [n, L], found as a reader does,
    from name to name until a record tells one of the `values`.

    Raises `ValueError` when no record does.
    """
    found = []
    for r, place in np.argwhere(answers).tolist():
        seen = np.lib.stride_tricks.sliding_window_view(ids[r, :place], PIECE)
        told = np.flatnonzero((seen[:, 0] == specials["<key>"]) & (seen[:, 2] == specials["<value>"]))
        links = {int(seen[k, 1]): int(k) + PIECE - 1 for k in told}  # a later record of a name is nearer
        name = int(ids[r, place - 1])
        for _ in links:
            at = links.get(name, 0)
            name = int(ids[r, at])
            if not at or name in values:
                break
        if name not in values:
            raise ValueError(f"row {r} asks {int(ids[r, place - 1])} at {place}, and no record tells it: generate anew")
        found.append((r, place - 1, at))
    return found


def distances(ids: np.ndarray, answers: np.ndarray, specials: Mapping[str, int], values: range) -> np.ndarray:
    """int64[answers], tokens from the nearest token that tells each answer to the token that predicts it."""
    return np.array([place - at for _, place, at in evidence(ids, answers, specials, values)])
