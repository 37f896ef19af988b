"""GGUF files: read back by transformers and gguf they hold the rotated weights, bit for bit."""

import json
import re
import shlex
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from spinlab.compose import composed
from spinlab.config import FormatChange, ModelConfig, Override, RotationConfig, TensorQuant
from spinlab.errors import InputError, ResultError
from spinlab.experiment import run
from spinlab.export.base import check_exports
from spinlab.export.gguf import architecture, write
from spinlab.export.gguf.blocks import packed
from spinlab.export.gguf.writer import MARK
from spinlab.export.transformed import save_transformed
from spinlab.formats import IntegerFormat
from spinlab.metrics.perplexity import perplexity
from spinlab.model import license as licenses
from spinlab.model.bytes import byte_tokenizer
from spinlab.model.modules import restore
from spinlab.rotation.online import hadamard_rotation
from spinlab.rotation.orthogonal import random_orthogonal
from spinlab.rotation.rotations import RotationSet
from spinlab.stages.pipeline import Pipeline
from spinlab.stages.text import windows_in
from spinlab.weights.quantized import QuantizedWeight

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi3": {"num_key_value_heads": 4, "pad_token_id": None},
}
# of a head's width and of Phi-3's padding a GGUF says nothing that transformers reads
UNTOLD = ("qwen3", "phi3")
HALF = 2.0**-11  # of a number that is rounded to float16


def fields(file) -> dict:
    found = gguf.GGUFReader(file)
    return {name: field.contents() for name, field in found.fields.items()}


def tensors(file) -> dict[str, np.ndarray]:
    """Return every tensor as floats, by gguf's own decoder."""
    found = gguf.GGUFReader(file).tensors
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in found}


def state(model) -> dict[str, torch.Tensor]:
    """Return the numbers of a model, of stock modules again."""
    restore(model)
    return model.state_dict()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_f16_is_the_rotated_model_and_the_original_function(
    make_subject, make_original, make_settings, read_back, tmp_path, ids, family
):
    path = str(tmp_path / "m.gguf")
    config = make_settings("f16", path, model_type=family, **FAMILIES[family])
    subject = make_subject(config)
    write(subject, path)
    original = make_original(config)
    found = read_back(tmp_path / "m.gguf", original.config if family in UNTOLD else None)
    rotated = state(subject.rotated())
    expected = {n: t if "norm" in n or "bias" in n else t.half() for n, t in rotated.items()}
    own = found.state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], t.float()) for name, t in expected.items())
    logits = original(ids).logits
    assert (found(ids).logits - logits).abs().max() < 8 * HALF * logits.abs().max()


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_our_levels_with_scales_in_float16(
    make_subject, make_settings, read_back, tmp_path, ids, family, kind
):
    path = str(tmp_path / "m.gguf")
    config = make_settings(kind, path, model_type=family, **FAMILIES[family])
    eight = TensorQuant(bits=8, symmetric=True, group_size=32)
    config = replace(config, quant=replace(config.quant, head=eight, embedding=eight))
    subject = make_subject(config)
    write(subject, path)
    weights = subject.weights()
    model = subject.fused(weights)
    for name, weight in weights.items():
        half = replace(weight, scale=weight.scale.half().float())
        model.get_submodule(name).weight.data = half.dequantize()
    found = read_back(tmp_path / "m.gguf", model.config if family in UNTOLD else None)
    exact = model(ids).logits
    assert torch.allclose(found(ids).logits, exact, atol=1e-4)
    for name, weight in weights.items():
        model.get_submodule(name).weight.data = weight.dequantize()
    ours = model(ids).logits
    assert (found(ids).logits - ours).abs().max() < 16 * HALF * ours.abs().max()
    own, expected = found.state_dict(), state(model)
    assert own.keys() == expected.keys()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_block_holds_every_level(bits):
    g = torch.Generator().manual_seed(0)
    levels = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (6, 64), generator=g)
    levels[0, :2] = torch.tensor([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1])
    scale = torch.rand(6, 2, generator=g) + 1e-3
    scale[1] = IntegerFormat(bits, True).parameters(torch.zeros(1), torch.zeros(1)).scale  # zeros
    weight = QuantizedWeight(
        levels.short(), scale, torch.zeros_like(scale), IntegerFormat(bits, True)
    )
    kind = {4: gguf.GGMLQuantizationType.Q4_0, 8: gguf.GGMLQuantizationType.Q8_0}[bits]
    found = gguf.quants.dequantize(packed("w", weight), kind)
    expected = replace(weight, scale=scale.half().float()).dequantize()
    assert torch.equal(torch.from_numpy(found), expected)
    refused = "the scale of w holds {}, which torch.float16 stores as {}: use export.artefact"
    for value, stored in (("1e+05", "inf"), ("2e-08", "0")):
        with pytest.raises(InputError, match=re.escape(refused.format(value, stored))):
            packed("w", replace(weight, scale=torch.full_like(scale, float(value))))


