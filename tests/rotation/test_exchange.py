"""Rotation files of other codes are read without running their code."""

import pickle
from dataclasses import replace

import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file

from spinlab.config import ModelConfig
from spinlab.errors import InputError
from spinlab.model.load import meta_model
from spinlab.model.map import ModelMap
from spinlab.model.modules import map_of
from spinlab.rotation.exchange import read_rotations, with_online, write_bin
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.online import OnlineRotation, dense_rotation, hadamard_rotation
from spinlab.rotation.orthogonal import orthogonality_error, random_orthogonal
from spinlab.rotation.rotations import RotationSet

GENERATOR = torch.Generator().manual_seed(3)
LAYER_1 = "model.layers.1.self_attn.R2"
SHAPE = {
    "hidden_size": 12,
    "head_dim": 4,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}


def described(**changes) -> ModelMap:
    return map_of(meta_model(ModelConfig(architecture={**SHAPE, **changes}), None))


def drawn(about: dict | None = None) -> RotationSet:
    g = torch.Generator().manual_seed(0)
    r2 = torch.stack([random_orthogonal(4, g) for _ in range(2)])
    return RotationSet(random_orthogonal(12, g), r2, about=about)


def foreign(**changes) -> dict:
    """The dictionary that SpinQuant saves."""
    start = drawn()
    layers = {f"model.layers.{i}.self_attn.R2": start.r2[i].float() for i in range(2)}
    return {"R1": start.r1.float(), **layers, **changes}


def read(path) -> RotationSet:
    return read_rotations(path, described())


def test_an_r_bin_has_spinquants_keys_and_comes_back(tmp_path):
    write_bin(drawn(), tmp_path / "R.bin")
    raw = torch.load(tmp_path / "R.bin", weights_only=True)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in raw.items()} == {
        "R1": (torch.float32, (12, 12)),
        "model.layers.0.self_attn.R2": (torch.float32, (4, 4)),
        "model.layers.1.self_attn.R2": (torch.float32, (4, 4)),
    }
    loaded = read(tmp_path / "R.bin")
    assert torch.allclose(loaded.r1, drawn().r1, atol=1e-6)
    assert torch.allclose(loaded.r2, drawn().r2, atol=1e-6)


def test_a_drifted_r_bin_is_projected_and_the_drift_is_logged(tmp_path, caplog):
    caplog.set_level("INFO")
    torch.save(foreign(R1=drawn().r1.float() * (1 + 1e-3)), tmp_path / "R.bin")
    loaded = read(tmp_path / "R.bin")
    assert orthogonality_error(loaded.r1) < 1e-12
    assert torch.allclose(loaded.r1, drawn().r1, atol=1e-6)
    assert "R1: max|RRᵀ-I| = 2.0e-03, projected" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (foreign(R1=drawn().r1.float() * 1.1), r"R1 is not orthogonal: max\|RRᵀ-I\| = 2\.1e-01"),
        (foreign(R1=torch.eye(8)), r"R1 is \(8, 8\), the model has \(12, 12\)"),
        (foreign(R1=torch.ones(12)), r"R1 is \(12,\), the model has \(12, 12\)"),
        (foreign(R1=torch.ones(())), r"R1 is \(\), the model has"),
        (foreign(R1=torch.ones(0)), r"R1 is \(0,\), the model has"),
        (foreign(R1=torch.eye(1).expand(50_000, 50_000)), r"R1 is \(50000, 50000\), the model"),
        (foreign(**{LAYER_1: torch.eye(3)}), r"layers\.1\.self_attn\.R2 is \(3, 3\), the model"),
        (foreign(R9=torch.eye(4)), r"has not the keys of an R.bin of 2 layers .*: R9"),
        (foreign(**{LAYER_1.replace("1", "01"): torch.eye(4)}), "has not the keys"),
        ({"R1": torch.eye(12)}, "has not the keys of an R.bin"),
        ({}, "has not the keys of an R.bin"),
        (foreign(R1=torch.full((12, 12), torch.nan)), "R1 holds numbers that are not finite"),
        (foreign(**{LAYER_1: torch.full((4, 4), torch.inf)}), "holds numbers that are not finite"),
        (foreign(R1=torch.eye(12) * 1e30), r"R1 is not orthogonal: max\|RRᵀ-I\| = 1\.0e\+60"),
        (foreign(R1=torch.eye(12, dtype=torch.int64)), r"R1 \(torch.int64\) is no dense tensor"),
        (foreign(R1=torch.eye(12, dtype=torch.bool)), r"R1 \(torch.bool\) is no dense tensor"),
        (foreign(R1=torch.eye(12, dtype=torch.complex64)), "is no dense tensor of floats"),
        (foreign(R1=torch.eye(12).to(torch.float8_e4m3fn)), "is no dense tensor of floats"),
        (foreign(R1=torch.eye(12).to_sparse()), "is no dense tensor of floats"),
        (foreign(R1=torch.empty(12, 12, device="meta")), "is no dense tensor of floats"),
        (foreign(R1="a string"), r"R1 \(str\) is no dense tensor"),
        (foreign(R1=None), r"R1 \(NoneType\) is no dense tensor"),
        (foreign(R1=[torch.eye(12)]), r"R1 \(list\) is no dense tensor"),
        ([torch.eye(12)], "is not a plain dictionary of tensors"),
        ({1: torch.eye(12)}, "is not a plain dictionary of tensors"),
        (torch.eye(12), "is not a plain dictionary of tensors"),
    ],
)
def test_what_is_no_rotation_is_refused_with_the_reason(tmp_path, content, message):
    torch.save(content, tmp_path / "R.bin")
    with pytest.raises(InputError, match=message):
        read(tmp_path / "R.bin")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", [12, 16])
