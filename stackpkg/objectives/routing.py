"""What the routers of any mixture of experts of transformers decide, recorded while the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # how many, in the configurations of transformers
BIAS = "e_score_correction_bias"  # the name transformers gives the buffer that moves the choice and not the weight
CENTER = "center"  # the buffer of the reference model that is taken from all logits
STATE = {"bias": BIAS, "center": CENTER}  # what training sets, by its name in a checkpoint


class Routed(NamedTuple):
    """One layer's decisions over the positions of one forward."""

    logits: Tensor  # [positions, experts]
    chosen: Tensor  # int64 [positions, k]
    sigmoid: bool = False  # scores are sigmoid(logits), not their softmax

    def gate(self) -> Tensor:
        """Probabilities [positions, experts], fp32. Sigmoid scores are normalised: DeepSeek-V3, arXiv 2412.19437."""
        if not self.sigmoid:
            return self.logits.float().softmax(-1)
        scores = self.logits.float().sigmoid()
        # s'_i = s_i / sum_j s_j   (eq. 19)
        return scores / scores.sum(-1, keepdim=True)


def routers(model: nn.Module) -> list[nn.Module]:
    """The router of each layer that has one, in order; none for a dense model."""
    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    known = [getattr(module, "_can_record_outputs", None) or {} for module in inner]
    specs = [spec for each in known for spec in _listed(each.get("router_logits"))]
    classes = tuple({spec.target_class if isinstance(spec, OutputRecorder) else spec for spec in specs})
    return [module for module in model.modules() if isinstance(module, classes)]


def _listed(spec: object) -> list:
    return spec if isinstance(spec, list) else [spec] if spec else []


def by_sigmoid(router: nn.Module, config: object) -> bool:
    """Whether a router scores by sigmoid, not softmax: transformers writes that in code; those with a correction bias
    do unless they say."""
    said = getattr(router, "scoring_func", None) or getattr(config, "scoring_func", None)
    kind = said or ("sigmoid" if hasattr(router, BIAS) else "softmax")
    if kind not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring_func {kind!r} of {type(router).__name__}: softmax and sigmoid gates are known here")
    return kind == "sigmoid"


@contextmanager
def record(model: nn.Module) -> Iterator[list[Routed]]:
    """Forwards inside the block add their routing to the list, layer by layer. Works where the model itself does not
    return `router_logits` (DeepSeek-V3). A forward that activation checkpointing repeats later is not seen. A model
    whose layers lie in several processes has `listeners`: it adds the routing of all of them itself.

    Raises `ValueError` for a router that does not return (logits, weights, indices).
    """
    listeners = getattr(model, "listeners", None)
    if listeners is None:
        with watch(model) as here:
            yield here
        return
    found: list[Routed] = []
    listeners.append(found)
    try:
        yield found
    finally:
        listeners.pop()


@contextmanager
def watch(model: nn.Module) -> Iterator[list[Routed]]:
    """`record` of the layers that lie in this process."""
    found: list[Routed] = []

    def hook(module: nn.Module, _: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if not isinstance(output, tuple) or len(output) != 3 or output[2].is_floating_point():
            name = type(module).__name__
            raise ValueError(f"{name} does not return (logits, weights, indices) as the routers of Mixtral do")
        # A view: FSDP2 puts its hooks on what the model returns, and gradients taken up to here must not set them off
        logits = output[0].view_as(output[0]).flatten(0, -2)
        found.append(Routed(logits, output[2].flatten(0, -2), by_sigmoid(module, getattr(model, "config", None))))

    handles = [router.register_forward_hook(hook) for router in routers(model)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def move_biases(modules: Sequence[nn.Module | None], chosen: Tensor, rate: float) -> None:
    """One step of balance without a loss (Wang et al., arXiv 2408.15664). `chosen` [layers, experts]: how often the
    whole step chose each expert. Call it once an optimiser step; None stands for a router of another process. Raises
    `ValueError` where a router has no such bias.
    """
    for module, count in zip(modules, chosen.double(), strict=True):
        if module is None:
            continue
        if not hasattr(module, BIAS):
            name = type(module).__name__
            raise ValueError(f"{name} has no `{BIAS}`: set objectives.bias_rate to 0 and use objectives.load_balance")
        # b_i <- b_i + gamma sign(mean_j c_j - c_i)   (alg. 1); less the mean of the move: a shift of all is no choice
        move = rate * (count.mean() - count).sign()
        getattr(module, BIAS).add_((move - move.mean()).to(getattr(module, BIAS)))


@torch.no_grad()
def move_centers(modules: Sequence[nn.Module | None], mean: Tensor, rate: float) -> None:
    """One step of centred routers. `mean` [layers, experts]: of the logits of the whole step, less the center that they
    had. Call it as `move_biases`. Raises `ValueError` where a router has no center.
    """
    for module, drift in zip(modules, mean, strict=True):
        if module is None:
            continue
        if not hasattr(module, CENTER):
            raise ValueError(f"{type(module).__name__} has no `{CENTER}`: set objectives.center_rate to 0")
        # c <- m c + (1 - m) mean_x l(x), with 1 - m the rate   (DINO: arXiv 2104.14294, eq. 4)
        getattr(module, CENTER).add_((rate * drift).to(getattr(module, CENTER)))
