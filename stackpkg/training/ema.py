"""An exponential moving average of the weights, sharded like the weights, in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from stackpkg.training.mesh import local


def reshard(model: nn.Module) -> None:
    """Give up full weights that a forward without backward left behind: `parameters()` are the shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class ShardedEMA:
    """Polyak and Juditsky 1992; warm-up of the decay as in TensorFlow's `ExponentialMovingAverage`.

    `swa_utils.AveragedModel` deep-copies the module, which FSDP2 refuses (torch 2.13); this keeps a shadow of the local
    shards as DTensors, so that a distributed checkpoint saves and reshards it like the weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.updates = model, decay, 0
        self.shadow = {name: self._like(p, local(p).detach().float().clone()) for name, p in model.named_parameters()}

    @staticmethod
    def _like(parameter: Tensor, shard: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor):
            return shard
        mesh, placements = parameter.device_mesh, parameter.placements
        return DTensor.from_local(
            shard, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )

    @torch.no_grad()
    def update(self) -> None:
        """Once per applied optimiser step."""
        # decay_t = min(decay, (1 + t) / (10 + t));  shadow <- shadow + (1 - decay_t) (weights - shadow)
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        shadows = [local(self.shadow[name]) for name, _ in self.model.named_parameters()]
        weights = [local(p).detach().float() for p in self.model.parameters()]
        torch._foreach_lerp_(shadows, weights, 1 - decay)
        self.updates += 1

    @contextmanager
    @torch.no_grad()
    def swapped(self) -> Iterator[None]:
        """The model runs on the average inside the block, on its own weights after it."""
        reshard(self.model)
        kept = {name: local(p).clone() for name, p in self.model.named_parameters()}
        self._set_weights({name: local(tensor) for name, tensor in self.shadow.items()})
        try:
            yield
        finally:
            self._set_weights(kept)

    @torch.no_grad()
    def load(self, shadow: dict[str, Tensor]) -> None:
        """Take over the shadow of a checkpoint."""
        for name, tensor in self.shadow.items():
            local(tensor).copy_(local(shadow[name]))

    @torch.no_grad()
    def _set_weights(self, shards: dict[str, Tensor]) -> None:
        reshard(self.model)
        for name, parameter in self.model.named_parameters():
            local(parameter).copy_(shards[name])
