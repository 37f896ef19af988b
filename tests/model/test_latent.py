"""Attention by latents: what is special about it, against stock modules and plain arithmetic."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, DeepseekV3Config, PreTrainedModel
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from spinlab.config import (
    CodecConfig,
    KVConfig,
    ModelConfig,
    QuantConfig,
    RotationConfig,
    TensorQuant,
)
from spinlab.errors import InputError
from spinlab.kv.bits import cache_bits, cache_bytes
from spinlab.kv.cache import CodedCache, attach_kv, kv_path_of
from spinlab.kv.path import KVPath
from spinlab.metrics.attention import attention_errors
from spinlab.model.attention import attend
from spinlab.model.load import load_model, prepared
from spinlab.model.map import ModelMap
from spinlab.model.modules import map_of
from spinlab.model.random import architecture_of, random_model
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.check import BrokenSite, check_invariance, logits, logits_error
from spinlab.rotation.exchange import write_bin
from spinlab.rotation.fuse import fold_norms
from spinlab.rotation.initial import check_rotations, initial_rotations
from spinlab.rotation.rotations import RotationSet
from spinlab.rotation.stored import read_stored
from tests.conftest import ARCHITECTURE
from tests.shapes import DEEPSEEK, fitted

SHAPES = {
    "deepseek_v2": {},
    "deepseek_v2, lite": {"q_lora_rank": None, "attention_bias": True},
    "deepseek_v3": {"attention_bias": True, "tie_word_embeddings": True},
    "deepseek_v3, halves": {"rope_interleave": False, "v_head_dim": 12},
}
MODULES = {"deepseek_v2": modeling_deepseek_v2, "deepseek_v3": modeling_deepseek_v3}
QUANT = QuantConfig(weights=TensorQuant(symmetric=True))
EXACT = QuantConfig(TensorQuant(bits=16), TensorQuant(bits=16))
NONE = dict.fromkeys(("r1", "r2", "r3", "r4"), "none")
BASE = {
    **{"vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2},
}
# of latents, and of the key that is turned, or of one of them
KV = {
    "both": KVConfig(CodecConfig(bits=4), CodecConfig(bits=3)),
    "queries": KVConfig(queries=CodecConfig(bits=4)),
    "latent": KVConfig(CodecConfig(bits=16), CodecConfig(bits=2, group_size=4)),
    "runs": KVConfig(CodecConfig(codec="kivi", bits=4), CodecConfig(bits=4), window=5, sinks=2),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)


def settings(shape: str, dtype: str, **changes) -> ModelConfig:
    family = shape.partition(",")[0]
    known = fitted(family, {**BASE, **SHAPES[shape], **changes, "model_type": family})
    return ModelConfig(architecture=known, dtype=dtype)


def make(shape: str, **changes) -> PreTrainedModel:
    return load_model(settings(shape, "float64", **changes), None, 0)


def drawn(model_map: ModelMap, **changes) -> RotationSet:
    return initial_rotations(RotationConfig(**changes), model_map, torch.Generator().manual_seed(0))


class Wide:
    """Torch, whose float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def turned(queries, keys, waves):
    """RoPE on neighbours, by what it says."""
    cos, sin = (part.double()[:, None] for part in (waves.real, waves.imag))
    pairs = ((x[..., 0::2], x[..., 1::2]) for x in (queries, keys))
    both = (torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2) for a, b in pairs)
    return tuple(both)


@every_shape
def test_a_prepared_model_gives_the_logits_of_the_stock_one(monkeypatch, ids, shape):
    """Stock modules norm, choose and turn in float32, whatever the dtype: here in float64.

    What is ours of a router is its product alone.
    """
    model, family = make(shape), shape.partition(",")[0]
    stock = random_model(settings(shape, "float64"), 0).double().eval()
    stock.set_experts_implementation("eager")
    monkeypatch.setattr(MODULES[family], "torch", Wide())
    if family == "deepseek_v2":
        monkeypatch.setattr(MODULES[family], "apply_rotary_emb", turned)
    found = logits(model, ids)
    assert found.dtype == torch.float64
    assert logits_error(found, logits(stock, ids)) < 1e-12


