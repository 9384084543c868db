"""Every command of every page is run as it stands, placeholders filled: what acts on copies of a small run and on its
running job, in the order of its page; everything else on the run itself.

The small run is a repository of its own: the package, its profiles and four short notebooks, whose `31_train` trains a
real job. What a page says of a cluster is a dry run (`launch --render`).
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from stackpkg import params, runs, sharddrill
from stackpkg.data.ledger import Ledger
from stackpkg.runs import read_json
from stackpkg.telemetry import guard, rules
from stackpkg.training import drills, faults, promotion, tiny

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)
PAGES = {path.stem: BLOCK.findall(path.read_text()) for path in sorted((ROOT / "book/runbooks").glob("*.md"))}
STEP = "STEP=12            # the last step you trust; checkpoints are named by their step"
NOTEBOOKS = {
    "00_check": "import os; cores = os.cpu_count()\nfolder.record('00_check', cores=cores)",
    "30_compose": "folder.record('30_compose', terms=len(p.objectives.model_dump()))",
    "31_train": "from stackpkg.training import launch\ndone = launch.launch('train', p, folder)\n"
    "folder.outputs('checkpoints/train/done.json', 'checkpoints/train/checkpoint-*', 'telemetry/train.parquet')\n"
    "folder.record('31_train', steps=done['steps'])",
    "40_evaluate": "folder.inputs('checkpoints/train/done.json')\n"
    "folder.record('40_evaluate', steps=runs.read_json(folder.path / 'checkpoints/train/done.json')['steps'])",
}


class Lab:
    """A repository whose run `small` the commands are about."""

    def __init__(self, place: Path) -> None:
        self.place, self.run, self.home = place, place / "outbox/small", place / "outbox/small/checkpoints/train"
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        keep = {name: value for name, value in os.environ.items() if name not in ("RUN", "STEP")}
        self.environment = keep | {"PATH": path, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1"}
        self.given, self.begun = dict[str, str](), list[subprocess.Popen[str]]()

    def start(self, block: str) -> subprocess.Popen[str]:
        text = block.replace("RUN=dry_run", "RUN=small")
        for placeholder, value in ({STEP: "STEP=8"} | self.given).items():
            text = text.replace(placeholder, value)
        command = ["bash", "-eu", "-o", "pipefail", "-c", text]
        how = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
        self.begun.append(subprocess.Popen(command, cwd=self.place, env=self.environment, **how))
        return self.begun[-1]

    def type(self, block: str) -> tuple[int, str]:
        done = self.start(block)
        said, _ = done.communicate()
        return done.returncode, said

    def copy(self, name: str) -> "Lab":
        made = Lab(Path(shutil.copytree(self.place, self.place.with_name(name))))
        made.begun = self.begun
        return made

    def paused(self, run: subprocess.Popen[str]) -> int:
        """The process of the job's rank, stopped as soon as the job that `run` started has saved a checkpoint."""
        have = {path.name for path in self.home.glob("checkpoint-*")}
        self.until(run, lambda: {path.name for path in self.home.glob("checkpoint-*")} - have)
        rank = int((self.place / "outbox/.locks/small.train").read_text().split()[1])
        os.kill(rank, signal.SIGSTOP)
        return rank

    def until(self, run: subprocess.Popen[str], seen: Callable[[], object]) -> None:
        """Wait for what a command that still runs is to bring about."""
        while not seen():
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.02)


def key(block: str) -> str:
    """The same for blocks that differ in words that are only kept."""
    return re.sub(r"--reason ('[^']*'|\S+)|note (\S+) \"\w+:", r"--reason or note \2", block)


def page(name: str, *, having: str) -> str:
    """The one block of a page that holds these words."""
    (found,) = (block for block in PAGES[name] if having in block)
    return found


