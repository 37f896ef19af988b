"""A run that diverges stops with one sentence, and leaves the rotations from before."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from torch import nn

from spinlab.__main__ import main
from spinlab.learn.divergence import Divergence, DivergenceCheck
from spinlab.rotation.rotations import RotationSet

MOST = 2.0


def rotations(value: float) -> dict[str, nn.Parameter]:
    return {"r1": nn.Parameter(torch.full((2, 2), value))}


@pytest.mark.parametrize(
    ("loss", "norm"),
    [(math.nan, 1.0), (math.inf, 1.0), (4.0, math.nan), (4.0, math.inf), (MOST * 4.0 + 1e-6, 1.0)],
)
def test_no_number_and_too_large_a_loss_stop_the_run(loss, norm):
    check = DivergenceCheck(MOST)
    check.check(0, 4.0, 1.0, rotations(0.0))
    with pytest.raises(Divergence) as stopped:
        check.check(7, loss, norm, rotations(1.0))
    sentence = str(stopped.value)
    for words in ("step 7", f"loss {loss:.4g} (at the start 4)", f"norm {norm:.4g}", "learn.lr.r1"):
        assert words in sentence


def test_the_first_loss_alone_must_be_a_number():
    check = DivergenceCheck(MOST)
    check.check(0, 1e6, 1e6, rotations(0.0))
    with pytest.raises(Divergence) as stopped:
        DivergenceCheck(MOST).check(0, math.nan, 1.0, rotations(0.0))
    assert stopped.value.last_good == {}


def test_losses_up_to_the_multiple_of_the_first_pass_in_any_order():
    check = DivergenceCheck(MOST)
    for step, loss in enumerate([4.0, 1.0, MOST * 4.0, 3.0]):
        check.check(step, loss, 1.0, rotations(0.0))
    assert check.first == 4.0


def test_the_last_good_rotations_are_those_of_the_last_sound_loss():
    check, held = DivergenceCheck(MOST), rotations(1.0)
    check.check(0, 4.0, 1.0, held)
    held["r1"].data.fill_(2.0)
    check.check(1, 3.0, 1.0, held)
    held["r1"].data.fill_(3.0)  # a step that turns out bad
    with pytest.raises(Divergence) as stopped:
        check.check(2, math.nan, 1.0, held)
    (kept,) = stopped.value.last_good.values()
    assert torch.equal(kept, torch.full((2, 2), 2.0))
    assert not kept.requires_grad


def test_the_first_loss_survives_a_resume():
    check, again = DivergenceCheck(MOST), DivergenceCheck(MOST)
    assert check.state() == {}
    again.load_state({})
    assert again.first is None
    check.check(0, 0.1, 1.0, rotations(0.0))  # has no short binary fraction
    again.load_state(check.state())
    assert again.first == check.first
    with pytest.raises(Divergence, match=r"at the start 0\.1\)"):
        again.check(1, 0.3, 1.0, rotations(0.0))


@pytest.fixture
def command_line(monkeypatch, capfd, tmp_path):
    """Run the toy experiment's learning in this process; return exit status and what was said."""
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 89 % 26) for i in range(10_000)))
    settings = ["+experiment=toy", "tracker=none", "eval.tasks=[]", "eval.variants=[fp]"]
    settings += [f"data.calibration={text}", f"data.evaluation=[{text}]", "eval.window=64"]
    settings += [f"paths.cache={tmp_path / 'cache'}", f"paths.runs={tmp_path / 'runs'}"]

    def run(*overrides: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["spinlab", *settings, *overrides])
        GlobalHydra.instance().clear()
        status: object = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code
        assert isinstance(status, int)
        return status, capfd.readouterr().err

    return run


def test_a_diverged_run_names_a_file_that_can_be_loaded(command_line, tmp_path):
    fast = ["learn.max_loss_ratio=1.0001", "learn.lr.r1=1e6", "learn.lr.clip=0.1"]
    status, said = command_line("model=random", *fast)
    assert status == 2
    (sentence,) = (line for line in said.splitlines() if "spinlab:" in line)
    found = re.search(r"diverged at step (\d+): .* rotation.load=(\S+)$", sentence)
    assert found, sentence
    path = Path(found[2])
    assert path.parent == tmp_path / "cache"
    assert list(path.parent.glob("*.diverged*")) == [path]
    kept = RotationSet.load(path)
    assert kept.r4 is not None
    assert len(kept.weight_clips) == 14
    assert max(kept.orthogonality().values()) < 1e-12
    assert (kept.about or {})["trained"]["weights_bits"] == 4
    status, said = command_line("model=random", "learn=none", f"rotation.load={path}")
    assert status == 0, said
    assert f"all from {path.name}" in said


def test_a_run_that_diverges_at_once_has_nothing_to_keep(command_line, monkeypatch, tmp_path):
    check = DivergenceCheck.check
    monkeypatch.setattr(
        DivergenceCheck, "check", lambda self, step, loss, *rest: check(self, step, math.nan, *rest)
    )
    status, said = command_line()
    assert status == 2
    assert "diverged at step 0" in said
    assert "rotation.load" not in said
    assert not list((tmp_path / "cache").glob("*.diverged*"))
