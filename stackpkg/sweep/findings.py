"""What came of a sweep: every trial, the winner and how sure it is, the Pareto front, thresholds of the guardrails."""

from __future__ import annotations

import difflib
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import yaml
from scipy import stats

from stackpkg.evaluation.construction import over_seeds
from stackpkg.params import Params
from stackpkg.runs import RunFolder, write_text
from stackpkg.sweep.space import apply, overlay
from stackpkg.sweep.study import PROFILE, Part, feasible
from stackpkg.telemetry import guard, rows

CONFIDENCE = 0.95
DEFINING = ("nonfinite", "update_skipped")  # series that say that a run diverged cannot foretell it
QUARTER = 4  # the last part of a run says whether it diverged; what the rest says is how one could have known


def history(folder: RunFolder, job: str) -> pd.DataFrame:
    """Rows of one trial by step; empty when it ended before its first. A step that was not finite in any attempt stays
    so: what the ladder mended is no proof of health."""
    try:
        table = rows.read(folder.path / "telemetry" / job)
    except FileNotFoundError:
        return pd.DataFrame()
    kept = rows.effective(table)
    kept["nonfinite"] = kept["step"].map(table.groupby("step")["nonfinite"].max())
    return kept[kept["rank"] == 0].set_index("step")


def diverged(table: pd.DataFrame) -> bool:
    """A loss or gradient norm was not finite, or the run ended above where it began: by the median of its last quarter,
    or by the last loss on held-out text, which sees the last update too."""
    if table.empty:
        return False
    loss = table["loss_language_modelling"].astype(float)
    ends = [loss.iloc[-max(1, len(loss) // QUARTER) :].median()]
    if "validation_loss" in table:
        ends += table["validation_loss"].dropna().astype(float).tolist()[-1:]
    return bool(table["nonfinite"].any() or max(ends) > loss.iloc[0])


def table(parts: Mapping[str, Part], folder: RunFolder) -> pd.DataFrame:
    """One row per trial that ended by itself, good or bad: `loss` in nats per token, where it finished; `room_*` is
    the distance to each limit, negative where it is broken; the factors by name."""
    found = []
    for name, part in parts.items():
        for trial in part.trials():
            attrs = trial.user_attrs
            arm, rows_of = attrs.get("arm", {}), history(folder, attrs["job"])
            row = {"job": attrs["job"], "part": name, "number": trial.number, "state": trial.state.name}
            row |= {"loss": trial.value if trial.state.name == "COMPLETE" else math.nan, "steps": len(rows_of)}
            row |= {"feasible": feasible(trial), "diverged": diverged(rows_of), "of": arm.get("of", trial.number)}
            row |= {key: attrs.get(key, math.nan) for key in ("router_entropy", "precision_at_k")}
            row |= {f"room_{key}": -value for key, value in trial.constraints.items()}
            row |= {"seed": arm.get("seed", part.p.seed), "hot": arm.get("hot", 1.0), "error": attrs.get("error", "")}
            found.append(row | (arm.get("factors") or trial.params))
    return pd.DataFrame(found)


def pareto(found: pd.DataFrame) -> pd.Series:
    """Which rows no other beats: as small a loss and as much room to every limit, and better in one of them."""
    names = [name for name in found if name.startswith("room_")]
    values = np.column_stack([found["loss"], *(-found[name] for name in names)]).astype(float)
    whole = np.isfinite(values).all(1)
    beaten = [
        any(whole[j] and (values[j] <= row).all() and (values[j] < row).any() for j in range(len(values)))
        for row in values
    ]
    return pd.Series(whole & ~np.array(beaten, dtype=bool), index=found.index)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95% interval (Student's t); of fewer than two values there is none, and both ends are NaN."""
    found = over_seeds(values)
    return found["value"], found["low"], found["high"]


def ranking(found: pd.DataFrame) -> pd.DataFrame:
    """Finalists, best first: loss over the seeds, and what each gains on the profile, paired by seed. A finalist that
    failed or broke a limit with any seed is out, and stands last."""
    final = found[found.part == "final"]
    losses = final.pivot(index="of", columns="seed", values="loss")
    made = pd.DataFrame(index=losses.index)
    made["seeds"], made["in"] = losses.notna().sum(axis=1), final.groupby("of")["feasible"].all()
    made[["loss", "low", "high"]] = [interval(row) for row in losses.to_numpy()]
    gains = losses.loc[PROFILE] - losses
    made[["gain", "gain_low", "gain_high"]] = [interval(row) for row in gains.to_numpy()]
    return made.sort_values(["in", "loss"], ascending=[False, True])


def winner(found: pd.DataFrame, parts: Mapping[str, Part]) -> dict[str, Any]:
    """The rule: the smallest mean validation loss of the finalists that kept every limit with every seed.

    Raises `ValueError` when there is none, with what was seen.
    """
    ranked = ranking(found)
    if not ranked["in"].any():
        rooms = found.loc[found.part == "final", [name for name in found if name.startswith("room_")]].min().to_dict()
        raise ValueError(f"no finalist kept every limit; least room seen {rooms}; widen the sweep or the limits")
    of, best = ranked.index[0], ranked.iloc[0]
    arms = (arm for arm in parts["final"].arms or () if arm["of"] == of)
    return {"trial": int(of), "factors": next(arms)["factors"], "separable": bool(best.gain_low > 0)} | {
        name: float(best[name]) for name in ("loss", "low", "high", "seeds", "gain", "gain_low", "gain_high")
    }


def write_winner(p: Params, folder: RunFolder, won: dict[str, Any]) -> str:
    """`sweep/winner.yaml`, which lies over the profile when a person has agreed, and `sweep/winner.diff` to read first;
    returns the diff. It is empty when the profile itself won."""
    changes = overlay(p, won["factors"])
    sure = "better than the profile" if won["separable"] else "NOT separable from the profile"
    head = "# validation loss {loss:.4f} [{low:.4f}, {high:.4f}], gain on the profile {gain:.4f} ".format(**won)
    head += "[{gain_low:.4f}, {gain_high:.4f}]: {}; 95% intervals of {seeds:.0f} seed(s)\n".format(sure, **won)
    head = head.replace("[nan, nan]", "[no interval]")
    before, after = (
        yaml.safe_dump(q.model_dump(mode="json", include=set(changes)), sort_keys=False).splitlines()
        for q in (p, apply(p, changes))  # raises if it isn't a profile
    )
    diff = head + "\n".join(
        difflib.unified_diff(before, after, "the profile", f"trial {won['trial']}", lineterm="", n=1)
    )
    write_text(folder / "sweep/winner.yaml", head + yaml.safe_dump(changes, sort_keys=False))
    write_text(folder / "sweep/winner.diff", f"{diff}\n")
    return diff


# --- thresholds of the guardrails


def extreme(table: pd.DataFrame, alert: guard.Alert) -> float:
    """How near the run came to setting off `alert`: of the scores that it must hold in a row the quietest, there where
    that is loudest. NaN when there are too few (a window needs its first values)."""
    window, scores = deque[float](maxlen=guard.WINDOW), list[float]()
    for value in table.get(alert.series, pd.Series(dtype=float)).dropna():
        if math.isfinite(value):
            if alert.comparison in ("above", "below") or len(window) >= guard.WARM:
                scores.append(guard.score(alert, value, window))
            window.append(value)
    quiet, loud = (max, min) if alert.comparison == "below" else (min, max)
    held = [quiet(scores[k : k + alert.hold]) for k in range(len(scores) - alert.hold + 1)]
    return loud(held, default=math.nan)


def separate(healthy: Sequence[float], bad: Sequence[float], *, below: bool, among: int = 1) -> dict[str, Any]:
    """The threshold between the scores of healthy and of diverged runs, if any value has them on two sides; `among` as
    many scores that are asked so.

    `low` to `high` is the gap, in which every value separates these runs. `false_alarms` and `misses` are the 95%
    upper bounds of the rates that so few runs allow; with too few the verdict says so. `auc` is the
    chance that a diverged run scores beyond a healthy one.
    """
    sign = -1.0 if below else 1.0
    good, ill = ([sign * x for x in xs if math.isfinite(x)] for xs in (healthy, bad))
    made = {"healthy": len(good), "diverged": len(ill), "auc": math.nan, "threshold": math.nan}
    made |= {"low": math.nan, "high": math.nan, "false_alarms": math.nan, "misses": math.nan}
    if not good or not ill:
        return made | {"verdict": f"not separable: no {'healthy' if ill else 'diverged'} run has this score"}
    # AUC = U / (n m)   (Mann & Whitney 1947)
    auc = float(stats.mannwhitneyu(ill, good).statistic) / (len(ill) * len(good))
    a, b = sorted((sign * max(good), sign * min(ill)))
    if max(good) >= min(ill):
        return made | {"auc": auc, "verdict": "not separable: the scores of both kinds overlap"}
    made |= {
        "auc": auc,
        "low": a,
        "high": b,
        "threshold": min(max(a, math.sqrt(a) * math.sqrt(b)), b) if a > 0 else (a + b) / 2,
    }
    # none in n: p <= 1 - 0.05^(1/n)   (Clopper & Pearson 1934, one-sided)
    made |= {name: 1 - (1 - CONFIDENCE) ** (1 / len(x)) for name, x in (("false_alarms", good), ("misses", ill))}
    # scores that say nothing fall apart so in 1 of C(n + m, m) orders   (Fisher's exact permutation test), and of k of
    # them one does in k times as many   (Bonferroni)
    chance = min(1.0, among / math.comb(len(good) + len(ill), len(ill)))
    too_few = f"too few runs: scores that say nothing part like this with chance {chance:.2f}"
    return made | {"verdict": "separable" if chance <= 1 - CONFIDENCE else too_few}


def thresholds(p: Params, runs: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """For every guardrail watched each step, and for the plain gradient norm: does a value of its score separate the
    runs (name -> rows by step) that diverged from those that did not, and is it the value that we ship? Scored are the
    steps before the last quarter, which says what diverged: so an alert foretells it, or does not."""
    speed = "data_wait_seconds", "tokens_per_second"
    alerts = [a for a in guard.load(p) if (a.per, a.seen) == ("step", "job") and a.series not in (*DEFINING, *speed)]
    spike = next(a for a in alerts if a.series == "grad_norm")
    alerts.append(spike.model_copy(update={"name": "gradient norm", "comparison": "above", "threshold": math.nan}))
    bad = {name: diverged(table) for name, table in runs.items()}
    made = []
    for alert in alerts:
        scores = {name: extreme(table.iloc[: -max(1, len(table) // QUARTER)], alert) for name, table in runs.items()}
        sides = ([score for name, score in scores.items() if bad[name] is side] for side in (False, True))
        found = separate(*sides, below=alert.comparison == "below", among=len(alerts))
        shipped = float(alert.threshold)
        found["shipped"], found["holds"] = shipped, found["low"] <= shipped <= found["high"]
        made.append({"alert": alert.name, "series": alert.series, "comparison": alert.comparison} | found)
    return pd.DataFrame(made).set_index("alert")
