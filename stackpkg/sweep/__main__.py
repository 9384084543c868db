"""One more worker for a sweep that a run has begun: `python -m stackpkg.sweep outbox/<run>`, on any machine that
shares the folder."""

import sys
from pathlib import Path

from stackpkg.params import validate
from stackpkg.runs import RunFolder, read_json
from stackpkg.sweep.study import run

if __name__ == "__main__":
    folder = RunFolder(Path(sys.argv[1]).name)
    run(validate(read_json(folder.path / "sweep/params.json")), folder)
