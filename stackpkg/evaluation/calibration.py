"""Does a model know how sure it may be? Reliability of its next-token predictions."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15  # of equal width, as in Guo et al. 2017


def reliability(logits: Tensor, labels: Tensor) -> Tensor:
    """float64 [3, BINS] over labelled positions (`labels` >= 0): predictions whose probability falls into each bin, the
    sum of these probabilities, and how many of them are right. `logits` [..., vocabulary], `labels` [...].
    """
    confidence, said = logits[labels >= 0].softmax(-1).max(-1)
    right = (said == labels[labels >= 0]).double()
    place = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    rows = torch.stack([torch.ones_like(right), confidence.double(), right])
    return torch.zeros(3, BINS, dtype=torch.double, device=rows.device).index_add_(1, place, rows).cpu()


def expected_error(bins: Tensor) -> float:
    """Expected calibration error, in [0, 1], of what `reliability` counted."""
    count, confidence, right = bins
    # ECE = sum_b |B_b| / n |acc(B_b) - conf(B_b)|        (Guo et al. 2017, arXiv 1706.04599, eq. 3)
    return float((right - confidence).abs().sum() / count.sum().clamp(min=1))
