"""The folder of a run, read for figures: its record, what lies beside it, what its stages kept."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from spinlab.config.outputs import PathsConfig
from spinlab.errors import InputError
from spinlab.report.records import Record, read_record


class RunFolder:
    """Find what a run has left. run: the folder of its record; cache: where its stages lie."""

    def __init__(self, run: str, cache: str = "") -> None:
        self.path = Path(run).expanduser()
        self._cache = Path(cache or PathsConfig().cache).expanduser()

    @cached_property
    def record(self) -> Record:
        """The record. Raises InputError where there is none, or none that is complete."""
        return read_record(self.path / "record.json")

    @property
    def model(self) -> str:
        """What the model that ran is called."""
        return self.record["config"]["model"]["name"]

    def json(self, name: str) -> Any:
        """Return what a file beside the record holds. Raises InputError where there is none."""
        path = self.path / name
        if not path.is_file():
            raise InputError(f"run={self.path} has no {name}: is it the folder of a run?")
        return json.loads(path.read_text(encoding="utf-8"))

    def tensors(self, stage: str, name: str) -> dict[str, np.ndarray]:
        """Return the arrays `<name>.safetensors` that a stage kept.

        Raises InputError where the cache does not hold them any more.
        """
        from safetensors.numpy import load_file

        keys = [made["key"] for made in self.record["stages"] if made["name"] == stage]
        path = self._cache / f"{stage}-{keys[-1] if keys else '*'}" / f"{name}.safetensors"
        if not path.is_file():
            raise InputError(
                f"{path} is not there: name the cache of the run with cache=, or run it again"
            )
        return load_file(path)
