"""One mesh for all layouts: which ranks read different rows, which hold parts of one model, and sums over both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from stackpkg.params import Layout


@dataclass(frozen=True)
class Mesh:
    """This rank's groups. `data` are the ranks that read different rows and hold the same part of the model, `tensor`
    those that split its matrices, `pipeline` those that hold the layers one after the other, first to last."""

    layout: Layout
    data: dist.ProcessGroup
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup

    @property
    def data_rank(self) -> int:
        return dist.get_rank(self.data)

    def squares(self, tensors: Iterable[Tensor]) -> Tensor:
        """This rank's part of the squared L2 norm, fp64; in their sum what is held several times counts once."""
        weighed: dict[float, list[Tensor]] = {}
        for tensor in tensors:
            share = parts(tensor) * self.layout.pp / self.layout.processes  # of a square: over the ranks of one stage
            weighed.setdefault(share, []).append(local(tensor).detach())
        device = "cuda" if torch.cuda.is_available() else "cpu"
        squares = torch.zeros((), dtype=torch.double, device=device)
        for share, shards in weighed.items():
            # rows in the type they have, their norms in fp64: 1e-9 from fp64 throughout, at a fifth of the time
            rows = [torch.linalg.vector_norm(shard, dim=-1, dtype=_at_least_fp32(shard)) for shard in shards]
            norms = torch.stack(torch._foreach_norm(rows, 2, dtype=torch.double))
            squares += share * norms.square().sum()
        return squares

    def norm(self, tensors: Iterable[Tensor], squares: Tensor | None = None) -> Tensor:
        """L2 norm, fp64, over all ranks, of `tensors` or of what they gave as `squares`. A collective; all ranks agree,
        and a number that is not finite on any rank reaches all of them.
        """
        total = self.squares(tensors) if squares is None else squares.clone()
        dist.all_reduce(total)
        return total.sqrt()

    def clip(self, gradients: Sequence[Tensor], largest: float, norm: Tensor | None = None) -> Tensor:
        """Scale the gradients in place so that their global norm, `norm` where it is known, is at most `largest`; the
        norm before, fp32."""
        norm = self.norm(gradients) if norm is None else norm
        # g <- g min(1, c / (|g| + 1e-6))   (Pascanu et al. 2013, alg. 1; the constant is torch's)
        scale = (largest / (norm + 1e-6)).clamp(max=1.0).float()
        if gradients:
            torch._foreach_mul_([local(gradient) for gradient in gradients], scale)
        return norm.float()


def build(layout: Layout) -> Mesh:
    """The mesh of the running process group. A collective. Raises `ValueError` where the processes do not match."""
    if dist.get_world_size() != layout.processes:
        raise ValueError(f"layout.processes is {layout.processes}, but {dist.get_world_size()} processes are running")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # the order of transformers' mesh: pp, replicas, fsdp, tp; experts move within it and change no rank's rows
    sizes, names = (layout.pp, layout.data_parallel, layout.tp), ("pp", "data", "tp")
    mesh = init_device_mesh(device, sizes, mesh_dim_names=names)
    return Mesh(layout, *(mesh[name].get_group() for name in ("data", "tp", "pp")))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a plain tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _at_least_fp32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float)


def parts(tensor: Tensor) -> int:
    """In how many different pieces a tensor lies on the ranks of its mesh; 1 when every rank has all of it."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())
