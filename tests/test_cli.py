"""What a person types: every answer is plain, and a wrong word ends with status 1 and never with a traceback."""

import hashlib
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import time
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import Result
from data_corpus import corpus, documents, profile
from typer.testing import CliRunner

from stackpkg import cli, params, pipeline, runs
from stackpkg.data import curriculum, provenance
from stackpkg.governance import checklist, seal, standing
from stackpkg.telemetry.rows import RowWriter
from stackpkg.training import promotion

ROOT = Path(__file__).parents[1]
ITEM = {"id": "D1", "text": "Curate.", "status": "red", "reasons": ["10_curate_corpus: documents is 0, must be > 0"]}
needs_keys = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="ssh-keygen is not installed")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the real notebooks and profiles, and an outbox of its own."""
    for module in (runs, cli, pipeline):
        monkeypatch.setattr(module, "root", lambda: tmp_path)
    for name in ("notebooks", "params", "governance"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "outbox").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(place: Path) -> Path:
    """A small run, sealed and signed with demonstration keys."""
    folder = runs.RunFolder("demo")
    runs.write_text(folder / "config/params.yaml", "seed: 17\n")
    runs.write_json(folder / "evidence/10_curate_corpus.json", {"documents": 3})
    p = params.validate({"run": "demo", "governance": {"demonstration_keys": True}})
    assert seal.finish(folder, p)["problems"] == []
    return folder.path


def call(*arguments: object) -> Result:
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_help_names_every_command() -> None:
    assert {"run", "params", "withdraw", "status", "verify", "sign", "book"} <= set(call("--help").output.split())


def test_the_shell_completes_commands_and_options() -> None:
    """Asked as bash asks it, after `stackpkg --install-completion`."""
    shell = {"_STACKPKG_COMPLETE": "source_bash"}
    script = CliRunner().invoke(cli.app, [], prog_name="stackpkg", env=shell).stdout
    assert "_STACKPKG_COMPLETE=complete_bash" in script and "complete -o default -F" in script
    for words, offered in (("stackpkg sta", {"status"}), ("stackpkg status --require", {"--require-green"})):
        asked = {"_STACKPKG_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        told = CliRunner().invoke(cli.app, [], prog_name="stackpkg", env=asked).stdout
        assert {*told.split()} == offered
    assert {"--install-completion", "--show-completion"} <= {*call("--help").stdout.split()}


# --- run


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sed: 3\n", "sed: unknown key; did you mean 'seed'? allowed: run, seed, data"),
        ("training: {epoch_steps: 0}\n", "training.epoch_steps: Input should be greater than or equal to 1; given 0"),
        ("training: {batch_tokens: 300}\n", "training.batch_tokens = 300 is not a multiple of"),
        ("data: {sources: [{kind: jsonl}]}\n", "needs `path`: a file, a folder or a datasets id"),
        ("seed: [1\n", "is not YAML"),
        ("- 1\n", "must hold a mapping"),
        (None, "there is no profile bad.yaml; params/ has cluster, dry_run, smoke"),
    ],
)
def test_a_bad_profile_stops_before_anything_runs(place: Path, text: str | None, expected: str) -> None:
    if text is not None:
        runs.write_text(place / "bad.yaml", text)
    done = call("run", "bad.yaml")
    assert done.exit_code == 1 and expected in done.stderr
    assert list((place / "outbox").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--run", "No Spaces"), "run: String should match pattern"),
        (("--from", "77"), "0 notebooks start with '77'; give one of: 00_check_readiness"),
        (("--only", "train"), "31_train"),
        (("--only", "5"), "2 notebooks start with '5'; give one of: 50_watch_telemetry, 51_drill_alerts\n"),
    ],
)
def test_a_bad_option_says_what_is_allowed_and_nothing_else(
    place: Path, options: tuple[str, str], expected: str
) -> None:
    done = call("run", "params/smoke.yaml", *options)
    assert done.exit_code == 1 and expected in done.stderr
    assert "executed notebook is kept" not in done.stderr, "nothing was executed"


def test_a_dry_run_names_every_stage_in_order_and_runs_none(place: Path) -> None:
    done = call("run", "params/smoke.yaml", "--dry-run", "--run", "elsewhere")
    assert done.exit_code == 0, done.output
    lines, stages = done.stdout.splitlines(), [stage.name for stage in pipeline.stages()]
    assert [line.split("] ")[1].split()[0] for line in lines] == stages
    assert all(line.endswith("would run: never ran") for line in lines) and len(lines) == len(stages) >= 17
    assert runs.files_below(place / "outbox/elsewhere") == []
    one = call("run", "params/smoke.yaml", "--dry-run", "--only", "31")
    assert one.stdout.splitlines() == ["[ 1/1] 31_train                   would run: never ran"]
    rest = call("run", "params/smoke.yaml", "--dry-run", "--from", "50_watch")
    assert [line.split()[2] for line in rest.stdout.splitlines()] == stages[stages.index("50_watch_telemetry") :]


# --- status


def test_status_of_a_run(run: Path) -> None:
    runs.write_json(
        run / "lock/00_check_readiness.json", {"stage": "00_check_readiness", "state": "ok", "seconds": 3.1}
    )
    failed = {"stage": "10_curate_corpus", "state": "failed", "seconds": 1.0, "error": "AssertionError: too few"}
    runs.write_json(run / "lock/10_curate_corpus.json", failed)
    done = call("status", run)
    assert done.exit_code == 0, done.output
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert lines["00_check_readiness"].split() == ["00_check_readiness", "ok", "3.1"]
    assert lines["10_curate_corpus"].split(maxsplit=3)[1:] == ["failed", "1.0", "AssertionError: too few"]
    assert "never ran" in lines["31_train"]
    assert "no checklist yet: 90_sign_off writes it" in done.stdout
    assert lines["sign-offs:"].startswith("sign-offs: lock/00_check_readiness.json: added since the seal")


def test_what_scripts_read_is_json(run: Path) -> None:
    failed = {"stage": "10_curate_corpus", "state": "failed", "seconds": 1.0, "cell": "code cell 3 of 9"}
    runs.write_json(run / "lock/10_curate_corpus.json", failed)
    checklist.write(runs.RunFolder("demo"), [ITEM])
    told = json.loads(call("status", run, "--json").stdout)
    stages = {stage["stage"]: stage for stage in told["stages"]}
    assert stages["10_curate_corpus"]["cell"] == "code cell 3 of 9" and stages["31_train"]["state"] == "never ran"
    assert told["checklist"][0]["reasons"] == ITEM["reasons"] and told["run"] == "demo" and told["problems"]
    data = json.loads(call("params", "data", "--json").stdout)["Data"]["parameters"]
    assert next(p for p in data if p["name"] == "workers")["default"] == "2"


def test_status_shows_the_checklist_and_why_an_item_is_not_green(run: Path) -> None:
    runs.write_text(run / "checklist.yaml", "")
    green = ITEM | {"id": "D2", "status": "green", "reasons": []}
    checklist.write(runs.RunFolder("demo"), [ITEM, green])
    done = call("status", run)
    assert (
        "D1  red    Curate.\n           10_curate_corpus: documents is 0, must be > 0\nD2  green  Curate.\n"
        in done.stdout
    )


@needs_keys
def test_status_says_that_demonstration_keys_approve_nothing(run: Path) -> None:
    assert call("status", run).stdout.splitlines()[-1] == f"sign-offs: {seal.LOUD}"


@needs_keys
def test_a_gate_opens_when_each_line_is_green_or_waived_and_the_run_verifies(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gate(*lines: dict[str, object], problems: tuple[str, ...] = ()) -> Result:
        monkeypatch.setattr(standing, "live", lambda folder: ([*lines], [*problems]))
        done = call("status", run, "--require-green", "--json")
        assert json.loads(done.stdout)["checklist"][: len(lines)] and call("status", run).exit_code == 0
        assert call("status", run, "--require-green").stderr == done.stderr
        return done

    assert call("status", run, "--require-green").stderr == "there is no checklist yet\nNOT GREEN\n"
    green, amber = (ITEM | {"id": name, "status": name, "reasons": []} for name in ("green", "amber"))
    waived = ITEM | {"id": "V3", "status": "waived"}
    assert gate(green).exit_code == 0 and gate(green).stderr == "green\n"
    assert gate(green, waived).exit_code == 0 and gate(green, waived).stderr == "green, 1 of 2 waived: V3\n"
    done = gate(green, ITEM, waived, amber)
    assert done.exit_code == 1
    assert done.stderr == "D1 is red: Curate.\namber is amber: Curate.\nNOT GREEN\n"
    done = gate(green, problems=("a.json: changed since the seal",))
    assert done.exit_code == 1 and done.stderr == "a.json: changed since the seal\nNOT GREEN\n"


@pytest.mark.parametrize("command", [("status",), ("book",), ("sign", "--role", "x", "--key", "x", "--reviewer", "x")])
def test_an_unknown_run_names_those_that_are_there(run: Path, command: tuple[str, ...]) -> None:
    done = call(*command, "outbox/dmeo")
    assert done.exit_code == 1
    assert done.stderr == "outbox/dmeo is not a run's folder; runs here: demo\n"
    other = call(*command, run.parents[1] / "notebooks")
    assert other.exit_code == 1 and "notebooks is not in" in other.stderr


def test_an_outbox_on_another_disk_is_reached_through_a_link(run: Path) -> None:
    disk = run.parent.rename(run.parents[1] / "disk")
    (run.parents[1] / "outbox").symlink_to(disk)
    assert call("status", "outbox/demo").exit_code == 0


def test_book_of_a_run_that_has_no_notebooks_yet(run: Path) -> None:
    done = call("book", run)
    assert done.exit_code == 1 and "outbox/demo/nb does not exist: execute the run first" in done.stderr


# --- verify and sign


@needs_keys
def test_verify_names_the_file_that_changed(run: Path) -> None:
    done = call("verify", run)
    assert (done.exit_code, done.stdout) == (0, f"{seal.LOUD}\nVERIFIED\n")
    path = run / "evidence/10_curate_corpus.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"3", b"4"))
    done = call("verify", run)
    assert done.exit_code == 1 and "VERIFIED" not in done.stdout
    assert done.stderr.splitlines() == [
        "evidence/10_curate_corpus.json: changed since the seal",
        "NOT VERIFIED: 1 problem(s)",
    ]
    path.write_bytes(content)
    assert call("verify", run).exit_code == 0


@needs_keys
def test_verify_tells_a_script_what_is_wrong_and_whose_sign_offs_count(run: Path) -> None:
    done = call("verify", run, "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 0 and told["verified"] and told["problems"] == [] and told["notice"] == seal.LOUD
    assert [(each["role"], each["reviewer"], each["decision"]) for each in told["signers"]] == [
        (role, role + seal.DEMONSTRATION, "approve") for role in seal.ROLES
    ]
    assert len({each["key"] for each in told["signers"]}) == 3
    (run / "signoffs/safety.json.sig").unlink()
    done = call("verify", run, "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 1 and not told["verified"] and "signoffs/safety.json.sig: missing" in told["problems"]
    assert [each["role"] for each in told["signers"]] == ["architecture", "infrastructure"]
    done = call("verify", run, "--json", "--trust", run)
    assert done.exit_code == 1 and json.loads(done.stdout)["signers"] == []


@needs_keys
def test_verify_against_the_real_reviewers_refuses_a_demonstration(run: Path) -> None:
    done = call("verify", run, "--trust", ROOT / "governance")
    assert done.exit_code == 1 and "approval/policy.yaml: not the policy to verify with" in done.stderr
    for role in seal.ROLES:
        assert f"is not {role}@demonstration.invalid's for the role {role}" in done.stderr


def test_verify_of_a_folder_that_is_not_there_fails(place: Path) -> None:
    done = call("verify", place / "outbox/none")
    assert done.exit_code == 1 and "none is not a run's folder" in done.stderr


@pytest.fixture
def reviewed(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run sealed under a policy of reviewers with keys of their own, and the folder of those keys."""
    keys, trust, lines = tmp_path_factory.mktemp("keys"), runs.root() / "governance", []
    for name in (*seal.ROLES, "author"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", keys / name], check=True)
        public = (keys / f"{name}.pub").read_text()
        lines.append(f'{name}@example.org namespaces="stackpkg-readiness-{name}" {public}')
    policy = (ROOT / "governance/policy.yaml").read_text()
    runs.write_text(trust / "allowed_signers", "".join(lines[:3]))
    runs.write_text(trust / "policy.yaml", f"{policy}- {public.strip()}\n")
    runs.write_text(trust / "revoked_keys", "")
    shutil.rmtree(run / "signoffs")
    assert len(seal.finish(runs.RunFolder("demo"), params.validate({"run": "demo"}))["problems"]) == 3
    return run, keys


def said(keys: Path, role: str) -> tuple[object, ...]:
    return ("--role", role, "--key", keys / role, "--reviewer", f"{role}@example.org")


@needs_keys
def test_a_reviewer_signs_with_a_key_of_their_own(reviewed: tuple[Path, Path]) -> None:
    run, keys = reviewed
    for role in seal.ROLES:
        done = call("sign", run, *said(keys, role))
        assert done.stdout.startswith(f"wrote {role}.json and {role}.json.sig\nno git tag: fatal: not a git repository")
    assert call("verify", run).stdout == "VERIFIED\n"
    assert call("status", run).stdout.splitlines()[-1] == "sign-offs: valid"
    wrong = call("sign", run, "--role", "legal", "--key", keys / "safety", "--reviewer", "safety@example.org")
    assert (
        wrong.exit_code == 1 and "unknown role 'legal'; allowed: architecture, infrastructure, safety" in wrong.stderr
    )
    missing = call("sign", run, "--role", "safety", "--key", keys / "none", "--reviewer", "safety@example.org")
    assert missing.exit_code == 1 and "could not sign" in missing.stderr


@needs_keys
def test_a_sign_off_is_tagged_in_git_and_nothing_is_pushed(reviewed: tuple[Path, Path]) -> None:
    run, keys = reviewed
    git = ["git", "-C", str(runs.root()), "-c", "user.name=x", "-c", "user.email=x@y"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert "no git tag: fatal: " in call("sign", run, *said(keys, "safety")).stdout, "nothing is committed yet"
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    for _ in range(2):
        done = call("sign", run, *said(keys, "safety"))
        name = done.stdout.splitlines()[1].split()[1].removesuffix(";")
        assert name.startswith("signoff/demo/safety-") and "push it yourself" in done.stdout
    told = subprocess.run([*git, "cat-file", "tag", name], capture_output=True, text=True, check=True).stdout
    last = (run.parent / "LOG.jsonl").read_bytes().splitlines(keepends=True)[-1]
    assert f"manifest {runs.digest(run / 'SHA256SUMS')}\nlog {hashlib.sha256(last).hexdigest()}" in told
    assert "tagger safety@example.org <safety@example.org>" in told
    tags = subprocess.run([*git, "tag", "--list"], capture_output=True, text=True, check=True).stdout.split()
    assert len(tags) == 2 and name in tags
    assert call("verify", run).stderr.count("LOG.jsonl") == 0
    (run.parent / "LOG.jsonl").unlink()
    seal.seal(run)
    told = call("verify", run).stderr
    gone = f"LOG.jsonl: the line that git's tag {name} names is gone"
    assert gone in told, "the log was written anew"
    assert gone in json.loads(call("status", run, "--json").stdout)["problems"], "and so says who reads the status"
    script = ["sh", ROOT / "governance/verify.sh", run, runs.root() / "governance"]
    assert gone in subprocess.run(script, capture_output=True, text=True, check=False).stdout


@needs_keys
def test_conditions_and_waivers_are_given_in_a_file(reviewed: tuple[Path, Path]) -> None:
    run, keys = reviewed
    for role in seal.ROLES[:2]:
        call("sign", run, *said(keys, role))
    runs.write_text(runs.root() / "params/checklist.yaml", (ROOT / "params/checklist.yaml").read_text())
    asked = runs.write_text(run.parents[1] / "terms.yaml", "conditions: [{id: C1, text: look, due: 2099-01-31}]\n")
    decided = (*said(keys, "safety"), "--decision", "approve-with-conditions")
    assert "with 0 condition(s)" in call("sign", run, *decided).stderr
    assert call("sign", run, *decided, "--terms", asked).exit_code == 0
    assert call("verify", run).stdout == "VERIFIED\n"
    note = ("--condition", "C1", "--text", "looked at it")
    assert (
        "asked for no condition 'C1'; it asked for: none" in call("met", run, *said(keys, "architecture"), *note).stderr
    )
    done = call("met", run, *said(keys, "safety"), *note)
    assert done.exit_code == 0 and "run the profile again" in done.stdout
    for text, told in (
        ("conditions: [{id: C1, text: look, due: 2020-01-31}]", "the day of C1 has passed"),
        ("conditions: [{id: C 1, text: look, due: 2099-01-31}]", "conditions.0.id"),
        ("waivers: [{item: Z9, reason: why, expires: 2099-01-31}]", "waives Z9; items: A1, A2"),
        ("waivers: [{item: V3, reson: why, expires: 2099-01-31}]", "waivers.0.reson"),
        (
            "waivers: [{item: V3, reason: why, expires: 2099-01-31}, {item: V3, reason: x, expires: 2099-01-31}]",
            "twice",
        ),
    ):
        asked.write_text(text)
        done = call("sign", run, *decided, "--terms", asked)
        assert done.exit_code == 1 and told in done.stderr, done.stderr


@needs_keys
def test_a_run_that_changed_since_its_seal_is_not_signed(run: Path) -> None:
    runs.write_text(run / "late.txt", "late")
    key = run.parent / ".demonstration/demo/safety"
    done = call("sign", run, "--role", "safety", "--key", key, "--reviewer", "safety@demonstration.invalid")
    assert done.exit_code == 1 and "late.txt: added since the seal" in done.stderr


def test_a_range_of_data_is_skipped_from_a_step_that_is_not_trained_yet(run: Path) -> None:
    assert "has no training job 'train'" in call("skip", run, "--step", "3", "--steps", "2").stderr
    home = run / "checkpoints/train"
    runs.write_json(home / "job.json", {})
    (home / "checkpoint-6").mkdir()
    late = call("skip", run, "--step", "3", "--steps", "2")
    assert late.exit_code == 1 and "checkpoint-6 has trained past step 3: set it aside first" in late.stderr
    done = call("skip", run, "--step", "6", "--steps", "2")
    assert done.exit_code == 0 and "from step 6 on, 2 steps of data are passed over" in done.stdout
    assert curriculum.decisions(home / "decisions.jsonl") == [{"kind": "skip", "step": 6, "steps": 2}]


def test_records_are_withdrawn_all_or_none(run: Path) -> None:
    shutil.copytree(corpus(), run / "data")
    first, second = documents()[:2]
    asked = ("withdraw", run, "--reason", "the author asked", "--record")
    wrong = call(*asked, first["record_id"], "--record", "no/such/file")
    assert wrong.exit_code == 1 and "nothing was withdrawn: no record 'no/such/file' in the corpus" in wrong.stderr
    assert provenance.withdrawals(run / "data/withdrawn.jsonl") == {}
    done = call(*asked, first["record_id"], "--record", second["source"])
    assert done.exit_code == 0 and "this run was sealed, and is another now" in done.stdout, done.output
    told = provenance.withdrawals(run / "data/withdrawn.jsonl")
    assert set(told) == {first["record_id"], second["record_id"]} and abs(max(told.values()) - time.time()) < 60


def test_a_version_is_demoted_and_comes_back(run: Path, tmp_path: Path) -> None:
    asked = ("demote", run, "--reason", "the loss rose in service")
    nothing = call(*asked)
    assert nothing.exit_code == 1 and "no version is in use; promoted so far: none" in nothing.stderr
    for version in ("v1", "v2"):
        runs.write_text(tmp_path / "model/config.json", json.dumps({"hidden_size": 32, "_name_or_path": version}))
        promotion.promote(run / "artifacts", tmp_path / "model", version, {}, [])
    done = call(*asked)
    assert done.exit_code == 0 and "v2 is demoted; in use: v1" in done.stdout, done.output
    assert "this run was sealed, and is another now" in done.stdout
    assert "v1 is demoted; in use: none" in call(*asked).stdout
    told = promotion.registry(run / "artifacts")
    assert told["current"] is None and told["history"][-1]["reason"] == "the loss rose in service"
    wrong = call("reinstate", run, "--version", "v3", "--reason", "a slip")
    assert wrong.exit_code == 1 and "v3 can't be current: never promoted" in wrong.stderr
    back = call("reinstate", run, "--version", "v2", "--reason", "it was the network")
    assert back.exit_code == 0 and "in use: v2" in back.stdout and "this run was sealed" in back.stdout
    assert promotion.registry(run / "artifacts")["current"] == "v2"


def test_query_answers_in_a_table_or_in_json_and_changes_nothing(run: Path) -> None:
    assert "no telemetry rows in train/" in call("query", run, "SELECT 1").stderr
    writer = RowWriter(run / "telemetry/train", "demo", 1, 0, 1)
    for step in (1, 2):
        writer.write(step, loss=math.nan if step == 2 else 1.25, note="a\nb\x1b[31m")
    writer.flush()
    before = {path: path.read_bytes() for path in runs.files_below(run)}
    said = call("query", run, "SELECT step, loss, note FROM effective ORDER BY step").stdout
    assert said.splitlines() == ["step  loss  note", "1     1.25  a b[31m", "2     nan   a b[31m"]
    lines = call("query", run, "SELECT step, loss, [loss] AS all FROM rows ORDER BY step", "--json").stdout.splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 1.25, "all": [1.25]}, {"step": 2, "loss": "NaN", "all": ["NaN"]},
    ]  # fmt: skip
    wrong = call("query", run, "SELECT lss FROM rows")
    assert wrong.exit_code == 1 and '"loss"' in wrong.stderr and "effective    of each step" in wrong.stderr
    assert call("query", run, "DROP VIEW rows").exit_code == 1
    assert {path: path.read_bytes() for path in runs.files_below(run)} == before


