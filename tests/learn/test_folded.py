"""R1, R2, folded scales and blocks, learned together, against dense matrices and autograd."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from spinlab.config import (
    ClipSearch,
    CodecConfig,
    KVConfig,
    LearnConfig,
    ObjectiveConfig,
    OptimizerConfig,
    QuantConfig,
    RatesConfig,
    RotationConfig,
    TensorQuant,
)
from spinlab.config.rotation import BlocksConfig
from spinlab.errors import InputError
from spinlab.formats.quantizer import StraightThrough
from spinlab.learn import learn_rotations
from spinlab.learn.learned.inputs import check_inputs
from spinlab.model.modules import embedding_of, linears_of, map_of, norm_at
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.check import check_invariance
from spinlab.rotation.fuse import fold_norms
from spinlab.rotation.initial import initial_rotations
from spinlab.rotation.inputs import ScaledDual, in_gains, to_channels, to_rows
from spinlab.rotation.rotations import RotationSet
from spinlab.rotation.stored import read_stored
from spinlab.weights.rtn import round_to_nearest, search_ratios

BATCH = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(2))
QUANT = QuantConfig(weights=TensorQuant(symmetric=True))
FLOATS = {
    name: TensorQuant(symmetric=True, group_size=size, format=name)
    for name, size in (("nvfp4", 16), ("mxfp4", 32), ("mxfp4_mse", 32))
}
WEIGHTS = {"int4": QUANT.weights, **FLOATS}
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}  # whole groups of 32
SETTINGS = dict(
    steps=4,
    batch=4,
    micro_batch=2,
    sequence_length=16,
    quantize_weights=True,
    rotations=["r1", "r2", "inputs"],
    lr=RatesConfig(r1=0.01, scale=0.03),
    optimizer=OptimizerConfig("cayley_adam", max_grad_norm=None),
)
FUSED = RotationConfig(r1="random", r2="random", inputs="scales")
BLOCKS = RotationConfig(
    r1="random", r2="random", r4="none", inputs="blocks", blocks=BlocksConfig(8, "random")
)
BLOCKS_AND_R4 = replace(BLOCKS, r4="hadamard")
KINDS = pytest.mark.parametrize(
    "config", [FUSED, BLOCKS, BLOCKS_AND_R4], ids=["scales", "blocks", "blocks and R4"]
)


def with_scales(config: RotationConfig, model) -> RotationSet:
    """Draw rotations, and scales that differ between all rows of what produces an input."""
    g, places = torch.Generator().manual_seed(3), map_of(model)
    start = initial_rotations(config, places, g)
    inputs = {}
    for key, transform in start.inputs.items():
        input = places.input_at[key]
        rows = torch.rand(input.width // input.shared, generator=g, dtype=torch.float64) + 0.5
        scale = in_gains(to_channels(rows, input), input.offset)
        folded = input.producer is not None
        inputs[key] = ScaledDual(scale, folded, transform.dual)
    return RotationSet(start.r1, start.r2, start.r3, start.r4, None, inputs)


@pytest.fixture
def make_biased(make_family_model):
    """As Qwen2: queries share heads of keys and values, and q, k, v have biases."""
    return partial(make_family_model, "qwen2")


FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "phi3",
    "granite",
    "olmo2",
    "stablelm",
    "cohere",
    "gemma",
    "gemma2",
    "gemma3_text",
    "deepseek_v3",
]


@pytest.mark.parametrize("family", FAMILIES)
@KINDS
def test_networks_with_folded_scales_keep_logits_in_float64(
    make_family_model, fitting, ids, family, config
):
    make = partial(make_family_model, family)
    rotations = with_scales(fitting(config, map_of(make())), make())
    rotated = partial(QuantizedNetworks(make, QUANT, KVConfig()).rotated, rotations)
    assert check_invariance(make, rotated, rotations, ids[:1]) < 1e-9


def test_scales_of_shared_values_are_those_of_their_rows(make_biased):
    places = map_of(make_biased()).input_at
    assert {input.shared for input in places.values()} == {1, 2}
    for input in places.values():
        rows = torch.arange(input.width // input.shared)
        channels = to_channels(rows, input)
        assert channels.shape == (input.width,)
        assert torch.equal(to_rows(channels, input), rows)
    input = places["0.o"]  # heads 0 and 1 of the queries read head 0 of the values
    channels = to_channels(torch.arange(input.width // 2), input)
    assert torch.equal(channels[: input.run], channels[input.run : 2 * input.run])


class Dense:
    """The network by its definition, as a function of R1, every R2, log scales and dense blocks.

    Scales divide what producers give; their weights are rounded as they will be, divided by them.
    """

    def __init__(self, make, start: RotationSet, weights: TensorQuant) -> None:
        self.start, self.model, self.weights = start, make(), weights
        self.map = map_of(self.model)
        fold_norms(self.model)
        self.r1, self.r2 = (r.clone().requires_grad_() for r in (start.r1, start.r2))
        inputs = self.map.input_at
        self.logs = {
            key: to_rows(t.scale, inputs[key]).log().requires_grad_()
            for key, t in start.inputs.items()
        }
        self.blocks = {
            key: t.dual.first.clone().requires_grad_()
            for key, t in start.inputs.items()
            if t.dual is not None
        }
        self._insert()

    def _turn(self, key: str, x: torch.Tensor) -> torch.Tensor:
        """Return T of inputs whose scale is gone, or T* of weights that have it."""
        if key in self.blocks:
            return x @ torch.block_diag(*self.blocks[key])
        r4 = self.start.r4 if self.map.input_at[key].reads == "R4" else None
        return x if r4 is None else x @ r4.dense()

    def _divisors(self, path: str) -> torch.Tensor | float:
        keys = [input.key for input in self.map.inputs if input.producer == path]
        return self.logs[keys[0]].detach().exp()[:, None] if keys else 1.0

    def _round(self, path: str, weight: torch.Tensor) -> torch.Tensor:
        divisors = self._divisors(path)
        ratios = search_ratios(weight / divisors, self.weights, ClipSearch())
        rounded = round_to_nearest(weight / divisors, self.weights, ratios)
        return rounded.dequantize(weight.dtype) * divisors

    def _insert(self) -> None:
        networks = QuantizedNetworks(lambda: self.model, QUANT, KVConfig())
        networks._fake_quant(self.model, RotationSet(r3=self.start.r3))
        embedding, final = embedding_of(self.model), norm_at(self.model, self.map.final_norm)
        embedding.register_forward_hook(lambda m, args, out: out @ self.r1)
        final.register_forward_hook(lambda m, args, out: out @ self.r1.mT)
        for input in self.map.inputs:
            divide = lambda m, args, out, k=input.key: out / self.logs[k].exp()  # noqa: E731
            self.model.get_submodule(input.producer).register_forward_hook(divide)
        for site, module in linears_of(self.model):
            module.path.rotation = partial(self._turn, site.key)
            writes = {"R1": self.r1, "R2": self.r2[site.layer]}.get(site.writes)
            reads = {"R1": self.r1, "R2": self.r2[site.layer]}.get(site.reads)
            weight = _turned(module.weight.detach(), writes, reads)
            scale = to_channels(self.logs[site.key].exp(), self.map.input_at[site.key])
            weight = self._turn(site.key, weight * scale)
            rounded = StraightThrough.apply(weight, partial(self._round, site.path))
            module._parameters.pop("weight")
            object.__setattr__(module, "weight", rounded)
            if module.bias is not None and writes is not None:
                turned = _turned(module.bias.detach()[:, None], writes, None)[:, 0]
                module._parameters.pop("bias")
                object.__setattr__(module, "bias", turned)

    def loss(self) -> float:
        loss = self.model(input_ids=BATCH, labels=BATCH, use_cache=False).loss
        loss.backward()
        return loss.item()


def _turned(weight, writes, reads):
    for side, turn in ((0, writes), (1, reads)):
        if turn is not None:
            dense = torch.block_diag(*[turn] * (weight.shape[side] // len(turn)))
            weight = dense.mT @ weight if side == 0 else weight @ dense
    return weight


def tangent(point: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    return 0.5 * (plain - point @ plain.mT @ point)


@KINDS
@pytest.mark.parametrize("format", WEIGHTS)
def test_loss_and_gradients_are_those_of_the_definition(make_biased, learner_of, config, format):
    make, weights = partial(make_biased, **WIDE), WEIGHTS[format]
    start = with_scales(config, make())
    quant = replace(QUANT, weights=weights)
    learner = learner_of(make, LearnConfig(**SETTINGS), quant, start=start)
    loss = learner.gradients(0, BATCH)[0]["loss"]
    dense = Dense(make, start, weights)
    assert loss == pytest.approx(dense.loss(), rel=1e-6)  # transformers' loss is in float32
    found, groups = learner.rotations, learner.rotations.inputs.groups
    expected = {"r1": tangent(start.r1, dense.r1.grad), "r2": tangent(start.r2, dense.r2.grad)}
    for key, blocks in dense.blocks.items():
        name = f"{key.partition('.')[2]}.first"
        expected.setdefault(name, []).append(tangent(blocks.detach(), blocks.grad))
    for name, gradient in expected.items():
        gradient = torch.stack(gradient) if isinstance(gradient, list) else gradient
        assert gradient.abs().max() > 1e-6
        close(found.parameters[name].grad, gradient)
    for name in groups:
        scales = [log.grad for key, log in dense.logs.items() if key.endswith(f".{name}")]
        assert torch.stack(scales).abs().max() > 1e-6
        close(found.inputs.scales.logs[name].grad, torch.stack(scales))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6 * expected.abs().max())


@KINDS
@pytest.mark.parametrize(("format", "kv"), [("int4", 16), *((name, 4) for name in WEIGHTS)])
def test_what_was_learned_is_what_the_network_learned_with(
    make_biased, learner_of, config, format, kv
):
    """The result, fused as any rotation is, gives the loss that the loop sees next."""
    make, quant = partial(make_biased, **WIDE), replace(QUANT, weights=WEIGHTS[format])
    start, sides = with_scales(config, make()), CodecConfig(bits=kv)
    settings = KVConfig(keys=sides, values=sides)
    rates = RatesConfig(r1=0.01, scale=0.03, clip=0.02, input_clip=0.02, kv_clip=0.02)
    learn = LearnConfig(**{**SETTINGS, "lr": rates})
    learner = learner_of(make, learn, quant, settings, start)
    learn_rotations(learner, BATCH.repeat(4, 1), 0, lambda step, values: None)
    found = learner.result()
    for key, transform in start.inputs.items():
        assert (found.inputs[key].scale - transform.scale).abs().max() > 1e-3
        assert found.inputs[key].folded
    assert len(found.kv_clips) == (0 if kv == 16 else 2 * len(start.r2))
    assert kv == 16 or min(found.kv_clips.values()) < 1
    seen = learner.gradients(0, BATCH)[0]["loss"]
    networks = QuantizedNetworks(make, quant, settings)
    weights = {}
    for site, module in linears_of(networks.fused(found)):
        ratios = found.weight_clips[site.path]
        weights[site.path] = round_to_nearest(module.weight, quant.weights, ratios)
    loss = networks.dequantized(found, weights)(input_ids=BATCH, labels=BATCH).loss.item()
    assert loss == pytest.approx(seen, rel=1e-5)


@pytest.mark.parametrize("format", WEIGHTS)
def test_ranges_feel_scales_as_if_they_were_in_the_weights(make_biased, learner_of, format):
    """Their gradients are those of a network that has the scales in its weights already.

    Of v_proj and up_proj: what norms carry, a network that starts without scales folds again.
    """
    make, quant = partial(make_biased, **WIDE), replace(QUANT, weights=WEIGHTS[format])
    config = RotationConfig("none", "none", "none", "none", inputs="scales")
    drawn, rates = with_scales(config, make()).inputs, RatesConfig(scale=0.03, clip=0.02)
    ones = {key: replace(t, scale=torch.ones_like(t.scale)) for key, t in drawn.items()}
    by_linears = {key: t for key, t in drawn.items() if key.endswith((".o", ".down"))}
    start = RotationSet(inputs=ones | by_linears)
    learn = LearnConfig(**{**SETTINGS, "lr": rates, "rotations": ["inputs"]})
    apart = learner_of(make, learn, quant, start=start)
    fused = partial(QuantizedNetworks(make, quant, KVConfig()).fused, start)
    alone = LearnConfig(**{**SETTINGS, "lr": replace(rates, scale=0), "rotations": []})
    within = learner_of(fused, alone, quant, start=RotationSet())
    losses = [learner.gradients(0, BATCH)[0]["loss"] for learner in (apart, within)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert apart.space.ranges.logs.keys() == within.space.ranges.logs.keys()
    for path, expected in within.space.ranges.logs.items():
        assert expected.grad.abs().max() > 1e-6
        close(apart.space.ranges.logs[path].grad, expected.grad)


@KINDS
def test_a_stored_file_gives_the_same_network(make_biased, learner_of, config, tmp_path):
    start = with_scales(config, make_biased())
    learner = learner_of(make_biased, LearnConfig(**SETTINGS), QUANT, start=start)
    learn_rotations(learner, BATCH.repeat(4, 1), 0, lambda step, values: None)
    found = learner.result()
    found.save(tmp_path / "r.safetensors")
    loaded = read_stored(tmp_path / "r.safetensors", map_of(make_biased()))
    networks = QuantizedNetworks(make_biased, QUANT, KVConfig())
    logits = [networks.rotated(r)(input_ids=BATCH).logits for r in (found, loaded)]
    assert torch.equal(*logits)


@KINDS
def test_learning_brings_the_network_nearer_to_the_original(make_biased, learner_of, config):
    rates = RatesConfig(r1=0.003, scale=0.03, clip=0.02, input_clip=0.01)
    objective = ObjectiveConfig(cross_entropy=0, kl=1)
    learn = LearnConfig(**{**SETTINGS, "steps": 20, "lr": rates, "objective": objective})
    learner = learner_of(make_biased, learn, QUANT, start=config, apart=True)
    losses = [learner.step(index, BATCH)["loss"] for index in range(20)]
    assert sum(losses[-4:]) / 4 < 0.85 * losses[0]


def test_scales_of_one_are_no_scales(make_biased):
    """Without steps the method is QuaRot's and SpinQuant's start, to the bit."""
    plain, scaled = (
        initial_rotations(
            RotationConfig(inputs=inputs), map_of(make_biased()), torch.Generator().manual_seed(0)
        )
        for inputs in ("none", "scales")
    )
    networks = QuantizedNetworks(make_biased, QUANT, KVConfig())
    fused = [networks.fused(rotations).state_dict() for rotations in (plain, scaled)]
    assert all(torch.equal(tensor, fused[1][name]) for name, tensor in fused[0].items())


def test_what_cannot_be_learned_together_is_refused():
    scale = ScaledDual(torch.ones(8, dtype=torch.float64))
    with pytest.raises(InputError, match=r"inputs have scales only: set learn\.lr\.scale"):
        check_inputs({"0.o": scale}, 0.0)
    online = ScaledDual(torch.ones(8, dtype=torch.float64), folded=False)
    with pytest.raises(InputError, match=r"that of 1\.o is of another"):
        check_inputs({"0.o": scale, "1.o": online}, 0.1)
