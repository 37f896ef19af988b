"""MXFP4 and NVFP4 in compressed-tensors: readers get the run's numbers with every bit."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from spinlab.bench.served import load_served
from spinlab.compose import composed
from spinlab.config import Config
from spinlab.errors import InputError
from spinlab.export import compressed_tensors as export
from spinlab.export.floats import packed_floats
from spinlab.export.profiles import PROFILES
from spinlab.fakequant.insert import input_paths, insert_fake_quant
from spinlab.formats import quantizer
from spinlab.formats.integer import nearest
from spinlab.model.files import read_json
from spinlab.model.modules import linears_of, map_of
from spinlab.weights.quantized import set_dequantized

SHAPE = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
FIT = ["+experiment=toy", "learn=none", "kv=kv16", "rotation.r3=none", "eval.variants=[fp,fake]"]
FLOATS = [name for name, profile in PROFILES.items() if "integer" not in profile.formats]
FORMATS = [(profile, name) for profile in FLOATS for name in PROFILES[profile].formats]
FUSED = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}


def config_of(profile: str, name: str, *settings: str) -> Config:
    words = [f"quant={PROFILES[profile].preset}", f"quant.weights.format={name}"]
    return composed(*FIT, *words, f"export.profile={profile}", *settings)


def opened(folder: Path, ids: torch.Tensor) -> PreTrainedModel:
    """Return what the reader makes of a folder, in float32."""
    model = load_served(folder, torch.float32)
    assert model(ids).logits.dtype == torch.float32
    return model


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
@pytest.mark.parametrize(("profile", "name"), FORMATS)
def test_a_reader_has_the_runs_weights_with_every_bit(
    make_subject, tmp_path, ids, model_type, profile, name
):
    subject = make_subject(model_type, config_of(profile, name), **SHAPE)
    export.write(subject, str(tmp_path / "c"))
    stored = load_file(tmp_path / "c" / "model.safetensors")
    model = opened(tmp_path / "c", ids)
    weights = subject.weights()
    for path, linear in model.named_modules():
        parts = [w for n, w in weights.items() if n == path or n.startswith(f"{path}.")]
        if parts and isinstance(linear, torch.nn.Linear):
            expected = torch.cat([part.dequantize() for part in parts])
            assert torch.equal(linear.weight.detach().float(), expected), path
            assert stored[f"{path}.weight_packed"].shape == (len(expected), expected.shape[1] // 2)
    ours = ["weight_global_scale"] if "nvfp4" in profile else []
    ours += ["input_global_scale"] if profile == "nvfp4" else []
    found = {name.rpartition(".")[2] for name in stored if name.endswith("_global_scale")}
    assert found == set(ours)
    for scale in ours if model_type == "llama" else ():
        for part, names in FUSED.items():
            places = (f"model.layers.0.{part}.{name}.{scale}" for name in names)
            assert len({stored[place].item() for place in places}) == 1


@pytest.mark.parametrize("profile", FLOATS)
def test_a_reader_computes_the_runs_network(make_subject, tmp_path, ids, monkeypatch, profile):
    """Ties of inputs are rounded as the package does."""
    monkeypatch.setattr(quantizer, "settled", nearest)
    subject = make_subject("llama", config_of(profile, profile.split("_")[0]), **SHAPE)
    export.write(subject, str(tmp_path / "c"))
    weights = subject.weights()
    model = subject.fused(weights)
    for parameter in model.parameters():
        parameter.data = parameter.bfloat16().float()
    insert_fake_quant(model, subject.rotations, subject.config.quant)
    for site, linear in linears_of(model):
        set_dequantized(linear, weights[site.path])
    found, expected = opened(tmp_path / "c", ids)(ids).logits, model(ids).logits
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


def inputs_of(width: int, peak: float) -> torch.Tensor:
    """Return tokens within a range, beyond it, and so small that scales of groups vanish."""
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(3))
    x = x.pow(3) * 2.0 ** torch.arange(-32, 32)[:, None] * peak / 2
    x[5, : width // 2], x[6] = 0, 0
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("profile", ["mxfp4", "nvfp4"])
@torch.no_grad()
def test_a_reader_rounds_inputs_as_the_run_does_with_every_bit(
    make_subject, tmp_path, ids, monkeypatch, profile, dtype
):
    """Ties are rounded as the package does; a bfloat16 is on a tie, or too far for noise."""
    lifecycle = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    if dtype == torch.float32:
        monkeypatch.setattr(quantizer, "settled", nearest)
    subject = make_subject("llama", config_of(profile, profile), **SHAPE)
    export.write(subject, str(tmp_path / "c"))
    model = opened(tmp_path / "c", ids)
    paths = input_paths(map_of(model), subject.rotations, subject.config.quant)
    clipped = 0
    for site, linear in linears_of(model):
        ours = paths[site.key].quantizer
        assert ours is not None
        peak = subject.rotations.peaks[site.key] if profile == "nvfp4" else 1.0
        x = inputs_of(site.in_features, peak).to(dtype)
        scheme: Any = linear.quantization_scheme
        read = lifecycle.forward_quantize(linear, x.clone(), "input", scheme.input_activations)
        assert torch.equal(ours.round(x), read), site.path
        clipped += (read.abs() < x.abs() / 2).sum().item()
    assert clipped > 0


def test_what_an_input_is_divided_by_is_the_power_of_two_below_the_formats_own(
    make_subject, tmp_path
):
    """448·6/max|x|, of inputs as they are seen in front of each linear, behind R4."""
    subject = make_subject("qwen2", config_of("nvfp4", "nvfp4", "rotation=block_r4"), **SHAPE)
    export.write(subject, str(tmp_path / "c"))
    stored = load_file(tmp_path / "c" / "model.safetensors")
    peaks = subject.rotations.peaks
    assert len(peaks) == len({site.key for site in map_of(subject.fused({})).sites})
    for site in map_of(subject.fused({})).sites:
        exact = 448 * 6 / peaks[site.key]
        found = stored[f"{site.path}.input_global_scale"]
        assert found.shape == (1,) and found.dtype == torch.float32
        assert found.item() == 2.0 ** math.floor(math.log2(exact))
    inputs = read_json(tmp_path / "c" / "config.json")["quantization_config"]
    inputs = inputs["config_groups"]["group_0"]["input_activations"]
    assert (inputs["strategy"], inputs["dynamic"], inputs["group_size"]) == (
        *("tensor_group", "local"),
        16,
    )


def test_scales_that_have_no_place_beside_others_are_refused(make_subject):
    weights = make_subject("llama", config_of("nvfp4_weights", "nvfp4"), **SHAPE).weights()
    weight = next(iter(weights.values()))
    small = replace(weight, scale=weight.scale * 2.0**-17)
    with pytest.raises(InputError, match=r"the scales of q are too small .* use export\.artefact"):
        packed_floats("q", [small], weight.scale.amax())


def test_what_a_profile_has_no_place_for_is_refused(tmp_path):
    for settings, said in {
        ("quant=nvfp4", "export.profile=mxfp4"): "quant.weights.format=mxfp4",
        ("quant=nvfp4", "export.profile=nvfp4"): "quant.activations.format=nvfp4_calibrated",
        ("quant=mxfp4", "export.profile=nvfp4"): "quant.weights.format=nvfp4",
        ("quant=mxfp4", "export.profile=mxfp4_weights"): "quant.activations.bits=16",
        ("quant=nvfp4_calibrated", "rotation.r3=hadamard"): "or export.profile=nvfp4",
        ("quant=mxfp4", "export.profile=vllm_w4a4"): "quant.weights.format=integer",
        ("quant=nvfp4", "export.profile=nvfp4_weights"): "quant.activations.bits=16",
        ("quant=w4a4", "export.profile=mxfp4"): "quant.weights.group_size=32",
        ("quant=nvfp4",): "or export.profile=nvfp4_weights with quant=nvfp4_weights",
        ("quant=nvfp4_weights",): "fit it), or export.profile=nvfp4_weights",
        ("quant=mxfp4",): "fit it), or export.profile=mxfp4",
    }.items():
        config = composed(*FIT, *settings)
        with pytest.raises(InputError, match="has no place for") as error:
            export.check("export.compressed_tensors", tmp_path / "c", config)
        assert said in str(error.value)
