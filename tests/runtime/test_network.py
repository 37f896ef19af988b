"""Networks on integers are the fake-quantized network."""

import pytest
import torch

from spinlab.config import (
    ClipSearch,
    CodecConfig,
    FormatChange,
    GPTQConfig,
    KVConfig,
    Override,
    QuantConfig,
    RotationConfig,
    TensorQuant,
    WeightsConfig,
)
from spinlab.errors import InputError
from spinlab.formats import IntegerFormat
from spinlab.model.modules import embedding_of, linear_at, map_of
from spinlab.networks.exact import ExactNetworks
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.duquant import DualTransform
from spinlab.rotation.initial import initial_rotations
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.orthogonal import exact_hadamard
from spinlab.rotation.rotations import RotationSet
from spinlab.runtime.stock.linear import IntegerLinear, LinearPart
from spinlab.stages.measure import stored_bytes
from spinlab.stages.outliers import attention_inputs, channel_peaks
from spinlab.weights.base import Rounding
from spinlab.weights.layerwise import quantize_gptq, quantize_rtn

QUANT = QuantConfig(weights=TensorQuant(symmetric=True))
KV = KVConfig()
SYMMETRIC = CodecConfig(symmetric=True)
OFF = KVConfig(CodecConfig(bits=16), CodecConfig(bits=16))


def prepared(make_model, quant=QUANT, dtype=torch.float32, kv=KV):
    networks = QuantizedNetworks(lambda: make_model(dtype), quant, kv)
    model_map = map_of(make_model())
    rotations = initial_rotations(RotationConfig(), model_map, torch.Generator().manual_seed(0))
    weights = quantize_rtn(networks.fused(rotations), quant, ClipSearch(), {})
    return networks, rotations, weights


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(
    "quant",
    [
        QUANT,
        QuantConfig(weights=TensorQuant(group_size=8), o_proj_per_head=False),
        QuantConfig(weights=TensorQuant(symmetric=True), activations=TensorQuant(bits=8)),
        QuantConfig(weights=TensorQuant(symmetric=True), activations=TensorQuant(bits=16)),
        QuantConfig(weights=TensorQuant(bits=12, symmetric=True)),
        QuantConfig(weights=TensorQuant(symmetric=True), activations=TensorQuant(group_size=8)),
    ],
    ids=str,
)
def test_integer_network_is_the_fake_quantized_network(make_model, ids, quant, backend):
    """In float64, where no rounding can flip a level: the two are one function."""
    networks, rotations, weights = prepared(make_model, quant, dtype=torch.float64)
    fake = networks.dequantized(rotations, weights)(ids).logits
    found = networks.integer(rotations, weights, backend)(ids).logits
    assert torch.allclose(found, fake, atol=1e-8 * fake.std().item())


def test_emulated_and_integer_networks_agree_to_the_last_bit(make_model, ids):
    networks, rotations, weights = prepared(make_model)
    emulated = networks.emulated(rotations, weights)(ids).logits
    assert torch.equal(networks.integer(rotations, weights, "cpu")(ids).logits, emulated)


def test_without_quantized_weights_the_network_keeps_its_own(make_model, ids):
    quant = QuantConfig(weights=TensorQuant(bits=16), activations=TensorQuant(bits=16))
    networks = QuantizedNetworks(lambda: make_model(), quant, OFF)
    _, rotations, _ = prepared(make_model)
    found = networks.integer(rotations, {}, "cpu")(ids).logits
    assert torch.allclose(found, make_model()(ids).logits, atol=1e-9)


def test_bfloat16_networks_compute_levels_and_scales_in_float32(make_model, ids):
    """bfloat16 cannot tell 127.5 from 127.7, nor hold an accumulator: only activations that
    pass between modules may be 16-bit."""
    networks, rotations, weights = prepared(make_model, dtype=torch.bfloat16)
    model = networks.integer(rotations, weights, "cpu")
    linear = model.get_submodule("model.layers.0.mlp.down_proj")
    assert linear.scale.dtype == torch.float32
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    rotated = rotations.r4(x.float()).bfloat16()
    exact = linear.path.quantizer.round(rotated.float()).double()
    dense = weights["model.layers.0.mlp.down_proj"].dequantize(torch.float64)
    expected = exact @ dense.T
    assert linear(x).dtype == torch.bfloat16
    # one rounding to bfloat16, 2^-9, and no more
    assert (linear(x).double() - expected).abs().max() < 2**-8 * expected.abs().max()
    assert torch.equal(model(ids).logits, networks.emulated(rotations, weights)(ids).logits)


def test_a_massive_token_does_not_split_the_two_networks(make_model, ids):
    """A residual stream dominated by one channel: after R1 every entry lies on a rounding tie."""

    def make(dtype=torch.float32):
        model = make_model(dtype, tie_word_embeddings=False)
        embedding_of(model).weight.data[:, 5] = 1e3
        return model

    networks, rotations, weights = prepared(make)
    fake = networks.dequantized(rotations, weights)(ids).logits
    found = networks.integer(rotations, weights, "cpu")(ids).logits
    assert (found - fake).abs().max() < 1e-3 * fake.std()


