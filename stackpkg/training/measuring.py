"""What a step tells of itself: which probes run, what of it the host reads at once, and what the ranks compare.

Of what a row tells the host reads within the step: the gradient norm, before the update, which may have to be skipped;
and, in one copy after it, the loss, the norm of the weights and the series of every alert that a job can see. All else
stays on the device until the block of rows ends, and comes in one copy. Besides, the stock `Trainer` reads loss and
norm for its own log, and the probe of attention replays the cache of keys and values on the host, where it runs.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from stackpkg.data.stream import Stream
from stackpkg.objectives import StepCounts, norms
from stackpkg.params import Params
from stackpkg.telemetry import flops, privacy
from stackpkg.telemetry.guard import Guard
from stackpkg.telemetry.probes import model_statistics
from stackpkg.telemetry.rows import RowWriter
from stackpkg.training.ema import reshard
from stackpkg.training.mesh import Mesh, local
from stackpkg.training.optim import effective_betas
from stackpkg.training.steploss import StepLoss

COMPARED = ("step_seconds", "data_wait_seconds", "memory_mb")  # over ranks, beside each one's part of the gradient norm
COUNTED = {"overflow_count": torch.isinf, "nan_count": torch.isnan}  # numbers of this rank's gradients


class Measuring:
    """The series of a job's rows. `later` are those of the last step that are still on the device."""

    def __init__(
        self, network: PreTrainedModel, p: Params, mesh: Mesh, stream: Stream, loss: StepLoss, rows: RowWriter,
        guard: Guard, events: Path, device: torch.device,
    ) -> None:  # fmt: skip
        self.network, self.p, self.mesh, self.stream, self.loss, self.rows = network, p, mesh, stream, loss, rows
        self.events, self.device, self.meter = events, device, loss.meter
        self.needed = {"loss", "weight_norm"} | {alert.series for alert in guard.alerts}
        self.later: dict[str, Tensor] = {}
        self.carried: dict[str, Tensor] = {}  # what a probe found last; rows between two runs repeat it
        self._parts: list[Tensor] = []  # of the gradient norm, this rank's, of each step of the block
        self._before: dict[str, Any] = {}
        rows.complete = self._complete
        self.parameters = self._active()
        self.peak = p.telemetry.peak_tflops * 1e12 or self._measured_peak()
        self.mark = time.perf_counter()

    def _active(self) -> float:
        count = torch.tensor(flops.active(self.network), device=self.device, dtype=torch.double)
        dist.all_reduce(count, group=self.mesh.pipeline)  # of the other stages
        return float(count)

    def _measured_peak(self) -> float:
        dtype = torch.bfloat16 if self.p.training.precision == "bf16" else torch.float32
        found = flops.peak(self.device, dtype)
        if dist.get_rank() == 0:
            told = f"{found / 1e12:.3g} TFLOP/s a rank, measured by a matmul ({str(dtype).removeprefix('torch.')})"
            print(f"[{self.rows.folder.name}] {told}: what utilisation is a share of", flush=True)
        return found

    # ---- around the update
    def begin(self, step: int) -> None:
        """Before the forward of `step`, from 1."""
        self.meter.step = step

    def gradients(self, gradients: Sequence[Tensor], squares: Tensor, norm: Tensor) -> None:
        """Before the clip, with this rank's part of the squared norm: numbers that are not finite are counted, where
        the norm says that there are any."""
        self._parts.append(squares.sqrt())
        self.counts = {name: torch.zeros((), device=self.device) for name in COUNTED}
        if not math.isfinite(float(norm)):
            for name, test in COUNTED.items():
                self.counts[name] += sum(test(local(each)).sum() for each in gradients)

    def update(self, skipped: bool) -> None:
        """Right before an update: what the weights are, where it is to be seen how far they move."""
        given = [] if skipped else [*self.network.parameters()]
        self._before = self.meter.run("update", lambda: {"weights": [w.detach().clone() for w in given]})

    def _moved(self, weights: Tensor) -> dict[str, Tensor]:
        if not (before := self._before.pop("weights", None)):
            return {}
        with self.meter.time("update"):
            for old, new in zip(before, self.network.parameters(), strict=True):
                old.sub_(new.detach())
            return {"update_ratio": self.mesh.norm(before) / weights}  # |w' - w| / |w'|

    # ---- the row
    def row(
        self, step: int, loss: Tensor, grad_norm: float, learning_rate: float, updates: int, counts: StepCounts,
        context: int, data_wait: float,
    ) -> dict[str, Any]:  # fmt: skip
        """What is known of a step that is done, after `updates` of them were applied; fills `later`."""
        seconds, betas = time.perf_counter() - self.mark, effective_betas(self.p.optimization, updates)
        values = self._terms(loss) | {"weight_norm": self.mesh.norm(self.network.parameters())}
        fresh = self.loss.probed | self._moved(values["weight_norm"]) | self._attention(step)
        self.loss.probed = {}
        self.carried |= {name: value for name, value in fresh.items() if not value.dim()}
        if self.loss.composer.usage is not None and "router_entropy" in fresh:
            fresh["router_usage"] = self.loss.composer.usage  # of all ranks
        drill_down = {name: value for name, value in fresh.items() if value.dim() and not self.mesh.data_rank}
        values |= self.carried | drill_down | self.counts
        names = sorted(self.needed & values.keys())
        told = torch.stack([values.pop(name).double().to(self.device) for name in names]).tolist()
        at_once, self.later = dict(zip(names, told, strict=True)), values
        held = at_once["loss"], grad_norm, at_once["weight_norm"]
        known: dict[str, Any] = {
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "beta1_effective": betas[0],
            "beta2_effective": betas[1],
            "nonfinite": sum(not math.isfinite(value) for value in held),
            "context": context,
            "cursor": self.stream.plan.position(step),
            "data_wait_seconds": data_wait,
            "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        if self.device.type == "cuda":
            known["device_memory_mb"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        return known | self._speed(seconds, counts.rows * context) | at_once

    def _terms(self, loss: Tensor) -> dict[str, Tensor]:
        """Raw terms add up over micro-batches and ranks; the loss was multiplied by the ranks for the mean of FSDP."""
        raw, ranks = self.loss.raw, self.p.layout.data_parallel
        names = sorted(raw[0])
        sums = torch.stack([torch.stack([micro[name] for micro in raw]).sum() for name in names]).double()
        sums = torch.cat([sums, loss.detach().double().reshape(1) / ranks])
        dist.all_reduce(sums, group=self.mesh.data)
        raw.clear()
        found = dict(zip([*names, "loss"], sums, strict=True))
        squares = {name.removeprefix("square_"): found.pop(name) for name in names if name.startswith("square_")}
        return found | {f"gradient_{name}": value for name, value in norms(squares).items()}

    def _attention(self, step: int) -> dict[str, Tensor]:
        """By its cadence, and with each evaluation, as a part of that; on a row that was held out."""

        def measure() -> dict[str, Tensor]:
            held_out = (self.stream.validation(domain, 1)["input_ids"] for domain in self.stream.domains)
            ids = torch.as_tensor(next(ids for ids in held_out if len(ids)), device=self.device)
            found = model_statistics(self.network, ids, self.mesh.tensor)
            reshard(self.network)
            return found

        return self.meter.run("attention", measure, extra=step % self.p.training.epoch_steps == 0)

    def _speed(self, seconds: float, tokens: int) -> dict[str, Any]:
        asked, layout = self.loss.asked, self.p.layout
        each = {context: flops.per_token(self.network, self.parameters, context) for _, context in {*asked}}
        work = sum(rows * context * each[context] for rows, context in asked) * layout.data_parallel
        asked.clear()
        return {
            "tokens_per_second": tokens / seconds,
            # observed FLOP/s over those at peak (PaLM, arXiv 2204.02311, appendix B), of all that the step carried
            "flops_utilisation": work / (seconds * self.peak * layout.processes),
            "flops_peak": "parameter" if self.p.telemetry.peak_tflops else "matmul",
            "step_seconds": seconds,
        }

    # ---- the block
    def _complete(self, rows: list[dict[str, Any]]) -> None:
        """A collective: beside each rank's numbers their mean, the maximum, and the rank that has it; what the probes
        cost; and the budget. A number that is not finite is a maximum."""
        mine = torch.tensor([[row.get(name, math.nan) for name in COMPARED] for row in rows], dtype=torch.double)
        parts = torch.stack(self._parts[-len(rows) :])[:, None] if self._parts else mine.new_zeros(len(rows), 1)
        spent = torch.tensor(self.meter.spent(), dtype=torch.double)
        flat = torch.cat([torch.cat((mine.to(parts.device), parts), 1).flatten(), spent.to(parts.device)])
        told = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
        dist.all_gather(told, flat)
        every = torch.stack(told).cpu()
        self._parts = []
        numbers = every[:, : -len(spent)].unflatten(1, (len(rows), -1))  # [ranks, rows, series]
        worst = numbers.nan_to_num(math.inf, math.inf).argmax(0)
        for k, row in enumerate(rows):
            for n, name in enumerate((*COMPARED, "grad_norm_part")):
                row[f"{name}_mean"] = float(numbers[:, k, n].mean())
                row[f"{name}_max"], row[f"{name}_max_rank"] = float(numbers[worst[k, n], k, n]), int(worst[k, n])
        dearest = every[:, -len(spent) :].nan_to_num(-1.0).amax(0)
        costs = [cost if cost >= 0 else math.nan for cost in dearest.tolist()]
        event = self.meter.settle(costs, [row["step_seconds_max"] for row in rows])
        known = {f"probe_seconds_{name}": cost for name, cost in zip(self.meter.every, costs, strict=True)}
        rows[-1] |= {name: cost for name, cost in known.items() if math.isfinite(cost)}
        rows[-1]["probe_share"] = sum(self.meter.shares.values())
        if event and dist.get_rank() == 0:
            self._tell(event | {"step": rows[-1]["step"], "attempt": rows[-1]["attempt"]})

    def _tell(self, event: dict[str, Any]) -> None:
        privacy.append(self.events, [event])
        cost = f"{event['probe']} takes {event['share']:.2%} of the time, all probes {event['share_of_all']:.2%}"
        limit = f"the budget is {event['budget']:.2%}: every {event['every']} steps, not {event['was']}"
        print(f"[{self.rows.folder.name}] probe {cost}; {limit}", flush=True)

    # ---- checkpoints
    def state_dict(self) -> dict[str, Any]:
        """JSON-able: cadences, costs, and what the rows until the next run of a probe repeat."""
        return {"meter": self.meter.state_dict(), "carried": {name: float(v) for name, v in self.carried.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.meter.load_state_dict(state.get("meter", {}))
        self.carried = {n: torch.tensor(v, device=self.device) for n, v in state.get("carried", {}).items()}
