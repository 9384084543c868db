"""What each probe costs, when it runs, and the budget: a job whose probes together cost too much thins the dearest."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

COSTS, STEPS, FEWEST = 8, 64, 2  # blocks with a cost of a probe, and steps, that count at most; blocks before a verdict


class Meter:
    """`every`: optimiser steps between two runs of each probe, 0 for never; `budget`: share of the time of the steps
    that all of them together may take. Seconds are the clock's; on a GPU they are its own, between two events, which
    nobody waits for before the block ends. The first run of a probe in a process, which warms up, does not count.
    """

    def __init__(self, every: Mapping[str, int], budget: float) -> None:
        self.every, self.budget, self.step = dict(every), budget, 0
        self.costs = {name: deque[float](maxlen=COSTS) for name in every}
        self.steps = deque[float](maxlen=STEPS)
        self._warm, self._open = set[str](), dict[tuple[str, int], list[Callable[[], float]]]()

    def due(self, name: str) -> bool:
        """Whether the probe runs in `step`: the first one, and then every n-th."""
        every = self.every.get(name, 0)
        return every > 0 and (self.step - 1) % every == 0

    def run(self, name: str, measure: Callable[[], dict[str, Any]], extra: bool = False) -> dict[str, Any]:
        """What `measure` finds, timed, where the probe is due; nothing elsewhere. `extra` asks for it all the same, as
        an evaluation does, whose time is its own; a probe that is switched off stays off.
        """
        if self.due(name):
            with self.time(name):
                return measure()
        return measure() if extra and self.every.get(name, 0) else {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Adds to what the probe costs in this step."""
        stop = _clock()
        try:
            yield
        finally:
            self._open.setdefault((name, self.step), []).append(stop())

    def spent(self) -> list[float]:
        """Of each probe, seconds of a run, mean over those since it was asked last; NaN for none."""
        found = dict[str, list[float]]()
        for (name, _), parts in self._open.items():
            found.setdefault(name, []).append(sum(part() for part in parts))
        self._open.clear()
        for name in found.keys() - self._warm:
            self._warm.add(name)
            found[name].pop(0)
        return [sum(v) / len(v) if (v := found.get(name)) else math.nan for name in self.every]

    @property
    def shares(self) -> dict[str, float]:
        """Of each probe that was timed often enough, its cost as a share of the time of the steps between its runs."""
        if not self.steps:
            return {}
        known = {name: median(costs) for name, costs in self.costs.items() if len(costs) >= FEWEST and self.every[name]}
        return {name: cost / (self.every[name] * median(self.steps)) for name, cost in known.items()}

    def settle(self, spent: Sequence[float], steps: Sequence[float]) -> dict[str, Any] | None:
        """At the end of a block, on all ranks with the same numbers: what a run of each probe took, and each step.
        Over the budget, the probe that costs most runs half as often from now on; returns the event that tells so.
        """
        self.steps.extend(steps)
        for name, seconds in zip(self.every, spent, strict=True):
            if math.isfinite(seconds):
                self.costs[name].append(seconds)
        shares = self.shares
        if sum(shares.values()) <= self.budget:
            return None
        name = max(shares, key=lambda each: shares[each])
        was, self.every[name] = self.every[name], 2 * self.every[name]
        told = {"event": "thinned", "probe": name, "was": was, "every": 2 * was, "budget": self.budget}
        return told | {"seconds": median(self.costs[name]), "share": shares[name], "share_of_all": sum(shares.values())}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        costs = {name: list(costs) for name, costs in self.costs.items()}
        return {"every": self.every, "costs": costs, "steps": list(self.steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """A probe stays as thin as it was; one that is switched off, or new, is as the parameters say."""
        for name in self.every.keys() & state.get("every", {}):
            self.every[name] = max(self.every[name], state["every"][name]) if self.every[name] else 0
            self.costs[name] = deque(state["costs"][name], maxlen=COSTS)
        self.steps = deque(state.get("steps", []), maxlen=STEPS)


def _clock() -> Callable[[], Callable[[], float]]:
    """Starts; call it to stop, and what that returns for the seconds."""
    if not torch.cuda.is_available():
        began = time.perf_counter()

        def stop() -> Callable[[], float]:
            seconds = time.perf_counter() - began
            return lambda: seconds

        return stop
    start = torch.cuda.Event(enable_timing=True)
    start.record()

    def stamp() -> Callable[[], float]:
        end = torch.cuda.Event(enable_timing=True)
        end.record()

        def seconds() -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1000

        return seconds

    return stamp
