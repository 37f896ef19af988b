"""What other mixtures have beside Mixtral's modules: shared experts, scores, sinks, routers."""

from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

from spinlab.config import (
    ClipSearch,
    KVConfig,
    ModelConfig,
    QuantConfig,
    RotationConfig,
    TensorQuant,
)
from spinlab.errors import InputError
from spinlab.fakequant.insert import FakeQuantLinear
from spinlab.kv.cache import CodedCache, kv_path_of
from spinlab.model.hooks import temporary_hooks
from spinlab.model.load import cast_model, exact_norms
from spinlab.model.modules import linear_at, map_of, prepare, set_map
from spinlab.model.random import random_model
from spinlab.model.shares import active_numbers, watched
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.check import check_invariance, logits, logits_error
from spinlab.rotation.initial import check_rotations, initial_rotations
from spinlab.runtime.fused.convert import why_not_runtime
from spinlab.weights.layerwise import quantize_rtn
from tests.conftest import ARCHITECTURE, EXPERTS

FAMILIES = ("qwen2_moe", "granitemoe", "glm4_moe", "llama4_text", "gpt_oss", "phimoe")
QUANT = QuantConfig(weights=TensorQuant(symmetric=True))
every_family = pytest.mark.parametrize("family", FAMILIES)


def drawn(model: PreTrainedModel, **changes):
    config = RotationConfig(**changes)
    return initial_rotations(config, map_of(model), torch.Generator().manual_seed(0))


def stock(family: str, described: PreTrainedModel) -> PreTrainedModel:
    """Return transformers' own model in float64, with its own attention and experts."""
    shape = {**ARCHITECTURE, "model_type": family, "initializer_range": 0.2}
    config = ModelConfig(architecture={**shape, **EXPERTS.get(family, {})})
    model = random_model(config, 0).eval()
    model.set_attn_implementation("eager" if family == "gpt_oss" else "sdpa")
    model.set_experts_implementation("eager")
    if family != "phimoe":  # whose norms are torch's own
        set_map(model, map_of(described))
        exact_norms(model)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.shape != model.model.rotary_emb.inv_freq.shape:
            tensor.data = tensor.data.double()
    return model


@every_family
def test_a_prepared_model_gives_the_logits_of_transformers_own(make_family_model, ids, family):
    model = make_family_model(family)
    if family == "phimoe":  # whose weights change, in the dtype that they are in
        model = prepare(stock(family, model))
    # the router of GLM multiplies in float32 there, whatever the model is in
    limit = 1e-5 if family == "glm4_moe" else 1e-12
    assert logits_error(logits(model, ids), logits(stock(family, model), ids)) < limit


@every_family
def test_steps_with_a_quantized_cache_are_what_they_are_at_once(make_family_model, ids, family):
    networks = QuantizedNetworks(lambda: make_family_model(family), QUANT, KVConfig())
    rotations = drawn(make_family_model(family))
    weights = quantize_rtn(networks.fused(rotations), QUANT, ClipSearch(), {})
    model = networks.dequantized(rotations, weights)
    expected = logits(model, ids)
    cache = CodedCache(kv_path_of(model), 2)
    parts = ids.split([9, 7, 1, 1, 1, 1, 1, 1, 1, 1], dim=1)
    found = [model(part, past_key_values=cache).logits for part in parts]
    assert logits_error(torch.cat(found, 1), expected) < 1e-9
    assert logits_error(expected, logits(make_family_model(family), ids)) > 1e-2


@every_family
def test_the_integer_runtime_says_what_it_leaves_to_torch(make_family_model, ids, family, caplog):
    networks = QuantizedNetworks(lambda: make_family_model(family), QUANT, KVConfig())
    rotations = drawn(make_family_model(family))
    fused = networks.fused(rotations)
    reason = why_not_runtime(fused, networks.kv_path(fused, rotations))
    of_attention = {"llama4_text": "turns neighbours", "gpt_oss": "has sinks"}
    assert reason is not None and of_attention.get(family, "no gated MLP alone") in reason
    weights = quantize_rtn(fused, QUANT, ClipSearch(), {})
    found = logits(networks.integer(rotations, weights, "auto"), ids)
    assert reason in caplog.text
    assert logits_error(found, logits(networks.emulated(rotations, weights), ids)) < 1e-9


