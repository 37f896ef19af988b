"""Learning runs that are killed at some step and started again end with the same bits."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent
STEPS = 8
RECIPES = ("two_cores", "spinquant")  # rounded weights and learned clip ratios; 16-bit weights
SETTINGS = [
    *("+experiment=toy", "tracker=none", "eval.tasks=[]", "eval.variants=[fp]", "eval.window=64"),
    *(f"learn.steps={STEPS}", "learn.save_every=1", "learn.project_every=3", "learn.momentum=0.5"),
    *("learn.batch=8", "learn.micro_batch=4", "learn.sequence_length=128"),
]


def start(folder: Path, caches: str, recipes: str, *flags: str) -> subprocess.Popen:
    """Start a run, or with -m one for each pair of a cache and a recipe."""
    text = folder / "text.txt"  # a short one: packaged texts take seconds to read
    text.write_text("".join(chr(97 + i * i % 89 % 26) for i in range(10_000)))
    texts = [f"data.calibration={text}", f"data.evaluation=[{text}]"]
    choice = [f"paths.cache={caches}", f"paths.runs={folder / 'runs'}", f"learn={recipes}"]
    command = [sys.executable, "-m", "spinlab", *flags, *SETTINGS, *texts, *choice]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def saved_steps(path: Path) -> int:
    """Count the steps that a kill now would leave."""
    try:
        with safe_open(path, framework="pt") as file:
            return len(json.loads(file.metadata()["curve"]))
    except (FileNotFoundError, SafetensorError):  # nothing yet, or the stage ended in this moment
        return 0


def kill_in_the_middle(cache: Path, recipe: str) -> int:
    """Start a recipe, send SIGKILL once two steps are saved, and return how many there are."""
    pattern = "learn-*.partial/progress.safetensors"
    others = set(cache.glob(pattern))
    process = start(cache.parent, str(cache), recipe)
    deadline = time.monotonic() + 120
    while not any(saved_steps(path) >= 2 for path in set(cache.glob(pattern)) - others):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (mine,) = set(cache.glob(pattern)) - others
    return saved_steps(mine)


def learned(cache: Path, name: str) -> tuple[dict[str, torch.Tensor], list]:
    """Return all tensors that a stage of learning leaves, and its curve."""
    tensors = load_file(cache / name / "rotations.safetensors")
    return tensors, json.loads((cache / name / "curve.json").read_text())


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> tuple[Path, Path, list[int], str]:
    """Return the cache of unbroken runs, and that of killed ones with the steps that they left."""
    folder = tmp_path_factory.mktemp("resume")
    whole, killed = folder / "whole", folder / "killed"
    left = [kill_in_the_middle(killed, recipe) for recipe in RECIPES]
    process = start(folder, f"{whole},{killed}", ",".join(RECIPES), "-m")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return whole, killed, left, output


def test_killed_runs_continue_where_they_were(caches):
    _, killed, left, output = caches
    assert all(2 <= steps < STEPS for steps in left)
    assert re.findall(r"learning resumes after step (\d)", output) == [str(n) for n in left]
    assert not list(killed.glob("learn-*.partial"))


def test_killed_runs_end_with_the_bits_of_unbroken_ones(caches):
    whole, killed, *_ = caches
    names = {path.parent.name for path in whole.glob("learn-*/curve.json")}
    assert len(names) == len(RECIPES)
    for name in names:
        (tensors, curve), (again, curve_again) = learned(whole, name), learned(killed, name)
        assert curve_again == curve
        assert len(curve) == STEPS
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())
