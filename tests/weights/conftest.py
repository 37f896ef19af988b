"""What tests of rounding share: a look at the pairs of inputs that a rounding gathers."""

import pytest
import torch

from spinlab.fakequant.insert import FakeQuantLinear
from spinlab.weights import layerwise

Pairs = dict[FakeQuantLinear, list[tuple[torch.Tensor, torch.Tensor]]]


@pytest.fixture
def seen_pairs(monkeypatch) -> Pairs:
    """Fill with what each linear reads, in the original and as it is quantized, when rounded."""
    pairs: Pairs = {}
    gather = layerwise.gather_pairs

    def spy(inputs, linear):
        inputs.visit(linear, lambda exact, x: pairs.setdefault(linear, []).append((exact, x)))
        return gather(inputs, linear)

    monkeypatch.setattr(layerwise, "gather_pairs", spy)
    return pairs