def test_a_shared_expert_reads_what_the_router_does_and_all_tokens_go_to_it(make_family_model, ids):
    model = make_family_model("qwen2_moe", num_experts=5, shared_expert_intermediate_size=28)
    described = map_of(model)
    sites = {site.name: site for site in described.sites if site.layer == 1}
    shared = [sites[f"mlp.shared_expert.{name}_proj"] for name in ("gate", "up", "down")]
    assert [site.key for site in shared] == ["1.gate_up", "1.gate_up", "1.down.shared"]
    assert all(site.expert is None and site.share == 1 and site.quantized for site in shared)
    gate = sites["mlp.shared_expert_gate"]
    assert (gate.key, gate.quantized, gate.out_features) == ("1.gate_up", False, 1)
    assert watched(described)["1.gate_up"] == "model.layers.1.mlp.gate.linear"
    expert = 3 * 24 * 20
    mlp = 5 * 24 + 24 + 3 * 24 * 28 + 2 * expert  # two of five experts
    assert active_numbers(described) == 2 * (24 * (2 * 32 + 2 * 16) + mlp)
    assert described.gated_widths == (20, 28)
    rotations = drawn(model)
    assert [rotations.r4.of(width).width for width in (20, 28)] == [20, 28]
    again = partial(
        make_family_model, "qwen2_moe", num_experts=5, shared_expert_intermediate_size=28
    )
    networks = QuantizedNetworks(again, QUANT, KVConfig())
    assert check_invariance(again, lambda: networks.rotated(rotations), rotations, ids[:1]) < 1e-9
    network = networks.emulated(
        rotations, quantize_rtn(networks.fused(rotations), QUANT, ClipSearch(), {})
    )
    kept = linear_at(network, gate.path.replace("layers.1", "layers.0"))
    assert not isinstance(kept, FakeQuantLinear) or kept.path.quantizer is None