@pytest.fixture(scope="module")
def done() -> dict[str, tuple[int, str]]:
    """What came of each block, by its key: status and output."""
    return {}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Before its first run: corpus, profile, notebooks."""
    place = tmp_path_factory.mktemp("lab") / "small"
    for part in ("stackpkg", "params", "governance"):
        shutil.copytree(ROOT / part, place / part, ignore=shutil.ignore_patterns("__pycache__"))
    alone = {"run": "small", "layout": {"processes": 1, "fsdp": 1}}
    p = params.validate(sharddrill.profile().model_dump(mode="json") | alone)
    (place / "params/small.yaml").write_text(yaml.safe_dump(p.model_dump(mode="json")))
    defaults = params.validate({}).model_dump(mode="json") | {"run": "lab"}
    given = "# Parameters\n" + "".join(f"{name} = {value!r}\n" for name, value in defaults.items())
    begin = "from stackpkg import params, runs\np = params.from_notebook(globals())\nfolder = runs.RunFolder(p.run)\n"
    (place / "notebooks").mkdir()
    for name, code in NOTEBOOKS.items():
        cells = [new_markdown_cell(f"# {name}"), new_code_cell(given, metadata={"tags": ["parameters"]})]
        made = new_notebook(cells=[*cells, new_code_cell(begin + code)])
        made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(made, place / f"notebooks/{name}.ipynb")
    made_lab = Lab(place)
    tiny.prepare(made_lab.run, p)
    runs.write_text(made_lab.run / "telemetry/rules.yml", rules.render(guard.load(p), 1.0, 1.0))
    yield made_lab
    for command in made_lab.begun:  # where a test failed half way
        if command.poll() is None:
            os.killpg(command.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def small(lab: Lab, done: dict[str, tuple[int, str]]) -> Lab:
    """The run at its end, by way of a save, a refused roll back and a halt while its job ran."""
    first = lab.start("stackpkg run params/small.yaml")
    rank = lab.paused(first)
    save, halt = page("KillSwitch", having="stackpkg save"), page("KillSwitch", having="--reason maintenance")
    done[key(save)] = lab.type(save)
    done["refused"] = lab.type("stackpkg rollback outbox/small --step 4")
    typed = lab.start(halt)
    lab.until(typed, (lab.home / "stop").exists)
    os.kill(rank, signal.SIGCONT)
    said = typed.communicate()[0]
    done[key(halt)] = typed.returncode, said
    assert first.wait() == 1, "the first command ends when the job stops"
    assert done[key(halt)][0] == 0, said
    return lab


def kill(lab: Lab, done: dict[str, tuple[int, str]]) -> None:
    """KillSwitch: a job is killed, no launch goes on until it may."""
    assert lab.type("stackpkg rollback outbox/small --step 4")[0] == 0
    first = lab.start("stackpkg run params/small.yaml")
    rank = lab.paused(first)
    now, again = page("KillSwitch", having="--now"), page("KillSwitch", having="rm outbox")
    typed = lab.start(now)
    lab.until(typed, (lab.home / "kill").exists)
    os.kill(rank, signal.SIGCONT)
    said = typed.communicate()[0]
    done[key(now)] = typed.returncode, said
    assert first.wait() == 1
    refused = lab.type("stackpkg run params/small.yaml")
    assert refused[0] == 1 and "train was killed: does harm" in refused[1], refused[1]
    done[key(again)] = lab.type(again)


def corrupt(lab: Lab, done: dict[str, tuple[int, str]]) -> None:
    """CorruptedShardRollback, in the order of the page."""
    file, offset = sharddrill.victim(Ledger(lab.run, "train").stream)
    shard = lab.run / file
    lab.given = {"SHARD=0123456789abcdef": f"SHARD={shard.stem}"}
    faults.flip(shard, offset)
    looked = lab.type("stackpkg shards outbox/small")
    assert looked[0] == 1 and f"shards/{shard.name}: corrupt" in looked[1], looked[1]
    for having in ("shards outbox/$RUN --mend", "trace outbox/$RUN --shard"):
        block = page("CorruptedShardRollback", having=having)
        done[key(block)] = lab.type(block)
    said = done[key(block)][1]
    first, good = (re.search(asked, said) for asked in (r"step (\d+)  use first read", r"without it: checkpoint-(\d+)"))
    back = int(good[1]) if good else 0
    assert first and back <= int(first[1]) and "damaged tokens: 1" in said, said
    lab.given[STEP] = f"STEP={back}"
    for having in ("stackpkg rollback", "stackpkg run params", "stackpkg rows"):
        block = page("CorruptedShardRollback", having=having)
        done[key(block)] = lab.type(block)
    rows = [line.split() for line in done[key(block)][1].splitlines()[1:]]
    losses = {(int(row[0]), int(row[1])): row[3:] for row in rows}
    again = [step for step, attempt in losses if attempt == 3 and (step, 2) in losses]
    assert again and all(losses[step, 3] == losses[step, 2] for step in again), "the attempts do not agree"


def pass_over(lab: Lab, done: dict[str, tuple[int, str]]) -> None:
    """CorruptedShardRollback's other way."""
    shard = max((lab.run / "data/shards").glob("*.bin"), key=lambda path: path.stat().st_size)
    lab.given = {"SHARD=0123456789abcdef": f"SHARD={shard.stem}"}
    faults.flip(shard, 70_000)
    block = page("CorruptedShardRollback", having="--skip")
    done[key(block)] = lab.type(block)


