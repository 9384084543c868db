"""Loading of a model in pipeline stages: this rank's layers alone, spread over the other axes by transformers."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer
from transformers.distributed.utils import TransformersDeviceMesh
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from stackpkg.params import Layout
from stackpkg.training import stages
from stackpkg.training.pipeline import Pipeline


class Staged:
    """Mixed into a model class: `from_pretrained` then builds, spreads and reads this rank's stages alone.

    transformers 5.23 has no training in stages, and refuses FSDP and expert dispatch beside the stages it has for
    inference; its functions for the other axes are used as they are, on a mesh that has stages as well.
    """

    layout = Layout()

    @classmethod
    def prepare_distribute_model(cls, distributed_config, device_map=None):  # type: ignore[no-untyped-def]
        size, kind = cls.layout, "cuda" if torch.cuda.is_available() else "cpu"
        replicas, names = (size.pp, size.replicas), ("pp", "dp_replicate")
        dense = init_device_mesh(kind, (*replicas, size.fsdp, size.tp), mesh_dim_names=(*names, "fsdp", "tp"))
        rest = size.fsdp * size.tp // size.ep
        expert = init_device_mesh(kind, (*replicas, rest, size.ep), mesh_dim_names=(*names, "efsdp", "ep"))
        device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
        return distributed_config, device, TransformersDeviceMesh(dense, expert)

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):  # type: ignore[no-untyped-def]
        group = mesh_manager.get_mesh("pp").get_group()
        pipeline = Pipeline(model, cls.layout, group, distributed_config.fsdp_mixed_precision)
        super().maybe_distribute_model(model, distributed_config, mesh_manager)
        maybe_install_capturing_hooks(model.base_model)  # else on the layers of the first stage to be asked alone
        model._pp_stage = pipeline  # whom transformers asks about weights that are not here
        if isinstance(model, FSDPModule):
            model.set_reshard_after_forward(False)  # gathered once a step, not once a micro-batch
        # accelerate 1.15 would bind a method to the model anew
        model.pipeline, model.listeners, model.forward = pipeline, pipeline.listeners, partial(pipeline.forward)
        return model

    def _expand_parallel_plan(self, plan):  # type: ignore[no-untyped-def]
        named = self.named_modules()
        elsewhere = {name for name, module in named if isinstance(module, PipelineIdentityLayer)}
        found = super()._expand_parallel_plan(plan)
        return {name: style for name, style in found.items() if name not in elsewhere}


def load(folder: Path, layout: Layout, mixed: bool) -> PreTrainedModel:
    """This rank's stages of the model in `folder`, spread as `layout` says; `mixed`: FSDP computes in bf16. Its names
    are those of the whole model. Raises `ValueError` as `stages.check` does.
    """
    config = AutoConfig.from_pretrained(folder)
    stages.check(config, layout)
    whole: Any = AutoModelForCausalLM._model_mapping[type(config)]
    # transformers looks into the file of a class for what it can do
    here = {"layout": layout, "__module__": whole.__module__}
    staged: Any = type(whole.__name__, (Staged, whole), here)
    spread = DistributedConfig(
        fsdp_size=layout.fsdp,
        dp_replicate_size=layout.replicas,
        tp_size=layout.tp,
        ep_size=layout.ep,
        fsdp_mixed_precision=mixed,
    )
    return staged.from_pretrained(folder, dtype=torch.float32, distributed_config=spread)
