"""Hub repositories: from the local cache, from a hub that runs in this process, or refused."""

import json
import os
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from spinlab.config import ModelConfig
from spinlab.errors import InputError
from spinlab.model.hub import snapshot
from spinlab.model.load import (
    check_model,
    describe_model,
    load_model,
    load_tokenizer,
    meta_model,
    source_digest,
    tokenizer_digest,
)

COMMIT, OTHER = "0123456789" * 4, "fedcba9876" * 4
NAME = "owner/tiny"


def repository(revision: str = "main", hub: str = NAME) -> ModelConfig:
    return ModelConfig(weights="pretrained", hub=hub, revision=revision)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache, which is all there is: no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def lay_out(cache: Path, folder: Path, commit: str = COMMIT, refs: tuple[str, ...] = ()) -> Path:
    """Lay a folder out as the hub's client does: blobs, links to them, names of the commit."""
    place = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = place / "snapshots" / commit
    for part in (snapshot, place / "blobs", place / "refs"):
        part.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        blob = place / "blobs" / f"{file.name}-{commit}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    for ref in refs:
        (place / "refs" / ref).write_text(commit)
    return snapshot


def described(config: ModelConfig) -> dict:
    return describe_model(config, meta_model(config, None))


def commit_of(config: ModelConfig) -> str:
    """Return the commit that a record cites."""
    return described(config)["source"]["commit"]


@pytest.mark.parametrize("revision", ["main", "v1.0", COMMIT])
def test_a_repository_loads_from_the_cache_by_name_branch_and_commit(cache, folder, revision):
    lay_out(cache, folder, refs=("main", "v1.0"))
    config = repository(revision)
    local = ModelConfig(weights="pretrained", path=str(folder))
    assert source_digest(config) == source_digest(local)  # and share every stage
    assert tokenizer_digest(config) == tokenizer_digest(local)
    assert described(config)["source"] == {"hub": NAME, "commit": COMMIT}
    ids = torch.tensor([load_tokenizer(config, None)("a text")["input_ids"]])
    found, expected = (load_model(c, None, 0)(ids).logits for c in (config, local))
    assert torch.equal(found, expected)


def test_each_revision_has_its_own_commit(cache, folder, save_checkpoint, tmp_path):
    save_checkpoint(tmp_path / "other", tie_word_embeddings=True)
    lay_out(cache, folder, COMMIT, refs=("main",))
    lay_out(cache, tmp_path / "other", OTHER, refs=("dev",))
    assert commit_of(repository("main")) == COMMIT
    assert commit_of(repository("dev")) == OTHER
    assert described(repository("dev"))["tied"]


@pytest.mark.parametrize("revision", ["dev", OTHER])
def test_what_is_not_in_the_cache_fails_at_once_when_offline(cache, folder, revision):
    lay_out(cache, folder, refs=("main",))
    start = time.perf_counter()
    with pytest.raises(
        InputError, match=r"switched off \(HF_HUB_OFFLINE\).*model.path="
    ) as mistake:
        check_model(repository(revision))
    assert f"{NAME} at {revision}" in str(mistake.value)
    assert time.perf_counter() - start < 2


def test_a_hub_out_of_reach_is_asked_once(cache, folder, monkeypatch):
    """Its own client would try for 23 s a file."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.perf_counter()
    with pytest.raises(InputError, match="cannot be reached"):
        check_model(repository())
    lay_out(cache, folder, refs=("main",))
    assert commit_of(repository()) == COMMIT
    assert time.perf_counter() - start < 5


def test_a_cached_repository_without_weights_is_not_whole(cache, folder):
    (folder / "model.safetensors").unlink()
    lay_out(cache, folder, refs=("main",))
    with pytest.raises(InputError, match="not whole, in the local cache"):
        check_model(repository())


@pytest.mark.parametrize("hub", ["a/b/c", "/a/folder", "~/folder", "owner/na me"])
def test_what_is_no_repository_name_is_told_so(cache, hub):
    with pytest.raises(InputError, match="is no repository's name, which is owner/name"):
        check_model(repository(hub=hub))


@pytest.mark.parametrize("revision", ["", "..", "../main", "/main"])
def test_what_is_no_revision_is_told_so(cache, revision):
    with pytest.raises(InputError, match=r"model.revision=.* is no name"):
        check_model(repository(revision))


# a hub in this process ---------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """Serve one folder as a repository, or refuse it with an error code of the hub's."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.sent = folder, []
        self.refusal: tuple[int, str] | None = None
        self.refused = "/"  # paths that begin so


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, hub = self.path.partition("?")[0], self.server
        names = sorted(file.name for file in hub.folder.iterdir())
        if hub.refusal and path.startswith(hub.refused):
            self._send(hub.refusal[0], b"", {"X-Error-Code": hub.refusal[1]})
        elif path.startswith(f"/api/models/{NAME}/revision/"):
            about = {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            self._send(200, json.dumps(about).encode())
        elif path.startswith(f"/api/models/{NAME}/tree/"):
            size = {n: (hub.folder / n).stat().st_size for n in names}
            files = [{"type": "file", "path": n, "size": size[n], "oid": n} for n in names]
            self._send(200, json.dumps(files).encode())
        else:
            name = path.rpartition("/")[2]
            if self.command == "GET":
                hub.sent.append(name)
            headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
            self._send(200, (hub.folder / name).read_bytes(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub(cache, folder, monkeypatch):
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    files = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    yield server
    server.shutdown()
    server.server_close()


def test_a_download_takes_what_is_read_and_no_more(hub, folder, monkeypatch):
    for extra in ("consolidated.safetensors", "pytorch_model.bin", "code.py", "README.md"):
        (folder / extra).write_bytes(b"not wanted")
    assert commit_of(repository()) == COMMIT
    files = {"config.json", "generation_config.json", "model.safetensors"}
    assert set(hub.sent) == {*files, "tokenizer.json", "tokenizer_config.json"}
    snapshot.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # by the branch's name too
    assert commit_of(repository()) == COMMIT


def test_shards_are_downloaded_as_their_index_names_them(hub, folder, save_checkpoint):
    (folder / "model.safetensors").unlink()
    save_checkpoint(folder, size="40KB")
    shards = {file.name for file in folder.glob("model-*.safetensors")}
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"left over")
    assert len(shards) > 1
    assert shards <= source_digest(repository()).keys()
    assert {name for name in hub.sent if name.startswith("model-")} == shards


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "GatedRepo", "is gated: ask for access"),
        (401, "RepoNotFound", "does not exist, or is private"),
        (404, "RepoNotFound", "does not exist, or is private"),
        (404, "RevisionNotFound", "has no model.revision=main"),
        (503, "", "cannot be reached"),
    ],
)
def test_a_refusal_of_the_hub_is_one_sentence(hub, status, code, words):
    hub.refusal = (status, code)
    with pytest.raises(InputError, match=words) as mistake:
        check_model(repository())
    assert "\n" not in str(mistake.value)


def test_a_gated_repository_may_be_seen_and_not_read(hub):
    hub.refusal, hub.refused = (403, "GatedRepo"), f"/{NAME}/"
    with pytest.raises(InputError, match=r"is gated: ask for access there and log in .*model.path"):
        check_model(repository())


def test_a_repository_that_the_hub_no_longer_shows_is_taken_from_the_cache(hub, cache, folder):
    lay_out(cache, folder, refs=("main",))
    hub.refusal = (404, "RepoNotFound")
    assert commit_of(repository()) == COMMIT
