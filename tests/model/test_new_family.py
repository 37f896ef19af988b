"""A family that spinlab does not know, added in this one file: other names, 1 + weight, a router.

Its layers differ in their biases, and each has a linear that reads the stream behind a norm, is
rotated with the rest and stays in 16 bits.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from spinlab.config import (
    ClipSearch,
    KVConfig,
    LearnConfig,
    QuantConfig,
    RotationConfig,
    TensorQuant,
    WeightsConfig,
)
from spinlab.errors import InputError
from spinlab.fakequant.insert import FakeQuantLinear
from spinlab.learn.loop import RotationLearner
from spinlab.model.families import FAMILIES
from spinlab.model.families.decoder import Names, read_decoder
from spinlab.model.load import cast_model, exact_norms
from spinlab.model.map import Family, ModelMap, Site
from spinlab.model.modules import map_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.check import check_invariance, logits, logits_error
from spinlab.rotation.fuse import fold_norms
from spinlab.rotation.initial import check_rotations, initial_rotations
from spinlab.rotation.rotations import RotationSet
from spinlab.rotation.statistics import gather_statistics
from spinlab.runtime.fused.convert import why_not_runtime
from spinlab.weights.base import Rounding
from spinlab.weights.layerwise import quantize_gptq, quantize_rtn

# the family -----------------------------------------------------------------------------------

NAMES = Names(
    layers="trunk.cells",
    embedding="trunk.read",
    final_norm="trunk.last",
    head="say",
    rope="trunk.turn",
    attention="look",
    mlp="think",
    attention_norm="before_look",
    mlp_norm="before_think",
    queries="look.ask",
    keys="look.offer",
    values="look.give",
    out="look.sum",
    gate="think.open",
    up="think.lift",
    down="think.drop",
    query_norm="look.no",
    key_norm="look.none",
)


def read_tiny(model: PreTrainedModel) -> ModelMap:
    """Read what is as everywhere, and add the routers, which read what the MLP reads."""
    known = read_decoder(model, NAMES, offset=1.0)
    sites: list[Site] = []
    routers: dict[str | None, str] = {}  # by the norm before them
    for site in known.sites:
        sites.append(site)
        if site.name == NAMES.up:
            path = f"{known.layers[site.layer].path}.think.switch"
            place = {"name": "think.switch", "path": path, "out_features": 2}
            sites.append(replace(site, **place, quantized=False))
            routers[known.input_at[site.key].producer] = path
    norms = [
        replace(n, readers=(*n.readers, routers[n.path])) if n.path in routers else n
        for n in known.norms
    ]
    layers = tuple(replace(layer, mlp=None) for layer in known.layers)
    return replace(known, sites=tuple(sites), norms=tuple(norms), layers=layers)


TINY = Family(read_tiny)


# its modules, as a checkpoint's library would bring them


class TinyConfig(PreTrainedConfig):
    model_type = "tiny"


class OnePlusNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width).uniform_(-0.7, 1.0)), 1e-6

    def forward(self, x):
        mean = x.square().mean(-1, keepdim=True)
        return x * (mean + self.eps).rsqrt() * (1 + self.weight)


class Look(nn.Module):
    def __init__(self, config, index: int) -> None:
        super().__init__()
        self.config, self.index, self.head_dim, self.scaling = config, index, 8, 8**-0.5
        self.num_key_value_groups, self.is_causal, bias = 2, True, index == 0
        self.ask = nn.Linear(24, 32, bias=bias)
        self.offer, self.give = nn.Linear(24, 16, bias=bias), nn.Linear(24, 16, bias=bias)
        self.sum = nn.Linear(32, 24, bias=False)

    def forward(self, x, angles, cache):
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in self._parts())
        q, k = apply_rotary_pos_emb(q, k, *angles)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        found, _ = attend(self, q, k, v, None, scaling=self.scaling)
        return self.sum(found.flatten(2))

    def _parts(self):
        return self.ask, self.offer, self.give


class Think(nn.Module):
    """One gated MLP, weighted by the router's first choice."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.lift = nn.Linear(24, 40, bias=False), nn.Linear(24, 40, bias=False)
        self.drop, self.switch = nn.Linear(40, 24, bias=False), nn.Linear(24, 2, bias=False)

    def forward(self, x):
        share = self.switch(x).softmax(-1)[..., :1]
        return self.drop(nn.functional.silu(self.open(x)) * self.lift(x)) * share


class Cell(nn.Module):
    def __init__(self, config, index: int) -> None:
        super().__init__()
        self.look, self.think = Look(config, index), Think()
        self.before_look, self.before_think = OnePlusNorm(24), OnePlusNorm(24)

    def forward(self, x, angles, cache):
        x = x + self.look(self.before_look(x), angles, cache)
        return x + self.think(self.before_think(x))


