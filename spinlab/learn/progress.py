"""Progress of a learning run on disk: state and curve in one file, replaced atomically."""

import logging
from pathlib import Path

from spinlab.files import kept_tensors, save_tensors
from spinlab.learn.loop import RotationLearner

log = logging.getLogger(__name__)


def save_progress(learner: RotationLearner, path: Path, curve: list[dict[str, float]]) -> None:
    """Write the learner's state and the curve so far."""
    save_tensors(path, learner.state(), curve)


def resume(learner: RotationLearner, path: Path) -> list[dict[str, float]]:
    """Continue from saved progress, if there is any and it is sound; return the curve so far."""
    kept = kept_tensors(path)
    if kept is None:
        return []
    tensors, curve = kept
    learner.load_state(tensors)
    log.info("learning resumes after step %d", len(curve))
    return curve
