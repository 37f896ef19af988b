"""A file of rotations, ours or SpinQuant's, that appears at once and whole."""

import logging

from spinlab.export.targets import place_of
from spinlab.files import replacing, writing
from spinlab.rotation.exchange import write_bin
from spinlab.rotation.rotations import RotationSet

log = logging.getLogger(__name__)


def save_rotations(rotations: RotationSet, path: str) -> None:
    """Write a .bin (R1 and R2) or a .safetensors (everything) in place of what is there.

    Raises InputError where an R.bin would lose a part.
    """
    target = place_of(path)
    with writing(target.parent, "export.rotations"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as file:
            write = write_bin if path.endswith(".bin") else RotationSet.save
            write(rotations, file)
    log.info("%-12s rotations in %s", "export", path)