def test_corrections_of_a_router_stay_in_float32_and_choose(make_family_model, ids):
    model = make_family_model("glm4_moe")
    gate = model.model.layers[1].mlp.gate
    assert gate.e_score_correction_bias.abs().max() > 0.02
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    before = dict(model.named_buffers())[name].clone()
    half = cast_model(make_family_model("glm4_moe"), torch.bfloat16)
    assert half.state_dict()[name].dtype == torch.float32
    assert torch.equal(half.state_dict()[name], before.float())
    found, stock_gate = gate(torch.zeros(1, 24, dtype=torch.float64)), gate._stock[0]
    assert stock_gate.e_score_correction_bias is gate.e_score_correction_bias
    assert found[0].dtype == torch.float64 and found[0].abs().max() == 0
    groups = before.view(4, 2).sum(-1).topk(2).indices  # all scores are 1/2: corrections choose
    allowed = {2 * group + place for group in groups.tolist() for place in (0, 1)}
    best = max(allowed, key=lambda expert: before[expert].item())
    assert best in found[2][0].tolist() and {*found[2][0].tolist()} <= allowed


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_group": 3}, "n_group=3 does not cut 8 experts into groups of 2 on"),
        ({"n_group": 8}, "n_group=8 does not cut 8 experts into groups of 2 on"),
        ({"n_group": 0}, "n_group=0 does not cut 8 experts into groups of 2 on"),
        ({"num_experts_per_tok": 3, "topk_group": 1}, "topk_group=1 of 4 groups do not hold"),
    ],
    ids=str,
)
def test_groups_that_hold_too_few_experts_are_refused(make_family_model, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        make_family_model("glm4_moe", **changes)


def test_an_expert_of_llama_4_reads_tokens_times_their_scores(make_family_model, ids):
    model, layer = make_family_model("llama4_text"), "model.layers.0.feed_forward"
    seen: dict[str, torch.Tensor] = {}
    with temporary_hooks() as hooks:
        for name in ("router.linear", *(f"experts.{e}.gate_proj" for e in range(4))):
            module = model.get_submodule(f"{layer}.{name}")
            keep = lambda m, args, name=name: seen.update({name: args[0]})  # noqa: E731
            hooks.append(module.register_forward_pre_hook(keep))
        model(ids)
    stream = seen.pop("router.linear")
    given = stream @ linear_at(model, f"{layer}.router.linear").weight.T
    best, chosen = given.max(-1)
    assert sum(len(rows) for rows in seen.values()) == ids.numel()
    for name, rows in seen.items():
        own = chosen == int(name.split(".")[1])
        expected = stream[own] * best[own, None].float().sigmoid().double()
        assert torch.allclose(rows, expected, atol=1e-6)  # the score is one in float32


def test_chunks_and_temperatures_of_llama_4_are_as_far_as_they_are_told(make_family_model):
    layers = map_of(make_family_model("llama4_text", num_hidden_layers=3)).layers
    assert [layer.attention.rope for layer in layers] == [True, False, True]
    assert [layer.attention.window for layer in layers] == [5, None, 5]
    assert all(layer.attention.neighbours for layer in layers)


def test_sinks_take_their_part_of_the_softmax(make_family_model, ids):
    """Against the weights of tokens alone, times the part that no sink takes."""
    model = make_family_model("gpt_oss", num_hidden_layers=1, layer_types=["full_attention"])
    attention = model.model.layers[0].self_attn
    attention.sinks.data = torch.linspace(-2, 3, 4, dtype=torch.float64)
    seen: dict[str, torch.Tensor] = {}
    with temporary_hooks() as hooks:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            keep = lambda m, args, out, name=name: seen.update({name: out, "in": args[0]})  # noqa: E731
            hooks.append(getattr(attention, name).register_forward_hook(keep))
        hooks.append(
            model.model.rotary_emb.register_forward_hook(lambda m, a, out: seen.update(rope=out))
        )
        model(ids)
    cos, sin = (part[:, None] for part in seen["rope"])

    def heads(name: str, turned: bool = True) -> torch.Tensor:
        x = seen[name].unflatten(-1, (-1, 8)).transpose(1, 2)
        a, b = x.chunk(2, -1)
        x = torch.cat((a * cos - b * sin, b * cos + a * sin), -1) if turned else x
        return x.repeat_interleave(4 // x.shape[1], 1)

    scores = heads("q_proj") @ heads("k_proj").mT / 8**0.5
    scores = scores.masked_fill(~torch.ones(24, 24, dtype=torch.bool).tril(), -torch.inf)
    tokens = scores.exp().sum(-1, keepdim=True)
    part = tokens / (tokens + attention.sinks.exp().view(-1, 1, 1))
    expected = scores.softmax(-1) @ heads("v_proj", turned=False) * part
    assert torch.allclose(seen["in"], expected.transpose(1, 2).flatten(2), atol=1e-12)


def test_gates_and_ups_of_gpt_oss_are_cut_off_and_no_scale_moves_into_them(make_family_model, ids):
    limited, free = (make_family_model("gpt_oss") for _ in range(2))
    for expert in (module for module in limited.modules() if hasattr(module, "limit")):
        expert.limit = 0.3
    assert logits_error(logits(limited, ids), logits(free, ids)) > 1e-3
    inputs = [input for input in map_of(limited).inputs if input.reads == "R4"]
    assert len(inputs) == 16 and all(input.producer is None for input in inputs)
    settings = {"smooth": 0.5, "smooth_groups": ["down"], "r4": "none", "online": False}
    with pytest.raises(InputError, match=r"down\.0 input runs online on a model without a norm or"):
        check_rotations(RotationConfig(**settings), map_of(limited))


def test_a_router_of_two_is_told_of_two(make_family_model):
    with pytest.raises(InputError, match="num_experts_per_tok=1, and its router chooses two"):
        make_family_model("phimoe", num_experts_per_tok=1)
