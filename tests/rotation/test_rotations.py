"""A set of rotations: files, switches, kinds."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch

from spinlab.config import ModelConfig, RotationConfig
from spinlab.config.rotation import BlocksConfig
from spinlab.errors import InputError, ResultError
from spinlab.model.load import meta_model
from spinlab.model.map import ModelMap
from spinlab.model.modules import map_of
from spinlab.rotation.initial import initial_rotations
from spinlab.rotation.online import dense_rotation
from spinlab.rotation.orthogonal import random_orthogonal
from spinlab.rotation.rotations import RotationSet

SHAPE = {
    "hidden_size": 24,
    "head_dim": 8,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def described(**changes) -> ModelMap:
    return map_of(meta_model(ModelConfig(architecture={**SHAPE, **changes}), None))


def drawn(seed: int = 0, **changes) -> RotationSet:
    config = RotationConfig(**changes)
    return initial_rotations(config, described(), torch.Generator().manual_seed(seed))


def test_a_saved_set_comes_back_with_every_bit(tmp_path):
    saved = RotationSet(**{**vars(drawn(r4="random")), "about": {"seed": 7}})
    saved.save(tmp_path / "r.safetensors")
    loaded = RotationSet.load(tmp_path / "r.safetensors")
    assert torch.equal(loaded.r1, saved.r1)
    assert torch.equal(loaded.r2, saved.r2)
    assert torch.equal(loaded.r3.dense(), saved.r3.dense())
    assert torch.equal(loaded.r4.dense(), saved.r4.dense())
    assert loaded.about == {"seed": 7}


def test_every_layer_has_its_own_r2():
    r2 = drawn().r2
    assert r2.shape == (2, 8, 8)
    assert not torch.equal(r2[0], r2[1])


def test_r3_is_one_for_all_layers_or_drawn_for_each(tmp_path):
    one, each = drawn(r3="random"), drawn(r3="random", r3_per_layer=True)
    assert one.r3.at(0) is one.r3.at(1)
    assert each.r3.dense().shape == (2, 8, 8)
    assert torch.equal(each.r3.at(0).dense(), one.r3.dense())  # the first that is drawn
    assert not torch.allclose(each.r3.at(0).dense(), each.r3.at(1).dense())
    assert max(each.orthogonality().values()) < 1e-12
    each.save(tmp_path / "r.safetensors")
    loaded = RotationSet.load(tmp_path / "r.safetensors")
    assert torch.equal(loaded.r3.dense(), each.r3.dense())
    assert loaded.r3.at(1).blocks == each.r3.at(1).blocks


def test_an_r3_that_turns_nothing_is_there_to_be_learned():
    assert torch.equal(drawn(r3="identity").r3.dense(), torch.eye(8).double())
    assert drawn(r4="identity").r4 is None
    assert drawn(r3="identity", online=False).r3 is None


@pytest.mark.parametrize("shape", [(8, 8), (3, 8, 8)])
def test_an_online_rotation_by_a_matrix_multiplies_with_it(shape):
    g = torch.Generator().manual_seed(1)
    matrix = torch.stack([random_orthogonal(8, g) for _ in range(3)])
    matrix = matrix[0] if len(shape) == 2 else matrix
    found, x = dense_rotation(matrix), torch.randn(2, 5, 8, generator=g).double()
    assert torch.equal(found.dense(), matrix)
    for layer in range(3):
        assert torch.allclose(found.at(layer)(x), x @ matrix.expand(3, 8, 8)[layer])


def test_switched_off_rotations_are_absent(tmp_path):
    off = drawn(r1="none", r2="none", r3="none", r4="none")
    off.save(tmp_path / "r.safetensors")
    loaded = RotationSet.load(tmp_path / "r.safetensors")
    assert (loaded.r1, loaded.r2, loaded.r3, loaded.r4) == (None,) * 4


def test_offline_means_that_nothing_runs_online():
    rotations = drawn(cross_head="hadamard", online=False)
    assert (rotations.r3, rotations.r4, rotations.cross_head) == (None,) * 3
    assert rotations.r1 is not None


def test_r4_blocks_are_power_of_two_hadamards(caplog):
    dense = drawn(r4="hadamard", r4_block=8).r4.dense()
    block = torch.from_numpy(scipy.linalg.hadamard(8)).double() / 8**0.5
    assert torch.allclose(dense, torch.block_diag(*[block] * 5))
    with pytest.raises(InputError, match=r"rotation.r4_block=16 does not divide 40"):
        drawn(r4_block=16)


def test_head_counts_without_an_order_leave_r2_alone(caplog):
    config = RotationConfig(cross_head="hadamard")
    nine = described(hidden_size=72, num_attention_heads=9, num_key_value_heads=3)  # SmolLM2-135M
    assert initial_rotations(config, nine, torch.Generator()).cross_head is None
    assert "no Hadamard matrix of order 9" in caplog.text


def test_cross_head_and_r2_make_quarots_kronecker_product():
    """QuaRot turns the o_proj input by H_heads ⊗ H_head_dim."""
    rotations = drawn(r2="exact_hadamard", cross_head="hadamard")
    inside = torch.block_diag(*[rotations.r2[0]] * 4)
    dense = inside @ rotations.cross_head.dense()
    expected = np.kron(scipy.linalg.hadamard(4), scipy.linalg.hadamard(8)) / 32**0.5
    assert torch.allclose(dense, torch.from_numpy(expected))


def test_a_matrix_that_is_not_orthogonal_is_refused():
    with pytest.raises(ResultError, match="R1"):
        RotationSet(r1=torch.ones(4, 4))


def test_learned_ranges_come_back_exactly_and_others_have_none(tmp_path):
    clips, ratio = {"0.qkv": 0.1 + 0.2, "1.down": 1.0}, torch.tensor([0.1, 0.7]).view(2, 1, 1)
    of_cache, weights = {"1.values": 0.7}, {"model.layers.0.mlp.up_proj": ratio}
    ranged = replace(drawn(), clips=clips, kv_clips=of_cache, weight_clips=weights)
    ranged.save(tmp_path / "r.safetensors")
    loaded = RotationSet.load(tmp_path / "r.safetensors")
    assert (loaded.clips, loaded.kv_clips) == (clips, of_cache)
    assert torch.equal(loaded.weight_clips["model.layers.0.mlp.up_proj"], ratio)
    drawn().save(tmp_path / "plain.safetensors")
    plain = RotationSet.load(tmp_path / "plain.safetensors")
    assert (plain.clips, plain.kv_clips, plain.weight_clips) == ({}, {}, {})


def test_equal_sets_make_equal_bytes(tmp_path):
    """safetensors orders several entries of metadata anew in each file."""
    about = {"seed": 7, "family": "llama", "learn": {"steps": 3, "lr": 0.5}}
    turned = dict(reversed(about.items()))
    found = set()
    for index in range(16):
        path = tmp_path / f"{index}.safetensors"
        replace(drawn(), clips={"0.o": 0.5}, about=turned if index % 2 else about).save(path)
        found.add(path.read_bytes())
    assert len(found) == 1


def test_r1_in_blocks_turns_no_channel_out_of_its_block():
    r1 = drawn(r1="hadamard", r1_block=8).r1
    blocks = r1.unflatten(0, (3, 8)).unflatten(2, (3, 8))
    for i in range(3):
        for j in range(3):
            flat = torch.full((8, 8), 8**-0.5 if i == j else 0.0, dtype=torch.float64)
            assert torch.allclose(blocks[i, :, j].abs(), flat)
    assert not torch.equal(blocks[0, :, 0], blocks[1, :, 1])
    with pytest.raises(InputError, match="r1_block=5 does not divide 24, the R1 width"):
        drawn(r1_block=5)
    with pytest.raises(InputError, match="r1=duquant has blocks of its own"):
        RotationConfig(r1="duquant", r1_block=8)


def test_every_input_is_turned_in_hadamard_blocks(tmp_path):
    off = {"r1": "none", "r2": "none", "r4": "none"}
    found = drawn(**off, inputs="blocks", blocks=BlocksConfig(8, "exact_hadamard"))
    assert found.inputs.keys() == {input.key for input in described().inputs}
    found.save(tmp_path / "r.safetensors")
    for key, transform in RotationSet.load(tmp_path / "r.safetensors").inputs.items():
        width = described().input_at[key].width
        x = torch.eye(width, dtype=torch.float64)
        wanted = np.kron(np.eye(width // 8), scipy.linalg.hadamard(8) / 8**0.5)
        assert torch.allclose(transform(x), torch.from_numpy(wanted))
