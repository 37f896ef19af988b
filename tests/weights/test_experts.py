"""Experts are rounded for their own tokens, which are found here by the routers' choices."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

from spinlab.config import (
    GPTAQConfig,
    GPTQConfig,
    KVConfig,
    LWCConfig,
    QronosConfig,
    QuantConfig,
    TensorQuant,
    WeightsConfig,
)
from spinlab.config.kv import CodecConfig
from spinlab.fakequant.insert import FakeQuantLinear
from spinlab.model.families.experts import Experts, Router, alone
from spinlab.model.hooks import temporary_hooks
from spinlab.model.load import cast_model
from spinlab.model.modules import layers_of, linear_at, linears_of, map_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.check import logits, logits_error
from spinlab.rotation.online import hadamard_rotation
from spinlab.rotation.rotations import RotationSet
from spinlab.weights.base import Rounding
from spinlab.weights.gptq import Moment, NoRows, error_spread, gptq
from spinlab.weights.methods import METHODS
from spinlab.weights.quantized import QuantizedWeight
from spinlab.weights.rtn import rtn

EXPERTS = {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
QUANT = QuantConfig(
    weights=TensorQuant(bits=3, symmetric=True), activations=TensorQuant(clip_ratio=0.9)
)
ROTATIONS = RotationSet(r3=hadamard_rotation(8), r4=hadamard_rotation(20))
OTHERS = {
    "qwen2_moe": {"num_experts": 12},
    "llama4_text": {
        **{"num_local_experts": 12, "intermediate_size": 20, "intermediate_size_mlp": 20},
        "attention_bias": True,
    },
    "gpt_oss": {"num_local_experts": 16, "intermediate_size": 20},
}
Weights = dict[str, QuantizedWeight]
LAYER, ATTENTION = "model.layers.{}.mlp", "model.layers.0.self_attn.o_proj"


@pytest.fixture
def windows() -> torch.Tensor:
    """Few tokens, so that some experts get none."""
    return torch.randint(0, 64, (3, 3), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def networks(make_family_model) -> QuantizedNetworks:
    def make() -> PreTrainedModel:
        return cast_model(make_family_model("qwen3_moe", **EXPERTS), torch.float32)

    return QuantizedNetworks(make, QUANT, KVConfig())


def rounded(networks: QuantizedNetworks, windows, folder, method: str) -> Weights:
    model = networks.fused(ROTATIONS)
    kinds = {"gptq": GPTQConfig, "gptaq": GPTAQConfig, "qronos": QronosConfig}
    own = {name: kind(block_size=10) for name, kind in kinds.items()}
    config = WeightsConfig(method, **own, lwc=LWCConfig(epochs=1))
    folder.mkdir(exist_ok=True)
    kv = networks.kv_path(model, ROTATIONS)
    return METHODS[method].work(
        Rounding(model, ROTATIONS, windows, networks.quant, config, folder, kv)
    )


class Seen:
    """Gather what a layer's MLP reads, and whom its router chooses, of whole passes."""

    def __init__(self, model: PreTrainedModel, windows: torch.Tensor, layer: int) -> None:
        self.stream: list[torch.Tensor] = []
        self.chosen: list[torch.Tensor] = []
        self.multiplied: dict[str, list[torch.Tensor]] = {}
        block = model.get_submodule(LAYER.format(layer))
        router = next(m for m in block.modules() if isinstance(m, Router))
        with temporary_hooks() as hooks, torch.no_grad():
            hooks.append(block.register_forward_pre_hook(self._read))
            hooks.append(router.register_forward_hook(self._choose))
            for site, linear in linears_of(model):
                if site.layer == layer and site.expert is not None:
                    see = partial(self._multiply, site.path)
                    hooks.append(linear.register_forward_pre_hook(see))
            for window in windows:
                model(input_ids=window[None], use_cache=False)

    def _read(self, module, args) -> None:
        self.stream.append(args[0][0])

    def _choose(self, module, args, out) -> None:
        self.chosen.append(out[2])

    def _multiply(self, path: str, linear: FakeQuantLinear, args) -> None:
        self.multiplied.setdefault(path, []).append(linear.path(args[0]))

    def rows(self, expert: int) -> torch.Tensor:
        """Return the rows of the stream that an expert gets: (rows, hidden)."""
        pairs = zip(self.stream, self.chosen, strict=True)
        return torch.cat([x[(chosen == expert).any(-1)] for x, chosen in pairs])


