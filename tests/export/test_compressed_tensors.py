"""compressed-tensors: what other readers compute is the run's own network, or a sentence."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from spinlab.bench.served import load_served
from spinlab.compose import composed
from spinlab.config import Config, ModelConfig
from spinlab.errors import InputError
from spinlab.export import compressed_tensors as export
from spinlab.export.base import Subject, check_exports
from spinlab.export.listing import read_listing
from spinlab.fakequant.insert import insert_fake_quant
from spinlab.formats import format_of
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.model.load import check_model
from spinlab.model.modules import linears_of
from spinlab.weights.quantized import set_dequantized

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
FIT = ["+experiment=toy", "learn=none", "kv=kv16", "rotation.r3=none", "eval.variants=[fp,fake]"]


def config_of(profile: str, *settings: str) -> Config:
    presets = {"vllm_w4a8": "w4a8_vllm", "vllm_w4a4": "w4a4_vllm", "weights_only": "w4a16"}
    quant = [f"quant={presets[profile]}", "quant.weights.group_size=32"]
    return composed(*FIT, *quant, f"export.profile={profile}", *settings)


def config_in(folder) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def served(folder) -> PreTrainedModel:
    return load_served(folder, torch.float32)


def emulated(subject: Subject) -> PreTrainedModel:
    """Return the run's network of dequantized floats, rounded to 16 bits where the file is."""
    weights = {
        name: replace(weight, scale=weight.scale.bfloat16().float())
        for name, weight in subject.weights().items()
    }
    model = subject.fused(weights)
    for parameter in model.parameters():
        parameter.data = parameter.bfloat16().float()
    insert_fake_quant(model, subject.rotations, subject.config.quant)
    for site, linear in linears_of(model):
        if site.path in weights:
            set_dequantized(linear, weights[site.path])
    return model


@pytest.fixture
def as_package_rounds(by_package, monkeypatch):
    """Quantize the run's inputs with the package's functions, whose ties float noise breaks."""
    monkeypatch.setattr(TokenQuantizer, "round_trip", by_package)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3", "granite", "olmo2", "gemma2"])
@pytest.mark.parametrize("profile", ["vllm_w4a8", "vllm_w4a4", "weights_only"])
def test_transformers_computes_the_runs_network(
    make_subject, as_package_rounds, tmp_path, ids, model_type, profile
):
    """With every bit here; another order of additions would leave float noise."""
    subject = make_subject(model_type, config_of(profile), **SHAPE)
    export.write(subject, str(tmp_path / "c"))
    expected, model = emulated(subject)(ids).logits, served(tmp_path / "c")
    assert difference(model(ids).logits, expected) < 1e-5
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "c", dtype=torch.float32)
    assert difference(alone(ids).logits, expected) > 0.1  # without R4


R4 = {
    "hadamard": ([], 64, 1e-5),
    "hadamard in blocks": (["rotation.r4_block=16"], 16, 1e-5),
    "random-hadamard": ([], 96, 1e-5),  # 12·8: no power of two; the signs are exact
    # a matrix of any numbers is rounded to bfloat16: inputs of two layers are off by 2^-10
    "random-hadamard of any kind": (["rotation.r4=random"], 64, 2**-8),
}


@pytest.mark.parametrize("kind", R4)
def test_what_turns_inputs_online_travels_with_its_blocks(make_subject, tmp_path, ids, kind):
    settings, width, bound = R4[kind]
    shape = {**SHAPE, "intermediate_size": 64 if width == 16 else width}
    subject = make_subject("llama", config_of("weights_only", *settings), **shape)
    export.write(subject, str(tmp_path / "c"))
    said = config_in(tmp_path / "c")["transform_config"]["config_groups"]["R4"]
    assert (said["type"], said["head_dim"]) == (kind.split()[0], width)
    stored = load_file(tmp_path / "c" / "model.safetensors")
    turning = [name for name in stored if "R4" in name]
    assert turning == ["model.layers.0.mlp.down_proj.R4_input.weight"]
    assert stored[turning[0]].shape == (width, width)
    found = difference(served(tmp_path / "c")(ids).logits, emulated(subject)(ids).logits)
    assert found < bound
    assert (found > 1e-5) == ("any" in kind)


