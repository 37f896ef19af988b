import pickle
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from spinlab.errors import InputError
from spinlab.model.seams import Dimensions
from spinlab.rotation.exchange import read_rotations, with_online, write_bin
from spinlab.rotation.online import OnlineRotation, hadamard_rotation
from spinlab.rotation.orthogonal import orthogonality_error, random_orthogonal
from spinlab.rotation.rotations import RotationSet

DIMENSIONS = Dimensions(
    hidden=12, head_dim=4, intermediate=20, layers=2, heads=3, kv_heads=1
)  # fmt: skip


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
    return read_rotations(path, DIMENSIONS, "llama")


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
        (foreign(R1=torch.eye(8)), r"r1 is \(8, 8\), the model has \(12, 12\)"),
        (foreign(R1=torch.ones(12)), r"R1 is \(12,\), not square"),
        (foreign(R9=torch.eye(4)), r"has not the keys of an R.bin .*: R9"),
        ({"R1": torch.eye(12)}, "has not the keys of an R.bin"),
        (foreign(**{"model.layers.1.self_attn.R2": torch.eye(3)}), "its R2 are not of one size"),
        (foreign(R1="a string"), "is not a plain dictionary of tensors"),
        ([torch.eye(12)], "is not a plain dictionary of tensors"),
        ({1: torch.eye(12)}, "is not a plain dictionary of tensors"),
        (foreign(R1=torch.ones(0)), "is not a plain dictionary of tensors"),
    ],
)
def test_what_is_no_rotation_is_refused_with_the_reason(tmp_path, content, message):
    torch.save(content, tmp_path / "R.bin")
    with pytest.raises(InputError, match=message):
        read(tmp_path / "R.bin")


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
    for tensors, why in (
        ({"foo": torch.eye(2)}, "it holds foo"),
        ({"r1": torch.eye(12)}, "spinlab did not write it"),
    ):
        save_file(tensors, tmp_path / "other.safetensors")
        with pytest.raises(InputError, match=f"is no file of rotations: {why}"):
            read(tmp_path / "other.safetensors")


def test_rotations_of_another_family_are_refused(tmp_path):
    drawn({"family": "qwen2"}).save(tmp_path / "r.safetensors")
    with pytest.raises(InputError, match="was made for a qwen2 model, this one is llama"):
        read(tmp_path / "r.safetensors")


def test_an_altered_own_file_is_refused_with_its_deviation(tmp_path):
    drawn().save(tmp_path / "r.safetensors")
    with safe_open(tmp_path / "r.safetensors", framework="pt") as file:
        tensors, metadata = {n: file.get_tensor(n) for n in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["r1"][0, 0] += 0.5
    save_file(tensors, tmp_path / "r.safetensors", metadata)
    with pytest.raises(InputError, match=r"R1 is not orthogonal: max\|RRᵀ-I\| = \d"):
        read(tmp_path / "r.safetensors")


def test_an_r_bin_holds_r1_and_r2_and_nothing_else(tmp_path):
    with pytest.raises(InputError, match=r"use \.safetensors"):
        write_bin(RotationSet(r1=drawn().r1), tmp_path / "R.bin")


def test_clip_ratios_travel_in_files_of_our_own_only(tmp_path):
    clipped = replace(drawn(), clips={"1.gate_up": 0.75})
    clipped.save(tmp_path / "r.safetensors")
    assert read(tmp_path / "r.safetensors").clips == {"1.gate_up": 0.75}
    with pytest.raises(InputError, match=r"use \.safetensors"):
        write_bin(clipped, tmp_path / "R.bin")
    replace(clipped, clips={"9.gate_up": 0.75}).save(tmp_path / "r.safetensors")
    with pytest.raises(InputError, match=r"input 9\.gate_up does not fit"):
        read(tmp_path / "r.safetensors")


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
