"""Gains of norms: folded where something turns what norms give, and else where they are."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from spinlab.compose import composed
from spinlab.config import ClipSearch, KVConfig, ModelConfig, RotationConfig, TensorQuant
from spinlab.config.rotation import keeps_gains
from spinlab.errors import InputError
from spinlab.model.load import load_model
from spinlab.model.modules import linear_at, map_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.initial import initial_rotations
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.rotations import AS_IT_IS, GAINS, WORDS, RotationSet
from spinlab.rotation.stored import read_stored
from spinlab.weights.rtn import rtn

SHAPE = {
    **{"model_type": "gemma3_text", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8},
    **{"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
}


def spread_out():
    """Return a Gemma 3 whose gains hold down eight channels that are large in the stream."""
    settings = ModelConfig(
        architecture=SHAPE, dtype="float64", outlier_channels=8, outlier_scale=1000.0
    )
    return load_model(settings, None, 0)


def test_the_original_as_it_is_has_its_own_weights():
    """To the bit, but for an embedding that the head shared."""
    original = spread_out().state_dict()
    found = QuantizedNetworks(spread_out, None, KVConfig()).fused(AS_IT_IS)
    assert not found.config.tie_word_embeddings
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, original[name]), name


@pytest.mark.parametrize("rotations", [AS_IT_IS, RotationSet()], ids=["as it is", "folded"])
def test_the_function_is_the_same_either_way(ids, rotations):
    networks = QuantizedNetworks(spread_out, None, KVConfig())
    found, wanted = networks.rotated(rotations)(ids).logits, spread_out()(ids).logits
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)


def test_weights_are_rounded_as_they_are_where_nothing_is_turned(ids):
    """Small gains, folded, make columns that rounding loses beside others, and inputs large."""
    errors = {}
    for name, rotations in {"kept": AS_IT_IS, "folded": RotationSet()}.items():
        outputs: list[torch.Tensor] = []
        model = QuantizedNetworks(spread_out, None, KVConfig()).fused(rotations)
        gate = linear_at(model, "model.layers.0.self_attn.q_proj")
        gate.register_forward_hook(lambda module, args, out, to=outputs: to.append(out.detach()))
        gates = [gate.weight.data, rtn(gate.weight, TensorQuant(), ClipSearch()).dequantize()]
        for weight in gates:
            gate.weight.data = weight.to(gate.weight.dtype)
            model(ids)
        errors[name] = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
    assert errors["folded"] > 3 * errors["kept"], errors


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"r1": "none"}, True),
        ({"r1": "hadamard"}, False),
        ({"r1": "identity"}, False),
        ({"r1": "none", "latents": "random"}, False),
        ({"r1": "none", "smooth": 0.5}, False),
        ({"r1": "none", "smooth": 0.5, "gains": "kept"}, True),
        ({"r1": "none", "gains": "folded"}, False),
        ({"r1": "none", "r4": "none", "inputs": "duquant"}, True),
        ({"r1": "none", "inputs": "scales"}, False),
        ({"r1": "none", "inputs": "blocks"}, False),
    ],
    ids=str,
)
def test_gains_are_folded_where_that_is_needed_or_asked_for(settings, kept):
    config = RotationConfig(**{"r2": "none", **settings})
    assert config.keeps_gains == kept
    named = {name: getattr(config, name) for name in ("gains", "r1", "latents", "smooth", "inputs")}
    assert keeps_gains(**named) == kept


@pytest.mark.parametrize("name", ["r1", "latents"])
def test_what_needs_folded_gains_is_named(name):
    settings = {"r1": "none", "latents": "none", name: "random", "gains": "kept"}
    with pytest.raises(InputError, match=rf"rotation\.{name}=random turns what they give"):
        RotationConfig(**settings)


def test_a_file_of_rotations_says_where_gains_are_and_no_setting_does():
    with pytest.raises(
        InputError, match=r"says itself where gains are: leave out rotation\.gains=f"
    ):
        RotationConfig(load="R.safetensors", gains="folded")


def test_methods_of_weights_alone_leave_norms_as_they_are():
    """Those whose papers fold nothing; smoothing is the same with gains folded."""
    kept = {
        name: composed("+experiment=methods_smollm2", f"method={name}").rotation.keeps_gains
        for name in ("rtn", "gptq", "smoothquant", "quarot", "duquant", "learned_blocks", "wush")
    }
    assert kept == {
        **{"rtn": True, "gptq": True, "wush": True},
        **{"smoothquant": False, "quarot": False, "duquant": False, "learned_blocks": False},
    }


def test_a_file_says_where_gains_are(make_model, tmp_path):
    model_map = map_of(make_model())
    config = RotationConfig(r1="none", r4="none", inputs="blocks", gains="kept")
    drawn = initial_rotations(config, model_map, torch.Generator().manual_seed(0))
    assert drawn.keeps_gains
    for rotations in (drawn, replace(drawn, keeps_gains=False)):
        rotations.save(tmp_path / "r.safetensors")
        for found in (
            RotationSet.load(tmp_path / "r.safetensors"),
            read_stored(tmp_path / "r.safetensors", model_map),
        ):
            assert found.keeps_gains == rotations.keeps_gains


@pytest.mark.parametrize(
    ("kept", "turned", "fault"),
    [("yes", False, "keeps_gains in its metadata is 'yes'"), (True, True, "r1 needs gains folded")],
)
def test_a_file_that_contradicts_itself_is_refused(make_model, tmp_path, kept, turned, fault):
    path, scale = tmp_path / "r.safetensors", torch.ones(24, dtype=torch.float64)
    eye = torch.eye(24, dtype=torch.float64) if turned else None
    RotationSet(eye, inputs={"0.qkv": ScaledDual(scale, True)}).save(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        words = json.loads(file.metadata()[WORDS])
    save_file(tensors, path, {WORDS: json.dumps(words | {GAINS: kept})})
    with pytest.raises(InputError, match=fault):
        read_stored(path, map_of(make_model()))
