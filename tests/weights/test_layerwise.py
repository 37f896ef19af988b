"""Layer by layer: formats, families, resuming."""

import re
import weakref
from dataclasses import replace

import pytest
import torch

from spinlab.config import (
    ClipSearch,
    FormatChange,
    GPTAQConfig,
    GPTQConfig,
    Override,
    QuantConfig,
    TensorQuant,
    WeightsConfig,
)
from spinlab.errors import InputError
from spinlab.formats import IntegerFormat
from spinlab.model.modules import linear_at, linears_of, map_of
from spinlab.rotation.online import hadamard_rotation
from spinlab.rotation.rotations import RotationSet
from spinlab.weights import layerwise
from spinlab.weights.base import Rounding
from spinlab.weights.ends import check_ends
from spinlab.weights.layerwise import check_weight_groups, quantize_gptq, quantize_rtn
from spinlab.weights.methods import METHODS
from spinlab.weights.quantized import effective_bits, load_weights, save_weights
from spinlab.weights.rtn import rtn

OFF, SYMMETRIC = TensorQuant(bits=16), TensorQuant(symmetric=True)
MIXED = QuantConfig(
    weights=SYMMETRIC,
    overrides=[
        Override("*.down_proj", weights=FormatChange(bits=8)),
        Override("*.v_proj", weights=FormatChange(bits=6, symmetric=False, group_size=8)),
        Override("*.0.mlp.up_proj", weights=FormatChange(bits=16)),
        Override("*.1.self_attn.o_proj", weights=FormatChange(bits=16)),
    ],
)


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(0, 64, (6, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=["rtn", "gptq", "gptaq"])
def quantize(request, windows, tmp_path):
    """Quantize a model by one of the methods; Qronos takes GPTAQ's way through a model."""

    def by_rtn(model, quant):
        return quantize_rtn(model, quant, ClipSearch(), {})

    def by_columns(model, quant):
        own = {"gptq": GPTQConfig(block_size=10), "gptaq": GPTAQConfig(block_size=10)}
        config, rotations = (
            WeightsConfig(request.param, **own),
            RotationSet(r4=hadamard_rotation(40)),
        )
        rounding = Rounding(model, rotations, windows, quant, config, tmp_path)
        return METHODS[request.param].work(rounding)

    return by_rtn if request.param == "rtn" else by_columns


def test_overrides_give_other_formats_to_the_linears_that_match(make_model, quantize):
    model = make_model(torch.float32)
    names = [site.path for site in map_of(model).sites]
    found = quantize(model, MIXED)
    left_out = {"model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"}
    assert found.keys() == set(names) - left_out
    for name, weight in found.items():
        expected = {"v_proj": (6, False, 3), "down_proj": (8, True, 1)}
        bits, symmetric, groups = expected.get(name.rpartition(".")[2], (4, True, 1))
        assert (weight.format, weight.groups) == (IntegerFormat(bits, symmetric), groups)


def test_weights_of_16_bits_are_left_as_they_are(make_model, quantize):
    model, original = make_model(torch.float32), make_model(torch.float32)
    quantize(model, MIXED)
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(linear_at(model, name).weight, linear_at(original, name).weight)


def test_a_network_of_mixed_formats_is_saved_and_loaded(make_model, quantize, tmp_path):
    found = quantize(make_model(torch.float32), MIXED)
    save_weights(found, tmp_path / "weights.safetensors")
    loaded = load_weights(tmp_path / "weights.safetensors")
    assert loaded.keys() == found.keys()
    for name, weight in found.items():
        assert torch.equal(loaded[name].dequantize(), weight.dequantize())
    numbers = {name: w.levels.numel() for name, w in found.items()}
    assert effective_bits(loaded, numbers) == effective_bits(found, numbers)


@pytest.mark.parametrize("method", ["gptq", "gptaq"])
@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_four_over_six"])
def test_weights_of_one_input_have_tensor_scales_of_their_own(
    make_model, windows, tmp_path, name, method
):
    """As in rounding to nearest: small keys keep the precision that they have by themselves."""

    def model():
        made = make_model(torch.float32, hidden_size=32, intermediate_size=48, head_dim=8)
        for layer in map_of(made).layers:
            linear_at(made, layer.attention.keys).weight.data *= 2.0**-17
        return made

    quant = QuantConfig(weights=TensorQuant(format=name, symmetric=True, group_size=16))
    own = {"gptq": GPTQConfig, "gptaq": GPTAQConfig}[method]
    config = WeightsConfig(method, **{method: own(static_groups=True)})
    rounding = Rounding(model(), RotationSet(), windows, quant, config, tmp_path)
    found = METHODS[method].work(rounding)
    plain = quantize_rtn(model(), quant, config.clip, {})
    first = [path for path in plain if ".0." in path and path[-6] in "qkv"]
    assert len(first) == 3 and all(torch.equal(found[p].scale, plain[p].scale) for p in first)


def test_nothing_of_an_input_is_there_beside_the_hessian_of_the_next(
    make_model, windows, tmp_path, monkeypatch
):
    """Neither what was known of it, nor the weights of its linears as they were."""
    model, factor = make_model(torch.float32), layerwise.error_spread
    old = {site.path: weakref.ref(linear.weight) for site, linear in linears_of(model)}
    spreads: list[weakref.ref] = []
    left: list[str] = []

    def seen(*args):
        left.extend("what was known" for rows in spreads if rows() is not None)
        for path, weight in old.items():
            if weight() is not None and weight() is not linear_at(model, path).weight:
                left.append(path)
        found = factor(*args)
        spreads.append(weakref.ref(found.rows))
        return found

    monkeypatch.setattr(layerwise, "error_spread", seen)
    config = WeightsConfig("gptq", gptq=GPTQConfig(block_size=10))
    METHODS["gptq"].work(Rounding(model, RotationSet(), windows, QuantConfig(), config, tmp_path))
    assert len(spreads) == 2 * 4 and not left


def test_with_16_bits_everywhere_nothing_is_quantized(make_model, quantize):
    assert quantize(make_model(torch.float32), QuantConfig(weights=OFF)) == {}


def test_head_and_embedding_are_rounded_to_nearest(make_model, quantize):
    head, embedding = TensorQuant(bits=8, symmetric=True), TensorQuant(bits=6, group_size=12)
    quant = QuantConfig(weights=SYMMETRIC, head=head, embedding=embedding)
    original = make_model(torch.float32, tie_word_embeddings=False)
    found = quantize(make_model(torch.float32, tie_word_embeddings=False), quant)
    for name, format in (("lm_head", head), ("model.embed_tokens", embedding)):
        expected = rtn(original.get_submodule(name).weight, format, ClipSearch())
        assert torch.equal(found[name].dequantize(), expected.dequantize())
    assert found.keys() - {"lm_head", "model.embed_tokens"} == {
        site.path for site in map_of(original).sites
    }


def test_layers_are_calibrated_behind_the_quantized_embedding(make_model, windows, tmp_path):
    found = []
    for bits in (2, 16):
        (tmp_path / str(bits)).mkdir()
        quant = QuantConfig(weights=SYMMETRIC, embedding=TensorQuant(bits=bits))
        config = WeightsConfig(method="gptq")
        arguments = (RotationSet(), windows, quant, config, tmp_path / str(bits))
        found.append(quantize_gptq(Rounding(make_model(torch.float32), *arguments)))
    name = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(found[0][name].levels, found[1][name].levels)


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "phi3",
        "granite",
        "olmo2",
        "olmo3",
        "stablelm",
        "cohere",
        "gemma",
        "gemma2",
        "gemma3_text",
        "mixtral",
    ],
)
def test_every_family_is_quantized(make_family_model, quantize, family):
    model = make_family_model(family)
    names = {site.path for site in map_of(model).sites if site.quantized}
    assert quantize(model, QuantConfig(weights=SYMMETRIC)).keys() == names


