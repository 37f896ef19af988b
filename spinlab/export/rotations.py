"""A file of rotations, ours or SpinQuant's, that appears at once and whole."""

import logging
import os
from pathlib import Path

from spinlab.export.targets import flush, place_of, sole_writer
from spinlab.rotation.exchange import write_bin
from spinlab.rotation.rotations import RotationSet

log = logging.getLogger(__name__)


def save_rotations(rotations: RotationSet, path: str) -> None:
    """Write a .bin (R1 and R2) or a .safetensors (everything) in place of what is there.

    Raises InputError where an R.bin would lose a part.
    """
    target = place_of(path)
    with sole_writer(target) as partial:
        file = partial / target.name
        if Path(path).suffix == ".bin":
            write_bin(rotations, file)
        else:
            rotations.save(file)
        flush(file)
        os.replace(file, target)
    log.info("%-12s rotations in %s", "export", path)
