"""The certificate that over 80 % of the signal lies beyond the local window: four legs, each a number with an interval.

Signal is what is learnt: the answers, the only labelled tokens of a long-range row. Beyond means farther than the
receptive field of the whole windowed stack, layers x (window - 1) tokens, not than the window of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stackpkg.data import longrange, mixing
from stackpkg.evaluation import control
from stackpkg.evaluation.construction import Interval, Rows, construction, leakage, no_leak, over_seeds, proportion
from stackpkg.runs import read_json, write_json

SHARE, ACCURACY, SLACK = 0.8, 0.9, 0.05  # the claim; what counts as learnt; how far a control may be above its ceiling
RESAMPLES, HELD_OUT = 2_000, 400


# --- legs 2 to 4: trained models


def one_each(rows: Rows) -> Rows:
    """The same rows with one answer each, of those that were asked, so that answers are independent."""
    kept = np.zeros_like(rows.answers)
    for r, answers in enumerate(rows.answers):
        places = np.flatnonzero(answers)
        kept[r, places[int(mixing.hashed(1, "one", r)[0] % np.uint64(len(places)))]] = True
    return Rows(rows.ids, kept)


@torch.no_grad()
def measured(model: control.StackForCausalLM, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of each answer and whether it is predicted, [answers]."""
    logs, said = control.scores(model, rows)
    return logs.numpy().astype(float), said.numpy() == rows.ids[rows.answers]


def truncated(rows: Rows, reach: int, block: int) -> Rows:
    """Of rows with one answer each, what lies in reach of the token that predicts it, from a whole block on."""
    places = rows.answers.argmax(1)
    starts = np.maximum(0, -(-(places - 1 - reach) // block) * block)
    width = int((places - starts).max()) + 1
    ids = np.zeros((len(places), width), np.int64)
    answers = np.zeros((len(places), width), bool)
    for r, (start, place) in enumerate(zip(starts.tolist(), places.tolist(), strict=True)):
        ids[r, : place + 1 - start] = rows.ids[r, start : place + 1]
        answers[r, place - start] = True
    return Rows(ids, answers)


def share(full: np.ndarray, window: np.ndarray, prior: float) -> Interval:
    """Share of the signal that only a view beyond the window gives, from log-probabilities of the answers [answers].

    `window` is the best of several predictors that see no farther; knowing nothing, `prior`, is one of them, so that a
    model which is lost in a short text gains nothing by it. The interval is a bootstrap over answers (Efron 1979).
    """
    # S_w = sum [log p_full - log p_window]+ / sum [log p_full - log p_prior]+        (after LongPPL, arXiv 2410.23771)
    gained = np.stack([np.maximum(full - np.maximum(window, prior), 0), np.maximum(full - prior, 0)])
    chosen = np.random.default_rng(0).integers(0, len(full), (RESAMPLES, len(full)))
    top, bottom = gained[:, chosen].sum(-1)
    low, high = np.quantile(top / np.maximum(bottom, 1e-12), [0.025, 0.975])
    value = gained[0].sum() / max(gained[1].sum(), 1e-12)
    return {"value": float(value), "low": float(low), "high": float(high), "n": len(full)}


def counterfactual(
    model: control.StackForCausalLM, rows: Rows, reach: int, specials: Mapping[str, int], values: range
) -> dict[str, Interval]:
    """One token replaced by another value, in rows with one answer each. `follows`: of the evidence, the answer is the
    new one; `stays`: of the text in reach, before the question, the answer is the old one.
    """
    n, count = len(rows.ids), np.uint64(len(values) - 1)
    found = np.array(longrange.evidence(*rows, specials, values))
    old = rows.ids[rows.answers]
    other = (old - values.start + 1 + (mixing.hashed(n, "other") % count).astype(np.int64)) % len(values) + values.start
    free = reach - longrange.PIECE + 2
    near = found[:, 1] - reach + (mixing.hashed(n, "near") % np.uint64(free)).astype(np.int64)
    changed = {}
    for name, places in (("follows", found[:, 2]), ("stays", near)):
        ids, each = rows.ids.copy(), np.arange(n)
        ids[each, places] = other
        ids[rows.answers] = other if name == "follows" else old
        changed[name] = proportion(measured(model, Rows(ids, rows.answers))[1])
    return changed


def certify(folder: Path, seeds: Iterable[int], steps: int) -> dict[str, Any]:
    """All legs on fresh rows; models are trained below `folder` where they are not yet. Written to
    `folder/certificate.json`. `holds` tells of each claim whether its interval clears the threshold, for every seed.
    """
    seeds, reach, values = list(seeds), control.REACH, control.VALUES
    runs = control.run(folder, seeds, steps)
    rows = control.draw("held_out", HELD_OUT)
    single, prior = one_each(rows), -math.log(len(values))
    built, leaks = construction(rows, reach, control.NAMED, values), leakage(rows, reach, values)
    distance = longrange.distances(*single, control.NAMED, values)
    trained, right = list[dict[str, Any]](), dict[str, np.ndarray]()
    for seed in seeds:
        full, window = (control.load(folder, kind, seed) for kind in (True, False))
        (far, sees), (local, guesses) = measured(full, single), measured(window, single)
        cut, _ = measured(full, truncated(single, reach, control.MODEL["block_size"]))
        right |= {control.name_of(True, seed): sees, control.name_of(False, seed): guesses}
        error = float(local.std(ddof=1) / math.sqrt(len(local)))
        trained.append({
            "seed": seed, "full": proportion(sees), "control": proportion(guesses),
            "control_loss": {"value": -float(local.mean()), "low": -float(local.mean()) - 4 * error,
                             "high": -float(local.mean()) + 4 * error, "n": len(local)},
            "share": share(far, np.maximum(cut, local), prior),
            **counterfactual(full, single, reach, control.NAMED, values),
        })  # fmt: skip
    holds = {
        "construction": built["beyond"]["low"] > SHARE,
        "no_leak": no_leak(leaks),
        "full_learns": all(t["full"]["low"] >= ACCURACY for t in trained),
        "control_at_ceiling": all(t["control"]["high"] <= built["ceiling"] + SLACK for t in trained),
        "control_above_bayes_loss": all(t["control_loss"]["high"] >= built["bayes_loss"] for t in trained),
        "truncation": all(t["share"]["low"] >= SHARE for t in trained),
        "counterfactual": all(min(t["follows"]["low"], t["stays"]["low"]) >= ACCURACY for t in trained),
    }
    made = {
        "reach": reach, "window": control.MODEL["sliding_window"], "layers": control.MODEL["num_hidden_layers"],
        "context": control.CONTEXT, "kinds": control.KINDS, "seeds": seeds, "steps": steps, "runs": runs,
        "thresholds": {"share": SHARE, "accuracy": ACCURACY, "slack": SLACK},
        "construction": {k: v for k, v in built.items() if k != "distance"}, "leakage": leaks, "trained": trained,
        "gap": over_seeds(t["full"]["value"] - t["control"]["value"] for t in trained),
        "by_distance": {"distance": distance.tolist(), **{name: seen.tolist() for name, seen in right.items()}},
        "cpu_seconds": sum(run["cpu_seconds"] for run in runs), "holds": holds,
    }  # fmt: skip
    return read_json(write_json(folder / "certificate.json", made))
