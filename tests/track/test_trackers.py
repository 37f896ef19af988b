"""Mirrors of the record: they may stop, and the run goes on."""

import csv
import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spinlab.config import Config, PathsConfig, TrackerConfig, WandbConfig
from spinlab.errors import InputError
from spinlab.report.figures.outliers import draw_outliers
from spinlab.track.mirrors.base import Outcome, Tracker
from spinlab.track.mirrors.wandb import tags
from spinlab.track.record import Record
from spinlab.track.trackers import Trackers

ROOT = Path(__file__).parent.parent.parent
DONE = Outcome(complete=True, metrics={"ppl/wiki/fp": 9.0})
FAILED = Outcome(complete=False)


def record_in(
    folder: Path, mode: str = "disabled", overrides=(), seed=0, sweep=False, **mirrors: bool
) -> Record:
    tracker = TrackerConfig(WandbConfig(mode=mode), **mirrors)
    config = Config(seed=seed, paths=PathsConfig(runs=str(folder)), tracker=tracker)
    return Record(config, list(overrides), {}, {}, sweep=sweep)


def started(record: Record) -> Trackers:
    record.save()
    trackers = Trackers()
    trackers.start(record)
    record.mirrors = trackers.stopped
    return trackers


def ended(record: Record, outcome: Outcome, steps: int = 1) -> list[Path]:
    """Go through a whole run; return the offline runs that stay."""
    trackers = started(record)
    for step in range(steps):
        trackers.log(step, {"loss": 1.0})
    record.status = "complete" if outcome.complete else "failed: "
    record.save()
    trackers.finish(outcome)
    assert not trackers.stopped
    return sorted(record.folder.glob("wandb/offline-run-*"))


class Flaky(Tracker):
    """A mirror that stands until `broken`."""

    name = "flaky"

    def __init__(self) -> None:
        self.steps, self.seen, self.broken, self.abandoned = [], [], False, False

    def log(self, step, values):
        if self.broken:
            raise ConnectionResetError("Connection lost")
        self.steps.append(step)

    def measured(self, place, variant, values):
        self.log(-1, {})
        self.seen.append((place, variant, values))

    def finish(self, outcome):
        self.log(-1, {})

    def abandon(self):
        self.abandoned = True


