"""Reading: what the objective is, and that it teaches a model to use the records it is given, and no others."""

import pytest
import torch
from tiny_models import QWEN

from stackpkg import params
from stackpkg.model import StackForCausalLM, build
from stackpkg.objectives import reading

CONFIG = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "moe_intermediate_size": 48, "num_experts": 1, "num_experts_per_tok": 1, "sliding_window": 16, "block_size": 8,
    "retrieval": True,
}  # fmt: skip
VOCAB, LENGTH = 48, 12


def model(**changes: object) -> StackForCausalLM:
    return build(params.Model(config=CONFIG | changes), VOCAB, 0, 3)


def documents(rows: int, seed: int) -> dict[str, torch.Tensor]:
    """Random orders of all different tokens: nothing but a record tells what follows what."""
    g = torch.Generator().manual_seed(seed)
    drawn = torch.stack([1 + torch.randperm(VOCAB - 1, generator=g)[:LENGTH] for _ in range(3 * rows)])
    return {"positive_ids": drawn[:rows], "negative_ids": drawn[rows:].view(rows, 2, LENGTH)}


def spent(network: StackForCausalLM, batch: dict[str, torch.Tensor], records: torch.Tensor) -> float:
    """Nats a token, the first one excepted."""
    with torch.no_grad():
        logits = network(**reading.request(batch["positive_ids"], records, 0)).logits
    return float(reading.reading(reading.said(logits, batch, 0))) / (len(records) * (LENGTH - 1))


def test_it_is_the_cross_entropy_of_the_documents_without_their_padding() -> None:
    batch = documents(3, 0)
    batch["positive_ids"][1, 7:] = 0
    logits = model()(**reading.asked(batch, 0)).logits
    expected = sum(
        -logits[b, t].log_softmax(-1)[token]
        for b in range(3)
        for t, token in enumerate(batch["positive_ids"][b, 1:])
        if token
    )
    torch.testing.assert_close(reading.reading(reading.said(logits, batch, 0)), expected)


def test_memory_keeps_records_apart() -> None:
    records = torch.tensor([[[1, 2, 3], [4, 5, 0]]])
    assert reading.memory(records, 0).tolist() == [[1, 2, 3, 0, 4, 5, 0, 0]]


@pytest.mark.parametrize("kind", ["stack without retrieval", "qwen3_moe"])
def test_only_a_model_with_cross_attention_reads(kind: str) -> None:
    other = model(retrieval=False) if kind[0] == "s" else build(params.Model(kind="auto", config=QWEN), VOCAB, 0, 3)
    assert reading.reads(model()) and not reading.reads(other)


def test_a_model_learns_to_go_on_where_a_record_goes_on() -> None:
    torch.manual_seed(0)
    network = model()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for step in range(150):
        batch = documents(32, 100 + step)
        logits = network(**reading.asked(batch, 0)).logits
        loss = reading.reading(reading.said(logits, batch, 0)) / (32 * (LENGTH - 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fresh = documents(32, 7)
    own, others = fresh["positive_ids"][:, None], fresh["negative_ids"]
    alone = spent(network, fresh, own[:, :0])
    assert alone > 3.2, "without records nothing tells the next token: at least log 36"
    assert spent(network, fresh, torch.cat([own, others], 1)) < 0.3 * alone
    assert spent(network, fresh, others) > 0.9 * alone, "records of something else do not help"
