"""The order of the stages, on one page: what each is made of, made when it is first asked for.

Every stage is cached under a key of the keys before it, its own settings, digests of its inputs and
the code that it runs (`spinlab.cache`). A second run of the same experiment loads no model at all.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from spinlab.cache import Artifact
from spinlab.config import Config
from spinlab.data.questions import identities
from spinlab.data.text import Text, read_texts
from spinlab.errors import InputError
from spinlab.files import file_digest
from spinlab.model.load import tokenizer_digest
from spinlab.rotation.rotations import AS_IT_IS, RotationSet
from spinlab.stages.factors import with_factors
from spinlab.stages.given import Given
from spinlab.stages.handoff import handoff_error
from spinlab.stages.layers import layers
from spinlab.stages.learn import Learning, OnStep, check_batch, learns
from spinlab.stages.measure import measure, metrics_of
from spinlab.stages.original import Original
from spinlab.stages.outliers import outliers
from spinlab.stages.peaks import peaks
from spinlab.stages.rotate import rotate
from spinlab.stages.rotations import rotations_in
from spinlab.stages.run import Run
from spinlab.stages.statistics import statistics
from spinlab.stages.text import Calibration, calibration, evaluation
from spinlab.stages.variant import Variant
from spinlab.stages.weights import round_weights
from spinlab.weights.quantized import QuantizedWeight


class Pipeline:
    """Hold the artefacts of one experiment. on_step: told the curve of every learning step."""

    def __init__(self, config: Config, on_step: OnStep = lambda step, values: None) -> None:
        check_batch(config)
        self.config, self.on_step = config, on_step
        self.run = Run(config)
        self.original = Original(self.run)
        self.given = Given(self.run, self.original)
        self._rotated: dict[str, Artifact | None] = {}  # by variant

    @cached_property
    def texts(self) -> tuple[Text, list[Text]]:
        """The calibration text and the evaluation texts."""
        return read_texts(self.config.data)

    @cached_property
    def calibration(self) -> Calibration:
        return calibration(self.run, self.original, self.texts[0])

    @cached_property
    def evaluation(self) -> Artifact:
        return evaluation(self.run, self.original, self.texts[1])

    @cached_property
    def statistics(self) -> Artifact | None:
        """What activations are like, where the rotations of the settings need to know."""
        if self.given.file is not None or not self.config.rotation.needs_statistics:
            return None
        return statistics(self.run, self.original, self.calibration)

    @cached_property
    def start(self) -> Artifact:
        """The rotations of the settings, as they were drawn or read."""
        parts = self.original, self.calibration, self.given, self.statistics
        return rotate(self.run, *parts)

    @cached_property
    def initial(self) -> Artifact:
        """The start, with factors as the settings say."""
        return self._with_factors(self.start)

    @cached_property
    def learning(self) -> Learning:
        """What learns on from the start; from the initial rotations where inputs keep theirs."""
        start = self.start if self.rounds_learned else self.initial
        return Learning(
            self.run, self.original, self.calibration, start, self.on_step, self.given.file
        )

    @cached_property
    def outcome(self) -> Artifact:
        """What learning makes of its start, with its curve; that itself if nothing is learned."""
        start = self.learning.initial
        return self.learning.artifact() if learns(self.run, start) else start

    @cached_property
    def learned(self) -> Artifact:
        """The outcome, with factors as the settings say: the rotations of the experiment."""
        return self._with_factors(self.outcome) if self.rounds_learned else self.outcome

    @cached_property
    def changes_factors(self) -> bool:
        """Tell whether factors are to be others than what was drawn or read."""
        rotation = self.config.rotation
        rounded = rotation.rounds_factors
        if rounded is None or self.given.transformed:  # whose weights are rotated already
            return False
        if self.given.rotations is None:
            return rounded and rotation.turns_inputs
        inputs = self.given.rotations.inputs.values()
        return any(each.dual is not None and each.rounded != rounded for each in inputs)

    @property
    def rounds_learned(self) -> bool:
        """Tell whether factors change behind the learning, which is of what turns inputs."""
        return self.changes_factors and "inputs" in self.config.learn.rotations

    def _with_factors(self, made: Artifact) -> Artifact:
        parts = self.run, self.original, self.calibration
        return with_factors(*parts, made) if self.changes_factors else made

    def rotated(self, name: str) -> Artifact | None:
        """Return the rotations of a variant; None for what has none.

        With them goes what calibration finds of inputs behind them, where a format asks for it.
        """
        if name == "fp":
            return None
        if name not in self._rotated:
            made = self.initial if name == "init" else None if name == "rtn" else self.learned
            parts = self.original, self.calibration, made
            self._rotated[name] = peaks(self.run, *parts) if self.calibrates else made
        return self._rotated[name]

    @property
    def calibrates(self) -> bool:
        """Tell whether inputs have ranges from calibration."""
        return self.config.quant.calibrates

    def rotations(self, name: str) -> RotationSet:
        """Load the rotations of a variant."""
        made = self.rotated(name)
        return AS_IT_IS if made is None else rotations_in(self.run, made)

    def weights(self, name: str) -> Artifact:
        """Return the rounded weights of a variant; `rtn` ignores the experiment's method."""
        config = self.config.weights
        if name == "rtn":
            config = replace(config, method="rtn")
        parts = self.original, self.calibration, self.rotated(name), config
        return round_weights(self.run, *parts)

    def variant(self, name: str) -> Variant:
        """Return what a variant's network is made of."""
        rounded = name != "fp" and self.config.quant.rounds_weights
        return Variant(name, self.rotated(name), self.weights(name) if rounded else None)

    def network(self, name: str) -> tuple[PreTrainedModel, Mapping[str, QuantizedWeight] | None]:
        """Assemble a variant's network; return its quantized weights too, None for the original.

        Raises InputError where the network comes layer by layer.
        """
        network, weights = self.variant(name).network(self.run, self.original)
        if network.part is not None:
            raise InputError(f"the network {name} is whole only with runtime.offload=false")
        return network.base(), weights

    def handoff_error(self, name: str) -> float:
        """Return how far a variant's integers are from the numbers they stand for."""
        return handoff_error(self.run, self.original, self.calibration, self.variant(name))

    def measured(self, name: str) -> Artifact:
        """Measure a variant, after the original where it is compared with that."""
        parts = self.original, self.evaluation, self.variant(name), self._reference(name)
        return measure(self.run, *parts)

    def measure(self, name: str) -> dict[str, float]:
        """Return a variant's metrics."""
        chosen = self.config.eval.task_metrics
        return metrics_of(self.measured(name), name, self._reference(name), chosen)

    def _reference(self, name: str) -> Artifact | None:
        """Return what was kept of the original for a comparison with it."""
        return self.measured("fp") if name != "fp" and self.config.eval.compares else None

    def outliers(self) -> dict[str, torch.Tensor]:
        """Return the largest attention inputs before, at the start and after learning."""
        rotated = {"init": self.initial, "learned": self.learned}
        parts = self.original, self.calibration, rotated, self.given.transformed
        return outliers(self.run, *parts)

    def layers(self, name: str) -> list[float]:
        """Return the error of the stream behind each layer of a variant, emulated in floats."""
        return layers(self.run, self.original, self.calibration, self.variant(name))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the numbers are about, by content and not by place: for the record and its key."""
        texts, measured, file = self.texts, self.config.eval, self.given.file
        return {
            "model": self.original.identity,
            "tokenizer": tokenizer_digest(self.config.model),
            "calibration": texts[0].digest,
            "evaluation": {t.label: {"part": t.part, "digest": t.digest} for t in texts[1]},
            "questions": identities(measured.tasks, measured.task_source),
            "rotations": file and file_digest(file),
        }