def test_the_originals_license_is_passed_on(make_subject, make_settings, monkeypatch, tmp_path):
    path = str(tmp_path / "m.gguf")
    subject = make_subject(make_settings("f16", path))
    link = "https://example.org/license"
    own = {"license": "other", "license_name": "own-1.0", "license_link": link}
    write(replace(subject, record=lambda: {"model": {"license": own}}), path)
    assert {f"general.{n.replace('_', '.')}": v for n, v in own.items()}.items() <= fields(
        path
    ).items()
    monkeypatch.setattr(licenses, "gguf_of", lambda config: path)
    packaged = ModelConfig(weights="pretrained", package="p", file="m.gguf")
    assert licenses.license_of(packaged) == own  # where spinlab looks for it
    write(subject, path)
    assert not [name for name in fields(path) if name.startswith("general.license")]


def test_norms_without_numbers_are_refused(make_subject, make_settings, tmp_path):
    subject = make_subject(make_settings("f16", str(tmp_path / "m.gguf")))
    model = subject.rotated()
    model.get_submodule("model.norm").weight.data[0] = torch.inf
    with pytest.raises(ResultError, match=r"output_norm.weight has 1 of 64 numbers that are nan"):
        write(replace(subject, rotated=lambda: model), str(tmp_path / "m.gguf"))
    assert not list(tmp_path.iterdir())


def test_weights_beyond_float16_are_refused(make_subject, make_settings, tmp_path):
    subject = make_subject(make_settings("f16", str(tmp_path / "m.gguf")))
    model = subject.rotated()
    model.get_submodule("model.layers.1.mlp.down_proj").weight.data[0, 0] = 1e6
    with pytest.raises(InputError, match=r"blk\.1\.ffn_down holds 1e\+06.*use another export"):
        write(replace(subject, rotated=lambda: model), str(tmp_path / "m.gguf"))
    assert not list(tmp_path.iterdir())


def test_biases_of_turned_rows_change_places_with_them(make_subject, make_settings, tmp_path):
    path = str(tmp_path / "m.gguf")
    subject = make_subject(make_settings("f16", path, attention_bias=True, mlp_bias=True))
    write(subject, path)
    found, model = tensors(path), subject.rotated()
    for layer in range(2):
        attention = model.get_submodule(f"model.layers.{layer}.self_attn")
        for name, heads in (("q", 4), ("k", 2)):
            linear = attention.get_submodule(f"{name}_proj")
            # a row of the file is a row of ours: 2i of a head is i, 2i + 1 is i + 8
            order = [h * 16 + i + 8 * j for h in range(heads) for i in range(8) for j in (0, 1)]
            bias, weight = (found[f"blk.{layer}.attn_{name}.{p}"] for p in ("bias", "weight"))
            assert np.array_equal(bias, linear.bias[order].numpy())
            assert np.array_equal(weight, linear.weight[order].half().float().numpy())
        assert np.array_equal(found[f"blk.{layer}.attn_output.bias"], attention.o_proj.bias)
    assert not np.array_equal(
        found["blk.0.attn_q.bias"], model.model.layers[0].self_attn.q_proj.bias
    )