def withdraw(lab: Lab, done: dict[str, tuple[int, str]]) -> None:
    """DataWithdrawal: a source goes, and the weights must not hold it."""
    told = lab.type("stackpkg trace outbox/small --step 9")[1]
    source = re.search(r"use text .*source (\S+)", told)
    assert source, told
    lab.given = {"DOCUMENT='folder:corpus/*'": f"DOCUMENT='{source[1][:-1]}*'"}
    look, act = page("DataWithdrawal", having="--document"), page("DataWithdrawal", having="stackpkg withdraw")
    done[key(look)] = code, said = lab.type(look)
    assert code == 0 and f"  {source[1]}" in said and "step 9  use text" in said and "snapshots with it: " in said, said
    good = re.search(r"newest checkpoint without it: (?:checkpoint-(\d+)|none)", said)
    assert good and int(good[1] or 0) <= 9
    lab.given[STEP] = f"STEP={good[1] or 0}"
    done[key(act)] = lab.type(act)
    artifacts = lab.run / "artifacts"
    assert promotion.promote(artifacts, lab.home / "final", "v1", {}, [])
    block = page("DataWithdrawal", having="stackpkg demote")
    done[key(block)] = lab.type(block)
    assert promotion.registry(artifacts)["current"] is None, done[key(block)]
    block = page("DataWithdrawal", having="stackpkg rollback")  # most pages share it
    done[key(block)] = code, again = lab.type(block)
    assert code == 0, again
    after = lab.type(look)[1]
    assert not re.search(r"step \d+ ", after) or "step 9 " not in after, after
    assert "withdrawn" in lab.type("stackpkg trace outbox/small --step 9")[1]


def spike(lab: Lab, done: dict[str, tuple[int, str]]) -> None:
    """SpikeRollback: back, and past the data."""
    block = page("SpikeRollback", having="stackpkg skip")
    done[key(block)] = lab.type(block)
    decided = (lab.home / "decisions.jsonl").read_text()
    assert '"kind": "skip", "step": 8, "steps": 4' in decided, done[key(block)][1]


def keep(lab: Lab, done: dict[str, tuple[int, str]]) -> None:
    """ArchiveRestore, from the sealed run on, before anybody adds a note to it."""
    for having in ("stackpkg archive", "stackpkg restore"):
        block = page("ArchiveRestore", having=having)
        done[key(block)] = lab.type(block)


ACTS = {act.__name__: act for act in (kill, corrupt, withdraw, spike, pass_over, keep)}


@pytest.fixture(scope="module")
def results(small: Lab, done: dict[str, tuple[int, str]]) -> dict[str, tuple[int, str]]:
    """Of every block of every page: the acts, in copies; then the rest, each once."""
    with ThreadPoolExecutor(2) as pool:
        acts = [pool.submit(act, small.copy(name), done) for name, act in ACTS.items()]
        for act in acts:
            act.result()
        sources = small.type("stackpkg trace outbox/small --step 3")[1]
        source = re.search(r"use text .*source (\S+)", sources)
        assert source, sources
        small.given = {"DOCUMENT='folder:corpus/*'": f"DOCUMENT='{source[1]}'"}
        rest = {key(block): block for blocks in PAGES.values() for block in blocks if key(block) not in done}
        found = {name: pool.submit(small.type, block) for name, block in rest.items()}
    return done | {name: each.result() for name, each in found.items()}


def test_a_roll_back_of_a_running_job_is_refused_and_says_what_to_do(
    small: Lab, done: dict[str, tuple[int, str]]
) -> None:
    code, said = done["refused"]
    assert code == 1 and "train runs (process " in said and "End it first: stackpkg halt outbox/small --wait" in said


@pytest.mark.parametrize("name", PAGES)
def test_every_command_of_the_page_works(name: str, results: dict[str, tuple[int, str]]) -> None:
    assert PAGES[name], "a page without a command"
    for block in PAGES[name]:
        code, said = results[key(block)]
        assert code == 0, f"{block}\n{said[-2000:]}"
        assert "Traceback" not in said, f"{block}\n{said[-2000:]}"


def test_what_was_changed_is_in_the_job(small: Lab, results: dict[str, tuple[int, str]]) -> None:
    """The commands did what their pages say, in the small run itself: it stopped whole and went on."""
    first, second = read_json(small.home / "attempts.json")
    assert first["stopped"]["reason"] == "maintenance" and first["stopped"]["step"] < drills.STEPS
    assert second["resumed_from"] == f"checkpoint-{first['stopped']['step']}"
    assert read_json(small.home / "done.json")["steps"] == drills.STEPS
    assert "attempts 2 missing 0" in results[key(page("FailureRecoveryJob", having="rows.missing"))][1]