@every_shape
def test_attention_of_16_bits_is_as_near_to_the_exact_one_as_stock_attention(ids, shape):
    """Its linears have the rows of stock ones in other products, and RoPE stays as it is."""
    changes = {"first_k_dense_replace": 2}
    stock = random_model(settings(shape, "float32", **changes), 0).bfloat16().eval()
    ours = load_model(settings(shape, "bfloat16", **changes), None, 0)
    exact = random_model(settings(shape, "float32", **changes), 0)
    exact.load_state_dict({name: x.float() for name, x in stock.state_dict().items()})
    seen: list[torch.Tensor] = []
    for model in (ours, stock, exact):
        attention = model.model.layers[0].self_attn
        attention.register_forward_hook(lambda m, args, out: seen.append(out[0].float()))
        model(input_ids=ids)
    found, own = ((x - seen[2]).norm() for x in seen[:2])
    assert 0 < found < 1.2 * own


@every_shape
@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("others", [{}, NONE, {"r1": "none", "inputs": "blocks"}], ids=str)
def test_rotations_of_latents_pass_the_gate(ids, shape, kind, others):
    rotations = drawn(map_of(make(shape)), latents=kind, **others)
    names = {"kv_latent"} | ({"q_latent"} if "lite" not in shape else set())
    assert rotations.latents.keys() == names
    networks = QuantizedNetworks(partial(make, shape), QUANT, KVConfig())
    rotated = partial(networks.rotated, rotations)
    assert check_invariance(partial(make, shape), rotated, rotations, ids[:1]) < 1e-9


def test_the_learned_network_has_rotated_latents(ids):
    """Nothing else is fused there, and nothing is rounded."""
    rotations = drawn(map_of(make("deepseek_v3")), latents="random", **NONE)
    networks = QuantizedNetworks(partial(make, "deepseek_v3"), EXACT, KVConfig())
    off = KVConfig(CodecConfig(bits=16), CodecConfig(bits=16))
    model = QuantizedNetworks(networks.original, EXACT, off).learnable(rotations)
    assert logits_error(logits(model, ids), logits(make("deepseek_v3"), ids)) < 1e-9
    weight = model.get_submodule("model.layers.0.self_attn.q_b_proj").weight
    folded = make("deepseek_v3")
    fold_norms(folded)
    plain = folded.get_submodule("model.layers.0.self_attn.q_b_proj").weight
    assert torch.allclose(weight, plain @ rotations.latents["q_latent"], atol=1e-12)


@pytest.mark.parametrize("name", ["kv_b_proj.v_proj", "kv_a_proj_with_mqa.turned_proj", "q_a_proj"])
def test_a_broken_part_is_named(ids, name):
    rotations = drawn(map_of(make("deepseek_v3")), latents="random")
    networks = QuantizedNetworks(partial(make, "deepseek_v3"), QUANT, KVConfig())
    rotated = networks.rotated(rotations)
    weight = rotated.get_submodule(f"model.layers.1.self_attn.{name}").weight
    weight.data = weight.data.roll(1, 0)
    with pytest.raises(BrokenSite, match=f"model.layers.1.self_attn.{name}"):
        check_invariance(partial(make, "deepseek_v3"), lambda: rotated, rotations, ids[:1])


def test_rotations_of_latents_are_stored_and_lost_by_no_file(tmp_path):
    model_map = map_of(make("deepseek_v3"))
    rotations = drawn(model_map, latents="random", r3="hadamard", r4="hadamard")
    rotations.save(tmp_path / "r.safetensors")
    found = read_stored(tmp_path / "r.safetensors", model_map)
    assert found.latents.keys() == {"q_latent", "kv_latent"}
    assert all(torch.equal(found.latents[n], x) for n, x in rotations.latents.items())
    assert all(rotations.orthogonality()[f"latents.{n}"] < 1e-12 for n in found.latents)
    with pytest.raises(InputError, match=r"there are rotations of latents; use \.safetensors"):
        write_bin(rotations, tmp_path / "R.bin")