def test_every_head_has_its_own_width_where_llama_cpp_allows_it(
    make_subject, make_original, make_settings, read_back, tmp_path, ids
):
    path = str(tmp_path / "m.gguf")
    config = make_settings("f16", path, head_dim=32, num_hidden_layers=1)
    write(make_subject(config), path)
    logits = make_original(config)(ids).logits
    found = read_back(tmp_path / "m.gguf")
    assert (found(ids).logits - logits).abs().max() < 8 * HALF * logits.abs().max()


def test_scales_that_norms_took_over_are_in_the_file(make_subject, make_settings, tmp_path):
    """SmoothQuant's scales lie in gains and weights: blocks belong to those gains."""
    path = str(tmp_path / "m.gguf")
    subject = make_subject(make_settings("q4_0", path))
    model = subject.fused({})
    norm = model.get_submodule("model.layers.0.input_layernorm")
    norm.weight.data = torch.rand(64) + 0.5
    write(replace(subject, fused=lambda weights: model), path)
    assert np.array_equal(tensors(path)["blk.0.attn_norm.weight"], norm.weight.numpy())


def test_a_tied_matrix_that_was_rounded_before_it_is_rotated_is_in_float16(
    make_subject, make_settings, changed, read_back, tmp_path, ids
):
    path = str(tmp_path / "m.gguf")
    tied = TensorQuant(bits=3, symmetric=True)
    config = changed(make_settings("q8_0", path), "quant", tied=tied)
    check_exports(config)
    subject = make_subject(config)
    write(subject, path)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert (kinds["token_embd.weight"], kinds["blk.0.attn_v.weight"]) == ("F16", "Q8_0")
    weights = subject.weights()
    model = subject.fused(weights)
    for name, weight in weights.items():
        if "embed" not in name:
            model.get_submodule(name).weight.data = weight.dequantize()
    expected = model(ids).logits
    found = read_back(tmp_path / "m.gguf")(ids).logits
    assert (found - expected).abs().max() < 16 * HALF * expected.abs().max()


def test_a_file_tells_its_shape_and_its_run(make_subject, make_settings, tmp_path):
    path = str(tmp_path / "m.gguf")
    config = make_settings("q4_0", path, model_type="mistral", sliding_window=48)
    write(make_subject(config), path)
    found = fields(path)
    assert json.loads(found[MARK]) == {
        **{"export": "gguf", "version": 1},
        "record": {"key": "0123", "metrics": {"ppl": 1.5}},
    }
    expected = {
        **{"general.architecture": "llama", "general.file_type": 2},
        **{"llama.context_length": 48, "llama.embedding_length": 64, "llama.block_count": 2},
        **{"llama.feed_forward_length": 96, "llama.attention.head_count": 4},
        **{"llama.attention.head_count_kv": 2, "llama.vocab_size": 256},
        **{"llama.rope.dimension_count": 16, "llama.rope.freq_base": 10000.0},
    }
    assert {key: found[key] for key in expected} == expected
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["output.weight"] == kinds["token_embd.weight"] == "F16"
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_overrides_give_a_linear_another_type(make_subject, make_settings, changed, tmp_path):
    path = str(tmp_path / "m.gguf")
    eight, off = FormatChange(bits=8), FormatChange(bits=16)
    overrides = [Override("*.down_proj", weights=eight), Override("*.0.*o_proj", weights=off)]
    config = changed(make_settings("q4_0", path), "quant", overrides=overrides)
    check_exports(config)
    write(make_subject(config), path)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"
    assert kinds["blk.0.attn_output.weight"] == "F16"
    assert kinds["blk.1.attn_output.weight"] == "Q4_0"


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def rope(kind: str, **more) -> dict:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": kind, "factor": 4.0, **more}}


