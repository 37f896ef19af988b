"""Mirrors of the record: they may stop, and the run goes on."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from spinlab.config import Config, PathsConfig, TrackerConfig, WandbConfig
from spinlab.errors import InputError
from spinlab.track.record import Record
from spinlab.track.trackers import Outcome, Trackers

ROOT = Path(__file__).parent.parent.parent
DONE = Outcome(complete=True, metrics={"ppl/wiki/fp": 9.0})
FAILED = Outcome(complete=False)


def record_in(folder: Path, mode: str = "disabled", tensorboard: bool = False) -> Record:
    tracker = TrackerConfig(WandbConfig(mode=mode), tensorboard)
    return Record(Config(paths=PathsConfig(runs=str(folder)), tracker=tracker), [], {}, {})


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


class Flaky:
    """A mirror that stands until `broken`."""

    name = "flaky"

    def __init__(self) -> None:
        self.steps, self.broken, self.abandoned = [], False, False

    def log(self, step, values):
        if self.broken:
            raise ConnectionResetError("Connection lost")
        self.steps.append(step)

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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_that_loses_its_folder_does_not_end_the_run(tmp_path):
    record = record_in(tmp_path, tensorboard=True)
    trackers = started(record)
    shutil.rmtree(record.folder / "tensorboard")
    writers = [t for t in threading.enumerate() if type(t).__name__ == "_AsyncWriterThread"]
    trackers.log(0, {"loss": 1.0})
    trackers.finish(DONE)
    assert "FileNotFoundError" in record.mirrors["tensorboard"]
    for writer in writers:  # its failure is this test's, not that of a later one
        writer.join(timeout=10)


KILLED = """
import sys, time
import psutil
from spinlab.config import Config, PathsConfig, TrackerConfig, WandbConfig
from spinlab.track.record import Record
from spinlab.track.trackers import Outcome, Trackers

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


def test_an_offline_run_can_be_moved(tmp_path):
    file = tmp_path / "cache" / "rotations.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"r1" * 99)
    record = record_in(tmp_path / "runs", "offline")
    whole = Outcome(complete=True, metrics={"ppl/a<b/fp": 9.25}, artifacts=[file])
    (folder,) = ended(record, whole)
    moved = shutil.move(folder, tmp_path / "moved")
    assert (Path(moved) / "files" / "rotations.safetensors").read_bytes() == b"r1" * 99
    assert not (Path(moved) / "files" / "rotations.safetensors").is_symlink()
    (file_of_all,) = Path(moved).glob("*.wandb")
    deadline = time.monotonic() + 30
    while b"rotations.safetensors" not in (log := file_of_all.read_bytes()):  # flushed in the end
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert str(file.parent).encode() not in log
    assert b"staging" not in log  # no artifact, not even of a table
    (table,) = (Path(moved) / "files" / "media").rglob("*.html")
    assert "<td>ppl/a&lt;b/fp<td>9.25" in table.read_text()


def test_a_server_that_does_not_answer_holds_the_start_for_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens on discard
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("spinlab.track.trackers._PATIENCE", 2)
    start = time.monotonic()
    with pytest.raises(InputError, match=r"no answer in 2 s.*tracker=offline"):
        started(record_in(tmp_path, "online"))
    assert time.monotonic() - start < 20
