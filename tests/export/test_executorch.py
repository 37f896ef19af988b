"""ExecuTorch takes an exported R.bin as it is, and turns weights with it as we do.

What it does was read in examples/models/llama/source_transformation/apply_spin_quant_r1_r2.py of
the repository pytorch/executorch: everything in float32, every layer's R2 by its name, heads as
wide as the stream divided by their number, and no bias of values.
"""

from dataclasses import replace

import pytest
import torch

from spinlab.config import RotationConfig
from spinlab.export.rotations import save_rotations
from spinlab.model.modules import map_of
from spinlab.networks.rotated import RotatedNetworks
from spinlab.rotation.fuse import fold_norms
from spinlab.rotation.initial import initial_rotations
from spinlab.rotation.rotations import RotationSet

SHAPE = {"head_dim": 6, "num_key_value_heads": 2}  # 24 = 4 heads of 6


@pytest.fixture
def rotations(make_model) -> RotationSet:
    generator = torch.Generator().manual_seed(0)
    config = RotationConfig(r1="random", r2="random")
    return initial_rotations(config, map_of(make_model(**SHAPE)), generator)


def turned(weights: dict[str, torch.Tensor], file: dict[str, torch.Tensor]) -> dict:
    """Do to a Llama's weights what ExecuTorch does, named as in transformers."""
    r1, found = file["R1"].float(), {}
    for name, weight in weights.items():
        if "norm" in name:
            found[name] = weight
            continue
        layer = name.split(".")[2] if "layers" in name else ""
        writes = "o_proj" in name or "down_proj" in name
        weight = r1.T @ weight if writes else weight @ r1
        if "v_proj" in name or "o_proj" in name:
            r2 = file[f"model.layers.{layer}.self_attn.R2"].float()
            rows = weight.T if "v_proj" in name else weight
            rows = (rows.reshape(len(rows), -1, r2.shape[0]) @ r2).reshape(rows.shape)
            weight = rows.T if "v_proj" in name else rows
        found[name] = weight
    return found


def test_executorch_turns_weights_by_an_r_bin_as_we_do(make_model, rotations, tmp_path):
    save_rotations(rotations, str(tmp_path / "R.bin"))
    file = torch.load(tmp_path / "R.bin", weights_only=True)
    folded = make_model(torch.float32, **SHAPE)
    fold_norms(folded)
    found = turned(folded.state_dict(), file)
    networks = RotatedNetworks(lambda: make_model(torch.float32, **SHAPE), None, None)
    expected = networks.stream_rotated(rotations).state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, atol=1e-4), name
    assert not torch.allclose(found["lm_head.weight"], folded.state_dict()["lm_head.weight"])


def test_an_r_bin_has_what_executorch_reads_and_nothing_else(rotations, tmp_path):
    save_rotations(rotations, str(tmp_path / "R.bin"))
    file = torch.load(tmp_path / "R.bin", weights_only=True)
    assert type(file) is dict
    assert {name: (t.dtype, tuple(t.shape)) for name, t in file.items()} == {
        "R1": (torch.float32, (24, 24)),
        "model.layers.0.self_attn.R2": (torch.float32, (6, 6)),
        "model.layers.1.self_attn.R2": (torch.float32, (6, 6)),
    }
    told = replace(rotations, about={"learned": True})  # what is told of it has no place there
    save_rotations(told, str(tmp_path / "again.bin"))
    assert torch.load(tmp_path / "again.bin", weights_only=True).keys() == file.keys()
