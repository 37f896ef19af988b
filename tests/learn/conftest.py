"""What tests of learning share: a learner of a model that a test makes."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from spinlab.config import ClipSearch, KVConfig, LearnConfig, QuantConfig, RotationConfig
from spinlab.learn import LearningSpace, RotationLearner
from spinlab.model.modules import map_of
from spinlab.networks.rotated import RotatedNetworks
from spinlab.rotation.initial import initial_rotations
from spinlab.rotation.rotations import RotationSet


@pytest.fixture
def learner_of() -> Callable[..., RotationLearner]:
    """Return a maker of learners on identical models that `make` gives.

    start: rotations, or the settings to draw them by; apart: with the original as a teacher.
    """

    def made(
        make: Callable[[], PreTrainedModel],
        learn: LearnConfig,
        quant: QuantConfig,
        kv: KVConfig | None = None,
        start: RotationSet | RotationConfig | None = None,
        apart: bool = False,
        space: type[LearningSpace] | None = None,
    ) -> RotationLearner:
        if not isinstance(start, RotationSet):
            generator = torch.Generator().manual_seed(0)
            start = initial_rotations(start or RotationConfig(), map_of(make()), generator)
        networks = RotatedNetworks(make, quant, kv or KVConfig())
        network = networks.learnable(start, inputs="inputs" in learn.rotations)
        teacher = make() if apart else None
        return RotationLearner(network, start, learn, quant, ClipSearch(), teacher, space)

    return made