def test_a_model_without_r4_needs_nothing_but_transformers_in_a_process_of_its_own(
    make_subject, tmp_path, ids
):
    subject = make_subject("qwen2", config_of("weights_only", "rotation.r4=none"), **SHAPE)
    export.write(subject, str(tmp_path / "c"))
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    load = "AutoModelForCausalLM.from_pretrained('c', dtype='float32')"
    script = (
        "from safetensors.torch import load_file, save_file\n"
        "from transformers import AutoModelForCausalLM\n"
        f"ids, model = load_file('ids.safetensors')['ids'], {load}\n"
        "save_file({'logits': model(ids).logits.detach()}, 'logits.safetensors')\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True)
    found = load_file(tmp_path / "logits.safetensors")["logits"]
    assert difference(found, emulated(subject)(ids).logits) < 1e-5


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_levels_are_the_runs_own_and_scales_are_rounded_to_the_files_dtype(
    make_subject, tmp_path, model_type
):
    subject = make_subject(model_type, config_of("vllm_w4a8"), **SHAPE)
    export.write(subject, str(tmp_path / "c"))
    stored, weights = load_file(tmp_path / "c" / "model.safetensors"), subject.weights()
    linears = [name.removesuffix(".weight_packed") for name in stored if "packed" in name]
    assert len(linears) == (8 if model_type == "phi3" else 14)
    for name in linears:
        shape = stored[f"{name}.weight_shape"]
        levels = unpack_from_int32(stored[f"{name}.weight_packed"], 4, torch.Size(shape))
        parts = [w for path, w in weights.items() if path == name or path.startswith(f"{name}.")]
        assert torch.equal(levels.short(), torch.cat([part.levels for part in parts]))
        scale = torch.cat([part.scale for part in parts])
        assert torch.equal(stored[f"{name}.weight_scale"], scale.bfloat16())
        assert f"{name}.weight" not in stored


def test_single_linears_have_groups_of_their_own_or_none(
    make_subject, as_package_rounds, tmp_path, ids
):
    eight = '{pattern: "*.mlp.*", weights: {bits: 8, group_size: 0}, '
    eight += "activations: {bits: 8, clip_ratio: 1.0}}"
    off = '{pattern: "*.layers.0.mlp.down_proj", weights: {bits: 16}, activations: {bits: 16}}'
    config = config_of("vllm_w4a4", f"quant.overrides=[{eight},{off}]")
    subject = make_subject("llama", config, **SHAPE)
    export.write(subject, str(tmp_path / "c"))
    said = config_in(tmp_path / "c")
    QuantizationConfig.model_validate(said)
    groups = said["config_groups"].values()
    assert sorted(len(group["targets"]) for group in groups) == [5, 8]
    assert "Linear" not in {target for group in groups for target in group["targets"]}
    assert said["ignore"] == ["model.layers.0.mlp.down_proj", "lm_head"]
    found = served(tmp_path / "c")(ids).logits
    assert difference(found, emulated(subject)(ids).logits) < 1e-5


def test_inputs_have_the_range_of_the_packages_reader_but_for_ties(by_package):
    """Which are half-way between levels, as every row's largest number is where it is negative."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))[None]
    for profile, bits in (("vllm_w4a4", 4), ("vllm_w4a8", 8)):
        settings = config_of(profile).quant.activations
        quantizer = TokenQuantizer(format_of(settings), 0, settings.clip_ratio)
        ours, theirs = quantizer.round_trip(x), by_package(quantizer, x)
        scale = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)
        differ = (ours - theirs).abs() > scale / 2
        between = ((x / scale).remainder(1) - 0.5).abs()
        assert (ours - theirs).abs().max() < 1.01 * scale.max()
        assert between[differ].max() < 1 / 1000 and differ.float().mean() < 0.01


def test_what_readers_do_otherwise_is_said(make_subject, tmp_path, caplog):
    turned = "transformers leaves out"
    ranges = "transformers another than this run: quant=w4a4_vllm has its own"
    for settings, said in (
        ([], [turned]),
        (["rotation.r4=none"], []),
        (["rotation.r4=none", "quant.activations.clip_ratio=1.0"], [ranges]),
    ):
        caplog.clear()
        subject = make_subject("llama", config_of("vllm_w4a4", *settings), **SHAPE)
        export.write(subject, str(tmp_path / "c"))
        assert [text for text in (turned, ranges) if text in caplog.text] == said


@pytest.mark.parametrize("value", [1e5, 2e-8])
def test_scales_that_16_bits_do_not_hold_are_refused(make_subject, tmp_path, value):
    subject = make_subject("llama", config_of("vllm_w4a8"), **SHAPE)
    weights = dict(subject.weights())
    name = next(name for name in weights if name.endswith("down_proj"))
    scale = weights[name].scale.clone()
    scale[3] = value
    weights[name] = replace(weights[name], scale=scale)
    odd = replace(subject, weights=lambda: weights)
    export.write(odd, str(tmp_path / "c"))  # bfloat16 holds both
    half = replace(odd, dtype=lambda: torch.float16)
    message = rf"the scale of {name} holds {value:.3g}, which torch\.float16 stores as (inf|0)"
    with pytest.raises(InputError, match=message.replace("+", r"\+")):
        export.write(half, str(tmp_path / "h"))
    assert not (tmp_path / "h").exists()


REFUSED = {
    "quant.activations.bits=4.*: set quant.activations.bits=8 .*, or export.profile=vllm_w4a4": [
        "quant=w4a4_vllm"
    ],
    "quant.activations.symmetric=false: set quant.activations.symmetric=true": [
        "quant.activations.symmetric=false"
    ],
    "quant.activations.group_size=32: set quant.activations.group_size=0": [
        "quant.activations.group_size=32"
    ],
    "quant.activations.clip_ratio=0.9: set quant.activations.clip_ratio=0.996": [
        "quant.activations.clip_ratio=0.9"
    ],
    "quant.o_proj_per_head=true: set quant.o_proj_per_head=false": ["quant.o_proj_per_head=true"],
    "quant.weights.bits=3: set quant.weights.bits=4": ["quant.weights.bits=3"],
    "quant.weights.symmetric=false: set quant.weights.symmetric=true": [
        "quant.weights.symmetric=false"
    ],
    "quant.weights.group_size=48: set quant.weights.group_size=64": ["quant.weights.group_size=48"],
    r"quant.overrides\[\*.down_proj\].weights.bits=3: set 'quant.overrides=.*bits:4}}\]'": [
        'quant.overrides=[{pattern: "*.down_proj", weights: {bits: 3}}]'
    ],
    "quant.head.bits=8, quant.embedding.bits=8: set quant.head.bits=16 quant.embedding.bits=16": [
        *("quant.head.bits=8", "quant.embedding.bits=8")
    ],
    "quant.tied.bits=8: set quant.tied.bits=16": ["quant.tied.bits=8"],
    "kv.keys.bits=4, kv.values.bits=4: set kv.keys.bits=16 kv.values.bits=16": ["kv=kv4"],
    r"kv.overrides=\['\*.0.\*'\]: set '?kv.overrides=\[\]": [
        'kv.overrides=[{pattern: "*.0.*", keys: {bits: 4}}]'
    ],
    "has no place for R3: set rotation.r3=none": ["rotation.r3=hadamard"],
    "has no place for the rotation across heads: set rotation.cross_head=none": [
        "rotation.cross_head=hadamard"
    ],
    "has no place for learned ranges of inputs: set learn.lr.input_clip=0": [
        *("learn=two_cores", "learn.lr.input_clip=0.01")
    ],
    "has a weight of 16 bits and an input of 8": [
        'quant.overrides=[{pattern: "*.down_proj", weights: {bits: 16}}]'
    ],
    "k_proj has another format than the linears that share its input": [
        'quant.overrides=[{pattern: "*.q_proj", weights: {bits: 8}}]'
    ],
}


@pytest.mark.parametrize(
    ("weights", "inputs", "fits"),
    [
        ("symmetric: false", "", ["weights: {symmetric: true}"]),
        ("bits: 3, group_size: 48", "", ["weights: {bits: 4, group_size: 64}"]),
        (
            "bits: 8",
            "clip_ratio: 0.9",
            ["weights: {bits: 8}", f"activations: {{clip_ratio: {254 / 255}}}"],
        ),
        ("", "bits: 4, symmetric: false, group_size: 8", None),
    ],
    ids=str,
)
def test_overrides_that_fit_are_said_as_they_are_typed(tmp_path, weights, inputs, fits):
    """As one list, in which entries that fit stay: single ones have no name in settings."""
    first = '{pattern: "*.layers.0.*", weights: {group_size: 0}}'
    kinds = {"weights": weights, "activations": inputs}
    given = [f"{kind}: {{{words}}}" for kind, words in kinds.items() if words]
    odd = f'{{pattern: "*.layers.[01].*", {", ".join(given)}}}'
    settings = ["quant.activations.clip_ratio=1.0", f"export.compressed_tensors={tmp_path}/c"]
    with pytest.raises(InputError, match=r"\[\*\.layers\.\[01\]\.\*\]\.") as found:
        check_exports(config_of("vllm_w4a8", *settings, f"quant.overrides=[{first},{odd}]"))
    words = shlex.split(str(found.value).partition(": set ")[2].partition(" (quant=")[0])
    config = config_of("vllm_w4a8", *settings, *words)
    check_exports(config)
    if fits is not None:
        wanted = f'quant.overrides=[{first},{{pattern: "*.layers.[01].*", {", ".join(fits)}}}]'
        assert config.quant.overrides == composed("+experiment=toy", wanted).quant.overrides


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_a_profile_cannot_carry_is_refused_with_what_it_can(tmp_path, sentence):
    config = config_of("vllm_w4a8", *REFUSED[sentence], f"export.compressed_tensors={tmp_path}/c")
    with pytest.raises(InputError, match=sentence):
        check_exports(config)


def test_a_missing_package_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[compressed-tensors\]'"):
        check_exports(config_of("vllm_w4a8", f"export.compressed_tensors={tmp_path}/c"))


def test_an_export_is_refused_as_a_model_and_replaced_by_a_new_one(make_subject, tmp_path):
    for seed in (0, 1):
        subject = make_subject("llama", config_of("vllm_w4a8"), seed, **SHAPE)
        export.write(subject, str(tmp_path / "c"))
    assert read_listing("it", tmp_path / "c", "compressed_tensors")["profile"] == "vllm_w4a8"
    assert (tmp_path / "c" / "generation_config.json").is_file()
    settings = ModelConfig(weights="pretrained", path=str(tmp_path / "c"))
    with pytest.raises(InputError, match=r"stored quantized \(compressed-tensors\).*was made from"):
        check_model(settings)
