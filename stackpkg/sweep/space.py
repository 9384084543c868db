"""What a trial may change, what it runs, and the limits it must keep."""

from __future__ import annotations

from typing import Any

from stackpkg.params import Params, validate

SPACE = {  # name: lowest, highest of a log-uniform draw, as a multiple of the profile's value
    "optimization.learning_rate": (0.3, 3.0),
    "optimization.warmup_steps": (0.5, 2.0),
    "optimization.clip": (0.5, 4.0),
    "objectives.contrastive": (0.25, 4.0),
    "objectives.load_balance": (0.25, 4.0),
    "objectives.gate_entropy": (0.25, 4.0),
    "objectives.long_range": (0.25, 4.0),
    "objectives.regret": (0.25, 4.0),
    "objectives.z_loss": (0.25, 4.0),
    "objectives.conformance": (0.25, 4.0),
    "objectives.preference": (0.25, 4.0),
    "objectives.reading": (0.25, 4.0),
}  # language modelling is the measure of the others


def _value(p: Params, name: str) -> Any:
    section, key = name.split(".")
    return getattr(getattr(p, section), key, 0)


def space(p: Params) -> dict[str, tuple[float, float]]:
    """The part of `SPACE` that the profile uses: no factor switches on what has the value 0."""
    return {name: span for name, span in SPACE.items() if _value(p, name)}


def overlay(p: Params, factors: dict[str, float]) -> dict[str, dict[str, Any]]:
    """The profile's values times `factors`, in three digits, as sections of a profile; without those that stay."""
    made: dict[str, dict[str, Any]] = {}
    for name, factor in factors.items():
        section, key = name.split(".")
        old = _value(p, name)
        new = max(1, round(old * factor)) if isinstance(old, int) else float(f"{old * factor:.3g}")
        if factor != 1 and new != old:
            made.setdefault(section, {})[key] = new
    rate = made.get("optimization", {}).get("learning_rate", p.optimization.learning_rate)
    if rate < p.optimization.floor:
        made["optimization"]["floor"] = rate
    return made


def apply(p: Params, changes: dict[str, dict[str, Any]]) -> Params:
    """The profile with the sections of `changes` laid over it. Raises `ValueError` as `params.validate` does."""
    values = p.model_dump()
    for section, fields in changes.items():
        values[section] = values.get(section, {}) | fields
    return validate(values)


def rung(p: Params) -> int:
    """Steps between two evaluations of a trial: a quarter of its length."""
    return -(-p.sweep.steps // 4)


def variant(p: Params, factors: dict[str, float], seed: int | None = None) -> Params:
    """The profile of one trial: values times factors, one process, `sweep.steps` steps, the warm-up shortened alike.

    Raises `ValueError` when the trial would be longer than the curriculum, or a value leaves its range.
    """
    steps = p.sweep.steps
    if steps > p.max_steps:
        raise ValueError(f"sweep.steps {steps} is above the {p.max_steps} steps of the curriculum; give fewer")
    values = apply(p, overlay(p, factors)).model_dump()
    o = values["optimization"]
    o["warmup_steps"] = min(round(o["warmup_steps"] * steps / p.max_steps), steps // 2)
    values["training"] |= {"epoch_steps": rung(p)}
    values["snapshots"] |= {"every_steps": rung(p)}
    values["layout"] |= {"processes": 1, "nodes": 1, "fsdp": 1, "tp": 1, "ep": 1, "pp": 1}
    values |= {
        "sweep": {"steps": steps},
        "seed": p.seed if seed is None else seed,
    }  # how many run is no property of one
    return validate(values)


def excess(p: Params, report: dict[str, Any]) -> dict[str, float]:
    """By how much an epoch report breaks each limit, at most 0 where it is kept; the worst router layer counts."""
    low, high = p.sweep.entropy_band or p.evaluation.entropy_band
    entropies = [float(layer["entropy"]) for layer in report["router"]]  # strict JSON holds "NaN" as a string
    own = p.sweep.min_precision_at_k
    precision = p.evaluation.min_precision_at_k if own is None else own
    made = {"precision_at_k": precision - float(report["precision_at_k"])}
    if entropies:
        made["router_entropy"] = max(low - min(entropies), max(entropies) - high)
    if "violations" in report:
        made["violations"] = float(report["violations"]) - p.sweep.max_violations
    return {name: value if value == value else float("inf") for name, value in made.items()}
