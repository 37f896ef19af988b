"""Standard streams that do not end a run, and how commands end: in order, with a sentence."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, TextIO

from spinlab.errors import InputError
from spinlab.launch import is_first


class Terminated(KeyboardInterrupt):
    """A signal treated like Ctrl-C: what is open is closed and what is known is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Lasting:
    """A stream whose reader may go away: from then on what is written is dropped.

    The descriptor itself is led to nowhere, for libraries and child processes that write to it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.has_reader = True

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        self.has_reader = False
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class ReaderLeft(Exception):
    """End what is only worth doing for a reader, who went away."""


class Console(logging.StreamHandler):
    """Write log lines to stderr, above the bars that stand there."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = sys.modules.get("tqdm")  # without it there are no bars
        if tqdm is None:
            super().emit(record)
            return
        with tqdm.tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def keep_streams() -> None:
    """Make sure that standard streams are there, and stay.

    A closed one would leave its number to the next file that is opened, into which libraries would
    then write their messages.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number, which is this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Lasting):
            setattr(sys, name, Lasting(stream or open(os.devnull, "w", encoding="utf-8")))  # noqa: SIM115


@contextmanager
def ending(command: str) -> Iterator[None]:
    """End a command as a user expects: one sentence and status 2 for what can be mended.

    Ctrl-C ends it with 130, as a shell would tell it, and without a traceback.
    """
    try:
        yield
    except InputError as error:
        print(f"{command}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(file=sys.stderr)  # after the ^C
        sys.exit(130)


def check_reader() -> None:
    """Raise ReaderLeft where nobody reads standard output any more."""
    if not getattr(sys.stdout, "has_reader", True):
        raise ReaderLeft


def end_in_order() -> None:
    """Turn the signals that ask for an end into exceptions, where they would kill at once.

    Only the first process has something to close. The others may wait for it in a collective, where
    no handler of Python's runs: they keep the default, which ends them there.
    """
    if not is_first() or threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup has it ignored
            signal.signal(number, _terminate)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated(number)