class Trunk(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.read, self.last = nn.Embedding(64, 24), OnePlusNorm(24)
        self.cells = nn.ModuleList(Cell(config, index) for index in range(2))
        self.turn = LlamaRotaryEmbedding(config)

    def forward(self, input_ids=None, past_key_values=None, use_cache=None):
        x = self.read(input_ids)
        angles = self.turn(x, torch.arange(x.shape[1])[None])
        for cell in self.cells:
            x = cell(x, angles=angles, cache=past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.last(x))


class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    _supports_sdpa = True

    def __init__(self, config) -> None:
        super().__init__(config)
        self.trunk, self.say = Trunk(config), nn.Linear(24, 64, bias=False)

    def forward(self, input_ids=None, use_cache=None):
        found = self.trunk(input_ids=input_ids, use_cache=use_cache)
        return CausalLMOutputWithPast(logits=self.say(found.last_hidden_state))


# what holds for it -----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The one line in the table."""
    monkeypatch.setitem(FAMILIES, "tiny", TINY)


def make(dtype: torch.dtype = torch.float64) -> TinyModel:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    sizes = {"hidden_size": 24, "head_dim": 8, "num_attention_heads": 4}
    config = TinyConfig(
        **sizes,
        hidden_act="silu",
        rope_parameters=rope,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TinyModel(config)
    return cast_model(model, dtype).eval().requires_grad_(False)


def drawn(**changes) -> RotationSet:
    config = RotationConfig(**changes)
    return initial_rotations(config, map_of(make()), torch.Generator().manual_seed(0))


QUANT = QuantConfig(weights=TensorQuant(symmetric=True))
NETWORKS = QuantizedNetworks(make, QUANT, KVConfig())


def test_folding_and_exact_norms_keep_the_function(ids):
    model = make()
    exact_norms(model)
    fold_norms(model)
    assert all((model.get_submodule(n.path).weight == 0).all() for n in map_of(model).norms)
    assert logits_error(logits(model, ids), logits(make(), ids)) < 1e-12


@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_all_rotations_pass_the_gate(ids, kind):
    rotations = drawn(r1=kind, r2=kind, r3=kind, r4=kind)
    rotated = lambda: NETWORKS.rotated(rotations)  # noqa: E731
    assert check_invariance(make, rotated, rotations, ids[:1]) < 1e-9
    fused, folded = NETWORKS.fused(rotations), NETWORKS.fused(RotationSet())
    switches = [m.get_submodule("trunk.cells.1.think.switch").weight for m in (fused, folded)]
    assert torch.allclose(switches[0], switches[1] @ rotations.r1, atol=1e-12)


def test_transforms_of_inputs_reach_the_router_too(ids):
    settings = {"r1": "none", "r2": "none", "r4": "none", "inputs": "duquant", "smooth": 0.5}
    config = RotationConfig(**settings)
    found = gather_statistics(NETWORKS.stream_rotated(RotationSet()), ids)
    generator = torch.Generator().manual_seed(0)
    rotations = initial_rotations(config, map_of(make()), generator, found)
    rotated = lambda: NETWORKS.rotated(rotations)  # noqa: E731
    assert check_invariance(make, rotated, rotations, ids[:1]) < 1e-9


def test_the_router_stays_in_16_bits_and_everything_else_is_quantized(ids, tmp_path):
    rotations = drawn()
    weights = quantize_rtn(NETWORKS.fused(rotations), QUANT, ClipSearch(), {})
    expected = {site.path for site in map_of(make()).sites if "switch" not in site.path}
    assert weights.keys() == expected
    quantized = [NETWORKS.dequantized(rotations, weights), NETWORKS.emulated(rotations, weights)]
    for network in quantized:
        for name, module in network.named_modules():
            if isinstance(module, FakeQuantLinear):
                assert (module.path.quantizer is None) == name.endswith("switch")
        assert 1e-3 < logits_error(logits(network, ids), logits(make(), ids)) < 10
    config = WeightsConfig(method="gptq")
    fused = NETWORKS.fused(rotations)
    found = quantize_gptq(Rounding(fused, rotations, ids, QUANT, config, tmp_path))
    assert found.keys() == expected


@pytest.mark.parametrize("rounded", [False, True], ids=["activations", "weights"])
def test_its_rotations_learn(ids, rounded):
    learn = LearnConfig(
        steps=1, batch=2, sequence_length=24, dtype="float32", quantize_weights=rounded
    )
    start = drawn()
    networks = QuantizedNetworks(lambda: make(torch.float32), QUANT, KVConfig())
    learner = RotationLearner(networks.learnable(start), start, learn, QUANT, ClipSearch())
    assert learner.step(0, ids)["grad_norm"] > 0
    assert not torch.equal(learner.result().r1, start.r1)


def test_what_does_not_fit_is_refused_by_the_family(monkeypatch):
    model = make()
    assert "no gated MLP alone" in why_not_runtime(model, NETWORKS.kv_path(model, RotationSet()))
    sentence = "its norms stand behind the blocks"
    read = lambda model: replace(read_tiny(model), cannot={"r1": sentence})  # noqa: E731
    monkeypatch.setitem(FAMILIES, "tiny", Family(read))
    with pytest.raises(InputError, match=f"{sentence}: set rotation.r1=none"):
        check_rotations(RotationConfig(), map_of(make()))
    check_rotations(RotationConfig(r1="none"), map_of(make()))
    with pytest.raises(InputError, match=sentence):
        NETWORKS.fused(RotationSet(r1=torch.eye(24, dtype=torch.float64)))