def test_frequencies_of_llama3_are_in_the_file(make_subject, make_settings, tmp_path):
    path = str(tmp_path / "m.gguf")
    write(make_subject(make_settings("f16", path, **rope("llama3", **LLAMA3))), path)
    factors = tensors(path)["rope_freqs.weight"]
    wavelengths = 2 * np.pi * 10000.0 ** (np.arange(8) / 8)
    smooth = ((32 / wavelengths - 1) / 3).clip(0, 1)
    expected = 1 / ((1 - smooth) / 4 + smooth)
    assert np.allclose(factors, expected, rtol=1e-5)
    assert (factors[0], factors[-1]) == pytest.approx((1, 4))


def test_a_factor_and_a_length_of_rope_are_among_the_settings(
    make_subject, make_settings, tmp_path
):
    path = str(tmp_path / "m.gguf")
    linear = make_settings("f16", path, model_type="qwen2", **rope("linear"))
    write(make_subject(linear), path)
    found = fields(path)
    assert (found["qwen2.rope.scaling.type"], found["qwen2.rope.scaling.factor"]) == ("linear", 4)
    assert "rope_freqs.weight" not in tensors(path)
    yarn = rope("yarn", original_max_position_embeddings=32)
    write(make_subject(make_settings("f16", path, **yarn)), path)
    assert fields(path)["llama.rope.scaling.attn_factor"] == pytest.approx(1 + 0.1 * np.log(4))
    assert tensors(path)["rope_freqs.weight"][-1] == pytest.approx(4)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (rope("dynamic"), "llama.cpp's llama has no RoPE of the kind dynamic"),
        (
            {
                "model_type": "qwen3",
                "head_dim": 16,
                **rope("llama3", **LLAMA3),
            },
            "qwen3 has no RoPE of the kind llama3",
        ),
        (
            {
                "model_type": "qwen2",
                **rope("yarn", original_max_position_embeddings=32, beta_fast=16),
            },
            "qwen2 has no RoPE of the kind yarn with beta_fast=16",
        ),
        (
            {"model_type": "qwen3", "attention_bias": True, "head_dim": 16},
            r"qwen3 has no bias of model\.layers\.0\.self_attn\.o_proj",
        ),
        ({"hidden_act": "gelu"}, r"llama has no MLP like that of model\.layers\.0"),
        (
            {"model_type": "phi3", "pad_token_id": None, "head_dim": 32},
            "phi3 has no 4 heads of 32 numbers in a stream of 64",
        ),
        (
            {"model_type": "smollm3", "no_rope_layers": [0, 1]},
            r"smollm3 has no RoPE like that of model\.layers\.0",
        ),
    ],
    ids=["dynamic", "llama3", "yarn", "bias", "gelu", "heads", "layers"],
)
def test_what_llama_cpp_computes_otherwise_is_refused(make_settings, tmp_path, shape, message):
    with pytest.raises(InputError, match=message):
        check_exports(make_settings("f16", str(tmp_path / "m.gguf"), **shape))


def test_a_family_without_a_place_is_refused(make_settings, tmp_path, monkeypatch):
    monkeypatch.delitem(architecture._ARCHITECTURES, "qwen2")
    with pytest.raises(InputError, match="the family 'qwen2' has no place in it: it holds llama"):
        check_exports(make_settings("f16", str(tmp_path / "m.gguf"), model_type="qwen2"))


