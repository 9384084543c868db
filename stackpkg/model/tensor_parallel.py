"""What tensor parallelism needs beside the styles of transformers, which plans name."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, _AllReduceBackward
from transformers.distributed.tensor_parallel import TensorParallelLayer


class ReplicatedGradSum(TensorParallelLayer):
    """A replicated parameter that sees only this rank's heads: its gradient is summed over tensor-parallel ranks.

    The style of transformers 5.23 sums the accumulated `.grad` again after every micro-batch, so with accumulation the
    q- and k-norms of Qwen3 learn from a multiple of what they should. Here the gradient is summed on its way in.
    """

    def install_forward(self, module: nn.Module, mesh: object) -> nn.Module:
        original, group = module.forward, mesh.get_group()  # type: ignore[attr-defined]

        def forward(*args: object, **kwargs: object) -> object:
            kept = dict(module._parameters)
            for name, parameter in kept.items():
                if parameter is not None:
                    module._parameters[name] = _AllReduceBackward.apply(parameter, group)
            try:
                return original(*args, **kwargs)
            finally:
                module._parameters.update(kept)

        module.forward = forward
        return module


class Gathered(torch.autograd.Function):
    """The last dimension of all ranks, side by side. All compute the same loss from it, so each takes of its gradient
    what is its own, as transformers' sums after a row-wise projection do."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank, ctx.width = dist.get_rank(group), mine.shape[-1]
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, mine.contiguous(), group=group)
        return torch.cat(every, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].narrow(-1, ctx.rank * ctx.width, ctx.width), None


class AllHeads(TensorParallelLayer):
    """Attention whose last output, the probability on forbidden edges [b, L, heads], is of the heads of all ranks."""

    def transform_output_post_forward(self, module: nn.Module, output: Any, mesh: Any) -> Any:
        *rest, mass = output
        return (*rest, mass if mass is None else Gathered.apply(mass, mesh.get_group()))


ALL_PARALLEL_STYLES.register("replicated_with_grad_allreduce", ReplicatedGradSum())  # type: ignore[arg-type]
ALL_PARALLEL_STYLES.register("all_heads", AllHeads())  # type: ignore[arg-type]