def test_every_expert_is_rounded_by_gptq_for_its_own_tokens_alone(networks, windows, tmp_path):
    wide = CodecConfig(bits=16)
    networks = replace(networks, kv=KVConfig(keys=wide, values=wide))
    found = rounded(networks, windows, tmp_path, "gptq")
    # the first layer's stream depends on attention's weights alone, which are rounded first
    model = networks.dequantized(ROTATIONS, {n: w for n, w in found.items() if "attn" in n})
    for module in model.modules():
        if isinstance(module, FakeQuantLinear):
            module.path.quantizer = None
    seen, fused = Seen(model, windows, 0), networks.fused(ROTATIONS)
    config = WeightsConfig("gptq", gptq=GPTQConfig(block_size=10))
    for expert in range(12):
        rows, at = seen.rows(expert), f"{LAYER.format(0)}.experts.{expert}"
        for name in ("gate_proj", "up_proj"):
            weight = linear_at(fused, f"{at}.{name}").weight
            if len(rows):
                hessian = 2 / len(rows) * rows.T @ rows
                expected = gptq(weight, error_spread(hessian, config.gptq), QUANT.weights, config)
            else:
                expected = rtn(weight, QUANT.weights, config.clip)
            same = (found[f"{at}.{name}"].levels == expected.levels).float().mean()
            assert same > 0.99, (expert, name)  # sums in another order may flip a level
    used = {e for chosen in seen.chosen for e in chosen.flatten().tolist()}
    assert 0 < len(used) < 12


@pytest.mark.parametrize("family", OTHERS)
def test_experts_of_other_mixtures_are_rounded_for_their_own_tokens_too(
    make_family_model, windows, tmp_path, family
):
    """Those of Llama 4 for tokens times their scores, and a shared one for all tokens."""

    def make() -> PreTrainedModel:
        return cast_model(make_family_model(family, **OTHERS[family]), torch.float32)

    wide = CodecConfig(bits=16)
    networks = QuantizedNetworks(make, QUANT, KVConfig(keys=wide, values=wide))
    found = rounded(networks, windows, tmp_path, "gptq")
    attention = {n: w for n, w in found.items() if "attn" in n}
    model, fused = networks.dequantized(ROTATIONS, attention), networks.fused(ROTATIONS)
    parts: dict[str, list[torch.Tensor]] = {"stream": [], "chosen": [], "weights": []}
    for module in model.modules():
        if isinstance(module, FakeQuantLinear):
            module.path.quantizer = None

    def keep(module, args) -> None:
        for kept, x in zip(parts.values(), args, strict=True):
            kept.append(x)

    layer = layers_of(model)[0]
    with temporary_hooks() as hooks, torch.no_grad():
        experts = next(module for module in layer.modules() if isinstance(module, Experts))
        hooks.append(experts.register_forward_pre_hook(keep))
        model(input_ids=windows)
    (stream,), (chosen,), (weights,) = parts.values()
    config, unseen = WeightsConfig("gptq", gptq=GPTQConfig(block_size=10)), 0
    sites = [s for s in map_of(model).sites if s.key == "0.gate_up" and s.quantized]
    for site in sites:
        rows = stream
        if site.expert is not None:
            token, place = torch.where(chosen == site.expert)
            scores = weights[token, place, None] if family == "llama4_text" else 1
            rows = stream[token] * scores
        weight = linear_at(fused, site.path).weight
        if len(rows):
            hessian = 2 / len(rows) * rows.T @ rows
            expected = gptq(weight, error_spread(hessian, config.gptq), QUANT.weights, config)
        else:
            expected, unseen = rtn(weight, QUANT.weights, config.clip), unseen + 1
        same = (found[site.path].levels == expected.levels).float().mean()
        assert same > 0.99, site.path  # sums in another order may flip a level
    assert 0 < unseen < len(sites) - 2


