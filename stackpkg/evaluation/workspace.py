"""The epochs of a run as a workspace of evidently, for `evidently ui --workspace outbox/<run>/eval/workspace`.

The server of evidently (0.7.23) loads metrics of its own package alone, so here a number is the mean of a column of one
row; the page of an epoch (`evaluation.report`) calls it by its name.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path

from stackpkg.evaluation import epoch, report  # the second before evidently: it says that nothing is to be sent

# isort: split
import pandas as pd
from evidently import Dataset, Report
from evidently.metrics import MeanValue
from evidently.sdk.models import PanelMetric
from evidently.sdk.panels import line_plot_panel
from evidently.ui.workspace import Workspace

from stackpkg.params import Params

PANELS = {
    "Validation loss": "*validation_loss",
    "Validation loss by domain": "validation_loss_*",
    "Calibration error": "*calibration_error",
    "Retrieval": "precision_at_k recall_at_k mrr ndcg_at_10",
    "Long range": "*long_range_accuracy",
    "Violations and forbidden attention": "violations forbidden_*",
    "Router entropy by layer": "router_entropy_*",
}


def _shown(name: str) -> list[str]:
    """Panels that a number is in."""
    return [title for title, patterns in PANELS.items() if any(fnmatchcase(name, one) for one in patterns.split())]


def write(reports: Sequence[Path], p: Params, folder: Path) -> Path:
    """Write the workspace anew in `folder`: a snapshot for each report of an epoch, with the limits of its page, at the
    time it was written, of the numbers that the panels above them show. Returns `folder`."""
    made = folder.with_name(f".{folder.name}")
    shutil.rmtree(made, ignore_errors=True)
    workspace = Workspace.create(str(made))
    project = workspace.create_project(f"Run {p.run}", description="Each epoch of the job train on held-out data")
    before, names = None, dict[str, None]()
    for path in reports:
        read = epoch.read(path)
        numbers = {name: value for name, value in report.flat(read).items() if _shown(name)}
        metrics = [MeanValue(column=name, tests=report.limits(p, name, before)) for name in sorted(numbers)]
        reference = Dataset.from_pandas(pd.DataFrame([before]).reindex(columns=[*numbers])) if before else None
        at = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        found = Report(metrics).run(Dataset.from_pandas(pd.DataFrame([numbers])), reference, timestamp=at)
        workspace.add_run(project.id, found, name=f"epoch {read['epoch']}")
        before, names = numbers, names | dict.fromkeys(numbers)
    for title in PANELS:
        shown = [name for name in names if title in _shown(name)]
        values = [PanelMetric(legend=name, metric="MeanValue", metric_labels={"column": name}) for name in shown]
        if values:
            project.dashboard.add_panel(line_plot_panel(title, values))
    shutil.rmtree(folder, ignore_errors=True)
    return made.rename(folder)
