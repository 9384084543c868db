"""Floating-point operations that the model asks for, and those that the machine can do: the ratio is utilisation."""

from __future__ import annotations

import re
import time

import torch
from torch import nn
from transformers import PreTrainedModel

from stackpkg.model import StackConfig
from stackpkg.model.patterns import Cut
from stackpkg.model.summaries import pyramid
from stackpkg.objectives.routing import EXPERTS

SIDE = {"cpu": 512, "cuda": 8192}  # of the matrices that the peak is measured with


def active(model: PreTrainedModel) -> float:
    """Parameters that a token of the layers in this process is multiplied with: of the experts those it is sent to; a
    table of embeddings only where it is the head too."""
    config = model.config
    experts = next((int(count) for name in EXPERTS if (count := getattr(config, name, None))), 1)
    chosen = getattr(config, "num_experts_per_tok", 1) / experts
    sizes = ((name, parameter.numel()) for name, parameter in model.named_parameters())
    total = sum(size * (chosen if re.search(r"\.experts\.", name) else 1.0) for name, size in sizes)
    table = getattr(model.get_input_embeddings(), "weight", None)
    tied = getattr(config, "tie_word_embeddings", False)
    return total if tied or not isinstance(table, nn.Parameter) else total - table.numel()


def keys(model: PreTrainedModel, context: int) -> float:
    """Keys that a query reads, mean over a row of `context` tokens and over layers; the whole row but in the reference
    model, whose linear mode reads its features in their place."""
    config = model.config
    if not isinstance(config, StackConfig):
        return float(context)
    if context > config.linear_from:
        return config.head_dim * (4 if config.feature_map == "favor" else 1)
    token, found = torch.arange(context), []
    for pattern in {config.pattern(layer) for layer in range(config.num_hidden_layers)}:
        cut, half = Cut.of(config, pattern), config.sliding_window // 2
        near = (token // cut.dilation + 1).clamp_max(config.sliding_window)
        if pattern == "block":
            near = token % half + 1 + half * (token >= half)
        span = cut.chunk * cut.dilation
        document = torch.zeros(1, context, dtype=torch.long)
        read = pyramid(config, document, document, -(-context // span), span).read.sum(1)
        found.append(float(near.double().mean() + 1 + read.double().mean()))
    return sum(found) / len(found)


def per_token(model: PreTrainedModel, parameters: float, context: int) -> float:
    """FLOPs of forward and backward for one token of a row of `context`; `parameters` are the `active` ones of all
    layers. What is computed again in the backward does not count, nor reading of retrieved records."""
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * size
    # 6 N + 12 L H Q T   (PaLM, arXiv 2204.02311, appendix B), T the keys that a query reads
    return 6 * parameters + 12 * config.num_hidden_layers * width * keys(model, context)


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one device, by the fastest of a few products of two square matrices. Draws nothing from the generator
    that training draws from."""
    side, fastest = SIDE[device.type], float("inf")
    own = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=own, device=device, dtype=dtype) for _ in range(2))
    for _ in range(4):
        began = time.perf_counter()
        float((a @ b)[0, 0])  # waits for the device
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * side**3 / fastest
