"""`telemetry.report_to`: what a job tells besides its rows, through the callbacks of transformers, which rank 0 alone
heeds."""

from __future__ import annotations

import copy
from typing import Any

from stackpkg.telemetry.exporter import numbers
from stackpkg.training.resumable import Resumable


class Reporting(Resumable):
    """`Trainer` that tells its callbacks the numbers of each row, once, in place of its own few."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """What `Trainer` says of a step (it has a rate) is remembered alone: the row tells it, and more. The last of it
        is enough: all of it would be written with every checkpoint, 15 MB after 100,000 steps."""
        if "learning_rate" in logs:
            self.state.log_history.append({**logs, "step": self.state.global_step})
        else:
            super().log(logs, start_time)
        del self.state.log_history[:-1]

    def tell(self, rows: list[dict[str, Any]]) -> None:
        """The numbers of the rows of a block as `train/<series>`, each at its step, where a receiver is named."""
        for row in rows if self.args.report_to else ():
            then = copy.copy(self.state)
            then.global_step = row["step"]
            told = {name: value for name, value in numbers(row).items() if name not in ("step", "time")}
            self.callback_handler.on_log(self.args, then, copy.copy(self.control), told)