def test_tokens_that_attend_to_one_token_do_not_split_the_two_networks(make_model):
    """What o_proj reads is quantized already, and where a head fills 10 or 14 steps odd numbers of
    them lie half-way between its 15 new ones.

    Sequences of one token attend to it alone; float noise is added where other kernels bring it.
    """
    kv = KVConfig(SYMMETRIC, SYMMETRIC)  # asymmetric heads fill 15 steps: all but one in 600
    networks, rotations, weights = prepared(make_model, dtype=torch.float64, kv=kv)
    alone = torch.arange(64)[:, None]
    expected = networks.dequantized(rotations, weights)(alone).logits
    found = networks.integer(rotations, weights, "torch")(alone).logits
    assert torch.allclose(found, expected, atol=1e-12 * expected.std().item())
    noisy, g = networks.dequantized(rotations, weights), torch.Generator().manual_seed(0)
    read = []

    def add_noise(module, inputs):
        read.append(inputs[0])
        return inputs[0] * (1 + 1e-15 * torch.randn(inputs[0].shape, generator=g).double())

    for layer in (0, 1):
        o_proj = linear_at(noisy, f"model.layers.{layer}.self_attn.o_proj")
        o_proj.register_forward_pre_hook(add_noise)
    with torch.no_grad():
        found = noisy(alone).logits
    assert torch.allclose(found, expected, atol=1e-10 * expected.std().item())
    heads = torch.cat(read).unflatten(-1, (-1, 8))
    scale, _ = IntegerFormat(4, False).parameters(heads.amin(-1), heads.amax(-1))
    fraction = (heads / scale[..., None]) % 1
    assert ((fraction - 0.5).abs() < 1e-12).sum() > 50  # there were ties to be decided


def test_every_rotated_linear_multiplies_integers(make_model):
    networks, rotations, weights = prepared(make_model)
    model = networks.integer(rotations, weights, "cpu")
    linears = [model.get_submodule(path) for path in map_of(model).site_at]
    assert len(linears) == 7 * 2
    assert all(isinstance(m, IntegerLinear | LinearPart) for m in linears)
    assert sum(isinstance(m, IntegerLinear) for m in model.modules()) == 4 * 2


@pytest.mark.parametrize(
    "overrides",
    [
        [Override("*.k_proj", weights=FormatChange(bits=8))],
        [Override("*.q_proj", weights=FormatChange(bits=12))],
        [Override("*.v_proj", weights=FormatChange(bits=16))],
        [Override("*.gate_proj", weights=FormatChange(symmetric=False))],
    ],
    ids=str,
)
def test_linears_of_unlike_formats_are_multiplied_apart(make_model, ids, overrides):
    quant = QuantConfig(weights=TensorQuant(symmetric=True), overrides=overrides)
    networks, rotations, weights = prepared(make_model, quant, dtype=torch.float64)
    model = networks.integer(rotations, weights, "cpu")
    fake = networks.dequantized(rotations, weights)(ids).logits
    assert torch.allclose(model(ids).logits, fake, atol=1e-8 * fake.std().item())
    linears = (model.get_submodule(path) for path in map_of(model).site_at)
    paths = {path for linear in linears if (path := getattr(linear, "path", None))}
    assert all(path.once._last is None for path in paths)


def test_linears_with_biases_keep_them(make_family_model, ids):
    """Qwen2: q, k and v have biases, the rest none."""
    networks, rotations, weights = prepared(lambda *dtype: make_family_model("qwen2"))
    fake = networks.dequantized(rotations, weights)(ids).logits
    found = networks.integer(rotations, weights, "cpu")(ids).logits
    assert torch.allclose(found, fake, atol=1e-8 * fake.std().item())


def test_generate_runs_on_integers_and_matches_full_passes(make_model, ids):
    networks, rotations, weights = prepared(make_model)
    model = networks.integer(rotations, weights, "cpu")
    prompt = ids[:1, :6]
    found = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = prompt
    for _ in range(6):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, expected)


def test_gptq_on_the_network_beats_rtn_and_resumes_with_the_same_bits(make_model, tmp_path):
    networks, rotations, weights = prepared(make_model)
    windows = torch.randint(0, 64, (8, 24), generator=torch.Generator().manual_seed(0))
    config = WeightsConfig(method="gptq", gptq=GPTQConfig(block_size=8))

    def gptq(folder):
        folder.mkdir(exist_ok=True)
        model = networks.fused(rotations)
        return quantize_gptq(Rounding(model, rotations, windows, QUANT, config, folder))

    found = gptq(tmp_path / "whole")
    assert found.keys() == weights.keys()
    original = make_model(torch.float32)(windows).logits
    quiet = QuantizedNetworks(networks.original, QuantConfig(activations=TensorQuant(bits=16)), OFF)
    errors = [
        (quiet.dequantized(rotations, w)(windows).logits - original).norm()
        for w in (found, weights)
    ]
    assert errors[0] < 0.9 * errors[1]

    gptq(tmp_path / "killed")
    (tmp_path / "killed" / "layer-001.safetensors").unlink()
    resumed = gptq(tmp_path / "killed")
    for name, weight in found.items():
        assert torch.equal(resumed[name].levels, weight.levels)


