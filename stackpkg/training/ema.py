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
    """Polyak and Juditsky 1992; warm-up of the decay as in TensorFlow's `ExponentialMovingAverage`, which alone leaves
    the initial weights in (a tenth of the first average); debiased as Adam's moments are, so that none of them stays.

    `swa_utils.AveragedModel` deep-copies the module, which FSDP2 refuses (torch 2.13); this keeps a shadow of the local
    shards as DTensors, so that a distributed checkpoint saves and reshards it like the weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.updates, self.unseen = model, decay, 0, 1.0
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
        self._count()
        # m_t = d_t m_(t-1) + (1 - d_t) w_t, m_0 = 0, debiased: m_t / (1 - prod d)   (Adam, arXiv 1412.6980, sec. 3);
        # the same without m: shadow <- shadow + (1 - d_t) / (1 - prod d) (weights - shadow), and the first is w_1
        rate = (1 - self._decay(self.updates)) / (1 - self.unseen)
        shadows = [local(self.shadow[name]) for name, _ in self.model.named_parameters()]
        weights = [local(p).detach().float() for p in self.model.parameters()]
        torch._foreach_lerp_(shadows, weights, rate)

    def _decay(self, update: int) -> float:
        # d_t = min(decay, t / (9 + t)), t from 1
        return min(self.decay, update / (9 + update))

    def _count(self) -> None:
        self.updates += 1
        self.unseen *= self._decay(self.updates)  # what an average that is not debiased has of the initial weights

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
        """Take over the shadow of a checkpoint; `resume` the number of updates in it."""
        for name, tensor in self.shadow.items():
            local(tensor).copy_(local(shadow[name]))

    def resume(self, updates: int) -> None:
        """Go on after so many updates."""
        self.updates, self.unseen = 0, 1.0
        while self.updates < updates and self.unseen:
            self._count()
        self.updates = updates

    @torch.no_grad()
    def _set_weights(self, shards: dict[str, Tensor]) -> None:
        reshard(self.model)
        for name, parameter in self.model.named_parameters():
            local(parameter).copy_(shards[name])
