"""The card of a promoted version: a head the hub reads, the numbers of the gate, the digests of the files."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from stackpkg import runs
from stackpkg.governance import release

ABOUT = {
    "job": "train", "attempt": 2, "step": 12, "data": "ab" * 32, "layout": {"processes": 2},
    "versions": {"architecture": "1.2.0", "router": "1.0", "retriever": "1.1"}, "config": {"model_type": "stackpkg"},
}  # fmt: skip
MEASURED = {"final": {"validation_loss": 2.25, "precision_at_k": 0.5}, "final_ema": {"validation_loss": 2.5}}
LIMITS = {"validation_loss": ("<", 3.0), "precision_at_k": (">=", 0.25)}


@pytest.fixture
def folder(tmp_path: Path) -> runs.RunFolder:
    made = runs.RunFolder.__new__(runs.RunFolder)  # one outside outbox/
    made.name, made.path = "cards", tmp_path
    return made


def test_the_card_is_read_back_as_it_was_measured(folder: runs.RunFolder) -> None:
    first = runs.write_json(folder / "eval/epoch_001.json", {"loss": 2.25})
    second = runs.write_json(folder / "eval/epoch_002.json", {"loss": 2.0})
    text = release.card(folder, "v3", "final", MEASURED, LIMITS, ABOUT, ["eval/epoch_*.json"])
    card = ModelCard(text)
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == MEASURED["final"]
    assert card.data.library_name == "transformers" and card.data.tags == ["stackpkg", "architecture-1.2.0"]
    for path in (first, second):
        assert f"| eval/{path.name} | `{runs.digest(path)}` |" in text
    assert "Promoted from `final` of job `train`, attempt 2, after step 12, on 2 processes." in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert (
        "| validation_loss | &lt; 3.0 | 2.25 | 2.5 | " in rows
        and "| precision_at_k | &gt;= 0.25 | 0.5 | None | " in rows
    )
    table = text.splitlines()[text.splitlines().index("| limit | | final | final_ema | ") :]
    assert table[1].startswith("| --- ") and table[2].startswith("| validation_loss"), "a table without a gap"


def test_evidence_that_is_not_there_is_named(folder: runs.RunFolder) -> None:
    with pytest.raises(ValueError, match=r"outbox/cards/eval/none.json is no evidence"):
        release.card(folder, "v3", "final", MEASURED, LIMITS, ABOUT, ["eval/none.json"])
