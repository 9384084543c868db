"""The norm over a group of one; over ranks it is tested by the layouts of test_parity.py."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from stackpkg.params import Layout
from stackpkg.training import mesh
from stackpkg.training.mesh import Mesh

SHAPES = [(512, 300), (7,), (3, 40, 50), (), (0, 4)]


@pytest.fixture(scope="module")
def alone() -> Iterator[Mesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield mesh.build(Layout(processes=1, fsdp=1))
    dist.destroy_process_group()


def gradients(scale: float) -> list[Tensor]:
    torch.manual_seed(5)
    return [scale * torch.randn(shape) for shape in SHAPES]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_norm_is_that_of_double_precision(alone: Mesh, scale: float) -> None:
    tensors = gradients(scale)
    exact = sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5
    assert float(alone.norm(tensors)) == pytest.approx(exact, rel=1e-7, abs=0)
    alone.clip(tensors, 1.0)
    assert float(alone.norm(tensors)) == pytest.approx(min(exact, 1.0), rel=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_one_number_that_is_not_finite_reaches_the_norm(alone: Mesh, poison: float) -> None:
    tensors = gradients(1.0)
    tensors[2][1, 2, 3] = poison
    assert float(alone.norm(tensors)) == pytest.approx(poison, nan_ok=True)
