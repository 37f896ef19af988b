"""The invariance gate: it runs its networks in turn, and what is no number does not pass."""

import weakref

import pytest
import torch

from spinlab.config import RotationConfig
from spinlab.errors import ResultError
from spinlab.model.modules import head_of, linear_at, map_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.check import BrokenSite, check_invariance, logits_of
from spinlab.rotation.initial import initial_rotations
from spinlab.rotation.orthogonal import check_orthogonal


class OneAtATime:
    """Makes networks, and fails where an earlier one is still there."""

    def __init__(self, make):
        self.make, self.made = make, []

    def __call__(self):
        assert not [ref for ref in self.made if ref() is not None]
        model = self.make()
        self.made.append(weakref.ref(model))
        return model


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "broken"])
def test_no_network_of_the_gate_stands_beside_another(make_model, ids, broken):
    make = OneAtATime(make_model)
    networks = QuantizedNetworks(make, None, None)
    generator = torch.Generator().manual_seed(0)
    rotations = initial_rotations(RotationConfig(), map_of(make_model()), generator)

    def rotated():
        model = networks.rotated(rotations)
        model.cycle = [model]  # as hooks make them
        if broken:
            weight = linear_at(model, "model.layers.1.mlp.up_proj").weight
            weight.data = weight.data.roll(1, 0)
        return model

    if broken:
        with pytest.raises(BrokenSite, match=r"first at model\.layers\.1\.mlp\.up_proj"):
            check_invariance(make, rotated, rotations, ids[:1])
    else:
        assert check_invariance(make, rotated, rotations, ids[:1]) < 1e-9
    assert len(make.made) == (4 if broken else 2)


def test_a_network_whose_logits_are_no_numbers_is_broken(make_model, ids):
    def poisoned():
        model = make_model()
        head_of(model).weight.data[5, 3] = torch.nan
        return model

    assert logits_of(poisoned, ids[:1]).isnan().any()
    rotations = initial_rotations(
        RotationConfig(), map_of(make_model()), torch.Generator().manual_seed(0)
    )
    with pytest.raises(BrokenSite, match="differ by nan"):
        check_invariance(make_model, poisoned, rotations, ids[:1])


@pytest.mark.parametrize("value", [2.0, torch.nan, torch.inf])
def test_a_rotation_that_is_none_does_not_pass(value):
    matrix = torch.eye(3, dtype=torch.float64)
    check_orthogonal("R1", matrix)
    matrix[1, 1] = value
    with pytest.raises(ResultError, match="R1 is not orthogonal"):
        check_orthogonal("R1", matrix)
