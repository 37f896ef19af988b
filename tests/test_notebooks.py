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


# Run each script in a process of its own, of which none has to import torch again or read all code.
RUNNER = """
import os, runpy, sys, tempfile
from pathlib import Path
import matplotlib.pyplot, spinlab.experiment
from spinlab.code import code_digest
from spinlab.collector import leave_modules

code_digest("spinlab.stages.pipeline")
leave_modules()  # collections of a script would copy all that it shares
for place, script in zip(sys.argv[1::2], sys.argv[2::2]):
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        (Path(place) / "code").write_text(str(code))
        continue
    os.dup2(os.open(f"{place}/stderr", os.O_WRONLY | os.O_CREAT), 2)
    os.chdir(f"{place}/here")
    os.environ["TMPDIR"], tempfile.tempdir = f"{place}/temporary", None
    sys.argv, sys.path[0] = [script], str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
    break
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> dict[Path, Path]:
    """Run all scripts; return by source the place of each, with its exit status and stderr."""
    places = {source: tmp_path_factory.mktemp(source.stem) for source in SOURCES}
    words = [str(path) for source, place in places.items() for path in (place, source)]
    for place in places.values():
        (place / "here").mkdir()
        (place / "temporary").mkdir()
    command = [sys.executable, "-c", RUNNER, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # each under a minute on two cores of its own
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300 * len(places)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return places


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_it_runs_as_a_script_and_leaves_nothing_behind(source, ran):
    place = ran[source]
    assert (place / "code").read_text() == "0", (place / "stderr").read_text()[-2000:]
    assert not list((place / "here").iterdir())
    left = [p for p in (place / "temporary").iterdir() if not p.name.startswith("torchinductor")]
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
