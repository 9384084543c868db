"""`telemetry.report_to`: what a job tells besides its rows, through the callbacks of transformers, which rank 0 alone
heeds."""

from __future__ import annotations

from typing import Any

from stackpkg.telemetry.exporter import numbers
from stackpkg.training.resumable import Resumable


class Reporting(Resumable):
    """`Trainer` that tells its callbacks the numbers of a row, once a step, in place of its own few."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """What `Trainer` says of a step (it has a rate) is remembered alone: the row tells it, and more."""
        if "learning_rate" in logs:
            self.state.log_history.append({**logs, "step": self.state.global_step})
        else:
            super().log(logs, start_time)

    def tell(self, row: dict[str, Any]) -> None:
        """The numbers of a row as `train/<series>`, where a receiver is named."""
        if self.args.report_to:
            told = {name: value for name, value in numbers(row).items() if name not in ("step", "time")}
            self.control = self.callback_handler.on_log(self.args, self.state, self.control, told)
