"""Mixtures of experts: what is special about them, against stock modules and plain arithmetic."""

from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

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
from spinlab.model.families.experts import Experts, Router
from spinlab.model.hooks import temporary_hooks
from spinlab.model.load import load_model
from spinlab.model.map import ModelMap
from spinlab.model.modules import linear_at, linears_of, map_of, restore
from spinlab.model.random import random_model
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.check import BrokenSite, check_invariance, logits
from spinlab.rotation.fuse import fold_norms
from spinlab.rotation.initial import check_rotations, initial_rotations
from spinlab.rotation.rotations import RotationSet
from spinlab.rotation.statistics import gather_statistics
from spinlab.rotation.stored import read_stored
from spinlab.weights.rtn import rtn
from tests.shapes import CUT_OFF, LATENTS

GLM4 = {
    **{"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
    **{"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
}
QWEN3 = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
LATENT = {**LATENTS, "first_k_dense_replace": 0, "num_key_value_heads": 4}
LIMITED = {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2}
SHAPES = {
    "qwen3_moe": QWEN3,
    "qwen3_moe, normalized": {**QWEN3, "norm_topk_prob": True},
    "olmoe": {"num_experts": 5, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**QWEN3, "shared_expert_intermediate_size": 20},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {**GLM4, "norm_topk_prob": False},
    "glm4_moe, groups": {**GLM4, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 1.5},
    "llama4_text": {"num_local_experts": 4},
    "llama4_text, two": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": LATENT,
    "deepseek_v2, groups": {**LATENT, **LIMITED, "routed_scaling_factor": 1.5},
    "deepseek_v3": {**LATENT, "n_group": 2, "topk_group": 1, "norm_topk_prob": False},
    "deepseek_v3, groups": {**LATENT, "n_group": 3, "topk_group": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, **CUT_OFF},
}
QUANT = QuantConfig(weights=TensorQuant(symmetric=True))
OFF = {"r1": "none", "r2": "none", "r4": "none"}
Chosen = list[tuple[torch.Tensor, torch.Tensor]]
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_choice = pytest.mark.parametrize("shape", [*SHAPES, "phimoe"])


def architecture(shape: str) -> dict:
    return {"model_type": shape.partition(",")[0], **SHAPES.get(shape, {})}


@pytest.fixture
def make(make_family_model):
    """Return a maker of models in float64 by the name of their shape."""

    def made(shape: str, **changes) -> PreTrainedModel:
        settings = architecture(shape) | changes
        return make_family_model(settings.pop("model_type"), **settings)

    return made


def drawn(model_map: ModelMap, **changes) -> RotationSet:
    return initial_rotations(RotationConfig(**changes), model_map, torch.Generator().manual_seed(0))


def routed(model: PreTrainedModel, ids: torch.Tensor) -> Chosen:
    """Return what every router's linear gives, and who is chosen by it, layer by layer."""
    given: list[torch.Tensor] = []
    chosen: list[torch.Tensor] = []
    with temporary_hooks() as hooks:
        for module in model.modules():
            if isinstance(module, Router):
                keep = lambda m, args, out: given.append(out)  # noqa: E731
                hooks.append(module.linear.register_forward_hook(keep))
            if isinstance(module, Experts):
                hooks.append(
                    module.register_forward_pre_hook(lambda m, args: chosen.append(args[1]))
                )
        model(input_ids=ids)
    return list(zip(given, chosen, strict=True))


def random_blocks(shape: str, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return the mixture of a layer as its family prepares it, and a stock one of its numbers."""
    base = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "initializer_range": 0.2}
    base |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = ModelConfig(architecture={**base, **architecture(shape)}, dtype=str(dtype)[6:])
    ours, stock = load_model(config, None, 0), random_model(config, 0).to(dtype)
    stock.set_experts_implementation("eager")
    single = dict(random_model(config, 0).named_buffers())
    for name, buffer in stock.named_buffers():
        if name.endswith("correction_bias"):  # as loading keeps it
            buffer.data = single[name]
    return mixture_of(ours), mixture_of(stock)


def mixture_of(model: PreTrainedModel) -> torch.nn.Module:
    """Return the MLP of the first layer."""
    found = (m for m in model.model.layers[0].children() if hasattr(m, "experts"))
    return next(found)


def router_of(mixture: torch.nn.Module) -> torch.nn.Module:
    return mixture.gate if hasattr(mixture, "gate") else mixture.router


@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_router_and_experts_compute_what_stock_ones_do(shape, dtype):
    """Their products have other shapes, and may be rounded otherwise: as far as stock ones are."""
    ours, stock = random_blocks(shape, dtype)
    exact = random_blocks(shape, torch.float32)[1]
    exact.load_state_dict({n: t.float() for n, t in stock.state_dict().items()})
    x = torch.randn(2, 50, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    choices = [router_of(block)(x.flatten(0, 1)) for block in (ours, stock)]
    assert all(map(torch.equal, *choices)) and len(choices[0]) >= 2

    def given(block, x):
        out = block(x)  # some give their routers' logits too
        return (out if isinstance(out, torch.Tensor) else out[0]).view(x.shape)

    found, expected = given(ours, x), given(stock, x)
    assert found.dtype == expected.dtype == dtype
    reference = (
        given(exact.double(), x.double()).float()
        if dtype == torch.float32
        else given(exact, x.float())
    )
    own = (expected - reference).abs().max()
    assert (found - reference).abs().max() <= 2 * own + 1e-7


@every_shape
def test_a_restored_model_is_the_stock_one(shape):
    base = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    base |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = ModelConfig(architecture={**base, **architecture(shape)})
    model, stock = load_model(config, None, 0), random_model(config, 0)
    restore(model)
    expected = stock.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items())
    kinds = [[type(m) for m in x.modules()] for x in (model.model.layers, stock.model.layers)]
    assert kinds[0] == kinds[1]
    restore(model)  # of a stock one nothing is to be done
    assert model.state_dict().keys() == expected.keys()


@every_choice
def test_routers_give_the_same_logits_and_choose_the_same_experts(make, ids, shape):
    original = make(shape)
    rotations = drawn(map_of(original), r1="random", r2="random", r3="random", r4="random")
    rotated = QuantizedNetworks(partial(make, shape), QUANT, KVConfig()).rotated(rotations)
    pairs = list(zip(routed(original, ids), routed(rotated, ids), strict=True))
    assert len(pairs) == 2
    for (given, chosen), (again, then) in pairs:
        assert torch.equal(chosen, then)
        assert (given - again).abs().max() < 1e-9 * given.std()


def test_a_router_takes_the_gain_and_r1_and_reads_its_input_unquantized(make, ids):
    networks = QuantizedNetworks(lambda: make("mixtral"), QUANT, KVConfig())
    original = make("mixtral")
    rotations = drawn(map_of(original))
    fused, name = networks.fused(rotations), "model.layers.1.mlp.gate.linear"
    gain = original.get_submodule("model.layers.1.post_attention_layernorm").weight
    expected = linear_at(original, name).weight * gain @ rotations.r1
    assert torch.allclose(linear_at(fused, name).weight, expected, atol=1e-12)
    weights = {
        site.path: rtn(linear.weight, QUANT.weights, ClipSearch())
        for site, linear in linears_of(fused)
        if site.quantized
    }
    for network in (
        networks.dequantized(rotations, weights),
        networks.emulated(rotations, weights),
    ):
        router = network.get_submodule(name)
        assert not isinstance(router, FakeQuantLinear) or router.path.quantizer is None
        assert torch.equal(router.weight, linear_at(fused, name).weight)
        seen: list[torch.Tensor] = []
        with temporary_hooks() as hooks:
            norm = network.get_submodule("model.layers.1.post_attention_layernorm")
            hooks.append(norm.register_forward_hook(lambda m, a, out, to=seen: to.append(out)))
            kept = routed(network, ids)
        assert torch.allclose(kept[1][0], seen[0].flatten(0, 1) @ router.weight.T, atol=1e-12)


def test_a_broken_expert_and_a_broken_router_are_named(make, ids):
    rotations = drawn(map_of(make("mixtral")))
    networks = QuantizedNetworks(lambda: make("mixtral"), QUANT, KVConfig())
    used = routed(make("mixtral"), ids[:1])[1][1].flatten().mode().values.item()
    for name in (f"mlp.experts.{used}.up_proj", "mlp.gate.linear"):
        rotated = networks.rotated(rotations)
        weight = linear_at(rotated, f"model.layers.1.{name}").weight
        weight.data = weight.data.roll(1, 0)
        with pytest.raises(BrokenSite, match=f"model.layers.1.{name}"):
            check_invariance(lambda: make("mixtral"), lambda m=rotated: m, rotations, ids[:1])


def test_experts_share_one_scale_of_the_input_they_share_out(make, ids):
    """It is that of all tokens and of the weights of all experts, and the router takes it too."""
    model = make("qwen3_moe")
    fold_norms(model)
    found = gather_statistics(model, ids)
    inputs: list[torch.Tensor] = []
    with temporary_hooks() as hooks:
        norm = model.get_submodule("model.layers.0.post_attention_layernorm")
        hooks.append(norm.register_forward_hook(lambda m, args, out: inputs.append(out)))
        for window in ids:
            model(input_ids=window[None])
    expected = torch.cat(inputs).abs().amax((0, 1)).float()
    assert torch.equal(found.peaks["0.gate_up"], expected)
    assert torch.allclose(found.means["0.gate_up"], torch.cat(inputs).mean(0).float(), atol=1e-6)
    names = ("gate_proj", "up_proj")
    experts = [
        linear_at(model, f"model.layers.0.mlp.experts.{e}.{n}").weight
        for e in range(5)
        for n in names
    ]
    largest = torch.cat(experts).abs().amax(0).float()
    assert torch.equal(found.weights["0.gate_up"], largest)
    settings = {**OFF, "smooth": 0.5, "smooth_groups": ["gate_up", "down"]}
    config, generator = RotationConfig(**settings), torch.Generator().manual_seed(0)
    rotations = initial_rotations(config, map_of(model), generator, found)
    assert rotations.inputs.keys() == {
        f"{layer}.{name}"
        for layer in range(2)
        for name in ("gate_up", *(f"down.{e}" for e in range(5)))
    }
    assert all(transform.folded for transform in rotations.inputs.values())
    networks = QuantizedNetworks(lambda: make("qwen3_moe"), QUANT, KVConfig())
    original = lambda: make("qwen3_moe")  # noqa: E731
    rotated = lambda: networks.rotated(rotations)  # noqa: E731
    assert check_invariance(original, rotated, rotations, ids[:1]) < 1e-9


@pytest.mark.parametrize("inputs", ["duquant", "wush"])
def test_an_expert_that_no_token_reaches_keeps_its_input_as_it_is(make, ids, inputs):
    make = partial(make, "qwen3_moe", num_experts=40, num_experts_per_tok=1)
    config = RotationConfig(**OFF, inputs=inputs)
    networks = QuantizedNetworks(make, QUANT, KVConfig())
    orders = {i.key: 4 for i in map_of(make()).inputs} if inputs == "wush" else None
    found = gather_statistics(networks.stream_rotated(RotationSet()), ids, blocks=orders)
    rotations = initial_rotations(config, map_of(make()), torch.Generator().manual_seed(0), found)
    used = [set(chosen.flatten().tolist()) for _, chosen in routed(make(), ids)]
    assert all(len(experts) < 40 for experts in used)
    downs = {key for key in rotations.inputs if ".down." in key}
    assert downs == {f"{layer}.down.{e}" for layer, experts in enumerate(used) for e in experts}
    assert check_invariance(make, lambda: networks.rotated(rotations), rotations, ids[:1]) < 1e-9


@every_shape
def test_a_loss_for_balance_is_left_out(make, ids, shape):
    """Checkpoints that were saved in training ask for it; logits do not depend on it."""
    if not hasattr(AutoConfig.for_model(shape.partition(",")[0]), "output_router_logits"):
        pytest.skip("this transformers has no such loss for the family")
    found, expected = (make(shape, output_router_logits=asked) for asked in (True, False))
    assert torch.equal(logits(found, ids), logits(expected, ids))


def test_layers_of_other_widths_have_an_r4_each(make, ids, tmp_path):
    make = partial(make, "qwen3_moe", mlp_only_layers=[0], intermediate_size=40)
    model_map = map_of(make())
    assert [layer.mlp is None for layer in model_map.layers] == [False, True]
    assert model_map.gated_widths == (20, 40)
    with pytest.raises(InputError, match=r"r4_block=16 does not divide 20, the R4 width"):
        check_rotations(RotationConfig(r4_block=16), model_map)
    networks = QuantizedNetworks(make, QUANT, KVConfig())
    for kind in ("hadamard", "random"):
        rotations = drawn(model_map, r4=kind)
        for input in (input for input in model_map.inputs if input.reads == "R4"):
            assert rotations.behind(input).width == input.width
        rotated = partial(networks.rotated, rotations)
        assert check_invariance(make, rotated, rotations, ids[:1]) < 1e-9
    rotations.save(tmp_path / "r.safetensors")
    again = read_stored(tmp_path / "r.safetensors", model_map)
    for width in (20, 40):
        assert torch.equal(again.r4.of(width).dense(), rotations.r4.of(width).dense())
    assert {n for n in rotations.orthogonality() if "r4" in n} == {
        f"r4.{width}.{side}" for width in (20, 40) for side in ("left", "right")
    }
    lost = {n: t for n, t in load_file(tmp_path / "r.safetensors").items() if "r4.20" not in n}
    words = safe_open(tmp_path / "r.safetensors", "pt").metadata()
    save_file(lost, tmp_path / "l.safetensors", words)
    with pytest.raises(InputError, match=r"it has no r4\.20 beside"):
        read_stored(tmp_path / "l.safetensors", model_map)


def test_the_fused_runtime_leaves_experts_to_torch(make, left_to_torch):
    networks = QuantizedNetworks(lambda: make("mixtral"), QUANT, KVConfig())
    rotations = drawn(map_of(make("mixtral")))
    left_to_torch(networks, rotations, "model.layers.0 has no gated MLP alone")


def test_values_that_are_cut_off_are_refused(make_family_model):
    with pytest.raises(InputError, match=r"clip_qkv=1\.5 cuts values off .* with clip_qkv=null"):
        make_family_model("olmoe", clip_qkv=1.5)