def test_a_live_page_is_for_this_machine_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = call("live", run, "--address", "0.0.0.0:8000")
    assert refused.exit_code == 1 and "is no address of this machine alone; give 127.0.0.1:PORT" in refused.stderr
    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    done = call("live", run)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/ follows train; Ctrl-C ends it\n", done.stdout)


def test_an_inbox_says_where_it_listens_and_that_a_port_is_taken(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "pause", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    done = call("inbox", run, "--port", "0")
    said = r"http://127\.0\.0\.1:\d+/logbook writes into outbox/demo/logbook\.md; Ctrl-C ends it\n"
    assert re.fullmatch(said, done.stdout), done.stdout
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = call("inbox", run, "--port", port)
    assert refused.exit_code == 1 and f"port {port}: " in refused.stderr and "give another --port" in refused.stderr


def test_params_tells_defaults_ranges_and_meanings() -> None:
    said = call("params", "data").stdout
    assert "Data: Curation: filters" in said and "Layout" not in said
    line = re.search(r"  filters .*", said)
    assert line and '"licences": []' in line[0] and '"gopher_quality"' in line[0], "maps show what they hold"
    assert "integer; ≥ 1; ≤ 65536; default 2" in said and "worker processes of the engine" in said
    assert all(f"\n{name}: " in f"\n{call('params').stdout}" for name in ("Params", "Source", "Snapshots"))
    assert "no section 'dta'; did you mean 'Data'? allowed: Params" in call("params", "dta").stderr


def test_trace_goes_both_ways(run: Path) -> None:
    assert "give one of --step, --document, --shard and --due" in call("trace", run).stderr
    assert "has no training job 'train'; it has none" in call("trace", run, "--step", "0").stderr
    shutil.copytree(corpus(), run / "data")
    names = ("manifest.json", "pairs.parquet", "long_range.parquet")
    job = {"params": profile().model_dump(mode="json"), "steps": 20}
    runs.write_json(
        run / "checkpoints/train/job.json", job | {"data": {n: runs.digest(run / "data" / n) for n in names}}
    )
    lines = call("trace", run, "--step", "3").stdout.splitlines()
    record = next(line for line in lines if "use text" in line).split("record_id ")[1].split()[0]
    assert "step 3  use text" in call("trace", run, "--document", record).stdout
    source = next(row["source"] for row in documents() if row["record_id"] == record)
    assert any(line.endswith(f"source {source}") for line in lines if f"record_id {record}" in line)
    assert call("trace", run, "--document", source).stdout == call("trace", run, "--document", record).stdout
    assert (
        "no record 'unknown' in the corpus. Give a record id, its source"
        in call("trace", run, "--document", "unknown").stderr
    )
    assert call("trace", run, "--due").stdout == "none\n"
    told = json.loads(call("trace", run, "--document", record, "--json").stdout)
    assert told["documents"] == [{"record_id": record, "source": source}]
    assert 3 in [row["step"] for row in told["reads"] if row["use"] == "text"] and told["newest_without"] == ""
    whole = call("trace", run, "--document", "folder:t/code1*").stdout
    named = re.findall(r"document \w+  (\S+)", whole)
    assert sorted(named) == sorted(f"folder:t/code1{k}.py" for k in ("", *range(10)))
    alone = {line for name in named for line in call("trace", run, "--document", name).stdout.splitlines()}
    steps = [line for line in whole.splitlines() if line.startswith("step ")]
    assert steps and set(steps) == {line for line in alone if line.startswith("step ")}, "those of its documents"
    due = call("withdraw", run, "--record", "folder:t/*", "--reason", "the whole folder")
    assert due.exit_code == 0 and len(provenance.withdrawals(run / "data/withdrawn.jsonl")) == len(documents())
    late = call("trace", run, "--due").stdout
    assert f"document {record}  {source}  withdrawn" in late and "step 3  use text" in late
