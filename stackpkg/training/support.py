"""Which layout was seen to compute what one process does, for which model; a launch of any other is refused."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackpkg import runs
from stackpkg.params import Layout, Params

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Case = tuple[str, str, str]  # layout, model, precision
REFERENCE = "stackpkg"
DENSE, USUAL = ("pp", "replicas", "fsdp", "tp"), Layout().pipeline_schedule
TABLE = Path(__file__).parents[2] / "book" / "support.json"
# far above rounding, far below any real error; Adam divides a small gradient by its size, and rounding of it too
LIMITS = {
    "fp32": {"loss": 1e-4, "norm": 1e-4, "gradient": 1e-3, "weights": 1e-2, "average": 1e-2, "evaluation": 1e-4},
    # 8 bits round each factor; what is twice or half as large in one parameter is beyond them
    "bf16": {"loss": 2e-3, "norm": 2e-2, "gradient": 0.4, "weights": 0.2, "average": 0.2, "evaluation": 1e-3},
}


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


def cases(models: Iterable[str], dense: Iterable[str]) -> list[Case]:
    """The whole matrix: expert parallelism for mixtures only, bf16 for the reference model only."""
    return [*((which, model, "fp32") for which, sizes in LAYOUTS.items() for model in models
              if sizes["ep"] == 1 or model not in dense),
            *((which, REFERENCE, "bf16") for which in LAYOUTS)]  # fmt: skip


def case(row: dict[str, Any]) -> Case:
    """What a row of the table is of."""
    return row["layout"], row["model"], row["precision"]


def write(rows: list[dict[str, Any]]) -> None:
    """Put rows into the table, which is of one set of versions: rows of others go."""
    versions = {package: metadata.version(package) for package in ("torch", "transformers", "accelerate")}
    old = runs.read_json(TABLE) if TABLE.exists() else {}
    new = {case(row) for row in rows}
    kept = old["rows"] if old.get("versions") == versions else []
    rows = [*(row for row in kept if case(row) not in new), *rows]
    order = list(LAYOUTS)
    rows = sorted((row for row in rows if row["layout"] in order), key=lambda row: order.index(row["layout"]))
    runs.write_json(TABLE, {"versions": versions, "limits": LIMITS, "rows": rows})


def holds(row: dict[str, Any]) -> bool:
    """Whether a row of the table is within all limits, and its resume repeated it."""
    limits = LIMITS[row["precision"]]
    return "error" not in row and row["repeats"] and all(row[key] <= limit for key, limit in limits.items())


def architecture(p: Params) -> str:
    """`model_type` of what a profile trains."""
    from stackpkg.model.modeling import configure

    return configure(p.model).model_type


def _check_experts(config: PreTrainedConfig, layout: Layout) -> None:
    """Raises `ValueError` for experts whose pieces `torch.nn.functional.grouped_mm` does not multiply in bf16: it reads
    rows of 16 bytes ("strides should be multiple of 16 bytes", torch 2.13)."""
    if not any(getattr(config, key, 0) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        return
    key = "moe_intermediate_size" if hasattr(config, "moe_intermediate_size") else "intermediate_size"
    parts = layout.tp if layout.ep == 1 else 1  # expert parallel ranks hold whole experts
    for what, unit in ((key, 8 * parts), ("hidden_size", 8)):
        if (size := getattr(config, what)) % unit:
            raise ValueError(
                f"model.config has {what} {size}: in bf16 experts are multiplied by 8 features at a time, on each of "
                f"{parts} tensor parallel rank(s) that share one; give a multiple of {unit}, or compute in fp32"
            )


def check(p: Params) -> None:
    """Raises `ValueError` for a (layout, model) that the table does not hold, with the nearest one that it does, and
    for a model that can't be cut into the pipeline stages asked for, or whose experts bf16 can't multiply. In bf16 the
    layout has to hold with the reference model as well.
    """
    if p.layout.processes == 1:
        return
    from stackpkg.model.modeling import configure
    from stackpkg.training import stages

    config = configure(p.model)
    if p.layout.pp > 1:
        stages.check(config, p.layout)
    if p.training.precision == "bf16":
        _check_experts(config, p.layout)
    wanted, model = kinds(p.layout), config.model_type
    rows = [row for row in runs.read_json(TABLE)["rows"] if holds(row)]
    tested = [(kinds(Layout(**LAYOUTS[row["layout"]])), row) for row in rows]
    in_bf16 = [found for found, row in tested if row["precision"] == "bf16"]
    exact = p.training.precision == "fp32"
    tested = [(found, row) for found, row in tested if row["precision"] == "fp32" and (exact or found in in_bf16)]
    if any(found == wanted and row["model"] == model for found, row in tested):
        return
    # nearest: the same model on the fewest other ways of spreading; else the same layout of another model
    _, near = min(tested, key=lambda item: (item[1]["model"] != model, len(item[0] ^ wanted), item[1]["processes"]))
    raise ValueError(
        f"layout {name(p.layout)} was not tested with {model} in {p.training.precision}, or does not compute what one "
        f"process does; nearest that holds: {near['layout']} with {near['model']} ({near['processes']} "
        "processes). Change `layout`, or add the case and run python -m stackpkg.training.parity"
    )