def test_a_mirror_that_fails_is_left_out_and_named_in_the_record(tmp_path, caplog):
    record, flaky = record_in(tmp_path), Flaky()
    trackers = started(record)
    trackers._going.append(flaky)
    trackers.log(0, {"loss": 3.0})
    flaky.broken = True
    with caplog.at_level(logging.WARNING):
        trackers.log(1, {"loss": 2.0})
        trackers.log(2, {"loss": 1.0})
        trackers.finish(DONE)
    assert flaky.steps == [0]
    assert flaky.abandoned
    reason = "stopped at step 1: ConnectionResetError: Connection lost"
    assert json.loads(record.save().read_text())["mirrors"] == {"flaky": reason}
    assert caplog.text.count("flaky") == 1
    lines = (record.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [3.0, 2.0, 1.0]


def test_a_mirror_that_fails_at_the_end_is_named_too(tmp_path):
    record, flaky = record_in(tmp_path), Flaky()
    trackers = started(record)
    trackers._going.append(flaky)
    flaky.broken = True
    trackers.finish(DONE)
    assert record.mirrors["flaky"].startswith("could not finish: ConnectionResetError")


def test_a_mirror_that_fails_at_an_evaluation_is_named_by_it(tmp_path):
    record, flaky = record_in(tmp_path), Flaky()
    trackers = started(record)
    trackers._going.append(flaky)
    trackers.measured("fp", {"ppl/wiki/fp": 9.0})
    flaky.broken = True
    trackers.measured("fake", {"ppl/wiki/fake": 18.0})
    assert flaky.seen == [(0, "fp", {"ppl/wiki": 9.0})]
    assert record.mirrors["flaky"].startswith("stopped at fake: ConnectionResetError")


def test_a_full_disk_stops_the_curves_and_not_the_run(tmp_path, monkeypatch):
    record = record_in(tmp_path)
    trackers = started(record)

    def full(path, *arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(Path, "open", full)
        trackers.log(0, {"loss": 1.0})
        trackers.log(1, {"loss": 1.0})
    trackers.finish(DONE)
    assert record.mirrors == {
        "metrics.jsonl": "stopped at step 0: OSError: [Errno 28] No space left on device"
    }


def test_tensorboard_that_loses_its_folder_does_not_end_the_run(tmp_path):
    record = record_in(tmp_path, tensorboard=True)
    trackers = started(record)
    trackers.log(0, {"loss": 1.0})
    shutil.rmtree(record.folder / "tensorboard")
    trackers.log(1, {"loss": 1.0})
    (record.folder / "tensorboard").mkdir()  # what comes back later does not hide the loss
    trackers.finish(DONE)
    assert record.mirrors["tensorboard"].startswith("stopped at step 1: FileNotFoundError")


KILLED = """
import sys, time
import psutil
from spinlab.config import Config, PathsConfig, TrackerConfig, WandbConfig
from spinlab.track.mirrors.base import Outcome
from spinlab.track.record import Record
from spinlab.track.trackers import Trackers

tracker = TrackerConfig(WandbConfig(mode="offline"))
for seed in range(2):
    config = Config(seed=seed, paths=PathsConfig(runs=sys.argv[1]), tracker=tracker)
    record = Record(config, [], {}, {})
    record.save()
    trackers = Trackers()
    trackers.start(record)
    trackers.log(0, {"loss": 1.0})
    for process in psutil.Process().children(recursive=True) if seed == 0 else ():
        process.kill()
    time.sleep(0.5)  # until its end is noticed
    trackers.log(1, {"loss": 1.0})
    record.status = "complete"
    record.save()
    trackers.finish(Outcome(complete=True))
    curve = (record.folder / "metrics.jsonl").read_text().splitlines()
    print(seed, len(curve), sorted(trackers.stopped))
"""


def test_a_killed_wandb_service_ends_neither_the_run_nor_the_sweep(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "0 2 ['wandb']\n1 2 []\n")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("outcome", "code"), [(DONE, 0), (FAILED, 1)], ids=["done", "failed"])
def test_a_failed_run_is_red_in_wandb(tmp_path, monkeypatch, outcome, code):
    from wandb.sdk.wandb_run import Run

    codes = []
    finish = Run.finish

    def seen(self, exit_code=None):
        codes.append(exit_code)
        return finish(self, exit_code)

    monkeypatch.setattr(Run, "finish", seen)
    ended(record_in(tmp_path, "offline"), outcome)
    assert codes == [code]


def test_a_repeat_leaves_one_offline_run_that_of_the_record(tmp_path):
    def again(outcome: Outcome, steps: int) -> list[Path]:
        time.sleep(1.1)  # wandb names runs by the second
        return ended(record_in(tmp_path, "offline"), outcome, steps)

    (failed,) = ended(record_in(tmp_path, "offline"), FAILED)
    (later,) = again(FAILED, 2)
    assert later != failed
    (complete,) = again(DONE, 3)
    assert complete != later
    assert again(FAILED, 1) == [complete]
    (last,) = again(DONE, 3)
    assert last != complete


def files_of(folder: Path) -> tuple[Path, Path]:
    """Write a file of rotations and a figure, elsewhere than a run."""
    folder.mkdir()
    rotations, figure = folder / "rotations.safetensors", folder / "outliers.png"
    rotations.write_bytes(b"r1" * 99)
    draw_outliers({"before": np.arange(1.0, 9.0)}, "a layer").save(figure)
    return rotations, figure


def test_an_offline_run_is_synced_from_where_it_was_moved(tmp_path, service):
    file, figure = files_of(tmp_path / "cache")
    record = record_in(tmp_path / "runs", "offline", overrides=["+experiment=toy", "learn.lr.r1=1"])
    trackers = started(record)
    for step in range(2):
        trackers.log(step, {"loss": 3.0 - step})
    for variant in ("fp", "integer"):
        trackers.measured(variant, {f"ppl/wiki/{variant}": 9.5})
    whole = Outcome(
        complete=True,
        metrics={"ppl/a<b/fp": 9.25},
        layers={"outliers/before": [7.5, 8.0]},
        figures=[figure],
        artifacts={file: {"family": "llama"}},
    )
    trackers.finish(whole)
    assert not trackers.stopped
    shutil.rmtree(file.parent)
    (folder,) = record.folder.glob("wandb/offline-run-*")
    (tmp_path / "elsewhere").mkdir()
    done = service.sync(Path(shutil.move(folder, tmp_path / "elsewhere")))
    assert done.returncode == 0, done.stderr
    run, files = service.run, service.files
    assert (run["name"], run["project"], run["groupName"]) == (record.key, "spinlab", "custom")
    assert (run["jobType"], run["tags"]) == ("run", ["experiment=toy"])
    curve = [(r["learn/step"], r["learn/loss"]) for r in service.rows if "learn/step" in r]
    assert curve == [(0, 3.0), (1, 2.0)]
    names = ("evaluation/place", "evaluation/variant", "evaluation/ppl/wiki")
    measured = [tuple(row[n] for n in names) for row in service.rows if names[0] in row]
    assert measured == [(0, "fp", 9.5), (1, "integer", 9.5)]
    assert json.loads(files["wandb-summary.json"])["ppl/a<b/fp"] == 9.25
    assert files["rotations.safetensors"] == b"r1" * 99
    about = json.loads(files["rotations.json"])
    assert (about["key"], about["family"]) == (record.key, "llama")
    media = {name.partition("_")[0]: body for name, body in files.items() if "media/" in name}
    assert b"<td>ppl/a&lt;b/fp<td>9.25" in media["media/html/metrics"]
    assert b"<th>ppl/wiki<tr><td>fp<td>9.5<tr><td>integer<td>9.5" in media["media/html/results"]
    assert b"<th>outliers/before<tr><td>0<td>7.5" in media["media/html/layers"]
    assert media["media/images/figures/outliers"].startswith(b"\x89PNG")


@pytest.fixture
def server(service, tmp_path, monkeypatch):
    """The service as that of this process's online runs."""
    places = {f"WANDB_{name}_DIR": str(tmp_path / name) for name in ("CACHE", "DATA")}
    for name, value in (service.environment | places).items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # it remembers the settings of the process's first run
    yield service
    wandb.teardown()


def test_an_online_run_has_tables_and_keeps_rotations_with_what_they_say(tmp_path, server):
    file, _ = files_of(tmp_path / "cache")
    record = record_in(tmp_path / "runs", "online")
    trackers = started(record)
    trackers.log(0, {"loss": 3.0})
    trackers.measured("fp", {"ppl/wiki/fp": 9.5})
    layers = {"outliers/before": [7.5, 8.0]}
    trackers.finish(Outcome(True, {"gap/wiki": 0.5}, layers, artifacts={file: {"family": "llama"}}))
    assert not trackers.stopped
    tables = {n: json.loads(body) for n, body in server.files.items() if "media/table/" in n}
    assert sorted(table["columns"] for table in tables.values()) == [
        ["layer", "outliers/before"],
        ["metric", "value"],
        ["network", "ppl/wiki"],
    ]
    rotations = server.artifacts[f"rotations-{record.key}"]
    assert rotations["artifactTypeName"] == "rotation"
    about = json.loads(rotations["metadata"])
    assert (about["key"], about["experiment"], about["family"]) == (record.key, "custom", "llama")


def test_each_point_of_a_sweep_is_a_run_whatever_became_of_the_last(tmp_path, service):
    records = [record_in(tmp_path, "offline", seed=seed, sweep=True) for seed in range(2)]
    going = [started(record) for record in records]
    for trackers in going[::-1]:  # the first is open while the second starts
        trackers.log(0, {"loss": 1.0})
        trackers.finish(DONE)
    for record in records:
        (folder,) = record.folder.glob("wandb/offline-run-*")
        assert folder.name.endswith(record.key)
    assert service.sync(folder).returncode == 0
    assert (service.run["name"], service.run["jobType"]) == (records[1].key, "point")
    assert len([row for row in service.rows if "learn/step" in row]) == 1


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["+experiment=toy", "+method=quarot"], ["experiment=toy", "method=quarot"]),
        (["quant.weights.bits=3", "+sweep=seeds", "sweep=seeds"], ["sweep=seeds"]),
        (["name=" + "x" * 60], []),
    ],
    ids=["choices", "no settings", "too long"],
)
def test_what_a_command_chose_as_a_whole_makes_the_tags(overrides, found):
    assert tags(overrides, ["mine"]) == [*found, "mine"]


