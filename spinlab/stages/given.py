"""Rotations read from a file: that of the settings, or a transformed model's manifest."""

import os
from functools import cached_property
from pathlib import Path

from spinlab.errors import InputError
from spinlab.export.identity import manifest_of, warn_of_dtype
from spinlab.model.modules import map_of
from spinlab.rotation.exchange import read_rotations
from spinlab.rotation.rotations import RotationSet
from spinlab.stages.original import Original
from spinlab.stages.run import Run


class Given:
    """Name the file that rotations come from, if any, and what it holds.

    Raises InputError for a file that is not there, and for settings that cannot go with it.
    """

    def __init__(self, run: Run, original: Original) -> None:
        self._original = original
        self._load = _place(run.config.rotation.load)
        self._factors = run.config.rotation.factors
        self._manifest = manifest_of(run.config.model.path)
        if self._manifest is not None:
            _check_transformed(run)
            warn_of_dtype(self._manifest, run.config.model.dtype)
        elif self._load is not None and not os.path.isfile(self._load):
            raise InputError(f"rotation.load={self._load} does not exist")

    @property
    def file(self) -> Path | None:
        return self._manifest or self._load

    @property
    def transformed(self) -> bool:
        """Tell whether the model is rotated already, and brings the rest of its rotations."""
        return self._manifest is not None

    @cached_property
    def rotations(self) -> RotationSet | None:
        """What the file holds, made for this model; None where no file is given."""
        if self.file is None:
            return None
        found = read_rotations(self.file, map_of(self._original.shape), self.transformed)
        turning = any(transform.dual is not None for transform in found.inputs.values())
        if self._factors is not None and not self.transformed and not turning:
            raise InputError(
                f"rotation.factors={self._factors} is of what turns single inputs, and {self.file} "
                "turns none: leave it out"
            )
        return found


def _place(path: str | None) -> Path | None:
    return Path(path).expanduser() if path else None


def _check_transformed(run: Run) -> None:
    """Refuse what a model whose rotations are fused cannot do."""
    path, measured = run.config.model.path, run.config.eval
    if run.config.rotation.load or run.config.learn.steps:
        raise InputError(
            f"model.path={path} holds a transformed model, whose rotations are fused: leave "
            "rotation.load empty and use learn=none"
        )
    if "rtn" in (*measured.variants, *(measured.task_variants if measured.tasks else ())):
        raise InputError(
            f"model.path={path} holds a transformed model: it has no variant rtn, without "
            "rotation; use eval=llmc or other eval.variants"
        )
