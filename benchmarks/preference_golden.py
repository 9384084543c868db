"""Values of DPO, SimPO and ORPO as TRL computes them, for `tests/test_preference.py`.

    uv pip install --no-deps trl && python benchmarks/preference_golden.py tests/golden_preference.json

Calls TRL's own methods (`CPOTrainer.cpo_loss`, `ORPOTrainer.odds_ratio_loss`, `get_batch_logps` and
`DPOTrainer._compute_loss`) on logits drawn from a seed. Nothing is trained and no model is loaded.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

N, LENGTH, VOCAB = 5, 12, 17
BETA = {"dpo": 0.1, "simpo": 2.0, "orpo": 0.1}
GAMMA = 1.0


def example() -> dict[str, Tensor]:
    """Logits and texts of N pairs, chosen first; prompts and answers of many lengths, padding 0 on the right."""
    g = torch.Generator().manual_seed(7)
    ids = torch.randint(1, VOCAB, (2 * N, LENGTH), generator=g)
    ids[torch.arange(LENGTH) >= torch.randint(7, LENGTH + 1, (2 * N, 1), generator=g)] = 0
    policy, reference = (torch.randn(2 * N, LENGTH, VOCAB, generator=g) * 2 for _ in range(2))
    start = torch.randint(1, 6, (N,), generator=g).repeat(2)
    return {"ids": ids, "policy": policy, "reference": reference, "start": start}


def by_trl(data: dict[str, Tensor]) -> dict[str, list[float]]:
    """Each pair's loss by TRL's code. A loss's trainer is stood in for by the few settings its method reads."""
    from trl import DPOTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    ids, start = data["ids"], data["start"]
    answer = (torch.arange(LENGTH) >= start[:, None]) & (ids != 0)
    labels = ids.masked_fill(~answer, -100)
    mean = CPOTrainer.get_batch_logps(data["policy"], labels, average_log_prob=True)
    place = SimpleNamespace(device=torch.device("cpu"))
    simpo: Any = SimpleNamespace(
        alpha=0.0, beta=BETA["simpo"], simpo_gamma=GAMMA, loss_type="simpo", label_smoothing=0.0, accelerator=place
    )
    orpo: Any = SimpleNamespace(beta=BETA["orpo"], accelerator=place)
    ratio = ORPOTrainer.odds_ratio_loss(orpo, mean[:N], mean[N:])[0]
    mean_by_orpo = ORPOTrainer.get_batch_logps(data["policy"], labels, average_log_prob=True)
    return {
        "simpo": CPOTrainer.cpo_loss(simpo, mean[:N], mean[N:])[0].tolist(),
        "orpo": (-mean_by_orpo[:N] - ratio).tolist(),  # TRL subtracts the ratio from the likelihood of the chosen
        "dpo": [_dpo(DPOTrainer, data, answer, pair) for pair in range(N)],
    }


def _dpo(trainer: Any, data: dict[str, Tensor], answer: Tensor, pair: int) -> float:
    from trl.trainer.utils import selective_log_softmax

    rows = [pair, pair + N]
    ids, mask = data["ids"][rows], answer[rows]

    def model(name: str) -> Any:
        """What TRL's patched forward returns: log-probabilities of next tokens, 0 where there is no label."""
        found = selective_log_softmax(data[name][rows][:, :-1], ids[:, 1:]).masked_fill(~mask[:, 1:], 0.0)
        metrics = dict.fromkeys(("entropy", "mean_logits"), found) | {"is_top1": found > 0}
        return lambda **_: SimpleNamespace(log_probs=found, **metrics)

    accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda t: t, gather=lambda t: t)
    settings = SimpleNamespace(
        beta=BETA["dpo"], loss_types=["sigmoid"], loss_weights=[1.0], ld_alpha=None, f_divergence_type="reverse_kl",
        label_smoothing=0.0, use_weighting=False, precompute_ref_logps=True, aux_loss_enabled=False,
        model=SimpleNamespace(training=False), accelerator=accelerator, _total_train_tokens=0,
        _metrics={"eval": defaultdict(list)},
    )  # fmt: skip
    reference = model("reference")().log_probs.sum(1)
    inputs = {
        "input_ids": ids, "attention_mask": (ids != 0).long(), "completion_mask": mask.long(),
        "ref_chosen_logps": reference[:1], "ref_rejected_logps": reference[1:],
    }  # fmt: skip
    return float(trainer._compute_loss(settings, model("policy"), inputs, return_outputs=False))


if __name__ == "__main__":
    golden = {"trl": version("trl"), "values": by_trl(example())}
    Path(sys.argv[1]).write_text(json.dumps(golden, indent=1) + "\n")