def test_gptq_resumes_with_the_same_bits(make_model, windows, tmp_path):
    quant = replace(MIXED, embedding=TensorQuant(bits=6))
    config = WeightsConfig(method="gptq", gptq=GPTQConfig(block_size=10))

    def run():
        model = make_model(torch.float32, num_hidden_layers=3)
        return quantize_gptq(Rounding(model, RotationSet(), windows, quant, config, tmp_path))

    whole = run()
    (tmp_path / "layer-002.safetensors").unlink()
    resumed = run()
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[n].levels, w.levels) for n, w in whole.items())


def test_a_damaged_layer_is_made_again_with_the_same_bits(make_model, windows, tmp_path, caplog):
    """One flipped bit of a level, a file that was torn, and an empty one."""
    config = WeightsConfig(method="gptq", gptq=GPTQConfig(block_size=10))

    def run():
        model = make_model(torch.float32, num_hidden_layers=3)
        return quantize_gptq(Rounding(model, RotationSet(), windows, MIXED, config, tmp_path))

    whole, path = run(), tmp_path / "layer-001.safetensors"
    sound = path.read_bytes()
    for damaged in (sound[:-1] + bytes([sound[-1] ^ 1]), sound[: len(sound) // 2], b""):
        caplog.clear()
        path.write_bytes(damaged)
        resumed = run()
        assert "the progress in layer-001.safetensors is damaged and is dropped" in caplog.text
        assert path.read_bytes() == sound
        for name, weight in whole.items():
            assert torch.equal(resumed[name].dequantize(), weight.dequantize())


def test_an_override_that_matches_nothing_is_refused(make_model):
    quant = QuantConfig(overrides=[Override("*.down_porj", weights=FormatChange(bits=8))])
    with pytest.raises(InputError, match=r"'\*\.down_porj' matches no linear"):
        check_weight_groups(map_of(make_model()), quant)


@pytest.mark.parametrize(
    ("quant", "setting"),
    [
        (QuantConfig(weights=TensorQuant(group_size=16)), "quant.weights.group_size=16"),
        (
            QuantConfig(overrides=[Override("*.q_proj", weights=FormatChange(group_size=5))]),
            "quant.overrides[*.q_proj].weights.group_size=5",
        ),
        (QuantConfig(head=TensorQuant(bits=8, group_size=7)), "quant.head.group_size=7"),
        (QuantConfig(embedding=TensorQuant(bits=8, group_size=7)), "quant.embedding.group_size=7"),
    ],
)
def test_groups_must_divide_what_they_group(make_model, quant, setting):
    with pytest.raises(InputError, match=re.escape(f"{setting} does not divide 24")):
        check_weight_groups(map_of(make_model()), quant)
        check_ends(make_model(), quant)


def test_groups_of_weights_and_inputs_must_nest_linear_by_linear(make_model):
    model, group = make_model(intermediate_size=24, head_dim=6), TensorQuant(group_size=12)
    quant = QuantConfig(weights=group, activations=TensorQuant(group_size=8))
    with pytest.raises(InputError, match=r"groups of 8 inputs of model.layers.0.self_attn.q_proj"):
        check_weight_groups(map_of(model), quant)
    for kind, size in (("weights", 4), ("activations", 0)):
        nested = [Override("*", **{kind: FormatChange(group_size=size)})]
        check_weight_groups(map_of(model), replace(quant, overrides=nested, o_proj_per_head=False))
