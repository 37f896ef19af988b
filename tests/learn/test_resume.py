"""Learning runs that are killed at some step and started again end with the same numbers."""

import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

from spinlab.__main__ import main
from spinlab.compose import composed
from spinlab.learn import RotationLearner
from spinlab.stages import learn as learning
from spinlab.stages.pipeline import Pipeline
from spinlab.tensors import read_tensors

STEPS = 8
RECIPES = ("two_cores", "spinquant")  # rounded weights and learned clip ratios; 16-bit weights
SETTINGS = [
    *("+experiment=toy", "tracker=none", "eval.tasks=[]", "eval.variants=[fake]", "eval.window=64"),
    *(
        f"learn.steps={STEPS}",
        "learn.save_every=1",
        "learn.optimizer.project_every=3",
        "learn.optimizer.momentum=0.5",
    ),
    *("learn.batch=8", "learn.micro_batch=4", "learn.sequence_length=128"),
]


def words(cache: Path, text: list[str], recipes: str) -> list[str]:
    """Return the words of a run of one recipe, or of a sweep over more."""
    choice = [f"paths.cache={cache}", f"paths.runs={cache}-runs", f"learn={recipes}"]
    return [*SETTINGS, *text, *choice]


def sweep_here(cache: Path, text: list[str]) -> str:
    """Run all recipes in this process, which has imported everything; return what was said."""
    GlobalHydra.instance().clear()
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        patch.setattr(sys, "argv", ["spinlab", "-m", *words(cache, text, ",".join(RECIPES))])
        main()
    return said.getvalue()


def saved_steps(path: Path) -> int:
    """Count the steps that a kill now would leave."""
    try:
        return len(read_tensors(path)[1])
    except (FileNotFoundError, ValueError):  # nothing yet, at its end, or replaced while it is read
        return 0


def kill_in_the_middle(forks, cache: Path, text: list[str], recipe: str) -> int:
    """Start a recipe, send SIGKILL once two steps are saved, and return how many there are."""
    pattern = "learn-*.partial/progress/learn.safetensors"
    others = set(cache.glob(pattern))
    process = forks.start(cache, "spinlab", *words(cache, text, recipe))
    deadline = time.monotonic() + 120
    while not any(saved_steps(path) >= 2 for path in set(cache.glob(pattern)) - others):
        assert process.poll() is None, process.communicate()
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
def caches(tmp_path_factory, forks, short_text) -> tuple[Path, Path, list[int], str]:
    """Return the cache of unbroken runs, and that of killed ones with the steps that they left.

    In other processes they are killed, in this one they go on.
    """
    folder = tmp_path_factory.mktemp("resume")
    whole, killed = folder / "whole", folder / "killed"
    left = [kill_in_the_middle(forks, killed, short_text, recipe) for recipe in RECIPES]
    sweep_here(whole, short_text)
    return whole, killed, left, sweep_here(killed, short_text)


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


def test_killed_runs_end_with_the_records_of_unbroken_ones(caches):
    def records(cache: Path) -> dict[str, dict[str, float]]:
        made = Path(f"{cache}-runs").glob("toy/*/record.json")
        return {path.parent.name: json.loads(path.read_text())["metrics"] for path in made}

    whole, killed, *_ = caches
    assert len(records(whole)) == len(RECIPES)
    assert all("ppl/text.txt/fake" in metrics for metrics in records(whole).values())
    assert records(killed) == records(whole)


class Killed(BaseException):
    """Stand for a kill in this process."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, short_text) -> Pipeline:
    """Return a pipeline that has learned from its start to its end."""
    found = three_steps(tmp_path_factory.mktemp("unbroken"), short_text)
    found.learned  # noqa: B018
    return found


def three_steps(folder: Path, text: list[str]) -> Pipeline:
    """Return a pipeline of three steps that are saved after the second one and the last."""
    choice = ["learn=two_cores", f"paths.cache={folder / 'cache'}", "learn.optimizer.warmup=0"]
    steps = ["learn.steps=3", "learn.save_every=2"]
    return Pipeline(composed(*SETTINGS, *text, *choice, *steps))


@pytest.fixture
def again(tmp_path, short_text) -> Callable[[], Pipeline]:
    """Return a maker of pipelines that share a cache and learn what `unbroken` did."""
    return lambda: three_steps(tmp_path, short_text)


def break_off(monkeypatch, pipeline: Pipeline) -> Path:
    """Kill the learning behind its last step, at the gate; return what it leaves."""

    def kill(*parts):
        raise Killed

    with monkeypatch.context() as patch:
        pipeline.initial  # noqa: B018 - it has a gate of its own
        patch.setattr(learning, "gate", kill)
        with pytest.raises(Killed):
            pipeline.learned  # noqa: B018
    (path,) = pipeline.run.cache.root.glob("learn-*.partial/progress/learn.safetensors")
    return path


def counted(monkeypatch) -> list[int]:
    """Return a list that grows by each step that is done from here on."""
    steps, step = [], RotationLearner.step

    def count(self, index, batch):
        steps.append(index)
        return step(self, index, batch)

    monkeypatch.setattr(RotationLearner, "step", count)
    return steps


def bits(pipeline: Pipeline) -> tuple[dict[str, torch.Tensor], list]:
    return learned(pipeline.run.cache.root, pipeline.learned.path.name)


def same(found: tuple[dict, list], expected: tuple[dict, list]) -> bool:
    (tensors, curve), (others, other_curve) = found, expected
    return (
        curve == other_curve
        and tensors.keys() == others.keys()
        and all(torch.equal(tensors[name], tensor) for name, tensor in others.items())
    )


def test_a_kill_behind_the_last_step_costs_no_step(unbroken, again, monkeypatch):
    assert len(read_tensors(break_off(monkeypatch, again()))[1]) == 3
    steps = counted(monkeypatch)
    assert same(bits(again()), bits(unbroken))
    assert steps == []


def test_damaged_progress_is_dropped_and_learned_again(
    unbroken, again, tmp_path, monkeypatch, caplog
):
    path = break_off(monkeypatch, again())
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    steps = counted(monkeypatch)
    assert same(bits(again()), bits(unbroken))
    assert steps == [0, 1, 2]
    assert "the progress in learn.safetensors is damaged and is dropped" in caplog.text
    assert not list(tmp_path.glob("cache/learn-*/progress"))