def test_what_has_no_latents_or_scales_their_channels_is_refused(make_model):
    with pytest.raises(InputError, match=r"a llama model has none: set rotation\.latents=none"):
        check_rotations(RotationConfig(latents="hadamard"), map_of(make_model()))
    smooth = RotationConfig(**NONE, latents="hadamard", smooth=0.5, smooth_groups=["kv_latent"])
    with pytest.raises(InputError, match=r"kv_latent input, which rotation\.latents mixes"):
        check_rotations(smooth, map_of(make("deepseek_v2")))


def expanded(model: PreTrainedModel, ids: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Return the latents and keys of each layer that keys and values of heads are made of."""
    kept: list[tuple[torch.Tensor, ...]] = []
    for layer in model.model.layers:
        stock = layer.self_attn.expand_kv

        def seen(latent, key, stock=stock):
            kept.append((latent, key))
            return stock(latent, key)

        layer.self_attn.expand_kv = seen
    model(input_ids=ids)
    return kept


@every_shape
def test_what_is_cached_is_coded_in_the_basis_of_its_rotation(ids, shape):
    rotations = drawn(map_of(make(shape)), latents="random", r3="random")
    networks = QuantizedNetworks(partial(make, shape), EXACT, KV["both"])
    folded = make(shape)
    fold_norms(folded)
    model = networks.fused(rotations)
    path = networks.kv_path(model, rotations)
    attach_kv(model, path, store=True)
    (latent, key), (coded, turned) = expanded(folded, ids)[0], expanded(model, ids)[0]
    assert latent.shape[1:] == (1, 24, 12) and key.shape[1:] == (1, 24, 4)
    assert torch.allclose(coded, path.values.pass_through(latent @ rotations.latents["kv_latent"]))
    assert torch.allclose(turned, path.keys.pass_through(key @ rotations.r3.dense()))


@every_shape
@pytest.mark.parametrize("kv", KV)
def test_decoding_with_a_coded_cache_is_recomputation(ids, shape, kv):
    rotations = drawn(map_of(make(shape)), latents="hadamard")
    networks = QuantizedNetworks(partial(make, shape), EXACT, KV[kv])
    model = networks.fused(rotations)
    path = networks.kv_path(model, rotations)
    attach_kv(model, path, store=True)
    whole = logits(model, ids)
    cache, steps = CodedCache(kv_path_of(model), 2), []
    for part in ids.split([10, *[1] * 9, 5], dim=1):
        steps.append(model(input_ids=part, past_key_values=cache).logits)
    assert logits_error(torch.cat(steps, 1), whole) < 1e-9
    assert logits_error(whole, logits(make(shape), ids)) > 1e-4
    sizes = map_of(model).dimensions
    if kv == "latent":  # floats of the key, 2 bits, a scale and a zero in each group of the latent
        assert cache.stored_bytes() == 2 * 2 * 24 * (4 * 8 + path.values.row_bytes)
    if kv == "both":
        assert cache.stored_bytes() == 2 * cache_bytes(path, sizes, 24)
    assert cache_bits(KVPath(), sizes) == 16


def test_errors_of_attention_are_those_of_keys_and_values_that_are_made_of_coded_ones(ids):
    """In one layer, which reads the same in both networks."""
    networks = QuantizedNetworks(
        lambda: make("deepseek_v3", num_hidden_layers=1), EXACT, KV["both"]
    )
    model = networks.fused(RotationSet())
    attach_kv(model, networks.kv_path(model, RotationSet()), store=False)
    found = attention_errors(model, ids[:1])
    seen: list[tuple[torch.Tensor, ...]] = []

    def watched(module, query, key, value, mask, **kwargs):
        seen.append((query, key, value, *[kwargs["scaling"]]))
        return attend(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("watched", watched)
    for kv in (KV["both"], KVConfig(CodecConfig(bits=16), CodecConfig(bits=16))):
        alone = QuantizedNetworks(networks.original, EXACT, kv)
        network = alone.fused(RotationSet())
        attach_kv(network, alone.kv_path(network, RotationSet()), store=False)
        network.config._attn_implementation = "watched"
        network(input_ids=ids[:1])
    (_, coded, of_coded, scaling), (query, key, value, _) = seen
    causal = torch.ones(24, 24, dtype=torch.bool).tril()
    scores = [query @ k.mT * scaling for k in (coded, key)]
    error = (scores[0] - scores[1])[..., causal].square().mean().sqrt()
    outputs = [
        s.masked_fill(~causal, -torch.inf).softmax(-1) @ v
        for s, v in zip(scores, (of_coded, value), strict=True)
    ]
    relative = (outputs[0] - outputs[1]).square().sum() / outputs[1].square().sum()
    assert found["attention_score"] == pytest.approx(error.item(), rel=1e-4)
    assert found["attention_output"] == pytest.approx(relative.item(), rel=1e-4)


def test_the_fused_runtime_leaves_latents_to_torch(left_to_torch):
    networks = QuantizedNetworks(partial(make, "deepseek_v3"), QUANT, KVConfig())
    rotations = drawn(map_of(make("deepseek_v3")), latents="hadamard")
    left_to_torch(networks, rotations, "keys and values of model.layers.0 are made of a latent")


@pytest.mark.parametrize(
    ("family", "changes", "sentence"),
    [
        ("deepseek_v2", {"num_key_value_heads": 2}, "so it must be num_attention_heads=4"),
        ("deepseek_v2", {"qk_rope_head_dim": 3}, "qk_rope_head_dim=3 is odd"),
        ("deepseek_v2", {"v_head_dim": 0}, "v_head_dim=0 must be positive"),
        ("deepseek_v2", {"n_shared_experts": 0}, "n_shared_experts=0 must be positive"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method=noaux_tc is none of greedy"),
        ("deepseek_v2", {"num_experts_per_tok": 7}, "num_experts_per_tok=7 is not in 1 … 6"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "n_group=None does not cut 6"),
        ("deepseek_v3", {"head_dim": 8}, "head_dim=8 is taken for what RoPE turns"),
        ("deepseek_v3", {"n_group": 6}, "n_group=6 does not cut 6 experts into groups of 2 on"),
        ("deepseek_v3", {"n_group": 4}, "n_group=4 does not cut 6 experts"),
        ("deepseek_v3", {"topk_group": 3}, "topk_group=3 of 2 groups do not hold"),
        ("deepseek_v3", {"num_experts_per_tok": 4}, "topk_group=1 of 2 groups do not hold"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_shape_that_no_stock_model_runs_with_is_refused(family, changes, sentence):
    shape = {**fitted(family, {**BASE, "model_type": family}), **changes}
    with pytest.raises(InputError, match=sentence):
        architecture_of(ModelConfig(architecture=shape))


def test_layers_without_experts_ask_nothing_of_a_router():
    for family in DEEPSEEK:
        changes = {"first_k_dense_replace": 2, "n_group": None, "num_experts_per_tok": None}
        model = make(family, **changes)
        assert all(layer.mlp is not None for layer in map_of(model).layers)
        assert SimpleNamespace(**DEEPSEEK[family]).first_k_dense_replace == 1


def test_what_published_configs_call_the_router_of_v3_changes_nothing():
    """They have keys that transformers keeps and its models do not read."""
    shape = {**fitted("deepseek_v3", {**ARCHITECTURE}), "vocab_size": 64}
    words = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
    config = DeepseekV3Config(**shape, **words)
    assert config.topk_method == "noaux_tc"
    model = prepared(modeling_deepseek_v3.DeepseekV3ForCausalLM(config), torch.float32)
    assert len(map_of(model).layers) == config.num_hidden_layers