def test_gptq_sees_inputs_of_already_quantized_layers(make_model, tmp_path):
    """With layer 0 damaged on purpose, layer 1 is rounded differently."""
    networks, rotations, _ = prepared(make_model)
    windows = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(0))
    outcomes = []
    for bits in (2, 8):
        coarse = QuantConfig(weights=TensorQuant(bits=bits, symmetric=True))
        folder = tmp_path / str(bits)
        folder.mkdir()
        arguments = (windows, coarse, WeightsConfig(method="gptq"), folder)
        quantize_gptq(Rounding(networks.fused(rotations), rotations, *arguments))
        (folder / "layer-001.safetensors").unlink()
        fine = (windows, QUANT, WeightsConfig(method="gptq"), folder)
        outcomes.append(quantize_gptq(Rounding(networks.fused(rotations), rotations, *fine)))
    name = "model.layers.1.mlp.down_proj"
    assert not torch.equal(outcomes[0][name].levels, outcomes[1][name].levels)


def test_weight_groups_must_divide_every_input(make_model):
    from spinlab.weights.layerwise import check_weight_groups

    with pytest.raises(InputError, match=r"quant.weights.group_size=16 does not divide 24"):
        check_weight_groups(map_of(make_model()), QuantConfig(weights=TensorQuant(group_size=16)))


def test_stored_bytes_count_what_a_checkpoint_holds(make_model):
    _, _, weights = prepared(make_model)
    model = make_model()
    linears = sum(w.levels.numel() for w in weights.values())
    channels = sum(w.levels.shape[0] for w in weights.values())
    embedding, norms = 64 * 24, 5 * 24
    assert stored_bytes(model) == 2 * (linears + embedding + norms)
    assert stored_bytes(model, weights) == linears // 2 + 4 * channels + 2 * (2 * embedding + norms)


def test_a_rotation_flattens_channel_peaks(make_model, ids):
    def make(dtype=torch.float32):
        model = make_model(dtype)
        embedding_of(model).weight.data[:, 5] *= 50
        return model

    networks, rotations, _ = prepared(make)
    before = channel_peaks(attention_inputs(make(), ids[:1]))
    after = channel_peaks(attention_inputs(networks.rotated(rotations), ids[:1]))
    assert before.shape == after.shape == (2, 24)
    hadamard = exact_hadamard(24)[None]
    dual = DualTransform(hadamard, torch.arange(24), torch.eye(24, dtype=torch.float64)[None])
    online = RotationSet(inputs={"0.qkv": ScaledDual(dual=dual)})
    seen = channel_peaks(attention_inputs(networks.rotated(online), ids[:1]))
    assert seen[0].amax() < 0.7 * before[0].amax()  # behind what runs online
    assert torch.allclose(
        seen[1], channel_peaks(attention_inputs(networks.rotated(RotationSet()), ids[:1]))[1]
    )
    assert (after.amax(1) / after.mean(1) < 0.5 * before.amax(1) / before.mean(1)).all()


def bytes_of(model) -> int:
    """Return what a model's tensors really take."""
    storages = {t.untyped_storage() for t in (*model.parameters(), *model.buffers())}
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_the_gates_networks_compute_in_float64_and_are_no_larger_than_what_they_gate(
    make_model, ids, dtype
):
    def make():
        return make_model(dtype, **shape)

    shape = {"hidden_size": 48, "intermediate_size": 80, "vocab_size": 64}
    quant = QuantConfig(weights=TensorQuant(symmetric=True))
    networks = ExactNetworks(make, quant, KVConfig())
    generator = torch.Generator().manual_seed(0)
    rotations = initial_rotations(RotationConfig(), map_of(make()), generator)
    weights = quantize_rtn(networks.fused(rotations), quant, ClipSearch(search=False), {})
    most = bytes_of(networks.fused(rotations)) + 7 * 2 * 64 * 48  # both ends in 8 bytes, not in 2
    expected = networks.dequantized(rotations, weights)
    found = networks.integer(rotations, weights, "torch")
    assert bytes_of(expected) < most
    assert bytes_of(found) < most
    expected, found = expected(ids).logits, found(ids).logits
    assert expected.dtype == found.dtype == torch.float64
    assert (expected - found).abs().max() < 1e-12 * expected.std()
