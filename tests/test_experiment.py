"""The whole pipeline on the toy experiment: results, cache, resume after SIGKILL, sweeps."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from hydra.core.global_hydra import GlobalHydra

from spinlab import experiment
from spinlab.__main__ import main
from spinlab.compose import composed
from spinlab.errors import InputError
from spinlab.experiment import _gain
from spinlab.learn import save_progress
from spinlab.stages import learn as learning

ROOT = Path(__file__).parent.parent
FAST = ["tracker=none", "eval.tasks=[]"]


def words_of(folder: Path, *overrides: str) -> list[str]:
    paths = [f"paths.cache={folder / 'cache'}", f"paths.runs={folder / 'runs'}"]
    return ["spinlab", *overrides, "+experiment=toy", *paths]


def run(folder: Path, *overrides: str) -> tuple[dict, str]:
    """Run to the end in a process of its own; return the record and what was printed."""
    command = [sys.executable, "-m", *words_of(folder, *overrides)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    output = process.stdout + process.stderr
    assert process.returncode == 0, output
    path = Path(output.rpartition("record: ")[2].split()[0])
    return json.loads(path.read_text()), output


def run_here(folder: Path, *overrides: str) -> dict:
    """Run to the end in this process, which has imported everything; return the record."""
    words = ["+experiment=toy", *overrides]
    paths = [f"paths.cache={folder / 'cache'}", f"paths.runs={folder / 'runs'}"]
    record = experiment.run(composed(*words, *paths), words)
    return json.loads(record.path.read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict, str]:
    folder = tmp_path_factory.mktemp("toy")
    return (folder, *run(folder, "tracker=offline", "tracker.tensorboard=true"))


def test_the_record_is_complete(finished):
    folder, record, output = finished
    assert record["status"] == "complete"
    assert set(record) == {
        "schema", "experiment", "key", "identity", "model", "config", "overrides", "environment",
        "stages", "metrics", "status", "mirrors",
    }  # fmt: skip
    metrics = record["metrics"]
    for variant in ("fp", "rtn", "init", "fake", "integer"):
        assert {f"ppl/wiki/{variant}", f"ppl/c4/{variant}", f"bytes/{variant}"} <= set(metrics)
    for variant in ("fp", "rtn", "integer"):
        assert metrics[f"zeroshot/piqa/n/{variant}"] == 4
        assert f"zeroshot/arc_easy/acc_norm_stderr/{variant}" in metrics
    assert metrics["orthogonality/r1"] < 1e-12
    assert metrics["invariance/learned"] < 1e-3
    assert abs(metrics["gap/wiki"]) < 0.005
    assert "| integer" in output
    assert str(folder) in output


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (94.0, None),
        (95.5, "hardly moved wiki perplexity, from 100.00 down to 95.50"),
        (100.15, "hardly moved wiki perplexity, from 100.00 up to 100.15"),
        (105.5, "made wiki perplexity worse, from 100.00 to 105.50"),
    ],
)
def test_what_learning_did_to_perplexity_is_said_with_its_direction(end, said, caplog):
    metrics = {"ppl/wiki/init": 100.0, "ppl/wiki/fake": end, "learn/first_loss": 5.0}
    record = SimpleNamespace(metrics=metrics)
    _gain(record, "wiki")
    assert metrics["learn/gain/wiki"] == pytest.approx(1 - end / 100)
    assert (said in caplog.text) if said else not caplog.text
    assert ("it did not matter" in caplog.text) == (abs(end - 100) <= 5)


def test_what_a_run_leaves_behind(finished):
    folder, record, _ = finished
    home = folder / "runs" / "toy" / record["key"]
    lines = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(48))
    assert record["mirrors"] == {}
    for figure in ("outliers", "curves"):
        assert (home / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    layers = json.loads((home / "layers.json").read_text())
    assert set(layers) == {"outliers/before", "outliers/init", "outliers/learned", "error/fake"}
    assert {len(numbers) for numbers in layers.values()} == {2}
    assert 0.05 < min(layers["error/fake"]) < max(layers["error/fake"]) < 1
    for name in ("before", "init", "learned"):
        mean = sum(layers[f"outliers/{name}"]) / 2
        assert mean == pytest.approx(record["metrics"][f"outliers/{name}"], rel=1e-6)
    (mirror,) = home.glob("wandb/offline-run-*")
    assert list(mirror.glob("*.wandb"))
    assert (mirror / "files" / "rotations.safetensors").is_file()
    log = (home / "run.log").read_text()
    assert "== spinlab tracker=offline" in log
    assert "learn        done in" in log
    assert "\r" not in log  # of bars
    assert list(home.glob("tensorboard/events*"))


def test_nothing_about_the_machines_owner_is_recorded(finished):
    _, record, _ = finished
    text = json.dumps(record)
    assert str(Path.home()) + "/" not in text.replace(str(ROOT), "") or str(Path.home()) == "/"
    assert "paths" not in record["config"]


def test_a_second_run_finds_every_stage_and_the_same_numbers(finished, caplog):
    folder, record, _ = finished
    with caplog.at_level("INFO"):
        again = run_here(folder, "tracker=none")
    assert all(stage["cached"] for stage in again["stages"])
    assert again["metrics"] == record["metrics"]
    assert "learn        cached" in caplog.text and "done in" not in caplog.text


@pytest.mark.usefixtures("toy_cache")
def test_the_same_seed_gives_the_same_record_from_scratch(finished, tmp_path):
    """In another process; of the stages only those that cut texts into tokens may be there."""
    _, record, _ = finished
    again = run_here(tmp_path, "tracker=none")
    cached = {stage["name"] for stage in again["stages"] if stage["cached"]}
    assert cached <= {"check", "calibration", "evaluation"}
    assert again["metrics"] == record["metrics"]


def test_another_evaluation_does_not_learn_again(finished, caplog):
    folder, _, _ = finished
    with caplog.at_level("INFO"):
        run_here(folder, *FAST, "eval.window=64", "eval.batch=2", "eval.variants=[fp,fake]")
    assert "learn        cached" in caplog.text
    assert "eval-fake    done" in caplog.text


def test_a_torn_cache_entry_is_computed_again_with_a_warning(finished, caplog):
    folder, record, _ = finished
    (weights, *_) = (folder / "cache").glob("learn-*/rotations.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = run_here(folder, "tracker=none")
    assert "is damaged (a file was altered) and is computed again" in caplog.text
    assert again["metrics"] == record["metrics"]


def kill_when(process, folder: Path, pattern: str) -> None:
    """Send SIGKILL as soon as a file that matches appears."""
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_run_killed_in_gptq_continues_and_ends_with_the_same_numbers(tmp_path, forks, short_text):
    """Learning that is killed is the subject of learn/test_resume.py."""
    pattern = "cache/weights-*.partial/progress/layer-001.safetensors"
    gptq = ["weights=gptq", "weights.gptq.samples=96", "weights.gptq.sequence_length=96"]
    model = ["model=random", "model.architecture.num_hidden_layers=4"]
    words = [*FAST, *gptq, *model, *short_text, "learn=none", "eval.variants=[fake,integer]"]
    whole = run_here(tmp_path / "whole", *words)
    killed = tmp_path / "killed"
    kill_when(forks.start(tmp_path, *words_of(killed, *words)), killed, pattern)
    assert list(killed.glob(pattern))  # progress survived
    resumed = run_here(killed, *words)
    assert resumed["metrics"] == whole["metrics"]


def test_an_interrupted_run_says_so_and_the_next_one_goes_on(
    tmp_path, short_text, monkeypatch, caplog
):
    settings = [*FAST, *short_text, "eval.variants=[fp]", "learn.steps=4", "learn.save_every=1"]
    paths = [f"paths.cache={tmp_path / 'cache'}", f"paths.runs={tmp_path / 'runs'}"]
    config = composed("+experiment=toy", *settings, *paths)
    with monkeypatch.context() as patch:

        def interrupt(learner, path, curve):
            save_progress(learner, path, curve)
            if len(curve) == 2:
                raise KeyboardInterrupt

        patch.setattr(learning, "save_progress", interrupt)
        with pytest.raises(KeyboardInterrupt):
            experiment.run(config, settings)
    (path,) = tmp_path.glob("runs/toy/*/record.json")
    assert json.loads(path.read_text())["status"] == "interrupted"
    for lock in tmp_path.rglob("*.lock"):
        with FileLock(lock, timeout=0):
            pass
    with caplog.at_level("INFO"):
        record = experiment.run(config, settings)
    assert "learning resumes after step 2" in caplog.text
    assert json.loads(path.read_text())["status"] == record.status == "complete"


def test_folders_that_cannot_be_written_are_refused_before_anything_else(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("cache", "runs"):
        paths = {"cache": "a", "runs": "b", name: "file/below"}
        config = composed(
            "+experiment=toy", *(f"paths.{n}={tmp_path}/{p}" for n, p in paths.items())
        )
        with pytest.raises(InputError, match=rf"Not a directory: set paths\.{name} to a folder"):
            experiment.run(config, [])


def test_two_processes_share_one_cache(tmp_path, forks, short_text):
    words = words_of(tmp_path, *FAST, *short_text, "eval.variants=[fp,fake]")
    processes = [forks.start(tmp_path, *words) for _ in range(2)]
    outputs = ["".join(process.communicate()) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum("learn        done" in output for output in outputs) == 1
    assert not list(tmp_path.glob("cache/*.partial"))


def test_a_sweep_leaves_one_record_per_seed(tmp_path, short_text, monkeypatch):
    words = [*FAST, *short_text, "seed=0,1", "eval.variants=[fp]", "learn.steps=0"]
    monkeypatch.setattr(sys, "argv", words_of(tmp_path, "-m", *words))
    GlobalHydra.instance().clear()
    main()
    records = [json.loads(p.read_text()) for p in tmp_path.glob("runs/toy/*/record.json")]
    assert sorted(record["config"]["seed"] for record in records) == [0, 1]
    assert all(record["status"] == "complete" for record in records)


def test_a_failed_stage_keeps_what_was_finished(tmp_path, short_text):
    far = [
        "learn.lr.r1=1e30",
        "learn.optimizer.cap_step=false",
        "learn.optimizer.max_grad_norm=null",
    ]
    with pytest.raises(InputError, match="learning diverged"):
        run_here(tmp_path, *FAST, *short_text, *far)
    (path,) = (tmp_path / "runs").glob("toy/*/record.json")
    record = json.loads(path.read_text())
    assert record["status"].startswith("failed: InputError: learning diverged")
    assert {"evaluation", "rotate"} <= {stage["name"] for stage in record["stages"]}


@pytest.mark.usefixtures("toy_cache")
def test_settings_that_leave_nothing_to_learn_or_round_still_run(tmp_path):
    """rotation=none with the default learning, and 16-bit weights and activations."""
    off = ["quant.weights.bits=16", "quant.activations.bits=16", "eval.variants=[fp,fake]"]
    metrics = run_here(tmp_path, *FAST, "rotation=none", "kv=kv16", *off)["metrics"]
    assert metrics["ppl/wiki/fake"] == pytest.approx(metrics["ppl/wiki/fp"], rel=1e-4)
    assert metrics["bits/weights/fake"] == 16
