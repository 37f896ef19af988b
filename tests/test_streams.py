"""Streams that go away and signals, from outside: a small program that works as a run does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spinlab import streams
from spinlab.errors import InputError

ROOT = Path(__file__).parent.parent
START = """
import logging, sys, time
from spinlab.streams import Console, keep_streams, end_in_order
keep_streams()
end_in_order()
logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[Console()])
"""
SPEAKS = (
    START
    + """
from tqdm import tqdm
for i in tqdm(range(300), mininterval=0):
    logging.info("line %d", i)
    print("out", i, flush=True)
    if i == 150:
        time.sleep(0.3)
opened = open(sys.argv[1], "w")
assert opened.fileno() > 2
opened.write("whole")
opened.close()
sys.stdout.flush()
"""
)


ENDS = [
    "2>&-",
    ">&- 2>&-",
    "<&- 2>&-",
    "2>&1 >/dev/null | head -1",
    "| head -1",
    "2>&1 | head -1",
]


@pytest.mark.parametrize("ends", ENDS)
def test_streams_that_are_closed_or_break_do_not_end_a_run(tmp_path, ends):
    (tmp_path / "speaks.py").write_text(SPEAKS)
    run = f"{sys.executable} {tmp_path}/speaks.py {tmp_path}/result"
    command, _, reader = ends.partition("|")
    status = f"{{ {run} {command}; echo $? > {tmp_path}/status; }}"
    shell = f"{status} | {reader}" if reader else status
    subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, timeout=60)
    assert (tmp_path / "status").read_text() == "0\n"
    assert (tmp_path / "result").read_text() == "whole"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_lets_open_work_be_closed(number):
    code = START + (
        "try:\n print('ready', flush=True); time.sleep(30)\n"
        "except KeyboardInterrupt as error: print(type(error).__name__, error)\n"
        "finally: print('closed')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    name = "KeyboardInterrupt " if number == signal.SIGINT else f"Terminated {number.name}"
    assert said.splitlines() == [name, "closed"]


def test_a_signal_ends_the_other_processes_at_once():
    """They may wait in a collective, where a handler would never run."""
    code = START + "print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)"
    other = {**os.environ, "WORLD_SIZE": "2", "RANK": "1"}
    said = subprocess.run(
        [sys.executable, "-c", "import signal" + code],
        cwd=ROOT,
        env=other,
        capture_output=True,
        text=True,
    )
    assert said.stdout == "True\n", said.stderr


def test_a_log_line_stands_above_the_bar(tmp_path):
    code = START + (
        "from tqdm import tqdm\n"
        "bar = tqdm(total=2, desc='learn', mininterval=0)\n"
        "logging.info('a line'); bar.close()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert any(line.strip() == "a line" for line in done.stderr.replace("\r", "\n").splitlines())


def test_commands_end_with_a_sentence_or_as_interrupted(capsys):
    with pytest.raises(SystemExit) as ended, streams.ending("spinlab.some"):
        raise InputError("mend it")
    assert (ended.value.code, capsys.readouterr().err) == (2, "spinlab.some: mend it\n")
    with pytest.raises(SystemExit) as ended, streams.ending("spinlab.some"):
        raise KeyboardInterrupt
    assert (ended.value.code, capsys.readouterr().err) == (130, "\n")
    with pytest.raises(ZeroDivisionError), streams.ending("spinlab.some"):
        _ = 1 / 0  # a fault of ours keeps its traceback
