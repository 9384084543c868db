"""Pipeline stages: the micro-batches of an optimiser step through `torch.distributed.pipelining`.

Every rank of a pipeline reads the same rows, so only hidden states travel, and beside them what the objectives need of
every layer: router logits and choices, and attention on forbidden edges. The last stage has all of it and takes the
loss as one process does; the gradients of the routers travel back with those of the hidden states. (Megatron-Core's
`MoEAuxLossAutoScaler` adds a loss in each stage instead, which these objectives, fed by token losses, can't be.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

from stackpkg.model.modeling import StackOutput
from stackpkg.objectives import StepCounts, routing
from stackpkg.objectives.routing import Routed
from stackpkg.params import Layout
from stackpkg.training import stages
from stackpkg.training.stages import layers
from stackpkg.training.steploss import StepLoss

SCHEDULES = {
    "gpipe": "GPipe",  # Huang et al., arXiv 1811.06965
    "1f1b": "1F1B",  # PipeDream-Flush: Narayanan et al., arXiv 2006.09503
    "interleaved": "Interleaved1F1B",  # Narayanan et al., arXiv 2104.04473, sec. 2.2
    "zero_bubble": "InterleavedZeroBubble",  # Qi et al., arXiv 2401.10241
}
RECORDED = ("attention_statistics", "forbidden_mass")  # of each layer, when a request asks for it
HEAD = ("logits_to_keep", "output_hidden_states", "text_ids")  # arguments that the body of a model need not see


class Part(nn.Module):
    """One stage, as the schedule calls it. `parts` are modules of the model, so that it finds their weights."""

    def __init__(self, pipeline: Pipeline, index: int, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts, self.index = nn.ModuleList(parts), index
        self.run = pipeline.micro_batch

    def forward(self, *received: Tensor, micro: Tensor) -> Any:
        return self.run(self.index, received, int(micro))


class Pipeline:
    """This rank's stages of `model`, which it cuts. Its `forward` takes the place of the model's: under `no_grad`, a
    call as of any model of transformers, which every rank of the pipeline must make and which answers all of them.
    """

    def __init__(self, model: PreTrainedModel, layout: Layout, group: dist.ProcessGroup, mixed: bool) -> None:
        self.model, self.layout, self.group = model, layout, group
        self.rank = self.pp_rank = dist.get_rank(group)
        self.listeners: list[list[Routed]] = []
        self.ranges = stages.ranges(len(layers(model)), layout.stages)
        self.last = layout.stages - 1
        self.mine = [stage for stage in range(layout.stages) if self.place(stage) == self.rank]
        self.wire = torch.bfloat16 if mixed and layout.data_parallel > 1 else torch.float32
        self.original, self.config = model.forward, model.config
        self._routers(model)
        routers, whole = routing.routers(model), {*model.state_dict()}
        stages.cut(model, self.mine, self.ranges)
        self.elsewhere = whole - {*model.state_dict()}
        self.memory: Tensor | None = None  # embeddings of the records that the first stage read last
        if 0 in self.mine and stages.reads(model):
            cast(Any, model.base_model).memory_norm.register_forward_hook(self._remember)
        self.identity = identity = PipelineIdentityLayer()
        numbered = list(enumerate(layers(model)))
        self.views = {
            stage: nn.ModuleList([layer if index in self.ranges[stage] else identity for index, layer in numbered])
            for stage in self.mine
        }
        here = {id(module) for module in model.modules()}
        self.routers = [router if id(router) in here else None for router in routers]
        self.loss: StepLoss
        self.schedules: dict[tuple, Any] = {}
        self.batches: list[Mapping[str, Tensor]] = []
        self.asked: list[dict[str, dict[str, Any]]] = []

    def _remember(self, module: nn.Module, given: Any, memory: Tensor) -> None:
        self.memory = memory

    def place(self, stage: int) -> int:
        """The rank of the pipeline that holds a stage: round and round."""
        return stage % self.layout.pp

    def _routers(self, model: PreTrainedModel) -> None:
        """Of the whole model: how many routers lie before each stage's end, and the shape of what one of them says."""
        every = routing.routers(model)
        known = {id(router) for router in every}
        of = [sum(id(module) in known for module in layer.modules()) for layer in layers(model)]
        self.routed = [sum(of[: each.stop]) for each in self.ranges]
        if every:
            first: Any = every[0]
            self.sigmoid = routing.by_sigmoid(first, model.config)
            self.choice = len(first.weight), model.config.num_experts_per_tok

    def find_rank_for_key(self, key: str, *_: Any) -> int | None:
        """For transformers' report of loading: weights of other stages are not missed."""
        return -1 if key in self.elsewhere else None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    # ---- one stage
    def forward(
        self, *, stage: int | None = None, hidden: Tensor | None = None, memory: Tensor | None = None, **request: Any
    ) -> Any:
        """What the model says to a request; with `stage`, only that one's part, from the `hidden` states before it and
        the embedded records.
        """
        return self._relay(request) if stage is None else self._run(stage, hidden, memory, request)

    def _run(self, stage: int, hidden: Tensor | None, memory: Tensor | None, request: Mapping[str, Any]) -> Any:
        base, given = cast(Any, self.model.base_model), dict(request)
        if stage:
            ids, given["inputs_embeds"] = given.pop("input_ids"), hidden
            given |= {"text_ids": ids} if stages.embeds(self.model) else {}
        if memory is not None:
            given["memory_embeds"] = memory
        kept, norm = base.layers, base.norm
        base.layers = self.views[stage]
        try:
            if stage == self.last:
                return self.original(**given)
            base.norm = self.identity
            return base(**{name: value for name, value in given.items() if name not in HEAD})
        finally:
            base.layers, base.norm = kept, norm

    # ---- training
    def add(self, inputs: Mapping[str, Tensor], counts: StepCounts, micro_batches: int) -> Tensor:
        """One micro-batch more. With the last of a step the schedule runs, all gradients are there, and the loss of the
        step comes back, on all ranks; 0 before. Raises `ValueError` where micro-batches of a step differ in shape.
        """
        self.batches.append(inputs)
        if len(self.batches) < micro_batches:
            return torch.zeros((), device=self.device)
        self.counts, self.asked = counts, [self.loss.requests(batch) for batch in self.batches]
        shapes = [tuple((name, *r["input_ids"].shape) for name, r in asked.items()) for asked in self.asked]
        if len(set(shapes)) > 1:
            raise ValueError(f"micro-batches of one step have the shapes {shapes}; a pipeline needs them alike")
        if (key := (micro_batches, *shapes[0])) not in self.schedules:
            self.schedules[key] = self._schedule(micro_batches)
        root = self.model if isinstance(self.model, FSDPModule) else None
        if root is not None:  # gradients are reduced once, below, whatever the order of the micro-batches
            root.set_is_last_backward(False)
            root.set_reshard_after_backward(False)
            root.set_requires_gradient_sync(False)
        order, losses = torch.arange(micro_batches), list[Tensor]()
        given, target = ((order,) if 0 in self.mine else ()), (order if self.last in self.mine else None)
        self.schedules[key].step(*given, micro=order, target=target, losses=losses, return_outputs=False)
        if root is not None:
            PipelineStage.perform_reduce_grad(cast(PipelineStage, SimpleNamespace(submod=root)), 1)
        self.batches, self.asked = [], []
        return self._tell(losses)

    def micro_batch(self, stage: int, received: Sequence[Tensor], micro: int) -> Any:
        """One stage of one micro-batch: the tensors for the next stage, or the loss."""
        asked, answers = self.asked[micro], dict[str, Any]()
        got = dict(zip(self._sent(stage - 1, asked), received, strict=True)) if stage else {}
        sent: dict[tuple[str, str], Tensor] = {}
        for name, request in asked.items():
            with routing.watch(self.model) as routed:
                came = {what: got.get((name, what)) for what in ("hidden", "memory")}
                out = answers[name] = self.model(stage=stage, **came, **request)
            said = {"mass": [layer.float() for layer in out.get("forbidden_mass") or ()]}
            if name == "text":
                said |= {"logits": [r.logits.float() for r in routed], "chosen": [r.chosen for r in routed]}
            for what, of in said.items():
                before = got.get((name, what))
                parts = ([] if before is None else [before]) + ([torch.stack(of)] if of else [])
                if parts:
                    sent[name, what] = torch.cat(parts)
            if stage < self.last:
                sent[name, "hidden"] = out.last_hidden_state.to(self.wire).contiguous()
                if "memory_ids" in request:
                    memory = cast(Tensor, came["memory"] if stage else self.memory).clone()
                    sent[name, "memory"] = memory.to(self.wire).contiguous()
            elif (name, "mass") in sent:
                out.forbidden_mass = tuple(sent[name, "mass"].unbind())
        if stage < self.last:
            return tuple(sent[key] for key in self._sent(stage, asked))
        every = zip(sent["text", "logits"], sent["text", "chosen"], strict=True) if self.routers else ()
        routed = [Routed(logits, chosen, self.sigmoid) for logits, chosen in every]
        return self.loss.value(answers, routed, self.batches[micro], self.counts)

    def _sent(self, after: int, asked: Mapping[str, dict[str, Any]]) -> list[tuple[str, str]]:
        """What leaves a stage for the next, in order."""
        found = []
        for name, request in asked.items():
            found.append((name, "hidden"))
            if name == "text" and self.routed[after]:
                found += [(name, "logits"), (name, "chosen")]
            if "memory_ids" in request:
                found.append((name, "memory"))
            if "output_forbidden_mass" in request:
                found.append((name, "mass"))
        return found

    def _schedule(self, micro_batches: int) -> Any:
        """A schedule for micro-batches of the shapes at hand; told all of them, it need not run the model to see."""
        asked, made = self.asked[0], []

        def empty(after: int) -> tuple[Tensor, ...]:
            found = []
            for name, what in self._sent(after, asked):
                batch, length = asked[name]["input_ids"].shape
                shape: dict[str, tuple[int, ...]] = {
                    "hidden": (batch, length, self.config.hidden_size),
                    "memory": (*asked[name].get("memory_ids", torch.empty(0, 0)).shape, self.config.hidden_size),
                    "mass": (self.ranges[after].stop, batch, length, self.config.num_attention_heads),
                }
                if self.routers:
                    experts, chosen = self.choice
                    shape |= {"logits": (self.routed[after], batch * length, experts)}
                    shape |= {"chosen": (self.routed[after], batch * length, chosen)}
                kind = {"hidden": self.wire, "memory": self.wire, "chosen": torch.int64}.get(what, torch.float32)
                tensor = torch.empty(shape[what], dtype=kind, device="meta")
                found.append(tensor.requires_grad_(what != "chosen"))
            return tuple(found)

        for stage in self.mine:
            parts = stages.modules(self.model, self.ranges[stage], stage == 0, stage == self.last)
            into = empty(stage - 1) if stage else (torch.empty(1, dtype=torch.int64, device="meta"),)
            out = empty(stage) if stage < self.last else (torch.empty((), device="meta").requires_grad_(),)
            part = Part(self, stage, parts)
            about: dict[str, Any] = {"input_args": into, "output_args": out, "group": self.group}
            made.append(PipelineStage(part, stage, self.last + 1, self.device, **about))
        kind = get_schedule_class(SCHEDULES[self.layout.pipeline_schedule])
        several: Any = made if issubclass(kind, PipelineScheduleMulti) else made[0]
        return kind(several, micro_batches, loss_fn=lambda loss, _: loss, scale_grads=False)

    def _tell(self, losses: list[Tensor]) -> Tensor:
        """What the last stage has seen of a step, on all of them: state between steps is the same everywhere."""
        told: list[Any] = [None]
        loss, knows = self.loss, self.last in self.mine
        if knows:
            seen = tree_map_only(Tensor, lambda t: t.detach().cpu(), (losses, loss.raw, loss.probed))
            told = [(*seen, loss.composer.observed)]
        dist.broadcast_object_list(told, group=self.group, group_src=self.place(self.last))
        losses, *seen, observed = told[0]
        if not knows:
            loss.raw, loss.probed = tree_map_only(Tensor, lambda t: t.to(self.device), seen)
            loss.composer.observe(observed, self.device)
        return torch.stack(losses).sum().to(self.device)

    # ---- evaluation
    def _relay(self, request: Mapping[str, Any]) -> StackOutput:
        """One stage after the other, then what each has to say, to all. Raises `ValueError` with gradients on."""
        if torch.is_grad_enabled():
            raise ValueError("a model in pipeline stages is trained by its schedule; call it under torch.no_grad()")
        mine, travels = dict[int, dict[str, Any]](), ["input_ids", *["memory_ids"] * ("memory_ids" in request)]
        carried: list[Tensor] = []  # hidden states, and embedded records where the model reads any
        for stage in self.mine:
            if stage and self.place(stage - 1) != self.rank:
                shapes = [(*request[name].shape, self.config.hidden_size) for name in travels]
                carried = [torch.empty(shape, device=self.device) for shape in shapes]
                for tensor in carried:
                    dist.recv(tensor, group=self.group, group_src=self.place(stage - 1))
            hidden, memory = (*carried, None, None)[:2]
            with routing.watch(self.model) as routed:
                out = self._run(stage, hidden, memory, request)
            mine[stage] = {"routed": routed} | {name: out.get(name) or () for name in RECORDED}
            if stage == self.last:
                mine[stage] |= {"logits": out.logits, "hidden": (out.hidden_states or (None,))[-1]}
                mine[stage] |= {"text": out.get("text_embedding")}
                break
            memory = memory if stage else self.memory
            passed = [out.last_hidden_state, memory][: len(travels)]  # exact, whatever the type it was computed in
            carried = [cast(Tensor, tensor).float().contiguous() for tensor in passed]
            if self.place(stage + 1) != self.rank:
                for tensor in carried:
                    dist.send(tensor, group=self.group, group_dst=self.place(stage + 1))
        told: list[Any] = [None] * self.layout.pp
        dist.all_gather_object(told, tree_map_only(Tensor, lambda t: t.cpu(), mine), group=self.group)
        every = dict(item for found in told for item in found.items())
        every = tree_map_only(Tensor, lambda t: t.to(self.device), every)
        joined = {name: [x for stage in sorted(every) for x in every[stage][name]] for name in ("routed", *RECORDED)}
        for listener in self.listeners:
            listener += joined["routed"]
        end = every[self.last]
        recorded: dict[str, Any] = {name: tuple(joined[name]) or None for name in RECORDED}
        recorded |= {"text_embedding": end["text"]}
        return StackOutput(logits=end["logits"], hidden_states=(end["hidden"],), **recorded)
