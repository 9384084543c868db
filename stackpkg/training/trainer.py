"""`Trainer` with what this stack needs and no more: its own sample order and objectives, sharded checkpoints, rows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainingArguments

from stackpkg.data import curriculum
from stackpkg.data.provenance import withdrawals_due
from stackpkg.data.schedule import NEVER
from stackpkg.data.stream import Stream
from stackpkg.evaluation import epoch
from stackpkg.evaluation.metrics import evaluate_epoch
from stackpkg.evaluation.retrieval import Retriever
from stackpkg.objectives import StepCounts
from stackpkg.params import Params
from stackpkg.telemetry import logbook, privacy
from stackpkg.telemetry.guard import Guard
from stackpkg.telemetry.rows import KEY, RowWriter
from stackpkg.training import riders, snapshots, stop, versions
from stackpkg.training.ema import ShardedEMA, reshard
from stackpkg.training.faults import inject, plant, spoilt
from stackpkg.training.loader import RankBatches, StreamDataset, Timed, collate
from stackpkg.training.measuring import Measuring
from stackpkg.training.mesh import Mesh
from stackpkg.training.optim import optimizer
from stackpkg.training.recovery import RUNGS, RollBack, Skips
from stackpkg.training.reporting import Reporting
from stackpkg.training.steploss import StepLoss


class StackTrainer(Reporting):
    """Stock `Trainer` loop; overridden are the loader, the loss, the clip, evaluation and checkpoints."""

    optimizer: Any  # set by Trainer before the first step
    lr_scheduler: Any

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: TrainingArguments,
        p: Params,
        mesh: Mesh,
        stream: Stream,
        folder: Path,
        name: str,
        attempt: int,
        guard: Guard,
        faults: list[dict[str, Any]],
        rung: int,
    ) -> None:
        # Trainer refuses to checkpoint a model sharded at load time (transformers 5.23); this class brings its own way.
        args.save_only_model, rows = True, StreamDataset(stream)
        made = optimizer(p.optimization)
        super().__init__(model, args, train_dataset=rows, eval_dataset=rows, optimizer_cls_and_kwargs=made)
        args.save_only_model = False
        self.network = model  # what Trainer calls `self.model`, with a type
        self.loss_is_scaled_for_ga = True  # the composer divides by the counts of the whole step
        self.p, self.stream, self.folder, self.name, self.attempt, self._rung = p, stream, folder, name, attempt, rung
        self.mesh, self.rank, self.ranks = mesh, dist.get_rank(), p.layout.data_parallel
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=args.bf16):  # as the steps: for DPO
            self.loss = StepLoss(model, stream, p, mesh, Path(str(args.output_dir)), self.args.device)
        self.loss.spoil = lambda total: spoilt(total, self.faults, self._here())
        self.composer = self.loss.composer
        self.ema = ShardedEMA(model, p.optimization.ema_decay)
        self.skips, self.guard, self.faults = Skips(guard.named("TrainGradSpike")), guard, faults
        plant(model, faults, self._here)
        self.retriever = Retriever(stream, p)
        self.rows = RowWriter(folder / "telemetry" / name, p.run, attempt, self.rank, dist.get_world_size())
        self.rows.told = self.tell
        about = model, p, mesh, stream, self.loss, self.rows, guard, folder / "telemetry" / f"{name}.events.jsonl"
        self.measuring = Measuring(*about, self.args.device)
        self._update_skipped, self._row, self._told = False, dict[str, Any](), dict[str, Any]()
        known = stream.manifest_digest, model.config.to_dict(), folder / "artifacts"
        self.saves(versions.describe(p, name, attempt, *known), faults)

    # ---- layout: the mesh is ours, accelerate sees plain processes
    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        found = super()._build_accelerator_args(**kwargs)
        found.pop("parallelism_config", None)  # accelerate 1.15 refuses one on CPU
        return found

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Every rank read the same snapshot. The stock method averages plain gradients over all processes, whatever
        they hold (transformers 5.23)."""

    # ---- data: one shard of every step per data-parallel rank, by arithmetic
    def get_train_dataloader(self) -> DataLoader:
        accumulation = self.p.training.accumulation
        place = accumulation, self.mesh.data_rank, self.ranks
        self.batches = RankBatches(self.stream, self.args.max_steps, *place, self._begin)
        return DataLoader(StreamDataset(self.stream), batch_sampler=self.batches, collate_fn=collate)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        timed = Timed(epoch_iterator)  # alone: what follows in there waits for the other ranks
        batches, count = super().get_batch_samples(timed, num_batches, device)
        self.restore_rng()
        self._data_wait = timed.seconds
        return batches, count

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Units of the whole optimiser step over all ranks: every term is divided by these."""
        self.loss.riders.open = self.retriever.switch.on
        counts = riders.units(batch_samples, self.stream.pad_id, device)
        dist.all_reduce(counts, group=self.mesh.data)
        tokens, answers, rows, *carried = counts.tolist()
        self.counts = StepCounts(tokens, answers, rows, self.ranks, *carried)
        self._sequence = batch_samples[0]["labels"].shape[1]
        self.measuring.begin(self.state.global_step + 1)
        return counts[0]

    # ---- loss
    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        total, outputs = self.loss(model, inputs, self.counts)
        return (total, outputs) if return_outputs else total

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a micro-batch; a pipeline runs all of a step with the last of them."""
        if self.p.layout.pp == 1:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        pipeline: Any = self.network.pipeline
        return pipeline.add(self._prepare_inputs(inputs), self.counts, self.p.training.accumulation)

    # ---- update
    def _here(self) -> dict[str, Any]:
        """What a fault may name."""
        step = self.state.global_step
        cursor = self.stream.plan.position(step)
        return {"step": step + 1, "rank": self.rank, "attempt": self.attempt, "cursor": cursor}

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        for fault in self.faults:
            inject(fault, model, self.optimizer.optimizer, self.saver.settle, self.folder, **self._here())
        self.saver.staged()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        squares = self.mesh.squares(gradients)
        norm = self.mesh.norm(gradients, squares)
        self.measuring.gradients(gradients, squares, norm)
        norm = self.mesh.clip(gradients, self.args.max_grad_norm, norm)
        self._update_skipped = self.skips.check(model, norm)
        self.measuring.update(self._update_skipped)
        # accelerate reports the step as skipped, so Trainer does not advance the schedule either
        self.optimizer._is_overflow = self._update_skipped
        return norm

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, trial: Any, *rest: Any, **more: Any
    ) -> None:
        """Evaluation, row, what the row's alerts ask for, checkpoint, in this order."""
        logged = self.control.should_log and self.state.global_step > self._globalstep_last_logged
        if logged:
            self.composer.after_step(not self._update_skipped, self.mesh.data)
            if not self._update_skipped:
                self.ema.update()
            self._row = self._measure(tr_loss, float(grad_norm), more["learning_rate"])
            due, self.control.should_save = self.control.should_save, False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *rest, **more)
        if logged:
            tr_loss.zero_()  # it was subtracted from itself, which leaves NaN what is NaN (transformers 5.23)
            self._write_row()
            self.control.should_save = due
            self.cadence.agree(self.state, self.control, self.args.device)
            if self.control.should_save:
                self._save_checkpoint(model, trial)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        if self.control.should_training_stop or self.state.global_step == self.args.max_steps:
            self.rows.settle()
        self.measuring.mark = time.perf_counter()

    def _measure(self, loss: Tensor, grad_norm: float, learning_rate: float) -> dict[str, Any]:
        step = self.state.global_step
        about = step - self.skips.total, self.counts, self._sequence, self._data_wait
        row = self.measuring.row(step, loss, grad_norm, learning_rate, *about)
        rung = max(int(self._update_skipped), self._rung)
        row |= self.stream.schedule.places(self.batches.of(step - 1))
        row |= {"update_skipped": int(self._update_skipped), "recovery_rung": rung}
        self.skips.judge(row, step)
        return row

    def _write_row(self) -> None:
        """Once a step, after its evaluation if it has one and before its checkpoint: no saved step lacks its row."""
        row = self._told = self.rows.write(self.state.global_step, self.measuring.later, **self._row)
        self._row = {}
        if self.rank == 0:
            step, alerts = self.state.global_step, self._alerts(row)
            self._act(alerts)
            note = " update skipped" if self._update_skipped else ""
            fired = "".join(f" ! {alert['alert']}" for alert in alerts)
            shown = "loss {loss:8.4f}  norm {grad_norm:7.3f}  rate {learning_rate:.2e}  {tokens_per_second:6.0f} tok/s"
            print(f"[{self.name}] step {step:>4}/{self.args.max_steps}  {shown.format(**row)}{note}{fired}", flush=True)
        if "validation_loss" in row:  # its alert may have switched retrieval off
            self.retriever.agree()

    def _alerts(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """What a row fires, in `alerts.jsonl` and the logbook."""
        step, alerts = row["step"], self.guard.observe(row)
        told = ({"step": step, "attempt": self.attempt, **alert} for alert in alerts)
        privacy.append(self.folder / "telemetry" / f"{self.name}.alerts.jsonl", told)
        if not self.faults:  # a drill's alerts are no incidents
            good = [path.name for path in snapshots.listed(Path(str(self.args.output_dir))).values()]
            logbook.fired(self.folder, self.name, step, self.attempt, alerts, good[-1] if good else "")
        return alerts

    def break_off(self, fault: RollBack, rung: int) -> None:
        """The row of the step in which this attempt broke off, for `rung`. The next attempt tells of it in its first
        row; where none follows, this one does. A fault that was found in a snapshot has no row: that of its step is
        told again."""
        saved = {name: value for name, value in self._saved.items() if name not in (*KEY, "ranks", "time")}
        measured, later = (fault.row, self.measuring.later) if fault.row else (saved | {"nonfinite": 1}, {})
        row = self.rows.write(fault.last, later, **measured | {"update_skipped": 1, "recovery_rung": rung})
        if self.rank == 0 and RUNGS[rung - 1] == "stop":
            self.guard.forget("TrainRolledBack")  # of the rung before
            self._alerts(row)

    def _act(self, alerts: list[dict[str, Any]]) -> None:
        """What an alert asks for; a spike was skipped before its row was written, and the ladder rolls back."""
        home = Path(str(self.args.output_dir))
        for alert in alerts:
            if alert["action"] == "retrieval_off":
                self.retriever.switch.on = False
            if alert["action"] == "snapshot":
                stop.ask_save(home)
            if alert["action"] == "stop":
                stop.request(home, f"{alert['alert']}: {alert['summary']}")
                self.guard.forget(alert["alert"])  # whoever launches the job again is told of the next one too

    # ---- evaluation, each epoch
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        number = -(-self.state.global_step // self.p.training.epoch_steps)
        report = evaluate_epoch(self.network, self.stream, self.p, self.args.device, self.ema.swapped, self.retriever)
        reshard(self.network)
        report |= {"epoch": number, "step": self.state.global_step, "run": self.p.run, "attempt": self.attempt}
        if self.rank == 0:
            epoch.write(self.folder / "eval" / self.name / f"epoch_{number:03d}.json", report)
        if "calibration" in report["guard"]:  # tried: should it be on again, the alert must tell of the next fall
            self.guard.forget("TrainLowPrecisionAtK")
        self._decide(self.batches.next_step, report)
        told = "precision_at_k", "validation_loss", "violations", "forbidden_attention", "reading_loss", "reading_gain"
        self._row |= {name: report[name] for name in told if name in report}
        guard = report["guard"]
        self._row |= {f"rejected_{name}": count for name, count in guard["rejected"].items()}
        self._row |= {"accepted": guard["accepted"], "similarities": guard["similarities"]}
        metrics = {"eval_loss": report["validation_loss"], "eval_precision_at_k": report["precision_at_k"]}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- decisions about the data still to come
    def _begin(self) -> int:
        """The step this attempt begins at. Records whose time may end before a launch must end are withdrawn now."""
        self.saver.sound = self.state.global_step
        self._decide(self.state.global_step, None)
        return self.state.global_step

    def _decide(self, step: int, report: dict[str, Any] | None) -> None:
        """What holds from `step` on, told by rank 0 and on disk before any rank acts on it."""
        schedule, told = self.stream.schedule, list[Any]([[]])
        if self.rank == 0:
            by = int(time.time() + 60 * self.p.layout.timeout_minutes)
            due = withdrawals_due(self.folder / "data", self.p.data, by)
            start = schedule.plan.rows_at(schedule.plan.position(step)).start  # a later date does not hold from here
            new = {record: why for record, why in due.items() if schedule.withdrawn.get(record, NEVER) > start}
            made = curriculum.judge(schedule.plan, step, report, schedule.decisions) if report else []
            made += [{"kind": "withdraw", "step": step, "record_id": record, "why": why} for record, why in new.items()]
            curriculum.record(Path(str(self.args.output_dir)) / "decisions.jsonl", made)
            told = [made]
        dist.broadcast_object_list(told)
        if told[0]:
            schedule.use([*schedule.decisions, *told[0]])
