"""`Trainer` whose checkpoints are written behind the training, complete or not there, and fit any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer

from stackpkg.data import manifest, tokenizer
from stackpkg.data.provenance import passed_over
from stackpkg.data.stream import Stream
from stackpkg.evaluation.retrieval import Retriever
from stackpkg.model.tokenizer import pretrained
from stackpkg.objectives import Composer
from stackpkg.params import Params
from stackpkg.runs import write_json
from stackpkg.telemetry.guard import Guard
from stackpkg.telemetry.rows import RowWriter
from stackpkg.training import checkpoint, stages, versions
from stackpkg.training.ema import ShardedEMA
from stackpkg.training.measuring import Measuring
from stackpkg.training.mesh import Mesh
from stackpkg.training.recovery import Skips
from stackpkg.training.saving import Cadence, Saver


class Resumable(Trainer):
    """What of the trainer is about checkpoints; the state that they hold is the subclass's."""

    optimizer: Any  # set by Trainer before the first step
    lr_scheduler: Any
    network: PreTrainedModel
    p: Params
    mesh: Mesh
    rank: int
    stream: Stream
    composer: Composer
    ema: ShardedEMA
    skips: Skips
    guard: Guard
    retriever: Retriever
    measuring: Measuring
    rows: RowWriter
    _told: dict[str, Any]  # the row of the last step
    _saved: dict[str, Any]  # that of the last snapshot's

    def saves(self, about: dict[str, Any], faults: list[dict[str, Any]]) -> None:
        """Once, before training: what the manifests say, and the drills."""
        self.saver = Saver(Path(str(self.args.output_dir)), self.p.snapshots, about, faults)
        self.cadence = Cadence(self.saver)
        self.add_callback(self.cadence)
        self._drawn: str | None = None
        self._saved = {}

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.saver.partial)  # below it Trainer makes checkpoint-N

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """An ordinary Hugging Face folder with its tokenizer, gathered from the shards; a checkpoint (internal call)
        has a form of its own."""
        if _internal_call:
            return
        if self.p.layout.pp > 1:
            stages.save(self.network, Path(str(output_dir)))
        else:
            self.network.save_pretrained(str(output_dir), is_main_process=self.rank == 0)
        if self.rank == 0:
            guard = self.p.retrieval.model_dump(mode="json") | self.retriever.switch.state_dict()
            write_json(Path(str(output_dir)) / "retriever.json", guard)
            words = pretrained(tokenizer.of_shards(self.stream.corpus.folder))
            words.save_pretrained(str(output_dir))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step, loss = self.state.global_step, self._told.get("validation_loss")
        if self.rank == 0:  # no snapshot is taken from a corpus that changed under the job
            corpus = self.stream.corpus
            manifest.check(corpus.folder, corpus.version, passed_over(corpus.folder), manifest.OPENING // 16)
        self.rows.settle()
        self.saver.wait()
        super()._save_checkpoint(model, trial)
        self._saved = self._told
        self.saver.begin(step, checkpoint.tensors(self.network, self.optimizer.optimizer, self.ema), loss)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The small files; the optimiser goes with the weights."""
        choice = checkpoint.biases(self.composer, self.mesh.pipeline)
        if self.rank == 0:
            checkpoint.write(Path(output_dir), self, choice)

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if folder is None:
            return
        versions.check(Path(folder), self.network.config.to_dict())
        checkpoint.load(Path(folder), self.network, self.optimizer.optimizer, self.ema)
        checkpoint.read(Path(folder), self)
        self.guard.forget("TrainRolledBack")
        # the cadence is the profile's; Trainer takes that of the checkpoint (transformers 5.23)
        self.state.compute_steps(self.args, self.args.max_steps)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Weights come with the moments, in `_load_optimizer_and_scheduler`: one read of one checkpoint."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Not yet: the loader draws a seed after it, and dropout would differ (transformers 5.23)."""
        self._drawn = checkpoint

    def restore_rng(self) -> None:
        """After the first batch."""
        super()._load_rng_state(self._drawn)
        self._drawn = None
