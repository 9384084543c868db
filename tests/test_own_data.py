"""A folder of text, a local model and a file of parameters become a promoted snapshot, by the commands of the book."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_models import LLAMA
from transformers import AutoModelForCausalLM, LlamaConfig

from stackpkg import params, runs
from stackpkg.data import tokenizer
from stackpkg.training import promotion

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "book/own_data.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def profile(corpus: str, model: str) -> str:
    """The file of the page with its placeholders filled in."""
    (text,) = blocks("yaml")
    text = text.replace("/data/manuals", corpus).replace(
        "tokenizer: organisation/model", f"tokenizer: {model}/tokenizer.json"
    )
    return text.replace("organisation/model", model)


def test_the_profile_of_the_page_is_valid_and_its_first_lines_are_the_users() -> None:
    p = params.validate(yaml.safe_load(profile("/data/manuals", "organisation/model")))
    assert (p.run, p.model.kind, p.data.sources[0].path) == ("mine", "auto", "/data/manuals")


@pytest.mark.slow
def test_the_commands_of_the_page_lead_to_a_promoted_snapshot(tmp_path: Path) -> None:
    corpus, model = tmp_path / "manuals", tmp_path / "model"
    corpus.mkdir()
    for path in [*(ROOT / "book").rglob("*.md"), *(ROOT / "stackpkg").rglob("*.py"), *(ROOT / "tests").glob("*.py")]:
        if "_build" not in path.parts and path.stat().st_size:
            shutil.copy(path, corpus / path.relative_to(ROOT).as_posix().replace("/", "_"))
    texts = [path.read_text(encoding="utf-8") for path in corpus.iterdir()]
    AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA | {"vocab_size": 1024})).save_pretrained(model)
    tokenizer.train_tokenizer(texts, 1024).save(str(model / "tokenizer.json"))
    home = ROOT / "outbox/test-mine"
    shutil.rmtree(home, ignore_errors=True)
    mine = runs.write_text(tmp_path / "mine.yaml", profile(str(corpus), str(model)))
    for line in "".join(blocks("bash")).splitlines():
        words = line.replace("params/mine.yaml", str(mine)).replace("outbox/mine", "outbox/test-mine").split()
        words += ["--run", "test-mine"] if words[1] == "run" else []
        command = [Path(sys.executable).with_name(words[0]), *words[1:]]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    artifacts = home / "artifacts"
    version = promotion.registry(artifacts)["current"]
    assert version and promotion.whole(artifacts, version)
    promoted = AutoModelForCausalLM.from_pretrained(artifacts / version)
    assert (promoted.config.model_type, promoted.config.vocab_size) == ("llama", 1024)
    assert (ROOT / "book/_build/test-mine/html/index.html").exists()