def test_smollm3_has_layers_without_rope_where_llama_cpp_has_them(
    make_subject, make_settings, tmp_path
):
    path = str(tmp_path / "m.gguf")
    config = make_settings(
        "f16", path, model_type="smollm3", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0]
    )
    check_exports(config)
    write(make_subject(config), path)
    assert fields(path)["general.architecture"] == "smollm3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"bits": 8}}, r"set quant\.weights\.bits=4$"),
        ({"weights": {"symmetric": False}}, r"set quant\.weights\.symmetric=true$"),
        ({"weights": {"group_size": 0}}, r"set quant\.weights\.group_size=32$"),
        ({"weights": {"group_size": 16}}, r"set quant\.weights\.group_size=32$"),
        ({"weights": {"format": "float4"}}, r"set quant\.weights\.format=integer$"),
        ({"activations": {"bits": 8}}, r"set quant\.activations\.bits=16$"),
        ({"head": {"bits": 8}}, r"set quant\.head\.bits=16$"),
        ({"embedding": {"bits": 3, "group_size": 32}}, r"set quant\.embedding\.bits=16$"),
        (
            {"weights": {"group_size": 0}, "activations": {"bits": 4}},
            r"blocks|symmetric integers of 4 bits in groups of 32 inputs: set "
            r"quant\.weights\.group_size=32 quant\.activations\.bits=16$",
        ),
    ],
    ids=str,
)
def test_what_blocks_cannot_hold_is_refused_with_the_nearest(
    make_settings, changed, tmp_path, changes, message
):
    config = make_settings("q4_0", str(tmp_path / "m.gguf"))
    for part, values in changes.items():
        value = replace(getattr(config.quant, part), **values)
        config = changed(config, "quant", **{part: value})
    with pytest.raises(InputError, match=message):
        check_exports(config)
    free = changed(config, "export", gguf_type="f16")  # holds no levels
    check_exports(free)


def test_a_quantized_cache_and_odd_overrides_are_refused(make_settings, changed, tmp_path):
    config = make_settings("q8_0", str(tmp_path / "m.gguf"))
    with pytest.raises(InputError, match=r"of 8 bits in groups of 32 inputs: set kv=kv16$"):
        check_exports(changed(config, "kv", keys=replace(config.kv.keys, bits=4)))
    for change in (FormatChange(bits=3), FormatChange(group_size=16)):
        entry = Override("*.up_proj", weights=change)
        with pytest.raises(InputError, match=r"overrides\[\*\.up_proj\] must give weights 4, 8"):
            check_exports(changed(config, "quant", overrides=[entry]))
    entry = Override("*.up_proj", activations=FormatChange(bits=8))
    with pytest.raises(InputError, match=r"set quant\.overrides=\[\]$"):
        check_exports(changed(config, "quant", overrides=[entry]))
    both = [replace(entry, weights=FormatChange(bits=4)), Override("*.0.*", FormatChange(bits=16))]
    with pytest.raises(InputError, match=r"set 'quant\.overrides=\[.*\]'$") as found:
        check_exports(changed(config, "quant", overrides=both))
    word = shlex.split(str(found.value))[-1]
    assert composed("+experiment=toy", "eval.variants=[fp,fake]", word).quant.overrides == [
        replace(both[0], activations=FormatChange()),
        both[1],
    ]


@pytest.mark.parametrize(
    ("given", "fits"),
    [
        ({"symmetric": False}, {"symmetric": True}),
        ({"group_size": 16}, {"group_size": 32}),
        ({"group_size": 64, "bits": 16}, None),
        ({"format": "float4", "bits": 4}, {"format": "integer", "bits": 4}),
        ({"bits": 7, "symmetric": False}, {"bits": 8, "symmetric": True}),
        ({"bits": 2}, {"bits": 4}),
    ],
    ids=str,
)
@pytest.mark.parametrize("pattern", ["*.layers.[01].*.down_proj", "*.layers.?.*.down_proj"])
def test_overrides_count_where_their_patterns_match(
    make_settings, changed, tmp_path, pattern, given, fits
):
    """A class of characters does not match itself: what counts is what it gives linears."""
    config = make_settings("q4_0", str(tmp_path / "m.gguf"))
    first = Override("*.up_proj", weights=FormatChange(bits=8))
    odd = [first, Override(pattern, weights=FormatChange(**given))]
    if fits is None:
        return check_exports(changed(config, "quant", overrides=odd))
    with pytest.raises(
        InputError, match=r"overrides\[\*\.layers.* must give weights 4, 8"
    ) as found:
        check_exports(changed(config, "quant", overrides=odd))
    said = composed("+experiment=toy", shlex.split(str(found.value))[-1]).quant.overrides
    assert said == [first, Override(pattern, weights=FormatChange(**fits))]
    check_exports(changed(config, "quant", overrides=said))
    # the last that matches counts
    later = [*odd, Override("*.down_proj", weights=FormatChange(bits=8))]
    check_exports(changed(config, "quant", overrides=later))


