"""A promoted version on a hub: the real client against a server on this machine that keeps what it is sent."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from typer.testing import CliRunner

from stackpkg import cli, runs
from stackpkg.governance import release
from stackpkg.runs import RunFolder
from stackpkg.training import promotion

TOKEN, NAME = "hf_" + "x" * 20, "lab/small"


class Hub(ThreadingHTTPServer):
    """What a hub keeps of one repository: commits, each a dictionary of files, and tags."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, dict[str, bytes]] = {"0" * 40: {".gitattributes": b"*.safetensors filter=lfs\n"}}
        self.main, self.messages = "0" * 40, [""]
        self.tags: dict[str, str] = {}
        self.large: dict[str, bytes] = {}
        self.made = self.breaks = False
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    """The routes that a push calls, as huggingface_hub 2.4 calls them."""

    server: Hub

    def log_message(self, *_: object) -> None: ...

    def answer(self, told: object, code: int = 200) -> None:
        body = json.dumps(told).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do(self) -> None:
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/large/"):
            hub.large[path.rpartition("/")[2]] = body
            return self.answer({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401)
        api = f"/api/models/{NAME}/"
        if path == "/api/repos/create":
            assert json.loads(body)["visibility"] == "private"
            hub.made, known = True, hub.made
            return self.answer({"url": f"{hub.url}/{NAME}"}, 409 if known else 200)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == f"/{NAME}.git/info/lfs/objects/batch":
            wanted = json.loads(body)["objects"]
            return self.answer({"transfer": "basic", "objects": [self.upload(one) for one in wanted]})
        what, _, rest = path.removeprefix(api).partition("/")
        if what == "refs":
            tags = [{"name": k, "ref": f"refs/tags/{k}", "targetCommit": v} for k, v in hub.tags.items()]
            return self.answer({"branches": [], "converts": [], "tags": tags})
        if what == "tree":
            files = hub.commits[hub.main if rest == "main" else rest]
            return self.answer([self.entry(name, content) for name, content in files.items()])
        if what == "preupload":
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in self.paths(body)}
            return self.answer(
                {"files": [{"path": k, "uploadMode": v, "shouldIgnore": False} for k, v in modes.items()]}
            )
        if what == "commit":
            return self.commit(body)
        if what == "tag":
            hub.tags[json.loads(body)["tag"]] = rest
            return self.answer({})
        return self.answer({"error": f"no route {path}"}, 404)

    do_GET = do_POST = do_PUT = do

    def paths(self, body: bytes) -> list[str]:
        return [file["path"] for file in json.loads(body)["files"]]

    def upload(self, wanted: dict[str, object]) -> dict[str, object]:
        return wanted | {"actions": {"upload": {"href": f"{self.server.url}/large/{wanted['oid']}"}}}

    def entry(self, name: str, content: bytes) -> dict[str, object]:
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        found: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": oid}
        if name.endswith(".safetensors"):
            found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return found

    def commit(self, body: bytes) -> None:
        hub, files = self.server, dict(self.server.commits[self.server.main])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                hub.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = hub.large[value["oid"]]
                files[value["path"]] = content[:-1] + b"\0" if hub.breaks else content
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        hub.main = hashlib.sha1(body + hub.main.encode()).hexdigest()
        hub.commits[hub.main] = files
        self.answer({"commitUrl": f"{hub.url}/{NAME}/commit/{hub.main}", "commitOid": hub.main})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own, that the hub alone speaks
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(runs, "root", lambda: tmp_path)
    made = RunFolder("lab")
    promote(made, "v1", 1.0)
    return made


def promote(folder: RunFolder, version: str, value: float, **more: str) -> None:
    candidate = folder.path / "candidate"
    candidate.mkdir(parents=True, exist_ok=True)
    (candidate / "config.json").write_text(json.dumps({"model_type": "stackpkg"}))
    for name, text in more.items():
        (candidate / name).write_text(text)
    save_file({"weight": torch.full((4, 4), value)}, candidate / "model.safetensors")
    assert promotion.promote(folder.path / "artifacts", candidate, version, {}, [], card=f"# {version}\n")


def bytes_of(folder: RunFolder, version: str) -> dict[str, bytes]:
    place = folder.path / "artifacts" / version
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in runs.files_below(place)}


def kept(hub: Hub, commit: str) -> dict[str, bytes]:
    return {name: content for name, content in hub.commits[commit].items() if name != ".gitattributes"}


def test_what_arrives_is_what_was_promoted(hub: Hub, folder: RunFolder) -> None:
    commit = release.push(folder, NAME)
    assert kept(hub, commit) == bytes_of(folder, "v1")
    assert {"README.md", "config.json", "model.safetensors"} <= kept(hub, commit).keys()
    assert hub.tags == {"v1": commit}
    assert hub.messages[-1] == f"lab v1, sha256 {runs.digest(folder.path / 'artifacts/v1')}"


def test_the_same_again_changes_nothing(hub: Hub, folder: RunFolder) -> None:
    assert release.push(folder, NAME) == release.push(folder, NAME)
    assert len(hub.commits) == 2


def test_a_later_version_replaces_every_file(hub: Hub, folder: RunFolder) -> None:
    promote(folder, "v2", 2.0, old="goes with v3")
    first = release.push(folder, NAME)
    (folder.path / "candidate/old").unlink()
    promote(folder, "v3", 3.0)
    second = release.push(folder, NAME)
    assert "old" in kept(hub, first)
    assert kept(hub, second) == bytes_of(folder, "v3")
    assert hub.tags == {"v2": first, "v3": second}


def test_a_version_on_the_hub_stays_what_it_is(hub: Hub, folder: RunFolder) -> None:
    first, other = release.push(folder, NAME), RunFolder("other")
    promote(other, "v1", 2.0)
    with pytest.raises(ValueError, match=r"has another v1, see model\.safetensors; a run has its own repository"):
        release.push(other, NAME)
    assert hub.main == first


def test_what_breaks_on_the_way_is_not_tagged(hub: Hub, folder: RunFolder) -> None:
    hub.breaks = True
    with pytest.raises(ValueError, match=r"does not hold v1 as it is here, see model\.safetensors; push again"):
        release.push(folder, NAME)
    assert not hub.tags
    hub.breaks = False
    assert hub.tags == {"v1": release.push(folder, NAME)}


def test_what_is_not_promoted_stays_here(hub: Hub, folder: RunFolder) -> None:
    with (folder.path / "artifacts/v1/config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ValueError, match="v1 changed since it was promoted"):
        release.push(folder, NAME)
    promotion.demote(folder.path / "artifacts", "test")
    with pytest.raises(ValueError, match="nothing of outbox/lab is promoted"):
        release.push(folder, NAME)
    assert not hub.made


@pytest.mark.parametrize(
    ("token", "endpoint", "said"),
    [(TOKEN, "", " is what was promoted"), ("hf_wrong", "", "Invalid"), (TOKEN, "http://127.0.0.1:9", "refused")],
)
def test_the_command_tells_and_keeps_the_token_to_itself(
    hub: Hub, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, token: str, endpoint: str, said: str
) -> None:
    monkeypatch.setattr(cli, "root", runs.root)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint or hub.url)
    monkeypatch.setenv("HF_TOKEN", token)
    done = CliRunner().invoke(cli.app, ["push", str(folder.path), NAME])
    assert said in done.output
    assert done.exit_code == (not said.startswith(" is"))
    assert token not in done.output
    assert isinstance(done.exception, SystemExit | None)
