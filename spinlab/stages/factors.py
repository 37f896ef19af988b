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
    """Return a stage's rotations with factors as `rotation.factors` says; itself where they are.

    It follows the learning, whose steps take factors as they are: one learning serves all settings.
    """
    rounded, factors = run.config.rotation.rounds_factors, run.config.rotation.factors
    if rounded is None:
        return made
    found = RotationSet.load(made.path / FILE)
    turning = [each for each in found.inputs.values() if each.dual is not None]
    if all(each.rounded == rounded for each in turning):
        return made

    def work(out: Path) -> None:
        inputs = {key: replace(each, rounded=rounded) for key, each in found.inputs.items()}
        about = dict(found.about or {})
        about["rotation"] = {**about.get("rotation", {}), "factors": factors}
        rotations = replace(found, inputs=inputs, about=about)
        rotations.save(out / FILE)
        write_json(out / "gate.json", gate(run, original, calibration, rotations))

    return run.cache.run("factors", [made.key, factors], work)
