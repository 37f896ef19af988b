"""What tests of learning share: a learner of a model that a test makes."""

from collections.abc import Callable

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from spinlab.config import ClipSearch, KVConfig, LearnConfig, QuantConfig, RotationConfig
from spinlab.learn import LearningSpace, RotationLearner
from spinlab.model.modules import decoder_of, map_of
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


@pytest.fixture
def kept_bytes() -> Callable[[RotationLearner, torch.Tensor], int]:
    """Return what counts the bytes that autograd keeps of a forward pass, beside what is there."""

    def count(learner: RotationLearner, batch: torch.Tensor) -> int:
        learner.rotations.begin()
        learner.space.begin(0)
        fixed = [*learner.model.parameters(), *learner.rotations.cast.values()]
        known = {tensor.untyped_storage().data_ptr() for tensor in fixed}
        kept: dict[int, torch.Tensor] = {}  # by storage, alive so that no address comes back

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            place = tensor.untyped_storage().data_ptr()
            if place not in known:
                kept.setdefault(place, tensor)
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            decoder_of(learner.model)(input_ids=batch, use_cache=False)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    return count
