"""Pushing an export: all of it and nothing else, to a repository that is its own, with the client.

The hub is a server in this process, to which the hub's own client talks from a fresh process.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from spinlab.errors import InputError
from spinlab.export.listing import write_listing
from spinlab.push import main, push

TOKEN = "hf_secret_of_mine"
NAME = "me/network"
RECORD = {"experiment": "toy", "key": "0123456789abcdef"}


class Hub(ThreadingHTTPServer):
    """Keep what is committed, by branch; refuse everything where `status` is set.

    meanwhile: done once, when files begin to come.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.branches: dict[str, dict[str, bytes]] = {}
        self.private = False
        self.messages: list[str] = []
        self.status = 0
        self.meanwhile: Callable[[], object] = lambda: None
        self.url = f"http://127.0.0.1:{self.server_port}"

    def commit_of(self, branch: str) -> str:
        """Return the name of what a branch holds, by which it is found too."""
        return sha1(repr(sorted(self.branches[branch].items())).encode()).hexdigest()

    def files(self, revision: str) -> dict[str, bytes] | None:
        """Return what a branch or a commit holds; None for neither."""
        commits = {self.commit_of(branch): branch for branch in self.branches}
        return self.branches.get(commits.get(revision, revision))


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        hub, body = self.server, self._body()
        path = self.path.partition("?")[0]
        words = path.split("/")
        if hub.status:
            self._send(hub.status, {"error": "not for you"})
        elif path == "/api/repos/create":
            if hub.branches:
                self._send(409, {"url": f"{hub.url}/{NAME}", "error": "is there already"})
                return
            hub.branches["main"] = {".gitattributes": b"*.safetensors filter=lfs\n"}
            hub.private = json.loads(body).get("visibility") == "private" or bool(
                json.loads(body).get("private")
            )
            self._send(200, {"url": f"{hub.url}/{NAME}", "name": NAME})
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif "/branch/" in path:
            start = hub.files(json.loads(body)["startingPoint"])
            assert start is not None
            hub.branches[words[-1]] = dict(start)
            self._send(200, {})
        elif "/preupload/" in path:
            hub.meanwhile()
            names = [file["path"] for file in json.loads(body)["files"]]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            self._send(200, {"files": [{"path": name, **how} for name in names]})
        elif "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            if lines[0]["value"]["parentCommit"] != hub.commit_of(words[-1]):
                self._send(412, {"error": "not on top of that"})
                return
            self._commit(words[-1], lines)
            self._send(200, {"commitUrl": f"{hub.url}/{NAME}/commit/c", "commitOid": "c" * 40})
        else:
            self._send(404, {"error": path})

    def _commit(self, branch: str, lines: list[dict]) -> None:
        files = self.server.branches[branch]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        found = re.fullmatch(rf"/api/models/{NAME}(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(rf"/{NAME}/resolve/([^/]+)/(.+)", path)
        branch = (found and found[2]) or (file and file[1]) or "main"
        held = hub.files(branch)
        if hub.status:
            self._send(hub.status, {"error": "not for you"})
        elif held is None:
            self._send(404, {"error": "none"}, {"X-Error-Code": "RevisionNotFound"})
        elif file:
            headers = {"ETag": f'"{len(hub.messages)}"', "X-Repo-Commit": "c" * 40}
            self._send(200, held[file[2]], headers)
        elif found and found[1] == "tree":
            self._send(
                200,
                [{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in held.items()],
            )
        else:
            names = [{"rfilename": name} for name in held]
            about = {
                "id": NAME,
                "sha": hub.commit_of(branch),
                "private": hub.private,
                "siblings": names,
            }
            self._send(200, about)

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def _send(self, status: int, content, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def client(hub, tmp_path, monkeypatch) -> None:
    """Lead the hub's client of this process to the server, with a token."""
    files = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return an export of two files, with a note of the user's beside them."""
    place = tmp_path / "export"
    place.mkdir()
    (place / "weights.safetensors").write_bytes(b"numbers")
    write_listing(place, "artefact", RECORD)
    (place / "notes.txt").write_text("for me alone")
    return place


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "notes.txt"}


def on(hub: Hub, branch: str) -> dict[str, bytes]:
    return {n: b for n, b in hub.branches[branch].items() if n != ".gitattributes"}


def test_the_command_uploads_an_export_and_never_says_the_token(hub, folder, tmp_path):
    inherited = {n: v for n, v in os.environ.items() if not n.startswith("HF_")}
    here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    done = subprocess.run(
        [sys.executable, "-m", "spinlab.push", str(folder), NAME, "--private"],
        env=inherited | here,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{hub.url}/{NAME}/commit/c\n"
    assert hub.private and on(hub, "main") == contents(folder)
    assert TOKEN.encode() not in b"".join(hub.branches["main"].values())


def test_a_later_export_takes_the_place_of_an_earlier_one(hub, folder):
    push(folder, NAME)
    own = contents(folder)
    assert own.keys() == {"weights.safetensors", "README.md", "manifest.json"}
    assert on(hub, "main") == own and not hub.private
    assert hub.messages == ["Upload the artefact of toy (0123456789abcdef)"]

    (folder / "notes.txt").unlink()
    (folder / "weights.safetensors").rename(folder / "other.safetensors")
    write_listing(folder, "artefact", RECORD)
    push(folder, NAME, revision="next")
    assert on(hub, "main") == own
    assert on(hub, "next") == contents(folder)


def test_a_repository_with_something_else_is_left_alone(hub, folder):
    hub.branches["main"] = {".gitattributes": b"", "model.safetensors": b"of another"}
    with pytest.raises(InputError, match=r"holds model.safetensors, which is not of an earlier"):
        push(folder, NAME, revision="next")
    hub.branches["main"] = {"manifest.json": b'{"name": "of another program"}'}
    with pytest.raises(InputError, match=r"holds manifest.json, which is not of an earlier"):
        push(folder, NAME)
    assert hub.branches.keys() == {"main"} and not hub.messages
    hub.branches["main"] = {}
    with pytest.raises(InputError, match="is there and public"):
        push(folder, NAME, private=True)


def test_a_repository_that_becomes_another_meanwhile_is_left_alone(hub, folder):
    hub.branches["main"] = {}
    hub.meanwhile = lambda: hub.branches["main"].update({"model.safetensors": b"of another"})
    with pytest.raises(InputError, match=f"{NAME} was changed by someone else meanwhile: run it"):
        push(folder, NAME)
    assert on(hub, "main") == {"model.safetensors": b"of another"} and not hub.messages


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "does not know this token: log in again"),
        (403, f"this token may not write to {NAME}"),
        (500, "the hub refused to take .*: try again later"),
    ],
)
def test_a_refusal_is_one_sentence(hub, folder, status, words):
    hub.status = status
    with pytest.raises(InputError, match=words) as mistake:
        push(folder, NAME)
    assert "\n" not in str(mistake.value) and TOKEN not in str(mistake.value)


