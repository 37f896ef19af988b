"""docs/extending.md keeps its word: each addition is a file and a line, and runs on the toy."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```(python|sh)\n(.*?)```", re.S)
FILE = re.compile(r"# (spinlab/\S+\.py)\n")
LINE = re.compile(r"# in (\w+) of (spinlab/\S+\.py)\n")
SMALL = ["tracker=none", "eval.tasks=[]", "eval.variants=[fp,fake]", "eval.max_windows=1"]

# Run the commands of a page, then show what came of them, in one process: what takes long is to
# import torch.
RUNNER = """
import json, sys
from pathlib import Path
from spinlab.compose import composed
from spinlab.experiment import run
from spinlab.report.__main__ import main
from spinlab.report.pages import rebuilt

found = {}
for command in json.loads(sys.argv[1]):
    found[" ".join(command)] = dict(run(composed(*command), command).metrics)
record = next(Path("runs").rglob("record.json"))
main(["figure=stages", f"run={record.parent}", "out=stages.pdf"])
table = rebuilt("<!-- table: seconds runs -->\\n<!-- end -->", Path("."))
print("FOUND" + json.dumps([found, table]))
"""


def sections() -> dict[str, str]:
    """Return the sections of the page that show code, by their heading."""
    parts = re.split(r"^## (.+)\n", PAGE, flags=re.M)[1:]
    return {head: text for head, text in zip(parts[::2], parts[1::2], strict=True)}


def extend(root: Path, text: str) -> tuple[list[str], list[list[str]]]:
    """Add a section's files and lines below a root; return the lines, and its commands."""
    added: list[str] = []
    commands: list[list[str]] = []
    for kind, block in BLOCK.findall(text):
        if kind == "sh":
            commands += [line.split()[1:] for line in block.splitlines()]
        elif match := FILE.match(block):
            path = root / match[1]
            assert not path.exists(), f"{match[1]} is there already"
            path.write_text(block[match.end() :], encoding="utf-8")
        else:
            match = LINE.match(block)
            assert match, block
            added += _add_line(root / match[2], match[1], block[match.end() :])
    return added, commands


def _add_line(path: Path, table: str, block: str) -> list[str]:
    """Put imports before the first import of spinlab, and the entries at the table's end."""
    imports = [line for line in block.splitlines() if line.startswith(("from ", "import "))]
    entries = [line for line in block.splitlines() if line.startswith("    ")]
    text = path.read_text(encoding="utf-8")
    if imports:
        text = text.replace("from spinlab.", "\n".join(imports) + "\nfrom spinlab.", 1)
    start = re.search(rf"^(class )?{table}\b.*$", text, re.M)
    assert start, f"{path} has no {table}"
    if start[1]:  # a dataclass: before its first method, or at its end
        found = re.compile(r"\n\n(    def |\n)").search(text, start.end())
        assert found, table
        end = found.start()
        text = f"{text[:end]}\n{chr(10).join(entries)}{text[end:]}"
    else:
        text = f"{text[: start.end()]}\n{chr(10).join(entries)}{text[start.end() :]}"
    path.write_text(text, encoding="utf-8")
    return entries


@pytest.fixture(scope="module")
def extended(tmp_path_factory, short_text) -> tuple[Path, dict[str, dict[str, float]], str]:
    """Return a copy of the repository with every addition of the page, and what its runs gave.

    That is their metrics, and a table of them.
    """
    root = tmp_path_factory.mktemp("extended")
    for folder in ("spinlab", "conf"):
        shutil.copytree(ROOT / folder, root / folder)
    commands = [c for text in sections().values() for c in extend(root, text)[1]]
    paths = [f"paths.cache={root / 'cache'}", f"paths.runs={root / 'runs'}"]
    more = [*SMALL, *paths, short_text[0]]  # to calibrate on
    words = json.dumps([[*command, *more] for command in commands])
    env = {**os.environ, "PYTHONPATH": str(root)}
    run = [sys.executable, "-c", RUNNER, words]
    done = subprocess.run(run, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found, table = json.loads(done.stdout.split("FOUND")[1])
    return root, {" ".join(c): m for c, m in zip(commands, found.values(), strict=True)}, table


def test_every_addition_is_one_file_and_one_line(tmp_path):
    shutil.copytree(ROOT / "spinlab", tmp_path / "spinlab")
    for name, text in sections().items():
        before = set(tmp_path.rglob("*.py"))
        lines, _ = extend(tmp_path, text)
        assert len(set(tmp_path.rglob("*.py")) - before) == 1, name
        assert len(lines) == 1, name


def test_every_addition_runs_and_its_integers_pass_the_gate(extended):
    _, found, _ = extended
    assert len(found) >= 8
    for command, metrics in found.items():
        least = metrics["ppl/wiki/fp"] if "model=random" not in command else 200  # of 256 bytes
        assert least < metrics["ppl/wiki/fake"] < 300, command
        assert metrics["invariance/fake"] < 1e-6, command


def test_additions_do_what_they_say(extended):
    root, found, table = extended
    assert (root / "r1.npy").stat().st_size > 0
    (latest,) = (root / "runs").rglob("latest.json")
    told = json.loads(latest.read_text())
    assert told["network"] == "fake"
    assert {"ppl/wiki", "bits/kv"} <= told.keys()
    (signs,) = (m for command, m in found.items() if "signs" in command)
    assert signs["bits/kv/fake"] < 4
    assert "| eval-fake" in table
    assert (root / "stages.pdf").read_bytes().startswith(b"%PDF")
