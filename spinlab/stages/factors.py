"""Stage `factors`: what turns inputs, with factors rounded, or exact again, as the settings say."""

from dataclasses import replace
from pathlib import Path

from spinlab.cache import Artifact
from spinlab.files import write_json
from spinlab.rotation.rotations import RotationSet
from spinlab.stages.original import Original
from spinlab.stages.rotations import FILE, gate
from spinlab.stages.run import Run
from spinlab.stages.text import Calibration


def with_factors(
    run: Run, original: Original, calibration: Calibration, made: Artifact
) -> Artifact:
    """Return a stage's rotations with factors as `rotation.factors` says, which they are not yet.

    It follows the learning of what turns inputs, which takes factors as they are: one learning
    serves both.
    """
    rounded, factors = bool(run.config.rotation.rounds_factors), run.config.rotation.factors

    def work(out: Path) -> None:
        found = RotationSet.load(made.path / FILE)
        inputs = {key: replace(each, rounded=rounded) for key, each in found.inputs.items()}
        about = dict(found.about or {})
        about["rotation"] = {**about.get("rotation", {}), "factors": factors}
        rotations = replace(found, inputs=inputs, about=about)
        rotations.save(out / FILE)
        write_json(out / "gate.json", gate(run, original, calibration, rotations))

    return run.cache.run("factors", [made.key, factors], work)
