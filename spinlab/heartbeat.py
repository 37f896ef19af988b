"""A sign of life from long stages."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

log = logging.getLogger(__name__)

_INTERVAL = 30.0  # seconds between two signs of life
_WORK = {
    "check": "reading every weight once",
    "model": "unpacking the packaged model's weights",
    "calibration": "tokenizing the calibration text",
    "evaluation": "tokenizing the evaluation texts",
    "rotate": "making the rotations, comparing the rotated model's logits with the original's",
    "factors": "comparing the logits of the model that rounded factors rotate with the original's",
    "peaks": "looking for the largest inputs",
    "handoff": "comparing the integer network with floats in float64",
    "outliers": "looking for the largest activations",
}


@contextmanager
def heartbeat(stage: str) -> Iterator[None]:
    """Say every half minute that a stage is at work and what it does, unless a bar does."""
    done = threading.Event()
    start = time.monotonic()
    work = _WORK.get(stage.partition("-")[0], "at work")  # handoff-fake and the like

    def beat() -> None:
        while not done.wait(_INTERVAL):
            if not getattr(tqdm, "_instances", None):
                seconds = time.monotonic() - start
                log.info("%-12s %s … %.0f s", stage, work, seconds)

    thread = threading.Thread(target=beat, name=f"heartbeat of {stage}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