@pytest.mark.parametrize(
    ("symmetric", "bits", "groups", "words"),
    [
        (False, 4, 2, r"integer of 4 bits in groups of 32 inputs"),
        (True, 4, 1, r"symmetric integer of 4 bits in groups of 64 inputs"),
        (True, 3, 2, r"symmetric integer of 3 bits in groups of 32 inputs"),
    ],
)
def test_levels_that_are_no_blocks_are_not_written_as_such(symmetric, bits, groups, words):
    scale = torch.ones(4, groups)
    format = IntegerFormat(bits, symmetric)
    weight = QuantizedWeight(torch.ones(4, 64).short(), scale, torch.ones_like(scale), format)
    with pytest.raises(InputError, match=f"w is {words}, and blocks of GGUF are symmetric"):
        packed("w", weight)


def test_linears_of_one_tensor_have_one_type(make_settings, changed, tmp_path):
    phi3 = {"model_type": "phi3", **FAMILIES["phi3"]}
    config = make_settings("q4_0", str(tmp_path / "m.gguf"), **phi3)
    check_exports(config)
    entry = Override("*.q_proj", weights=FormatChange(bits=8))
    with pytest.raises(InputError, match=r"q_proj, .*k_proj, .*v_proj lie in one tensor"):
        check_exports(changed(config, "quant", overrides=[entry]))


@pytest.mark.parametrize("kind", ["f16", "q4_0"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r4": "hadamard"}, r"a GGUF file cannot hold R4: set rotation\.r4=none"),
        ({"cross_head": "hadamard"}, r"rotation across heads: set rotation\.cross_head=none"),
        (
            {"inputs": "duquant", "r1": "none", "r2": "none"},
            r"online transforms of single inputs: set rotation\.inputs=none",
        ),
        (
            {"smooth": 0.5, "smooth_groups": ["qkv", "o"]},
            r"online scales of inputs: set rotation\.smooth_groups=\[qkv,gate_up\]",
        ),
    ],
    ids=["r4", "cross_head", "inputs", "smooth"],
)
def test_what_runs_online_is_refused(make_settings, changed, tmp_path, changes, message, kind):
    config = make_settings(kind, str(tmp_path / "m.gguf"))
    with pytest.raises(InputError, match=message):
        check_exports(changed(config, "rotation", **changes))
    offline = {"r4": "hadamard", "cross_head": "hadamard", "online": False}
    check_exports(changed(config, "rotation", **offline))
    check_exports(changed(config, "rotation", smooth=0.5))


def test_what_a_loaded_file_runs_online_is_refused(make_settings, changed, tmp_path):
    g = torch.Generator().manual_seed(0)
    r2 = torch.stack([random_orthogonal(16, g) for _ in range(2)])
    plain = RotationSet(random_orthogonal(64, g), r2)
    plain.save(tmp_path / "plain.safetensors")
    replace(plain, r4=hadamard_rotation(96)).save(tmp_path / "r4.safetensors")
    config = make_settings("f16", str(tmp_path / "m.gguf"))
    for name, fits in (("plain", True), ("r4", False)):
        load = RotationConfig(load=str(tmp_path / f"{name}.safetensors"))
        if fits:
            check_exports(replace(config, rotation=load))
            continue
        with pytest.raises(InputError, match=r"cannot hold R4, which rotation\.load=.* brings"):
            check_exports(replace(config, rotation=load))


@pytest.mark.parametrize("r4", ["none", "hadamard"])
def test_an_exported_model_is_taken_without_what_runs_online(
    make_subject, make_original, make_settings, changed, read_back, tmp_path, ids, r4
):
    file = tmp_path / "m.gguf"
    config = changed(make_settings("f16", str(file)), "rotation", r4=r4)
    subject = make_subject(config)
    about = {"family": "llama"}
    parts = (subject.rotated(), byte_tokenizer(), replace(subject.rotations, about=about))
    save_transformed(*parts, str(tmp_path / "t"))
    exported = ModelConfig(path=str(tmp_path / "t"))
    config = replace(make_settings("f16", str(file)), model=exported, rotation=RotationConfig())
    if r4 == "hadamard":
        with pytest.raises(InputError, match=r"cannot hold R4, which model\.path=.* brings"):
            check_exports(config)
        return
    check_exports(config)
    write(replace(subject, config=config), str(file))
    logits = make_original(make_settings())(ids).logits
    assert (read_back(file)(ids).logits - logits).abs().max() < 8 * HALF * logits.abs().max()


