"""The terms of the training loss. Each returns a sum over its units (tokens, rows, positions), never a mean:
the composer divides by the units of the whole optimiser step, so sums over micro-batches and ranks are exact.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_single_autograd


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Next-token cross-entropy of each position, nats (GPT: Radford et al. 2018, eq. 1). logits [b, L, vocab], labels
    [b, L], -100 where not trained -> [b, L]; entry t is the loss of label t + 1, and 0 where there is none. Each is
    >= 0, log vocab where the logits are all alike, and without bound as the probability of the label nears 0.
    """
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    # l_t = -log softmax(z_t)[y_(t+1)]
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    flat = F.cross_entropy(exact.flatten(0, 1), shifted.flatten(), reduction="none", ignore_index=-100)
    return flat.view_as(labels)


def long_range(tokens: Tensor, answer_mask: Tensor) -> Tensor:
    """Sum of `token_losses` over answers that need what lies outside the window; each answer's is >= 0, so the sum is
    between 0, also without answers, and that of all `tokens`.

    `answer_mask` [b, L] is aligned with the labels, true where the label is an answer token. The choice of the tokens
    is ours: Zoology (arXiv 2312.04927) finds most of what efficient models lack in recall, but trains on it apart;
    here the same tokens are weighted beside language modelling.
    """
    # sum_t l_t 1[y_(t+1) is an answer]
    return (tokens[:, :-1] * answer_mask[:, 1:]).sum()


def info_nce(
    query: Tensor, positive: Tensor, negatives: Tensor, pair_key: Tensor, tau: float,
    group: dist.ProcessGroup | None = None, margin: float | None = None,
) -> Tensor:  # fmt: skip
    """Sum over rows of InfoNCE (van den Oord et al., arXiv 1807.03748; in-batch negatives: DPR, arXiv 2004.04906).

    query, positive [rows, hidden], negatives [rows, H, hidden], all L2-normalised; pair_key [rows]. A row's negatives
    are its own H hard ones and the positives of every row of this micro-batch on all ranks of `group`, gathered with
    gradient; those with the row's own key are masked, and with a `margin` all that score above positive - margin
    (NV-Retriever, arXiv 2407.15831, sec. 3: there a teacher scores; an encoder that judges itself masks everything
    while its embeddings are still alike). Ranks must hold equally many rows. Each row is in
    [0, log(1 + negatives) + 2 / tau]. The loss is additive over ranks. It is NOT additive over accumulation: a split
    micro-batch has fewer negatives, hence another loss.
    """
    documents, keys, first = positive, pair_key, 0
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        everyone = group or dist.distributed_c10d._get_default_group()
        # `torch.distributed.nn.all_gather` takes ranks of a group for ranks of the world in its backward (torch 2.13)
        documents = all_gather_single_autograd(positive.contiguous(), 0, everyone)
        gathered = [torch.empty_like(pair_key) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, pair_key, group)
        keys, first = torch.cat(gathered), dist.get_rank(group) * len(query)
    target = first + torch.arange(len(query), device=query.device)
    scores = query @ documents.T / tau
    same = pair_key[:, None] == keys[None, :]
    same[torch.arange(len(query)), target] = False
    hard = torch.einsum("rd,rhd->rh", query, negatives) / tau
    scores = torch.cat((scores.masked_fill(same, -torch.inf), hard), 1)
    if margin is not None:
        own = scores.detach().gather(1, target[:, None])
        false = (scores.detach() > own - margin / tau).scatter(1, target[:, None], False)
        scores = scores.masked_fill(false, -torch.inf)
    # -log [ e^(q.d+/tau) / ( sum_j e^(q.d_j/tau) + sum_h e^(q.n_h/tau) ) ]
    return F.cross_entropy(scores, target, reduction="sum")


def balance_divergence(usage: Tensor) -> Tensor:
    """KL from uniform of each layer's running usage u [layers, experts], in nats -> [layers], each in [0, log E]: 0
    when balanced, log E when one expert takes all. Per layer: a mean over layers first would hide layers that collapse
    apart. A divergence in place of Switch's product of shares (arXiv 2101.03961, eq. 4) is ours: it is convex in the
    usage, does not depend on k, and its end points are known.
    """
    # KL(u || uniform) = sum_e u_e log(E u_e)
    return torch.special.xlogy(usage, usage * usage.shape[-1]).sum(-1)


def load_balance(gate: Tensor, usage: Tensor) -> Tensor:
    """Sum over positions of one layer's balance penalty. gate [positions, experts] probabilities, usage [experts]
    detached; each position's is at most log E.

    The gradient is that of KL(u || uniform) through u (constant terms drop out since gates sum to 1): one
    mirror-descent step on the usage (Beck & Teboulle 2003). Counts of the whole step as in arXiv 2501.11873. With u
    fixed during a step the penalty is linear in the tokens, so it is exactly additive. Experts unused so far are
    held at 1e-4 to keep the logarithm finite.
    """
    # sum_x sum_e sg[log(E u_e)] p_e(x)
    return (gate @ (usage.detach().clamp_min(1e-4) * usage.shape[-1]).log()).sum()


def gate_entropy(gate: Tensor, target: float) -> Tensor:
    """Sum over positions of the squared distance of one layer's normalised gate entropy to `target`, both in [0, 1]; so
    is each position's. gate [positions, experts] probabilities, of 2 experts or more. Ours: a bonus on entropy has no
    end but the even gate, which chooses nothing; a target keeps the gate between that and one that never explores.
    """
    # h(x) = -sum_e p_e log p_e / log E ;  sum_x (h(x) - h*)^2
    entropy = torch.special.entr(gate.clamp_min(1e-9)).sum(-1) / math.log(gate.shape[-1])
    return (entropy - target).square().sum()


def z_loss(logits: Tensor) -> Tensor:
    """Sum over positions of one layer's squared log-partition, logits [positions, experts]; each >= 0. It grows when
    all logits shift, which a softmax does not see, and keeps them where low precision is fine.
    """
    # sum_x (log sum_e e^(l_e(x)))^2   (ST-MoE, arXiv 2202.08906, eq. 5)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(-1).square().sum()
