import pytest
import torch

from spinlab.config import RotationConfig
from spinlab.errors import InputError
from spinlab.model.seams import Dimensions
from spinlab.rotation.rotations import RotationSet, initial_rotations

DIMENSIONS = Dimensions(hidden=24, head_dim=8, intermediate=40, layers=2)


def drawn(seed: int = 0, **changes) -> RotationSet:
    config = RotationConfig(**changes)
    return initial_rotations(config, DIMENSIONS, torch.Generator().manual_seed(seed))


def test_a_saved_set_comes_back_with_every_bit(tmp_path):
    saved = RotationSet(**{**vars(drawn(r4="random")), "about": {"seed": 7}})
    saved.save(tmp_path / "r.safetensors")
    loaded = RotationSet.load(tmp_path / "r.safetensors", DIMENSIONS)
    assert torch.equal(loaded.r1, saved.r1)
    assert torch.equal(loaded.r2, saved.r2)
    assert torch.equal(loaded.r3.dense(), saved.r3.dense())
    assert torch.equal(loaded.r4.dense(), saved.r4.dense())
    assert loaded.about == {"seed": 7}


def test_every_layer_has_its_own_r2():
    r2 = drawn().r2
    assert r2.shape == (2, 8, 8)
    assert not torch.equal(r2[0], r2[1])


def test_switched_off_rotations_are_absent(tmp_path):
    off = drawn(r1="none", r2="none", r3="none", r4="none")
    off.save(tmp_path / "r.safetensors")
    loaded = RotationSet.load(tmp_path / "r.safetensors")
    assert (loaded.r1, loaded.r2, loaded.r3, loaded.r4) == (None,) * 4


def test_rotations_of_another_model_are_refused(tmp_path):
    drawn().save(tmp_path / "r.safetensors")
    for other in (Dimensions(12, 8, 40, 2), Dimensions(24, 8, 40, 3), Dimensions(24, 8, 20, 2)):
        with pytest.raises(InputError, match="the model has"):
            RotationSet.load(tmp_path / "r.safetensors", other)


def test_a_matrix_that_is_not_orthogonal_is_refused():
    with pytest.raises(AssertionError, match="R1"):
        RotationSet(r1=torch.ones(4, 4))
