"""Mixture of experts: a top-k softmax gate with temperature over SwiGLU experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations import use_experts_implementation

from stackpkg.model.configuration import StackConfig

EACH = 512  # tokens that an expert gets of a part, on average: enough to be busy, few enough to stay in a cache


@use_experts_implementation
class Experts(nn.Module):
    """All experts of a layer as two 3-D weights, so that transformers can swap the kernel: by default `grouped_mm`,
    also the fastest on a CPU (2,048 tokens, 8 experts: 40 ms forward and backward; this loop 49; `batched_mm` 7,000).
    """

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        inner, outer = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * inner, outer))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, outer, inner))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [tokens, hidden], chosen and weights [tokens, k]. An index of `num_experts` is another rank's expert."""
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, slot = torch.where(chosen == expert)
            gate, up = F.linear(x[token], self.gate_up_proj[expert]).chunk(2, -1)
            y = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            out = out.index_add(0, token, y * weights[token, slot, None])
        return out


class Router(nn.Module):
    """`e_score_correction_bias`, named as in DeepSeek-V3, moves the choice and not the weights; `center` is taken from
    the logits, so that what all tokens have in common chooses no expert. Training sets both.
    """

    scoring_func = "softmax"

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.k, self.temperature = config.num_experts_per_tok, config.gate_temperature
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Buffer(torch.zeros(config.num_experts))
        self.center = nn.Buffer(torch.zeros(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits over temperature, fp32 [tokens, experts], and weight and index [tokens, k] of the chosen experts."""
        logits = F.linear(x.float(), self.weight.float()) / self.temperature - self.center
        # choose by l_e + b_e, weigh by softmax(l)_e   (arXiv 2408.15664, eq. 3)
        chosen = (logits + self.e_score_correction_bias).topk(self.k, -1).indices
        weights = logits.softmax(-1).gather(-1, chosen)
        if self.k > 1:  # a lone weight would become the constant 1 and the gate would get no gradient
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(x.dtype), chosen


class MixtureOfExperts(nn.Module):
    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.gate, self.experts = Router(config), Experts(config)
        self.part = EACH * config.num_experts // config.num_experts_per_tok  # tokens

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        _, weights, chosen = self.gate(flat)
        parts = zip(*(t.split(self.part) for t in (flat, chosen, weights)), strict=True)
        return torch.cat([self.experts(*part) for part in parts]).view_as(x)
