"""What changes the key of a stage: statements of the code behind it, and nothing else."""

import gc
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import spinlab
from spinlab import code
from spinlab.code import closure, code_digest

STAGES = ["spinlab.stages.rotate", "spinlab.stages.learn", "spinlab.stages.weights"]


@pytest.fixture(scope="module")
def digests(tmp_path_factory):
    """Return a function that digests stages after an edit of a copy of the package."""
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(
        Path(spinlab.__file__).parent,
        root / "spinlab",
        ignore=lambda folder, names: [n for n in names if "." in n and not n.endswith(".py")],
    )
    words = f"from spinlab.code import code_digest as d; print(*map(d, {STAGES}))"

    @cache  # the digests of an unchanged copy are asked for by most tests
    def found(file: str, edit=lambda text: text) -> list[str]:
        path = root / "spinlab" / file
        text = path.read_text(encoding="utf-8")
        path.write_text(edit(text), encoding="utf-8")
        run = [sys.executable, "-c", words]
        out = subprocess.run(run, cwd=root, env={"PYTHONPATH": str(root)}, capture_output=True)
        path.write_text(text, encoding="utf-8")
        assert out.returncode == 0, out.stderr
        return out.stdout.decode().split()

    return found


def test_the_digest_of_a_copy_is_that_of_the_package(digests):
    assert digests("device.py") == [code_digest(name) for name in STAGES]


def test_comments_docstrings_and_line_breaks_change_no_digest(digests):
    def edit(text: str) -> str:
        told = text.replace('"""', '"""Told anew. ', 1) if text.startswith('"""') else text
        return "# a comment\n\n\n" + told.replace("import ", "import  ")

    before = digests("device.py")
    for file in ("device.py", "formats/integer.py", "model/families/blocked.py", "stages/learn.py"):
        assert digests(file, edit) == before, file


@pytest.mark.parametrize("file", ["config/outputs.py", "track/trackers.py", "experiment.py"])
def test_what_only_reports_changes_no_digest(digests, file):
    assert digests(file, lambda text: text + "\nNEW_SETTING = 1\n") == digests("device.py")


@pytest.mark.parametrize("file", ["device.py", "formats/integer.py", "model/load.py"])
def test_a_statement_behind_every_stage_changes_every_digest(digests, file):
    before, after = digests("device.py"), digests(file, lambda text: text + "\nNEW = 1\n")
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_a_statement_in_one_stage_leaves_those_before_it_alone(digests):
    before = digests("device.py")
    after = digests("learn/optim/cayley.py", lambda text: text + "\nNEW = 1\n")
    assert [a == b for a, b in zip(before, after, strict=True)][:2] == [True, False]


def test_the_closure_goes_through_functions_and_the_faces_of_packages():
    found = closure("spinlab.kv.codecs")
    assert "spinlab.formats.integer_kernels" in found  # imported inside a function
    assert "spinlab.config.kv" in found  # through the face of spinlab.config
    assert not found & {"spinlab.config", "spinlab.config.outputs"}
    assert all(name.startswith("spinlab.") for name in found)


def test_a_stage_does_not_depend_on_what_comes_after_it_or_beside_it():
    def rooms(stage: str) -> set[str]:
        return {name.split(".")[1] for name in closure(f"spinlab.stages.{stage}") if "." in name}

    assert not rooms("learn") & {
        "runtime",
        "evaluate",
        "export",
        "track",
    }  # kernels cost no GPU day
    assert not rooms("weights") & {"learn", "runtime", "evaluate"}
    assert not rooms("rotate") & {"learn", "weights", "runtime"}
    assert not rooms("text") & {"rotation", "formats", "learn"}


def test_no_syntax_tree_is_kept_for_every_collection_to_walk():
    """A run's code has some 200 thousand nodes."""
    for kept in (code_digest, closure, code.imports_of, code._code):
        kept.cache_clear()
    gc.collect()
    before = len(gc.get_objects())
    code_digest("spinlab.experiment")
    gc.collect()
    assert len(gc.get_objects()) - before < 20_000
