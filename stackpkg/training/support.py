"""Which layout was seen to compute what one process does, for which model; a launch of any other is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackpkg import runs
from stackpkg.params import Layout, Params

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Case = tuple[str, str, str]  # layout, model, precision
REFERENCE = "stackpkg"
TIED = " tied"  # ends the name of a model whose head is its embedding
PACKAGES = ("torch", "transformers", "accelerate")
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
    """The whole matrix: expert parallelism for mixtures only, no pipeline for tied embeddings, bf16 for the reference
    model only."""
    return [*((which, model, "fp32") for which, sizes in LAYOUTS.items() for model in models
              if (sizes["ep"] == 1 or model not in dense) and (sizes["pp"] == 1 or not model.endswith(TIED))),
            *((which, REFERENCE, "bf16") for which in LAYOUTS)]  # fmt: skip


def case(row: dict[str, Any]) -> Case:
    """What a row of the table is of."""
    return row["layout"], row["model"], row["precision"]


def versions() -> dict[str, str]:
    """What is installed of the packages that a row depends on."""
    return {package: metadata.version(package) for package in PACKAGES}


def changed(measured: dict[str, str]) -> str:
    """Which packages are installed in another version than the table is of, in words; empty where none is. A label such
    as `+cpu` says how torch was built; the version before it is compared."""
    here, labelled = versions(), "{} {}, measured with {}".format
    return "; ".join(
        labelled(package, here[package], measured.get(package, "none"))
        for package in PACKAGES
        if here[package].partition("+")[0] != measured.get(package, "").partition("+")[0]
    )


def write(rows: list[dict[str, Any]]) -> None:
    """Put rows into the table, which is of one set of versions: rows of others go."""
    here = versions()
    old = runs.read_json(TABLE) if TABLE.exists() else {}
    new = {case(row) for row in rows}
    kept = old["rows"] if old.get("versions") == here else []
    rows = [*(row for row in kept if case(row) not in new), *rows]
    order = list(LAYOUTS)
    rows = sorted((row for row in rows if row["layout"] in order), key=lambda row: order.index(row["layout"]))
    runs.write_json(TABLE, {"versions": here, "limits": LIMITS, "rows": rows})


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
    layout has to hold with the reference model as well, with tied embeddings with a model that has them.

    Where the table is of other versions it warns, and does not refuse: the package allows their patch releases, and the
    matrix takes hours to measure again, which a machine that is to train may not have.
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
    wanted, model, table = kinds(p.layout), config.model_type, runs.read_json(TABLE)
    if others := changed(table["versions"]):
        warnings.warn(
            f"the table of layouts is of other versions: {others}. Measure it again: "
            "python -m stackpkg.training.parity",
            stacklevel=2,
        )
    rows = [row for row in table["rows"] if holds(row)]
    tested = [(kinds(Layout(**LAYOUTS[row["layout"]])), row) for row in rows]
    in_bf16 = [found for found, row in tested if row["precision"] == "bf16"]
    exact = p.training.precision == "fp32"
    tested = [(found, row) for found, row in tested if row["precision"] == "fp32" and (exact or found in in_bf16)]
    asked: dict[str, Callable[[str], bool]] = {model: lambda name: name == model}
    if getattr(config, "tie_word_embeddings", False):
        asked["tied embeddings"] = lambda name: name.endswith(TIED)
    for what, meant in asked.items():
        if any(found == wanted and meant(row["model"]) for found, row in tested):
            continue
        # nearest: the same model on the fewest other ways of spreading; else the same layout of another model
        _, near = min(tested, key=lambda at: (not meant(at[1]["model"]), len(at[0] ^ wanted), at[1]["processes"]))
        raise ValueError(
            f"layout {name(p.layout)} was not tested with {what} in {p.training.precision}, or does not compute what "
            f"one process does; nearest that holds: {near['layout']} with {near['model']} ({near['processes']} "
            "processes). Change `layout`, or add the case and run python -m stackpkg.training.parity"
        )