def test_without_token_or_network_there_is_a_sentence(hub, folder, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"the hub cannot be reached \(ConnectError\): connect"):
        push(folder, NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"the hub is switched off \(HF_HUB_OFFLINE\)"):
        push(folder, NAME)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SystemExit) as end:
        main([str(folder), NAME])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "spinlab.push: there is no token for the hub: log in with `hf auth login`, or set "
        "HF_TOKEN\n"
    )


@pytest.mark.parametrize("name", ["a/b/c", "na me", "-a/b"])
def test_what_is_no_name_is_told_so(folder, name):
    with pytest.raises(InputError, match="is no repository's name: write owner/name"):
        push(folder, name)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"key": "k"}, "Upload the artefact"),
        ({}, "Upload the artefact"),
        ({"key": "k", "experiment": "toy"}, "Upload the artefact of toy (k)"),
    ],
)
def test_an_export_says_of_its_run_what_it_knows(hub, folder, record, told):
    write_listing(folder, "artefact", record)
    push(folder, NAME)
    assert hub.messages == [told]


def test_only_a_whole_export_is_pushed(monkeypatch, folder, tmp_path):
    monkeypatch.setattr("spinlab.push.HfApi", None)  # it is not asked for anything
    (tmp_path / "other").mkdir()
    altered = shutil.copytree(folder, tmp_path / "altered")
    (altered / "weights.safetensors").write_bytes(b"other numbers")
    cut = shutil.copytree(folder, tmp_path / "cut")
    (cut / "README.md").unlink()
    rotated = shutil.copytree(folder, tmp_path / "rotated")
    (rotated / "manifest.json").unlink()
    (rotated / "transform.safetensors").write_bytes(b"rotations")
    able = "export.artefact, export.checkpoint and export.compressed_tensors write what can be"
    for place, words in (
        ("missing", "is no folder: name one that an export wrote"),
        ("other", r"holds no manifest\.json: name a folder that an export wrote"),
        ("altered", r"weights\.safetensors changed since it was exported"),
        ("cut", r"lacks README\.md"),
        ("rotated", f"was written by export.transformed: {able} pushed"),
        ("export/notes.txt", f"is a file: {able} pushed"),
    ):
        with pytest.raises(InputError, match=words):
            push(tmp_path / place, NAME)
