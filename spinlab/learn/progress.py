"""Progress of a learning run on disk: state and curve in one file, replaced atomically."""

import json
import logging
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from spinlab.learn.loop import RotationLearner

log = logging.getLogger(__name__)


def save_progress(learner: RotationLearner, path: Path, curve: list[dict[str, float]]) -> None:
    """Write the learner's state and the curve so far."""
    temporary = path.with_suffix(".tmp")
    save_file(learner.state(), temporary, metadata={"curve": json.dumps(curve)})
    temporary.replace(path)


def resume(learner: RotationLearner, path: Path) -> list[dict[str, float]]:
    """Continue from saved progress, if any; return the curve so far."""
    if not path.exists():
        return []
    with safe_open(path, framework="pt") as file:
        curve = json.loads(file.metadata()["curve"])
        learner.load_state({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    log.info("learning resumes after step %d", len(curve))
    return curve
