"""Numbers read off the running model. All of them leave the gradients alone."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stackpkg.model import attention_statistics

OUTLIER_SIGMA = 6.0  # LLM.int8 (arXiv 2208.07339) takes magnitude 6; here six standard deviations of the layer


def normalised_entropy(probabilities: Tensor) -> Tensor:
    """H(p) / log n over the last dimension, in [0, 1]; Shannon 1948. Shape of the rest is kept."""
    choices = probabilities.shape[-1]
    return torch.special.entr(probabilities).sum(-1) / torch.log(torch.tensor(float(choices)))


@torch.no_grad()
def router_statistics(router_logits: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Gate entropy: mean over tokens per layer, then mean and minimum over layers (a mean alone hides one collapsed
    layer); and the largest mean probability any expert has in any layer.
    """
    gates = [logits.detach().float().softmax(-1).reshape(-1, logits.shape[-1]) for logits in router_logits]
    entropy = torch.stack([normalised_entropy(gate).mean() for gate in gates])
    return {
        "router_entropy": entropy.mean(),
        "router_entropy_min": entropy.min(),
        "router_usage_max": torch.stack([gate.mean(0).max() for gate in gates]).max(),
    }


@torch.no_grad()
def model_statistics(model: PreTrainedModel, input_ids: Tensor) -> dict[str, float]:
    """Attention, key/value codec and activations of one forward over `input_ids` [b, L]; every rank must call it.

    Attention and codec series exist for the reference model only.
    """
    found = attention_statistics(model, input_ids)
    outputs = model(input_ids=input_ids, output_hidden_states=True, logits_to_keep=1)
    hidden = outputs.hidden_states[-1].float()
    outliers = (hidden - hidden.mean()).abs() > OUTLIER_SIGMA * hidden.std()
    series = {"activation_outlier_rate": float(outliers.float().mean())}
    if found:
        entropy = found["entropy"]
        series |= {
            "attention_entropy_mean": float(entropy.mean()),
            "attention_entropy_std": float(entropy.std()),
            "attention_entropy_median": float(entropy.median()),
            "masked_edge_share": float(found["masked_edge_share"].max()),
            "kv_ratio": float(found["kv_ratio"].mean()),
            "kv_error": float(found["kv_error"].max()),
            "kv_hit_rate": float(found["kv_hit_rate"].nanmean()),
            "kv_evictions": float(found["kv_evictions"].sum()),
        }
    return series
