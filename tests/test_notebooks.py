"""Notebooks: each runs as a script, its claims hold, and what is committed was made of it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "notebooks").glob("[0-9]*.py"))
NAMES = [source.stem for source in SOURCES]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """notebooks/build.py, which is no part of the package."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("build", ROOT / "notebooks" / "build.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_it_runs_as_a_script_and_leaves_nothing_behind(source, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    done = subprocess.run(
        [sys.executable, str(source)],
        cwd=tmp_path / "here",
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "temporary")},
        capture_output=True,
        text=True,
        timeout=300,  # under a minute on two cores of its own
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list((tmp_path / "here").iterdir())
    left = [p for p in (tmp_path / "temporary").iterdir() if not p.name.startswith("torchinductor")]
    assert not left


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_the_committed_notebook_is_that_of_its_source(source, build):
    target = source.with_suffix(".ipynb")
    found = nbformat.read(target, as_version=4)
    nbformat.validate(found)
    expected = build.read_source(source)
    for one, other in zip(found.cells, expected.cells, strict=True):
        assert (one.cell_type, one.id, one.source) == (other.cell_type, other.id, other.source)
    assert target.stat().st_size <= build.LARGEST
    code = [cell for cell in found.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {o.output_type for o in outputs} == {"stream", "execute_result"}
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert not re.search(r"/(tmp|home|root|work|Users)/", json.dumps(outputs))


def test_there_are_five_and_each_has_formulas_and_ends_with_words():
    assert [name[0] for name in NAMES] == list("12345")
    for source in SOURCES[:4]:
        assert "$$" in source.read_text(encoding="utf-8")
    for source in SOURCES:
        assert source.read_text(encoding="utf-8").rpartition("# %%")[2].startswith(" [markdown]")
