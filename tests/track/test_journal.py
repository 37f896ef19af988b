"""run.log: what a run says, also about its end."""

import errno
import io
import logging
import os

import pytest

from spinlab.errors import InputError
from spinlab.track import journal
from spinlab.track.journal import Journal

log = logging.getLogger("spinlab.test")


@pytest.fixture(autouse=True)
def speaking():
    root, before = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.INFO)
    yield
    root.setLevel(before)


def test_the_log_holds_what_was_said_and_every_repeat(tmp_path):
    for seed in range(2):
        kept = Journal(tmp_path / "run.log", [f"seed={seed}"])
        log.info("%-12s …", "rotate")
        logging.getLogger("other").info("chatter")
        logging.getLogger("other").warning("careful")
        kept.close()
        log.info("after the end")
    lines = (tmp_path / "run.log").read_text().splitlines()
    said = [line[20:] for line in lines]  # behind date and time
    once = ["rotate       …", "careful"]
    assert said == ["== spinlab seed=0", *once, "== spinlab seed=1", *once]


def test_a_fault_is_kept_with_its_trace_and_names_the_log(tmp_path):
    kept = Journal(tmp_path / "run.log", [])
    try:
        raise RuntimeError("out of luck")
    except RuntimeError as error:
        kept.tell(error)
        assert error.__notes__ == [f"the run's log: {tmp_path / 'run.log'}"]
    kept.close()
    text = (tmp_path / "run.log").read_text()
    assert "failed: RuntimeError: out of luck\nTraceback" in text
    assert "test_journal.py" in text


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InputError("too short"), "failed: InputError: too short"),
        (KeyboardInterrupt(), "interrupted"),
    ],
    ids=["mistake", "interrupt"],
)
def test_a_mistake_and_an_interrupt_are_one_line(tmp_path, error, said):
    kept = Journal(tmp_path / "run.log", [])
    kept.tell(error)
    kept.close()
    assert (tmp_path / "run.log").read_text().splitlines()[1].endswith(said)
    assert not hasattr(error, "__notes__")


class FullDisk(io.StringIO):
    def flush(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self):
        pass  # it would flush


def test_a_full_disk_ends_the_log_with_one_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(journal._LogFile, "_open", lambda self: FullDisk())
    kept = Journal(tmp_path / "run.log", [])
    log.info("one")
    log.info("two")
    kept.tell(InputError("three"))
    kept.close()
    assert caplog.text.count("No space left on device") == 1


def test_a_log_without_a_folder_is_given_up_with_one_warning(tmp_path, caplog):
    kept = Journal(tmp_path / "missing" / "run.log", [])
    log.info("one")
    kept.close()
    assert caplog.text.count("is no longer written") == 1
