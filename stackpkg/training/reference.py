"""Log-probabilities of preferences under the weights a job begins with: what DPO compares its own with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from stackpkg.data.stream import Batch
from stackpkg.objectives.preference import answers, stacked
from stackpkg.runs import replacing
from stackpkg.training.ema import reshard

ROWS = 8  # pairs of a forward
FILE = "reference.safetensors"


@torch.no_grad()
def log_probs(
    network: PreTrainedModel, pairs: Batch, pad_id: int, home: Path, data: dist.ProcessGroup, device: torch.device
) -> Tensor:
    """float32 [n, 2], nats: of the chosen and of the rejected answer to each of n `pairs`, under `network` as it is.

    Computed once a job, before its first step, and kept in its folder, so no second model lies in memory (TRL's
    `precompute_ref_log_probs`). A collective: the ranks of `data` share the pairs. Call it before a checkpoint is read.
    """
    path, told = home / FILE, list[Any]([None])
    if dist.get_rank() == 0 and path.exists():
        told = [load_file(path)["log_probs"]]
    dist.broadcast_object_list(told)
    if told[0] is not None:
        return told[0].to(device)
    count, ranks = len(pairs["preference_key"]), dist.get_world_size(data)
    whole = -(-count // (ROWS * ranks)) * ROWS * ranks  # every rank calls the model equally often
    mine = (torch.arange(whole) % count)[dist.get_rank(data) :: ranks]
    learning, found = network.training, []
    network.eval()
    for chosen in mine.split(ROWS):
        batch = {name: torch.as_tensor(values[chosen.numpy()], device=device) for name, values in pairs.items()}
        request = stacked(batch, pad_id)
        said = answers(network(**request).logits, request["input_ids"], batch["answer_start"].repeat(2), pad_id)
        found.append(torch.stack(said.log_probs.chunk(2), 1))
    network.train(learning)
    reshard(network)
    parts = [torch.empty(len(mine), 2, device=device) for _ in range(ranks)]
    dist.all_gather(parts, torch.cat(found).float().contiguous(), group=data)
    values = torch.stack(parts, 1).flatten(0, 1)[:count]
    if dist.get_rank() == 0:
        with replacing(path) as temporary:
            save_file({"log_probs": values.cpu().contiguous()}, temporary)
    return values
