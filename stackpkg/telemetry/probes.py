"""Numbers read off the running model. All of them leave the gradients alone, and stay on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from stackpkg.model import StackForCausalLM
from stackpkg.model.modeling import by_layer
from stackpkg.model.tensor_parallel import Gathered
from stackpkg.objectives import Pairs, bandit
from stackpkg.objectives.routing import Routed

OUTLIER_SIGMA = 6.0  # LLM.int8 (arXiv 2208.07339) takes magnitude 6; here six standard deviations of the layer
BINS = 40  # of the histogram of cosines, from -1 to 1


def normalised_entropy(probabilities: Tensor) -> Tensor:
    """H(p) / log n over the last dimension, in [0, 1]; Shannon 1948. Shape of the rest is kept."""
    choices = probabilities.shape[-1]
    return torch.special.entr(probabilities).sum(-1) / torch.log(torch.tensor(float(choices)))


@torch.no_grad()
def router_statistics(routed: Sequence[Routed], estimates: Tensor | None = None) -> dict[str, Tensor]:
    """Of the layers that have a choice: `router_entropy`, mean over tokens per layer, then mean and minimum over layers
    (a mean alone hides one collapsed layer); the largest and smallest mean probability any expert has in any layer.
    With the rewards that the experts are believed to pay, `estimates` [layers, experts], the expected regret of a
    token's gate, mean and maximum over layers. `..._layers` are the values of each layer.
    """
    gates = [layer.gate().detach() for layer in routed if layer.logits.shape[-1] > 1]
    if not gates:
        return {}
    gates = [gate.reshape(-1, gate.shape[-1]) for gate in gates]
    entropy = torch.stack([normalised_entropy(gate).mean() for gate in gates])
    usage = torch.stack([gate.mean(0) for gate in gates])
    found = {"router_entropy": entropy.mean(), "router_entropy_min": entropy.min(), "router_entropy_layers": entropy}
    found |= {"router_usage_max": usage.max(), "router_usage_min": usage.min()}
    if estimates is not None:
        each = zip(gates, estimates, strict=True)
        regret = torch.stack([bandit.regret(gate, paid) / len(gate) for gate, paid in each])
        found |= {"router_regret": regret.mean(), "router_regret_max": regret.max(), "router_regret_layers": regret}
    return found


@torch.no_grad()
def retrieval_statistics(pairs: Pairs) -> dict[str, Tensor]:
    """Of the labelled pairs of a micro-batch: the share of queries whose nearest document, of all in the batch and the
    hard negatives, is theirs; the mean cosine with their document and with all others; and the histogram of both,
    [2, BINS] shares.
    """
    documents = torch.cat((pairs.positive, pairs.negatives.flatten(0, 1))).detach().float()
    cosine = pairs.query.detach().float() @ documents.T
    mine = F.pad(pairs.key[:, None] == pairs.key, (0, documents.shape[0] - len(pairs.key)))
    nearest = mine.gather(1, cosine.argmax(1, keepdim=True))
    right, wrong = cosine[mine], cosine[~mine]
    counts = torch.stack([part.histc(BINS, -1, 1) / max(1, part.numel()) for part in (right, wrong)])
    return {
        "batch_precision_at_1": nearest.float().mean(),
        "similarity_positive": right.mean(),
        "similarity_negative": wrong.mean(),
        "similarity_histogram": counts,
    }


def _of_all_heads(mine: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """What a layer [layers] or its heads [layers, heads] told, of every rank of a group one after the other in the last
    dimension: [layers, values]."""
    mine = mine.reshape(len(mine), -1)
    return mine if group is None or dist.get_world_size(group) == 1 else Gathered.apply(mine, group)


@torch.no_grad()
def model_statistics(
    model: PreTrainedModel, input_ids: Tensor, tensor: dist.ProcessGroup | None = None
) -> dict[str, Tensor]:
    """Attention, key/value codec and activations of one forward over `input_ids` [b, L]; every rank must call it.

    Attention and codec series exist for the reference model only; `attention_entropy_heads` is [layers, heads], of all
    heads, those of the other ranks of `tensor` too. Evictions are those of the rank that evicts most.
    """
    asked = {"output_attention_statistics": True} if isinstance(model, StackForCausalLM) else {}
    outputs = model(input_ids=input_ids, output_hidden_states=True, logits_to_keep=1, **asked)
    hidden = outputs.hidden_states[-1].float()
    outliers = (hidden - hidden.mean()).abs() > OUTLIER_SIGMA * hidden.std()
    series = {"activation_outlier_rate": outliers.float().mean()}
    if asked:
        found = {name: _of_all_heads(value, tensor) for name, value in by_layer(outputs).items()}
        entropy = found["entropy"]
        series |= {
            "attention_entropy_mean": entropy.mean(),
            "attention_entropy_std": entropy.std(),
            "attention_entropy_median": entropy.median(),
            "attention_entropy_heads": entropy,
            "masked_edge_share": found["masked_edge_share"].max(),
            "kv_ratio": found["kv_ratio"].mean(),
            "kv_error": found["kv_error"].max(),
            "kv_distortion": found["kv_distortion"].max(),
            "kv_hit_rate": found["kv_hit_rate"].nanmean(),
            "kv_evictions": found["kv_evictions"].amax(1).sum(),
        }
        if "kernel_error" in found:  # linear attention has no other kernel to compare with
            series["attention_kernel_error"] = found["kernel_error"].max()
    return series
