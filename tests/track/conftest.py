"""Stands in for W&B's server on this machine: its own uploads are tried without a network.

It answers the few requests that they need and keeps what came in; whatever else it is asked gets an
empty answer.
"""

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest


class Service:
    """What was uploaded: the run as it was made, the rows of its history, artifacts and files."""

    def __init__(self) -> None:
        self.run: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        handler = type("Answers", (_Answers,), {"service": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def sync(self, run: Path) -> subprocess.CompletedProcess[str]:
        """Upload an offline run with W&B's own command."""
        command = [sys.executable, "-m", "wandb", "sync", str(run)]
        # its log would lie in this folder's wandb/
        environment = os.environ | self.environment | {"WANDB_DIR": str(run.parent)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40}

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        """Answer one operation of GraphQL."""
        if operation == "UpsertBucket":
            self.run = self.run or given
            project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "x", "name": given["name"], "project": project, "config": "{}"}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "CreateRunFiles":
            files = [{"name": n, "uploadUrl": f"{self.url}/put/{n}"} for n in given["files"]]
            return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}
        if operation == "CreateArtifact":
            made = given["input"]
            self.artifacts[made["artifactCollectionName"]] = made
            sequence = {"id": "s", "latestArtifact": None}
            known = {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}
            return {"createArtifact": {"artifact": known}}
        who = {"id": "u", "username": "me", "entity": "me", "admin": False, "flags": "{}"}
        none = {"edges": []}
        return {"viewer": {**who, "teams": none, "apiKeys": none}, "project": None}

    def stream(self, files: dict[str, Any]) -> None:
        """Take lines that are added to files."""
        lines = files.get("wandb-history.jsonl", {}).get("content", [])
        self.rows += [json.loads(line) for line in lines]


class _Answers(BaseHTTPRequestHandler):
    service: ClassVar[Service]

    def do_POST(self) -> None:
        body, answer = self._body(), {}
        if self.path == "/graphql":
            asked = {"variables": {}, **json.loads(body)}
            answer = {"data": self.service.answer(asked["operationName"], asked["variables"])}
        elif self.path.endswith("/file_stream"):
            self.service.stream(json.loads(body).get("files") or {})
        self._reply(answer)

    def do_PUT(self) -> None:
        self.service.files[self.path.removeprefix("/put/")] = self._body()
        self._reply({})

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        return gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body

    def _reply(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def service() -> Iterator[Service]:
    running = Service()
    yield running
    running.close()
