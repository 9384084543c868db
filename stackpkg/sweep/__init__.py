"""The automated sweep: Optuna asks, launched jobs answer, a rule written down before picks the winner.

`space` is what a trial may change and must keep, `study` asks and tells, `findings` reads what came of it.
"""

from stackpkg.sweep.findings import history, pareto, ranking, table, thresholds, winner, write_winner
from stackpkg.sweep.space import SPACE, apply, overlay, space, variant
from stackpkg.sweep.study import run

__all__ = [
    "SPACE", "apply", "history", "overlay", "pareto", "ranking", "run", "space", "table", "thresholds", "variant",
    "winner", "write_winner",
]  # fmt: skip
