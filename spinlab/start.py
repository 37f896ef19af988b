"""The second part of an experiment's stages: the rotations it starts from, behind their gate.

They are drawn, or made from activations, or read from a file: of the settings (`rotation.load`) or
of a transformed model (its manifest).
"""

import logging
import os
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from spinlab.config import Config, plain
from spinlab.data.questions import identities
from spinlab.errors import InputError
from spinlab.export.identity import manifest_of, warn_of_dtype
from spinlab.files import file_digest, write_json, write_tensors
from spinlab.finite import check_finite
from spinlab.model.context import context_of
from spinlab.model.load import tokenizer_digest
from spinlab.model.seams import dimensions_of
from spinlab.networks import Networks
from spinlab.rotation.check import GATE_TOKENS, check_invariance
from spinlab.rotation.exchange import read_rotations, with_online
from spinlab.rotation.initial import initial_rotations
from spinlab.rotation.ranges import warn_of_lost_ranges, with_fitting_ranges
from spinlab.rotation.rotations import RotationSet
from spinlab.rotation.statistics import Statistics, gather_statistics
from spinlab.sources import Sources

log = logging.getLogger(__name__)

SETTINGS = ("config", "sources")  # modules that every stage depends on


class Start(Sources):
    """Add to its sources the rotations that an experiment starts from."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.networks = Networks(self.original, config.quant, config.kv)
        self.given = self._given()

    def _given(self) -> Path | None:
        """Return the file that rotations come from: a transformed model's manifest, or `load`."""
        path, measured = self.config.model.path, self.config.eval
        manifest = manifest_of(path)
        if manifest is None:
            if self.loaded is not None and not os.path.isfile(self.loaded):
                raise InputError(f"rotation.load={self.loaded} does not exist")
            return self.loaded
        if self.loaded or self.config.learn.steps:
            raise InputError(
                f"model.path={path} holds a transformed model, whose rotations are fused: leave "
                "rotation.load empty and use learn=none"
            )
        if "rtn" in (*measured.variants, *(measured.task_variants if measured.tasks else ())):
            raise InputError(
                f"model.path={path} holds a transformed model: it has no variant rtn, without "
                "rotation; use eval=llmc or other eval.variants"
            )
        warn_of_dtype(manifest, self.config.model.dtype)
        return manifest

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the numbers are about, by content and not by place: for the record and its key."""
        calibration, evaluation = self.texts
        measured = self.config.eval
        return {
            "model": self.source,
            "tokenizer": tokenizer_digest(self.config.model),
            "calibration": calibration.digest,
            "evaluation": {t.label: {"part": t.part, "digest": t.digest} for t in evaluation},
            "questions": identities(measured.tasks, measured.task_source),
            "rotations": self.given and file_digest(self.given),
        }

    @property
    def transformed(self) -> bool:
        """Tell whether the model is rotated already, and brings the rest of its rotations."""
        return self.given is not None and self.given != self.loaded

    @property
    def loaded(self) -> Path | None:
        """The file that the settings name, if any."""
        load = self.config.rotation.load
        return Path(load).expanduser() if load else None

    @cached_property
    def given_rotations(self) -> RotationSet | None:
        """What the given file holds, made for this model; None where no file is given."""
        if self.given is None:
            return None
        settings = self.shape.config
        dimensions = dimensions_of(settings)
        return read_rotations(self.given, dimensions, settings.model_type, self.transformed)

    @cached_property
    def statistics(self) -> tuple[Path, str]:
        """A file with what the calibration text says about activations."""
        settings = self.config.rotation.statistics
        searches = self.config.rotation.searches
        depends = [self.source, self.calibration[1], plain(settings), self.config.seed, searches]

        def work(out: Path) -> None:
            model = self.networks.stream_rotated(RotationSet())
            windows = self.windows("statistics", settings.samples, settings.sequence_length)
            found = gather_statistics(model, windows, searches).tensors()
            check_finite(found, "the model is broken, or its activations overflow")
            write_tensors(out / "statistics.safetensors", found)

        code = ("rotation", "model", "networks", "start", *SETTINGS)
        folder, key = self.stages.run("statistics", depends, work, code)
        return folder / "statistics.safetensors", key

    def rotations_in(self, folder: Path) -> RotationSet:
        """Load a stage's rotations, with those of their learned ranges that fit the formats."""
        found = RotationSet.load(folder / "rotations.safetensors")
        return with_fitting_ranges(found, self.config.quant, self.config.weights)

    @cached_property
    def initial(self) -> tuple[Path, str]:
        """The initial rotations, once they have passed the invariance gate."""
        config, depends = self.config.rotation, [self.source, self.calibration[1]]
        depends += [self._rotation_settings(), self.config.seed]
        if self.given is not None:
            depends.append(file_digest(self.given))
        elif config.needs_statistics:
            depends.append(self.statistics[1])

        def work(out: Path) -> None:
            rotations = self._start()
            rotations.save(out / "rotations.safetensors")
            write_json(out / "gate.json", self.gate(rotations))

        code = ("rotation", "model", "quant", "kv", "networks", "start", *SETTINGS)
        folder, key = self.stages.run("rotate", depends, work, code)
        if self.given is not None:
            found = RotationSet.load(folder / "rotations.safetensors")
            warn_of_lost_ranges(found, self.config.quant, self.config.weights, self.given.name)
        return folder, key

    def _rotation_settings(self) -> dict[str, Any]:
        """Name the settings that the initial rotations depend on, for keys and files."""
        config = self.config.rotation
        unused = {"load"} | (set() if config.searches else {"duquant"})
        unused |= set() if config.needs_statistics else {"statistics"}
        return {name: value for name, value in plain(config).items() if name not in unused}

    def _start(self) -> RotationSet:
        """Read the rotations, or draw them, or make them from statistics."""
        config, settings = self.config.rotation, self.shape.config
        dimensions = dimensions_of(settings)
        about = self.about(settings.model_type)
        loaded = self.given_rotations
        if self.given is None or loaded is None:
            statistics = None
            if config.needs_statistics:
                statistics = Statistics.from_tensors(load_file(self.statistics[0]))
            generator = self.generator("init")
            drawn = initial_rotations(config, dimensions, generator, statistics, self.device)
            return replace(drawn, about=about)
        if self.given.suffix != ".bin":
            log.info("%-12s all from %s, rotation.* is not used", "rotations", self.given.name)
            return loaded
        online = replace(config, r1="none", r2="none", load=None)
        drawn = initial_rotations(online, dimensions, self.generator("init"))
        log.info("%-12s R1 and R2 from %s, the rest from rotation.*", "rotations", self.given.name)
        return replace(with_online(loaded, drawn), about={**about, **(loaded.about or {})})

    def about(self, family: str) -> dict[str, Any]:
        """Tell how rotations came to be, for the file that carries them."""
        config = self.config
        about = {"seed": config.seed, "model": self.source, "family": family}
        return plain({**about, "rotation": self._rotation_settings()})

    def gate(self, rotations: RotationSet) -> dict[str, float]:
        """Compare the rotated model with the original and measure orthogonality."""
        dtype = "float64" if self.config.model.dtype == "float64" else "float32"
        model = replace(self.config.model, dtype=dtype)
        networks = replace(self.networks, original=lambda: self.original(model))
        rotated = partial(networks.rotated, rotations)
        ids = self.gate_ids.to(self.device)
        error = check_invariance(networks.original, rotated, rotations, ids)
        log.info("%-12s logits differ by %.1e of their spread", "invariance", error)
        return {"logits_error": error, **rotations.orthogonality()}

    @property
    def gate_ids(self) -> torch.Tensor:
        """One calibration window: (1, gate_tokens)."""
        return self.windows("gate", 1, self.gate_tokens)

    @property
    def gate_tokens(self) -> int:
        """How many tokens the gates look at: no more than the model's context."""
        return min(GATE_TOKENS, context_of(self.shape.config) or GATE_TOKENS)
