"""A model cut into pipeline stages: which layers lie where, and one folder of all of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

from stackpkg.params import Layout
from stackpkg.runs import write_json


def ranges(layers: int, stages: int) -> list[range]:
    """Layers of each stage: as even as can be, the first ones longer, for the head is in the last. Raises `ValueError`
    for more stages than layers.
    """
    if layers < stages:
        raise ValueError(f"{layers} layers can't be cut into {stages} pipeline stages; make layout.pp smaller")
    sizes = [layers // stages + (stage < layers % stages) for stage in range(stages)]
    ends = list(itertools.accumulate(sizes))
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def check(config: PreTrainedConfig, layout: Layout) -> None:
    """Raises `ValueError` for a model that can't be cut as `layout` asks."""
    if getattr(config, "tie_word_embeddings", False):
        raise ValueError(
            "tie_word_embeddings: the first pipeline stage has the embedding and the last one the head, which would "
            "drift apart; set tie_word_embeddings to false in model.config, or layout.pp to 1"
        )
    ranges(config.num_hidden_layers, layout.stages)


def cut(model: PreTrainedModel, mine: list[int], every: list[range]) -> None:
    """Take out of `model`, in place, what no stage in `mine` holds; all names stay as they are."""
    base: Any = model.base_model
    kept = {layer for stage in mine for layer in every[stage]}
    for layer in range(len(base.layers)):
        if layer not in kept:
            base.layers[layer] = PipelineIdentityLayer()
    if 0 not in mine:
        base.embed_tokens = PipelineIdentityLayer()
        if reads(model):
            base.memory_norm = PipelineIdentityLayer()
    if len(every) - 1 not in mine:
        base.norm = PipelineIdentityLayer()
        model.set_output_embeddings(PipelineIdentityLayer())
        if embeds(model):
            cast(Any, model).embedder = PipelineIdentityLayer()


def save(model: PreTrainedModel, folder: Path) -> None:
    """One ordinary folder of transformers, a file of weights for each rank of the pipeline. A collective, after
    which others may still be writing."""
    group = cast(Any, model.pipeline).group
    place, places = dist.get_rank(group), dist.get_world_size(group)
    name = f"model-{place + 1:05d}-of-{places:05d}.safetensors"
    state = model.state_dict()
    writes = dist.get_rank() == _leader(model)
    full = {}
    for key, value in state.items():  # gathered one by one, kept by one rank of the stage
        tensor = value.full_tensor() if isinstance(value, DTensor) else value
        if writes:
            full[key] = tensor.detach().cpu().contiguous()
    told: list[Any] = [None] * places
    if writes:
        full = {key: value.contiguous() for key, value in revert_weight_conversion(model, full).items()}
    sizes = {key: value.numel() * value.element_size() for key, value in full.items()}
    dist.all_gather_object(told, (name, sizes), group=group)
    if writes:  # nobody waits for it here: it may take longer than a collective
        folder.mkdir(parents=True, exist_ok=True)
        save_file(full, folder / name, metadata={"format": "pt"})
    if dist.get_rank() == 0:
        config: Any = model.config
        config.architectures = [type(model).__name__.removeprefix("FSDP")]
        config.dtype = str(model.dtype).split(".")[1]
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        weights = {key: file for file, found in told for key in found}
        total = sum(size for _, found in told for size in found.values())
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weights})


def _leader(model: PreTrainedModel) -> int:
    """The first rank of this rank's place in the pipeline."""
    group = cast(Any, model.pipeline).group
    ranks = dist.get_world_size()
    return dist.get_rank(group) * (ranks // dist.get_world_size(group))


def layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a causal language model, in the place that all of transformers' keep them."""
    return cast(nn.ModuleList, model.base_model.layers)


def reads(model: PreTrainedModel) -> bool:
    """Whether records are embedded in the first stage and travel to the others."""
    return bool(getattr(model.config, "retrieval", False))


def embeds(model: PreTrainedModel) -> bool:
    """Whether the last stage embeds texts by their words."""
    return bool(getattr(model.config, "embedding_size", 0))


def modules(model: PreTrainedModel, held: range, first: bool, last: bool) -> list[nn.Module]:
    """Everything with weights that a stage of the layers `held` runs."""
    base: Any = model.base_model
    embedded = [base.embed_tokens, base.memory_norm] if reads(model) else [base.embed_tokens]
    before = embedded if first else []
    heads = [model.get_output_embeddings(), *([cast(Any, model).embedder] if embeds(model) else [])]
    after = [base.norm, *heads] if last else []
    return [*before, *(base.layers[layer] for layer in held), *after]
