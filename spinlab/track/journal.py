"""What a run says, kept in its folder: run.log."""

import logging
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from spinlab import parallel
from spinlab.errors import InputError

log = logging.getLogger(__name__)


class Journal:
    """Keep what the first process logs in a file; repeats of a run are appended to it."""

    def __init__(self, path: Path, words: list[str]) -> None:
        self._handler = _LogFile(path) if parallel.is_main() else logging.NullHandler()
        logging.getLogger().addHandler(self._handler)
        self._handler.handle(_line(f"== spinlab {' '.join(words)}"))

    def tell(self, error: BaseException) -> None:
        """Keep how the run failed, and let the error say where that is."""
        stopped = isinstance(error, KeyboardInterrupt)
        expected = stopped or isinstance(error, InputError)
        trace = None if expected else (type(error), error, error.__traceback__)
        text = "interrupted" if stopped else f"failed: {type(error).__name__}: {error}"
        self._handler.handle(_line(text, trace))
        if trace and isinstance(self._handler, _LogFile):
            error.add_note(f"the run's log: {self._handler.baseFilename}")

    def close(self) -> None:
        logging.getLogger().removeHandler(self._handler)
        with suppress(OSError):  # of a full disk, which was told
            self._handler.close()


class _LogFile(logging.FileHandler):
    """A log of spinlab's own words and of others' warnings, which a full disk ends."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", delay=True)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self.addFilter(lambda r: r.name.startswith("spinlab") or r.levelno >= logging.WARNING)
        self._broken = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # it cannot be opened
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Give up with one warning: this is no reason to end a run."""
        if not self._broken:
            self._broken = True
            logging.getLogger().removeHandler(self)
            log.warning("%s is no longer written: %s", self.baseFilename, sys.exception())


def _line(text: str, trace: Any = None) -> logging.LogRecord:
    return logging.LogRecord(log.name, logging.INFO, __file__, 0, text, None, trace)
