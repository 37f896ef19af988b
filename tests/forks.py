"""Run commands in processes of their own, of which none has to import torch again.

Run as a script this imports what every command imports, and digests the code, once. It then forks a
process for each command that it is given as a line of JSON, and tells in what status one ended. A
test that asks what a command imports, or how much memory it takes, starts one of its own instead.
"""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class Forks:
    """The process that forks; it starts with the first command."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def start(self, folder: Path, module: str, *words: str) -> "Fork":
        """Start `python -m module words`, which reads nothing and does without the hub.

        What it writes is kept in a new folder below the one that is given.
        """
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        if self._process is None:
            command = [sys.executable, __file__]
            told: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": environment}
            self._process = subprocess.Popen(command, cwd=ROOT, text=True, **told)
        place = folder / f"fork-{len(list(folder.glob('fork-*')))}"
        place.mkdir(parents=True)
        return Fork(self, self.ask(str(place), module, words, environment), place)

    def ask(self, *words: object) -> Any:
        """Send a line, and return what is answered."""
        assert self._process and self._process.stdin and self._process.stdout
        print(json.dumps(words), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()


@dataclass
class Fork:
    """One command, with as much of `subprocess.Popen` as tests use."""

    forks: Forks
    pid: int
    place: Path
    returncode: int | None = field(default=None, init=False)

    def poll(self) -> int | None:
        return self._ended(os.WNOHANG)

    def wait(self) -> int | None:
        return self._ended(0)

    def communicate(self) -> tuple[str, str]:
        """Wait for its end; return what it wrote to stdout and stderr."""
        self.wait()
        return (self.place / "stdout").read_text(), (self.place / "stderr").read_text()

    def _ended(self, options: int) -> int | None:
        if self.returncode is None:
            self.returncode = self.forks.ask(self.pid, options)
        return self.returncode


def _fork(stream: Any) -> tuple[str, str, list[str], dict[str, str]]:
    """Answer lines; return in a forked process, with what it has to do."""
    for line in stream:
        first, *told = json.loads(line)
        if isinstance(first, int):  # a process, and how to wait for it
            pid, status = os.waitpid(first, *told)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif not (answer := os.fork()):
            return first, *told
        print(json.dumps(answer), flush=True)
    sys.exit()


def _become(place: str, module: str, words: list[str], environment: dict[str, str]) -> None:
    """Run a module as Python does that has been started with it."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in enumerate(("stdout", "stderr"), start=1):
        os.dup2(os.open(f"{place}/{name}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin = open(0)  # noqa: SIM115 - the old one may hold lines that are not for it
    sys.argv, sys.path[0] = [module, *words], str(ROOT)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _main() -> None:
    from spinlab import experiment  # noqa: F401
    from spinlab.code import code_digest
    from spinlab.collector import leave_modules
    from spinlab.stages import pipeline

    code_digest(pipeline.__name__)
    leave_modules()  # a command's own collections would copy all that is shared with it
    _become(*_fork(sys.stdin))


if __name__ == "__main__":
    _main()