def test_rotations_rounded_to_any_float_are_taken(tmp_path, dtype, order):
    """Rounding moves RRᵀ by at most twice the rounding error of an entry: rows have length 1."""
    g = torch.Generator().manual_seed(order)
    hadamard = torch.from_numpy(scipy.linalg.hadamard(16)).double() / 16**0.5
    r1 = random_orthogonal(12, g) if order == 12 else hadamard * 0.998  # bfloat16's worst case
    content = foreign(R1=torch.nn.Parameter(r1.to(dtype)))
    torch.save(content, tmp_path / "R.bin")
    shape = described(hidden_size=order, num_attention_heads=order // 4)
    loaded = read_rotations(tmp_path / "R.bin", shape)
    assert orthogonality_error(loaded.r1) < 1e-12
    assert not loaded.r1.requires_grad
    assert (loaded.r1 - r1).abs().max() < 2.0**-8


def test_a_file_from_before_zip_archives_is_read(tmp_path):
    torch.save(foreign(), tmp_path / "R.bin", _use_new_zipfile_serialization=False)
    assert torch.allclose(read(tmp_path / "R.bin").r1, drawn().r1, atol=1e-6)


class Evil:
    def __reduce__(self):
        return (open, ("pwned", "w"))


@pytest.mark.parametrize(
    "save", [torch.save, lambda x, p: p.write_bytes(pickle.dumps(x, protocol=2))]
)
def test_a_pickle_that_runs_code_is_refused_and_runs_none(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    save({"R1": Evil()}, tmp_path / "R.bin")
    with pytest.raises(InputError, match="nothing else is unpickled"):
        read(tmp_path / "R.bin")
    assert not (tmp_path / "pwned").exists()


def test_files_that_are_not_there_or_not_rotations_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path / "missing.bin")
    (tmp_path / "text.safetensors").write_text("no tensors here")
    with pytest.raises(InputError, match="is no file of rotations"):
        read(tmp_path / "text.safetensors")
    save_file({"r1": torch.eye(12)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="is no file of rotations: spinlab did not write it"):
        read(tmp_path / "other.safetensors")


def test_rotations_of_another_family_are_refused(tmp_path):
    drawn({"family": "qwen2"}).save(tmp_path / "r.safetensors")
    with pytest.raises(InputError, match="was made for a qwen2 model, this one is llama"):
        read(tmp_path / "r.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r2": None}, "needs R1 and R2, and one is off"),
        ({"clips": {"1.gate_up": 0.75}}, "there are clip ratios of inputs"),
        ({"weight_clips": {LAYER_1: torch.ones(4, 1, 1)}}, "there are learned weight ranges"),
        ({"inputs": {"0.qkv": ScaledDual(torch.ones(12))}}, "there are transforms of inputs"),
        (
            {"r3": OnlineRotation(torch.ones(1, 1), random_orthogonal(4, GENERATOR))},
            "there are r3 that is no exact Hadamard",
        ),
        (
            {"r3": dense_rotation(torch.stack([hadamard_rotation(4).dense(), torch.eye(4)]))},
            "there are r3 that is no exact Hadamard",
        ),
    ],
    ids=["R2 off", "clip ratios", "weight ranges", "inputs", "dense R3", "an R3 for each layer"],
)
def test_an_r_bin_that_would_lose_a_part_is_not_written(tmp_path, changes, message):
    with pytest.raises(InputError, match=message + r"; use \.safetensors"):
        write_bin(replace(drawn(), **changes), tmp_path / "R.bin")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("block", [0, 4])
def test_exact_hadamards_are_made_again_and_are_no_loss(tmp_path, block):
    across = OnlineRotation(torch.eye(3), torch.eye(4))
    online = {"r3": hadamard_rotation(4), "r4": hadamard_rotation(20, block), "cross_head": across}
    write_bin(replace(drawn(), **online), tmp_path / "R.bin")
    assert (tmp_path / "R.bin").is_file()


@pytest.mark.parametrize("kind", ["hadamard", "identity"])
def test_an_r3_of_each_layer_that_settings_make_again_is_no_loss(tmp_path, kind):
    matrix = hadamard_rotation(4).dense() if kind == "hadamard" else torch.eye(4)
    for r3 in (dense_rotation(matrix), dense_rotation(torch.stack([matrix] * 2))):
        write_bin(replace(drawn(), r3=r3), tmp_path / "R.bin")


def test_online_rotations_of_an_r_bin_come_from_the_settings():
    across = OnlineRotation(torch.eye(3), torch.eye(4))
    settings = RotationSet(r3=hadamard_rotation(4), r4=hadamard_rotation(20), cross_head=across)
    both, loaded = with_online(drawn(), settings), drawn()
    assert (both.r3, both.r4, both.cross_head) == (settings.r3, settings.r4, across)
    assert torch.equal(both.r1, loaded.r1)


def test_bytes_that_are_no_pickle_are_refused(tmp_path):
    (tmp_path / "R.bin").write_text("no tensors here")
    with pytest.raises(InputError, match="nothing else is unpickled"):
        read(tmp_path / "R.bin")
