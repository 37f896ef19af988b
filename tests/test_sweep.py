"""Sweeps: what is finished is not done again, what fails is named, and presets compose."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from spinlab import device, experiment, sweep
from spinlab.__main__ import _of_points, _prepare, main
from spinlab.compose import CONF, composed, options_of
from spinlab.config import Config, EvalConfig, SweepConfig
from spinlab.errors import InputError, ResultError
from spinlab.experiment import finished
from spinlab.held import is_held
from spinlab.report.points import metric_names, own_of_each, points_table
from spinlab.sweep import Point, own_words
from spinlab.track.record import Record

ROOT = Path(__file__).parent.parent
SMALL = [
    *("+experiment=toy", "tracker=none", "eval.tasks=[]", "eval.variants=[fp]", "learn.steps=0"),
    *("eval.max_windows=1", "model=random", "model.architecture.num_hidden_layers=1"),
]
WINDOWS = [*range(16, 64, 8), 9999]  # the model reads 512 tokens


def sweep_in(folder: Path, *words: str) -> list[str]:
    """Return the words of a sweep over one short text."""
    text = folder / "text.txt"
    text.write_text("A text to score, of one window. " * 400)
    paths = [f"paths.cache={folder / 'cache'}", f"paths.runs={folder / 'runs'}"]
    texts = [f"data.calibration={text}", f"data.evaluation=[{text}]"]
    return ["-m", *SMALL, *texts, *paths, *words]


def complete(folder: Path) -> dict[Path, int]:
    """Return the complete records, with the times at which they were written."""
    return {
        path: path.stat().st_mtime_ns
        for path in folder.glob("runs/toy/*/record.json")
        if json.loads(path.read_text())["status"] == "complete"
    }


def test_a_killed_sweep_goes_on_and_names_what_failed(tmp_path, forks, monkeypatch, capsys):
    """In another process it is killed, in this one it goes on."""
    points = f"eval.window={','.join(map(str, WINDOWS))}"
    process = forks.start(tmp_path, "spinlab", *sweep_in(tmp_path, points))
    deadline = time.monotonic() + 120
    while len(complete(tmp_path)) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = complete(tmp_path)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/*-*/manifest.json")}
    assert 2 <= len(before) < 6

    again = sweep_in(tmp_path, points, "sweep.metric=ppl/*")
    monkeypatch.setattr(sys, "argv", ["spinlab", *again])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    output = "".join(capsys.readouterr())
    after = complete(tmp_path)
    assert len(after) == 6
    assert before.items() <= after.items()
    assert {path: path.stat().st_mtime_ns for path in made} == made
    (kept,) = tmp_path.glob("runs/sweeps/*/sweep.json")
    told = json.loads(kept.read_text())["points"]
    states = [point["state"] for point in told]
    assert states == ["cached"] * len(before) + ["done"] * (6 - len(before)) + ["failed"]
    assert all(point["metrics"]["ppl/text.txt/fp"] > 1 for point in told[:-1])
    command = shlex.join(["spinlab", *told[-1]["words"]])
    assert "eval.window=9999 failed: eval.window=9999 is longer than the 512 tokens" in output
    assert f"    {command}" in output
    assert "\n| 9999 " in kept.with_name("sweep.md").read_text()
    assert not list(kept.parent.glob("points-*"))


@pytest.fixture
def words(tmp_path) -> list[str]:
    """Return the words of a run of a second or two."""
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 89 % 26) for i in range(2_000)))
    words = [*SMALL, "eval.window=64"]
    words += [f"data.calibration={text}", f"data.evaluation=[{text}]"]
    return [*words, f"paths.cache={tmp_path / 'cache'}", f"paths.runs={tmp_path / 'runs'}"]


@pytest.fixture
def made(words) -> tuple[list[str], Path]:
    """Return the words of a run and its complete record."""
    return words, experiment.run(composed(*words), words).path


def test_a_run_holds_its_folder_before_its_record_says_that_it_runs(words, monkeypatch):
    def save(record: Record) -> None:
        raise ResultError(f"held: {is_held(record.folder)}")

    monkeypatch.setattr(Record, "save", save)
    with pytest.raises(ResultError, match="held: True"):
        experiment.run(composed(*words), words)


def test_a_point_is_finished_by_a_complete_record_of_the_same_settings_inputs_and_means(
    made, tmp_path, monkeypatch
):
    words, path = made
    assert finished(composed(*words), words) == path
    assert finished(composed(*words, "sweep.metric=ppl/*"), words) == path
    for other in (
        "seed=1",
        "tracker=offline",
        "runtime.threads=1",
        f"export.rotations={tmp_path}/R.safetensors",
    ):
        assert finished(composed(*words, other), words) is None, other
    whole = path.read_text()
    for status in ("running", "interrupted", "failed: ValueError: no"):
        path.write_text(json.dumps(json.loads(whole) | {"status": status}))
        assert finished(composed(*words), words) is None
    path.write_text(whole)
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "code_digest", lambda module: "other code")
        assert finished(composed(*words), words) is None
    for name, value in (("backend", "triton"), ("packages", {"geoopt": "0", "lm_eval": "0"})):
        saved = json.loads(whole)
        saved["environment"][name] = value
        path.write_text(json.dumps(saved))
        assert finished(composed(*words), words) is None, name
    path.write_text(whole)
    for file in (path.with_name("layers.json"), path.parent / "figures/outliers.png"):
        kept = file.rename(tmp_path / file.name)
        assert finished(composed(*words), words) is None, file
        kept.rename(file)
    assert finished(composed(*words), words) == path
    text = tmp_path / "text.txt"
    text.write_text(text.read_text() + "more")
    assert finished(composed(*words), words) is None


def test_a_run_that_learned_and_answered_leaves_a_curve_and_answers():
    measured = EvalConfig(tasks=["piqa"], variants=["fp", "fake"], task_variants=["fp", "rtn"])
    left = experiment._left(Config(eval=measured), {"learn/first_loss": 1.0})
    more = {"figures/curves.png", "predictions/fp.json.gz"}
    assert set(left) == {"layers.json", "figures/outliers.png"} | more


def test_a_torn_record_is_set_aside_and_its_point_is_not_finished(made, caplog):
    words, path = made
    path.write_text(path.read_text()[:100])
    assert finished(composed(*words), words) is None
    assert "record.json is damaged" in caplog.text
    assert path.with_name("record.json.damaged").exists()


@pytest.mark.usefixtures("toy_cache")
def test_codecs_stand_side_by_side_with_their_bits_and_what_they_recall(tmp_path, monkeypatch):
    """On the toy, by the command of the README."""
    (line,) = [
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("spinlab -m +experiment=kv model=toy +sweep=kv")
    ]
    words = shlex.split(line, comments=True)
    paths = [f"paths.cache={tmp_path / 'cache'}", f"paths.runs={tmp_path / 'runs'}"]
    monkeypatch.setattr(sys, "argv", [*words, *paths, "tracker=none", "eval.max_windows=2"])
    GlobalHydra.instance().clear()
    main()
    (kept,) = tmp_path.glob("runs/sweeps/*/sweep.md")
    head, _, *rows = ([c.strip() for c in x.split("|")] for x in kept.read_text().splitlines()[:4])
    assert "no point measured" not in kept.read_text()
    kv4, qjl = (dict(zip(head, row, strict=True)) for row in rows)
    assert (kv4["kv"], qjl["kv"]) == ("kv4", "qjl")
    assert (kv4["bits/kv/fake"], kv4["coded/kv/fake"]) == ("5.5", "1")
    assert float(qjl["bits/kv/fake"]) < 5.5
    assert 0.5 < float(qjl["coded/kv/fake"]) < 1  # its runs are of 128 tokens
    names = ("ppl/wiki", "kl/c4", "diverges/wiki", "needle/256", "needle_nats/256")
    assert all(row[f"{name}/fake"] for row in (kv4, qjl) for name in names)
    metrics = json.loads(next(tmp_path.glob("runs/kv/toy/kv4/*/record.json")).read_text())[
        "metrics"
    ]
    row = 16 // 2 + 3  # bytes of a head: 4 bits a number, a scale and a zero point
    for tokens in (4096, 32768):
        assert (
            metrics[f"bytes/kv/{tokens}/fake"] == 2 * 2 * 2 * tokens * row
        )  # sides, layers, heads
    assert metrics["bits/weights/fake"] == 16


def test_a_point_is_told_by_the_words_of_its_own():
    points = [["+experiment=toy", "seed=0", "a.b=1"], ["+experiment=toy", "seed=1", "+method=x"]]
    assert own_of_each(points) == [{"seed": "0", "a.b": "1"}, {"seed": "1", "method": "x"}]
    assert own_of_each([["seed=0"]]) == [{}]


def test_the_command_of_a_point_is_no_sweep_and_is_quoted_for_a_shell():
    words = ["rotation=random", "+experiment=toy", "+sweep=seeds", "sweep.metric=a", "x=[a, b]"]
    own = own_words(words)
    assert own == ["rotation=random", "+experiment=toy", "+sweep=seeds", "x=[a, b]"]
    assert shlex.split(Point(0, own).command) == ["spinlab", *own, "hydra.mode=RUN"]
    assert shlex.split(Point(0, own[:2]).command) == ["spinlab", *own[:2]]


@pytest.fixture
def announced(tmp_path, monkeypatch):
    """Return a function that announces a sweep as Hydra does, in this process."""
    for name in ("SPINLAB_SWEEP", "SPINLAB_SWEEP_PROCESS"):
        monkeypatch.setenv(name, "")  # to be put back
    monkeypatch.setattr(sweep, "started", None)

    def announce(*words: str, params: dict | None = None) -> sweep.Sweep:
        place = f"{tmp_path}/runs/sweeps/${{oc.env:SPINLAB_SWEEP}}"
        told = {
            "overrides": {"task": list(words)},
            "sweeper": {"params": params},
            "sweep": {"dir": place},
        }
        config = OmegaConf.create({"hydra": told, "sweep": {"metric": "ppl/wiki/fake"}})
        sweep.Start().on_multirun_start(config)
        assert sweep.started
        return sweep.started

    return announce


def test_a_sweep_is_known_by_what_it_runs_and_not_by_where(announced):
    one = announced("+experiment=toy", "seed=0,1").folder
    same = ("paths.runs=x", "tracker=none", "sweep.metric=a", "export.rotations=R.bin")
    assert all(announced("+experiment=toy", word, "seed=0,1").folder == one for word in same)
    others = {announced("+experiment=toy", "seed=0,2").folder}
    others |= {announced("+experiment=toy", params={"seed": v}).folder for v in ("0,1", "0,2")}
    assert len(others | {one}) == 4


def test_states_that_other_processes_left_make_the_table(announced, capsys, tmp_path):
    started = announced("+experiment=toy", "seed=0,1,2")
    assert started.end() == []
    record = {"schema": 2, "experiment": "toy", "key": "a", "status": "complete", "config": {}}
    record |= {"metrics": {"ppl/wiki/fake": 8.0}, "overrides": [], "stages": []}
    (tmp_path / "record.json").write_text(json.dumps(record))
    Point(0, ["seed=0"], "done", str(tmp_path / "record.json")).save(started.folder)
    Point(1, ["seed=1"], "failed", error="too short", mistake=True).save(started.folder)
    Point(2, ["seed=2"]).save(started.folder)  # its process is gone
    assert [point.failed for point in started.end()] == [False, True, True]
    told = capsys.readouterr().out
    for line in ("| 0    | done   | 8", "1 done, 1 failed, 1 killed", "seed=1 failed: too short"):
        assert line in told
    assert "seed=2 killed: its process ended before it did\n    spinlab seed=2" in told
    assert (started.folder / "sweep.md").read_text() in told
    kept = json.loads((started.folder / "sweep.json").read_text())["points"]
    assert [point["metrics"] for point in kept] == [{"ppl/wiki/fake": 8.0}, {}, {}]


def test_states_of_a_command_that_was_killed_are_cleared_away_and_those_of_others_stay(
    announced, monkeypatch
):
    folder = announced("seed=0,1").folder
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    kept = []
    for node in ("this", "another"):
        with monkeypatch.context() as patch:
            patch.setattr("platform.node", lambda: node)  # noqa: B023
            for process in (ended.pid, os.getpid(), os.getppid()):
                place = folder / f"points-{sweep._host()}-{process}"
                place.mkdir(parents=True)
                if node == "another" or process == os.getppid():
                    kept.append(place.name)
    monkeypatch.setattr("platform.node", lambda: "this")
    announced("seed=0,1")
    assert sorted(path.name for path in folder.iterdir()) == sorted(kept)


def test_a_metric_that_no_point_measured_is_told_with_the_nearest(announced, capsys, tmp_path):
    started = replace(announced("seed=0"), metrics=["ppl/wiki/*", "ppl/wikki/fake"])
    record = {"schema": 2, "experiment": "toy", "key": "a", "status": "complete", "config": {}}
    record |= {"metrics": {"ppl/wiki/fake": 8.0}, "overrides": [], "stages": []}
    (tmp_path / "record.json").write_text(json.dumps(record))
    Point(0, ["seed=0"], "cached", str(tmp_path / "record.json")).save(started.folder)
    started.end()
    said = "no point measured sweep.metric=ppl/wikki/fake: did you mean ppl/wiki/fake?"
    told = capsys.readouterr().out
    assert said in told and told.count("no point measured") == 1


def test_what_is_wrong_with_many_points_is_told_once(capsys):
    points = [Point(n, [f"seed={n}"], "failed", error="too long", mistake=True) for n in (0, 1)]
    points.append(Point(2, ["seed=2"], "failed", error="too short", mistake=True))
    assert _of_points([*points, Point(3, ["seed=3"], "done")]) == 2
    told = "3 of 4 failed: seed=0, seed=1: too long; seed=2: too short"
    assert told in capsys.readouterr().err


def test_a_search_without_one_metric_is_refused():
    basic, optuna = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "x.OptunaSweeper"
    launcher = {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}
    _prepare(SimpleNamespace(sweeper={"_target_": basic}, launcher=launcher), [])
    search = SimpleNamespace(sweeper={"_target_": optuna}, launcher=launcher)
    _prepare(search, ["ppl/wiki/fake"])
    refused = ([], ["ppl/*"], ["*wiki/fake"], ["ppl/wik?/fake"], ["ppl/[cw]*"], ["a", "b"])
    for metrics in refused:
        with pytest.raises(InputError, match=r"sweep\.metric=ppl/wiki/fake"):
            _prepare(search, metrics)
    pattern = SimpleNamespace(sweeper={"_target_": basic}, launcher=launcher)
    _prepare(pattern, ["ppl/*"])


MEASURED = [
    {"ppl/c4/fp": 3.0, "ppl/wiki/fp": 2.0, "ppl/wiki/fake": 4.0, "ppl/c4/fake": 5.0},
    {"ppl/c4/fp": 3.0, "ppl/wiki/fp": 2.0, "ppl/wiki/fake": 6.0, "gap/wiki": 0.1},
    {},
]
WIKI = ["ppl/wiki/fake", "ppl/wiki/fp"]


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ([], ["ppl/c4/fake", "ppl/wiki/fake"]),
        (["gap/wiki"], ["gap/wiki"]),
        (["ppl/*/fp"], ["ppl/c4/fp", "ppl/wiki/fp"]),
        (["ppl/wikki/fp"], []),
        (["gap/*", "ppl/wiki/*", "ppl/*/fp"], ["gap/wiki", *WIKI, "ppl/c4/fp"]),
    ],
)
def test_the_metric_asked_for_or_the_last_perplexity(wanted, names):
    assert metric_names(MEASURED, wanted) == names


def test_a_table_has_every_point_with_its_state():
    states = ("done", "cached", "failed")
    points = [
        {"words": ["a=1", f"seed={i}"], "state": state, "metrics": metrics}
        for i, (state, metrics) in enumerate(zip(states, MEASURED, strict=True))
    ]
    assert points_table(points, ["ppl/wiki/fake"]).splitlines() == [
        "| seed | state  | ppl/wiki/fake |",
        "|------|--------|---------------|",
        "| 0    | done   | 4             |",
        "| 1    | cached | 6             |",
        "| 2    | failed |               |",
    ]


def test_a_metric_of_a_variant_that_is_not_measured_is_refused():
    with pytest.raises(InputError, match=r"add rtn to eval\.variants=\[fp\]"):
        Config(sweep=SweepConfig("ppl/wiki/rtn"), eval=EvalConfig(variants=["fp"]))
    with pytest.raises(InputError, match=r"sweep\.metric=kl/wiki/fake is of a variant"):
        Config(sweep=SweepConfig(["ppl/wiki/*", "kl/wiki/fake"]), eval=EvalConfig(variants=["fp"]))
    with pytest.raises(InputError, match=r"sweep\.metric=3 is no name of a metric"):
        SweepConfig([3])
    Config(sweep=SweepConfig("ppl/wiki/*"), eval=EvalConfig(variants=["fp"]))


def test_metrics_are_one_or_a_list():
    of_preset = composed("+experiment=toy", "+sweep=kv", "eval.continued=64", "eval.needle=[256]")
    assert {"kl/*/fake", "bits/kv/fake", "needle/*/fake"} < set(of_preset.sweep.metrics)
    for word in ("ppl/wiki/fp", "[ppl/wiki/fp]"):
        assert composed("+experiment=toy", f"sweep.metric={word}").sweep.metrics == ["ppl/wiki/fp"]


def test_each_process_owns_a_device_and_one_too_many_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-ab")
    locks = []
    for name in ("3", "GPU-ab"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-ab")
        monkeypatch.setattr(device, "_owned", [])  # of another process
        device.own_one(tmp_path)
        device.own_one(tmp_path)  # for its next point: the same
        assert os.environ["CUDA_VISIBLE_DEVICES"] == name
        locks += device._owned
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-ab")
    monkeypatch.setattr(device, "_owned", [])
    with pytest.raises(InputError, match=r"hydra\.launcher\.n_jobs=2"):
        device.own_one(tmp_path)
    assert len(locks) == 2


def presets() -> list[str]:
    """Return every value of every preset by itself, the others of its sweep at their first."""
    found = []
    for name in options_of("sweep"):
        if name == "kv":  # needs longer windows: tests/kv/test_presets.py
            continue
        params = yaml.safe_load((CONF / "sweep" / f"{name}.yaml").read_text())["hydra"]["sweeper"]
        read = OverridesParser.create().parse_override
        axes = []
        for key, values in params["params"].items():
            override = read(f"{key}={values}")
            if override.is_discrete_sweep():
                axes.append([f"{key}={value}" for value in override.sweep_string_iterator()])
            elif not override.is_sweep_override():
                axes.append([f"{key}={values}"])
            else:
                axes.append([f"{key}=1"])  # of a range
        axes = [axis if len(axis) < 10 else axis[:1] for axis in axes]
        found += [" ".join(point) for point in product(*axes)]
    return found


@pytest.mark.parametrize("point", presets())
def test_every_point_of_a_preset_composes_with_an_experiment(point):
    composed("+experiment=toy", *point.split(" "))


@pytest.mark.parametrize(("alone", "mode"), [([], "MULTIRUN"), (["hydra.mode=RUN"], "RUN")])
def test_a_preset_is_a_sweep_without_a_flag_and_its_points_can_be_run_alone(alone, mode):
    words = ["+experiment=toy", "+sweep=seeds", *alone, "--cfg", "hydra"]
    shown = subprocess.run([sys.executable, "-m", "spinlab", *words], cwd=ROOT, capture_output=True)
    assert yaml.safe_load(shown.stdout)["hydra"]["mode"] == mode


def test_every_point_of_the_sweep_over_formats_composes():
    preset = yaml.safe_load((CONF / "sweep" / "formats.yaml").read_text(encoding="utf-8"))
    params = preset["hydra"]["sweeper"]["params"]
    choices = [[f"{key}={word}" for word in words.split(",")] for key, words in params.items()]
    points = [composed("+experiment=smollm2_135m_w4a4kv4", *point) for point in product(*choices)]
    assert len(points) == 75
    roundings = {(p.weights.method, p.weights.clip.search) for p in points}
    found = {(p.quant.weights.format, p.rotation.inputs) for p in points}
    assert (len(found), len(roundings)) == (3 * 3, 5)