def test_a_tag_that_is_too_long_is_refused():
    with pytest.raises(InputError, match=r"has 65 characters, and W&B takes 64: shorten it"):
        WandbConfig(tags=["x" * 65])


def test_csv_and_tensorboard_hold_curves_metrics_layers_and_figures(tmp_path):
    file, figure = files_of(tmp_path / "cache")
    record = record_in(tmp_path / "runs", tensorboard=True, csv=True)
    trackers = started(record)
    for step in range(2):
        trackers.log(step, {"loss": 3.0 - step, "lr": 0.5})
    trackers.measured("fp", {"ppl/wiki/fp": 9.5})
    layers = {"outliers/before": [7.5, 8.0], "outliers/init": [1.5, 2.0]}
    metrics = {"ppl/wiki/fp": 9.5, "bytes/fp": 4.0}
    trackers.finish(Outcome(True, metrics, layers, [figure], {file: {}}))
    assert not trackers.stopped
    told = {name: (record.folder / f"{name}.csv").read_text() for name in ("curves", "layers")}
    assert told["curves"].splitlines() == ["step,loss,lr", "0,3.0,0.5", "1,2.0,0.5"]
    assert told["layers"].splitlines()[1:] == ["0,7.5,1.5", "1,8.0,2.0"]
    with (record.folder / "metrics.csv").open(newline="") as table:
        assert {r["metric"]: float(r["value"]) for r in csv.DictReader(table)} == metrics
    events = EventAccumulator(str(record.folder / "tensorboard"), {"images": 0}).Reload()
    scalars = {n: [(e.step, e.value) for e in events.Scalars(n)] for n in events.Tags()["scalars"]}
    assert scalars["learn/loss"] == [(0, 3.0), (1, 2.0)]
    assert scalars["evaluation/ppl/wiki"] == [(0, 9.5)]
    assert scalars["layers/outliers/init"] == [(0, 1.5), (1, 2.0)]
    assert scalars["ppl/wiki/fp"] == [(0, 9.5)]
    assert events.Tags()["images"] == ["figures/outliers"]
    settings = events.SummaryMetadata("_hparams_/session_start_info")
    assert b"rotation.r1" in settings.plugin_data.content


def test_a_server_that_does_not_answer_holds_the_start_for_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens on discard
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("spinlab.track.mirrors.wandb._PATIENCE", 2)
    start = time.monotonic()
    with pytest.raises(InputError, match=r"no answer in 2 s.*tracker=offline"):
        started(record_in(tmp_path, "online"))
    assert time.monotonic() - start < 20
