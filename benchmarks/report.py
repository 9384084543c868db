"""What a benchmark prints and writes: rows of system, metric, value and unit, under the machine and the versions."""

import json
import os
import platform
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any


def row(system: str, metric: str, value: float, unit: str) -> dict[str, Any]:
    return {"system": system, "metric": metric, "value": float(f"{value:.4g}"), "unit": unit}


def quiet() -> dict[str, str]:
    """The environment for a measured process: one thread, no telemetry, no network."""
    still = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    return os.environ | still | {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def machine(*packages: str) -> dict[str, Any]:
    """Where and with what: processor, cores, load, Python, and the versions of packages."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": date.today().isoformat(),
        "processor": model[0].partition(": ")[2] if model else platform.processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
    }


def write(rows: list[dict[str, Any]], path: Path | None, **about: Any) -> None:
    """Print the rows as a table; with a path, write them there as JSON."""
    head = machine("numpy", "numba", "pyarrow") | about
    print(" ".join(f"{name}={value}" for name, value in head.items()))
    wide = max(len(item["system"]) for item in rows)
    for item in rows:
        print(f"{item['system']:<{wide}}  {item['metric']:<24} {item['value']:>12.4g}  {item['unit']}")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
