"""Evidently finds every epoch in the workspace of a run, by itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

from test_report import P, epoch

from stackpkg.evaluation import workspace
from stackpkg.runs import write_json

FIND = """
import json, sys
from evidently.ui.workspace import Workspace
found = Workspace(sys.argv[1])
(project,) = found.list_projects()
told = {}
for run in found.list_runs(project.id):
    model = found.get_run(project.id, run)
    results = {result.display_name: result for result in model.metric_results.values()}
    tests = [test.status.value for result in results.values() for test in result.tests]
    told[model.name] = {"failed": tests.count("FAIL"), "tests": len(tests), "at": model.timestamp.isoformat(),
                        "loss": results["Mean value of 'validation_loss'"].value}
panels = [panel.title for panel in project.dashboard.model().panels]
print(json.dumps({"name": project.name, "runs": told, "panels": panels, "ours": "stackpkg" in sys.modules}))
"""


def test_each_epoch_is_a_snapshot_that_evidently_finds_alone(tmp_path: Path) -> None:
    paths = []
    for number, loss in enumerate((4.0, 3.5, 3.9), start=1):
        paths.append(tmp_path / f"train/epoch_{number:03d}.json")
        write_json(paths[-1], epoch(epoch=number, step=6 * number, validation_loss=loss))
        os.utime(paths[-1], (1.8e9 + number, 1.8e9 + number))
    folder = tmp_path / "workspace"
    assert workspace.write(paths[:2], P, folder) == workspace.write(paths, P, folder) == folder
    done = subprocess.run(
        [sys.executable, "-c", FIND, folder], capture_output=True, text=True, cwd=tmp_path, check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"DO_NOT_TRACK": "1"},
    )  # fmt: skip
    assert not done.returncode, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["name"] == f"Run {P.run}" and not told["ours"]
    assert sorted(told["runs"]) == ["epoch 1", "epoch 2", "epoch 3"], "one for each epoch, none of the earlier write"
    assert [told["runs"][f"epoch {k}"]["failed"] for k in (1, 2, 3)] == [0, 0, 1], "the third is worse by a tenth"
    assert [told["runs"][f"epoch {k}"]["loss"] for k in (1, 2, 3)] == [4.0, 3.5, 3.9]
    assert len({run["at"] for run in told["runs"].values()}) == 3
    assert {"Validation loss", "Router entropy by layer", "Retrieval"} <= set(told["panels"])
    text = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert text and not [part for part in text if str(tmp_path).encode() in part], "a path of this machine"
    assert os.environ["DO_NOT_TRACK"]