def test_only_an_earlier_export_is_replaced(make_subject, make_settings, tmp_path):
    foreign, path = tmp_path / "mine.gguf", tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(foreign, "llama")
    writer.add_string("general.name", "a model of mine")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    before = foreign.read_bytes()
    with pytest.raises(InputError, match="is there and no earlier export: name another"):
        check_exports(make_settings("f16", str(foreign)))
    with pytest.raises(InputError, match="is there and no earlier export: name another"):
        write(make_subject(make_settings("f16", str(foreign))), str(foreign))
    assert foreign.read_bytes() == before
    subject = make_subject(make_settings("f16", str(path)))
    write(subject, str(path))
    first = path.read_bytes()
    check_exports(make_settings("f16", str(path)))
    write(subject, str(path))
    assert path.read_bytes() == first
    (tmp_path / "any").write_text("as any new file")
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(InputError, match="is a folder: name a file in it"):
        check_exports(make_settings("f16", str(tmp_path / "folder.gguf")))
    with pytest.raises(InputError, match=r"export\.gguf=model\.bin must end in \.gguf"):
        make_settings("f16", "model.bin")
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {"mine.gguf", "m.gguf", "any", "folder.gguf"}


def test_what_fails_leaves_the_earlier_file(make_subject, make_settings, tmp_path, monkeypatch):
    path = str(tmp_path / "m.gguf")
    subject = make_subject(make_settings("f16", path))
    write(subject, path)
    before = (tmp_path / "m.gguf").read_bytes()

    def full(self, tensor, tensor_endianess=None):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(InputError, match=r"No space left.*set export\.gguf to a folder"):
        write(subject, path)
    assert (tmp_path / "m.gguf").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_run_may_have_any_dtype(make_subject, make_settings, changed, tmp_path, dtype):
    path = str(tmp_path / "m.gguf")
    config = changed(make_settings("f16", path), "model", dtype=dtype)
    subject = make_subject(config)
    write(subject, path)
    head = subject.rotated().get_submodule("lm_head").weight.detach()
    assert np.array_equal(tensors(path)["output.weight"], head.half().float().numpy())


@pytest.mark.parametrize("kind", ["f16", "q4_0"])
@pytest.mark.usefixtures("toy_cache")
def test_a_run_writes_a_file_with_its_perplexity(read_back, tmp_path, kind):
    file = tmp_path / "toy.gguf"
    paths = [f"paths.{name}={tmp_path / name}" for name in ("cache", "runs")]
    words = ["+experiment=toy", "rotation=no_had", "eval.variants=[fp,fake]", "eval.tasks=[]"]
    words += ["quant.weights.group_size=32"]
    words += ["learn=none"] if kind == "f16" else ["learn.steps=1", "learn.quantize_weights=true"]
    words += ["quant.activations.bits=16", "kv=kv16", "tracker=none", *paths]
    words += [f"export.gguf={file}", f"export.gguf_type={kind}", "eval.max_windows=2"]
    config = composed(*words)
    record = run(config, words)
    model = read_back(file)
    found = windows_in(Pipeline(config).evaluation)["wiki"]
    variant = "fp" if kind == "f16" else "fake"
    # float16 moves a loss by a few of its roundings
    expected = record.metrics[f"ppl/wiki/{variant}"]
    assert perplexity(model, found, 2, "gguf") == pytest.approx(expected, rel=8 * HALF)
    about = json.loads(fields(file)[MARK])
    assert about["record"]["metrics"] == record.metrics
