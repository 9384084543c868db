"""Which layout was seen to compute what one process does, for which model; a launch of any other is refused."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from stackpkg import runs
from stackpkg.params import Layout, Params

DENSE, USUAL = ("pp", "replicas", "fsdp", "tp"), Layout().pipeline_schedule
TABLE = Path(__file__).parents[2] / "book" / "support.json"
LIMITS = {"loss": 1e-4, "gradient": 1e-3, "evaluation": 1e-4}  # far above rounding, far below any real error


def name(layout: Layout) -> str:
    """Sizes above 1, as in `pp2 gpipe x fsdp2 x tp2 + ep4`; the schedule of a pipeline is 1f1b unless it says."""
    dense = [f"{axis}{getattr(layout, axis)}" for axis in DENSE if getattr(layout, axis) > 1]
    if layout.pp > 1 and layout.pipeline_schedule != USUAL:
        dense[0] += f" {layout.pipeline_schedule}"
    return " x ".join(dense) + (f" + ep{layout.ep}" if layout.ep > 1 else "") or "one process"


def kinds(layout: Layout) -> frozenset[str]:
    """The ways of spreading that a layout combines; `copies` are experts that lie on more than one rank, and a schedule
    is one of them. Sizes differ between a test and a cluster, what is combined must not.
    """
    found = {axis for axis in (*DENSE, "ep") if getattr(layout, axis) > 1}
    if layout.pp > 1 and layout.pipeline_schedule != USUAL:
        found.add(layout.pipeline_schedule)
    return frozenset(found | {"copies"} if 1 < layout.ep < layout.fsdp * layout.tp else found)


def _sizes(schedule: str = USUAL, replicas: int = 1, **given: int) -> dict[str, Any]:
    sizes = {"fsdp": 1, "tp": 1, "ep": 1, "pp": 1} | given
    processes = sizes["pp"] * replicas * sizes["fsdp"] * sizes["tp"]
    return sizes | {"processes": processes, "pipeline_schedule": schedule}


_TESTED = [
    _sizes(fsdp=2), _sizes(replicas=2), _sizes(tp=2), _sizes(fsdp=2, ep=2), _sizes(tp=2, ep=2),
    _sizes(fsdp=4), _sizes(replicas=2, fsdp=2), _sizes(fsdp=2, tp=2), _sizes(fsdp=4, ep=4), _sizes(fsdp=4, ep=2),
    _sizes(fsdp=2, tp=2, ep=2), _sizes(fsdp=2, tp=2, ep=4), _sizes(replicas=2, fsdp=2, ep=2),
    _sizes(replicas=2, fsdp=2, tp=2), _sizes(replicas=2, fsdp=2, tp=2, ep=4),
    _sizes(pp=2), *(_sizes(kind, pp=2) for kind in ("gpipe", "interleaved", "zero_bubble")),
    _sizes(pp=2, fsdp=2), *(_sizes(kind, pp=2, fsdp=2) for kind in ("gpipe", "interleaved", "zero_bubble")),
    _sizes(replicas=2, pp=2), _sizes(pp=2, tp=2), _sizes(pp=2, fsdp=2, ep=2), _sizes(pp=2, tp=2, ep=2),
    _sizes(pp=2, fsdp=2, tp=2), _sizes(pp=2, fsdp=2, tp=2, ep=4), _sizes(replicas=2, pp=2, fsdp=2),
]  # fmt: skip
LAYOUTS = {name(Layout(**sizes)): sizes for sizes in _TESTED}


def cases(models: Iterable[str], dense: Iterable[str]) -> list[tuple[str, str]]:
    """(layout, model) of the whole matrix: expert parallelism for mixtures only."""
    return [(which, model) for which, sizes in LAYOUTS.items() for model in models
            if sizes["ep"] == 1 or model not in dense]  # fmt: skip


def write(rows: list[dict[str, Any]]) -> None:
    """Put rows into the table, which is of one set of versions: rows of others go."""
    versions = {package: metadata.version(package) for package in ("torch", "transformers", "accelerate")}
    old = runs.read_json(TABLE) if TABLE.exists() else {}
    new = {(row["layout"], row["model"]) for row in rows}
    kept = old["rows"] if old.get("versions") == versions else []
    rows = [*(row for row in kept if (row["layout"], row["model"]) not in new), *rows]
    order = list(LAYOUTS)
    rows = sorted((row for row in rows if row["layout"] in order), key=lambda row: order.index(row["layout"]))
    runs.write_json(TABLE, {"versions": versions, "limits": LIMITS, "rows": rows})


def holds(row: dict[str, Any]) -> bool:
    """Whether a row of the table is within all limits."""
    return "error" not in row and all(row[key] <= limit for key, limit in LIMITS.items())


def architecture(p: Params) -> str:
    """`model_type` of what a profile trains."""
    if not p.model.name_or_path:
        return "stackpkg" if p.model.kind == "stack" else p.model.config["model_type"]
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(p.model.name_or_path).model_type


def check(p: Params) -> None:
    """Raises `ValueError` for a (layout, model) that the table does not hold, with the nearest one that it does, and
    for a model that can't be cut into the pipeline stages asked for.
    """
    if p.layout.processes == 1:
        return
    if p.layout.pp > 1:
        from stackpkg.model.modeling import configure
        from stackpkg.training import stages

        stages.check(configure(p.model), p.layout)
    wanted, model = kinds(p.layout), architecture(p)
    rows = [row for row in runs.read_json(TABLE)["rows"] if holds(row)]
    tested = [(kinds(Layout(**LAYOUTS[row["layout"]])), row) for row in rows]
    if any(found == wanted and row["model"] == model for found, row in tested):
        return
    # nearest: the same model on the fewest other ways of spreading; else the same layout of another model
    _, near = min(tested, key=lambda item: (item[1]["model"] != model, len(item[0] ^ wanted), item[1]["processes"]))
    raise ValueError(
        f"layout {name(p.layout)} was not tested with {model}, or does not compute what one process does; nearest that "
        f"holds: {near['layout']} with {near['model']} ({near['processes']} processes). Change `layout`, or add "
        "the case and run python -m stackpkg.training.parity"
    )