@pytest.mark.parametrize("method", ["gptq", "gptaq", "qronos"])
def test_experts_without_tokens_are_rounded_to_nearest_and_counted(
    networks, windows, tmp_path, caplog, method
):
    found = rounded(networks, windows, tmp_path, method)
    assert found.keys() == {s.path for s in map_of(networks.original()).sites if s.quantized}
    model = networks.fused(ROTATIONS)
    counts: list[int] = []
    for layer in range(2):
        alike = 0
        for expert in range(12):
            at = f"{LAYER.format(layer)}.experts.{expert}"
            names = [f"{at}.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
            nearest = [rtn(linear_at(model, n).weight, QUANT.weights, _clip()) for n in names]
            alike += all(
                torch.equal(found[n].levels, w.levels) for n, w in zip(names, nearest, strict=True)
            )
        counts.append(alike)
    assert all(counts)
    for layer, count in enumerate(counts):
        sentence = f"layer {layer}: no token of the calibration text goes to {count} of its experts"
        assert sentence in caplog.text
    assert f"raise weights.{method}.samples" in caplog.text


def _clip():
    return WeightsConfig().clip


def test_both_inputs_of_an_expert_are_of_the_tokens_that_the_quantized_network_sends(
    networks, windows, tmp_path, seen_pairs
):
    """Coarse weights send tokens elsewhere: pairs are of one token, the original's as it would be.

    The original's inputs are worked out from its own stream, also where it routes otherwise.
    """
    windows = windows.repeat(1, 4)  # positions tell tokens apart
    found = rounded(networks, windows, tmp_path, "gptaq")
    rotated, quantized = networks.rotated(ROTATIONS), networks.dequantized(ROTATIONS, found)
    seen = iter(seen_pairs.values())
    elsewhere = 0
    for layer in range(2):
        original, then = (Seen(network, windows, layer) for network in (rotated, quantized))
        elsewhere += sum(
            int((a.sort(-1).values != b.sort(-1).values).sum())
            for a, b in zip(original.chosen, then.chosen, strict=True)
        )
        next(seen), next(seen)  # what attention reads
        for expert in range(12):
            original.chosen = then.chosen
            rows = original.rows(expert)
            at = f"{LAYER.format(layer)}.experts.{expert}"
            gate, up = (linear_at(rotated, f"{at}.{n}_proj").weight for n in ("gate", "up"))
            gated = torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)
            for name, exact in (("gate_proj", rows), ("down_proj", ROTATIONS.r4(gated))):
                both = next(seen)
                torch.testing.assert_close(torch.cat([e for e, _ in both]), exact)
                rounded_ones = then.multiplied.get(f"{at}.{name}", [torch.zeros(0, exact.shape[1])])
                torch.testing.assert_close(torch.cat([x for _, x in both]), torch.cat(rounded_ones))
    assert elsewhere > 0


@pytest.mark.parametrize("method", METHODS)
def test_all_networks_of_rounded_experts_are_one_function(networks, windows, tmp_path, method):
    windows = torch.cat([windows.repeat(1, 4)] * 2)
    weights = rounded(networks, windows, tmp_path, method)
    emulated, integer, fake = (
        logits(network, windows)
        for network in (
            networks.emulated(ROTATIONS, weights),
            networks.integer(ROTATIONS, weights, "auto"),
            networks.dequantized(ROTATIONS, weights),
        )
    )
    assert torch.equal(emulated, integer)
    assert logits_error(fake, emulated) < 1e-3
    assert logits_error(emulated, logits(networks.original(), windows)) > 1e-2


def test_where_one_expert_is_looked_at_others_are_not_computed(networks, windows):
    model = networks.original()
    layer, called = layers_of(model)[0], []
    with temporary_hooks() as hooks:
        for site, linear in linears_of(model):
            if site.layer == 0 and site.expert is not None:
                see = partial(lambda e, m, args: called.append(e), site.expert)
                hooks.append(linear.register_forward_pre_hook(see))
        model(input_ids=windows)
        every = set(called)
        for name in (LAYER.format(0) + f".experts.{min(every)}.down_proj", ATTENTION):
            called.clear()
            with pytest.raises(KeyError), alone(layer, linear_at(model, name)):
                model(input_ids=windows)
                raise KeyError
            assert set(called) == (every if name == ATTENTION else {min(every)})
        called.clear()
        model(input_ids=windows)  # as before
    assert set(called) == every


def test_a_run_that_was_killed_continues_with_the_same_bits(networks, windows, tmp_path):
    whole = rounded(networks, windows, tmp_path, "gptq")
    (tmp_path / "layer-001.safetensors").unlink()
    resumed = rounded(networks, windows, tmp_path, "gptq")
    assert all(torch.equal(resumed[n].levels, w.levels) for n, w in whole.items())


def test_a_moment_of_no_rows_is_none():
    moment = Moment(4, torch.device("cpu"))
    moment.add(torch.zeros(0, 4), torch.zeros(0, 4))
    with pytest.raises(NoRows):
        moment.value()
