"""The Triton runtime gives the reference's logits."""

import logging
from dataclasses import replace

import pytest
import torch

from spinlab.config import (
    ClipSearch,
    CodecConfig,
    KVConfig,
    QuantConfig,
    RotationConfig,
    TensorQuant,
)
from spinlab.config.kv import LloydMaxConfig
from spinlab.config.rotation import BlocksConfig
from spinlab.model.modules import map_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.initial import initial_rotations
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.online import hadamard_rotation
from spinlab.rotation.rotations import RotationSet
from spinlab.runtime.fused.convert import graph_runner, integer_runtime, new_cache
from spinlab.runtime.fused.operations import REFERENCE, triton_operations
from spinlab.runtime.kernels.linear import launch as gpu
from spinlab.weights.layerwise import quantize_rtn

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
# the interpreter's dot takes bfloat16 for integers
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
SYMMETRIC = TensorQuant(symmetric=True)
NORMED = LloydMaxConfig(turn="none", length="norm")
OF_LEVELS = [CodecConfig(codec="lloyd_max", bits=b, lloyd_max=NORMED) for b in (4, 3)]
KVS = {
    "affine": KVConfig(),
    "levels": KVConfig(*OF_LEVELS),
    "window": KVConfig(sinks=1, window=3),
    "levels in a window": KVConfig(*OF_LEVELS, sinks=2, window=2),
}
IN_BLOCKS = RotationConfig(
    r1="none", r4="none", inputs="blocks", blocks=BlocksConfig(size=32, kind="random")
)


W4A4 = QuantConfig(weights=SYMMETRIC)
W4A16 = QuantConfig(weights=TensorQuant(), activations=TensorQuant(bits=16))


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(
    ("quant", "inputs", "kv", "few"),
    [
        (W4A4, "none", "affine", 128),
        (W4A4, "none", "affine", 4),  # a prompt is many tokens
        (W4A16, "none", "affine", 128),
        (W4A4, "blocks", "affine", 128),
        (W4A4, "none", "levels", 128),
        (W4A4, "none", "window", 128),
        (W4A4, "none", "levels in a window", 128),
    ],
    ids=["w4a4", "prompt", "w4a16", "blocks", "levels", "window", "levels in a window"],
)
# NumPy, which interprets, minds the logarithm of an empty slot's scale
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@torch.no_grad()
def test_triton_gives_the_logits_of_the_reference(
    make_model, ids, device, quant, inputs, kv, few, dtype, caplog, monkeypatch
):
    """Prefill of a padded batch, a chunk, and decode steps, on all kernels together.

    few: how many tokens the kernels for few of them take.
    """
    monkeypatch.setattr(gpu, "_FEW", few)

    def make():
        return make_model(dtype, **SHAPE).to(device)

    networks = QuantizedNetworks(make, quant, KVS[kv])
    generator = torch.Generator().manual_seed(0)
    config = RotationConfig() if inputs == "none" else IN_BLOCKS
    rotations = initial_rotations(config, map_of(make()), generator)
    weights = quantize_rtn(networks.fused(rotations), quant, ClipSearch(), {})
    ids, found = ids[:, :9].to(device), []
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    for operations in (REFERENCE, triton_operations()):
        model = networks.fused(rotations)
        integer_runtime(model, networks.parts(model, rotations, weights), operations)
        if operations.name == "triton" and dtype.itemsize == 2 and quant.activations.bits < 16:
            monkeypatch.delattr(ScaledDual, "__call__")  # kernels turn inputs
        cache, steps = new_cache(model, 9), ids.split([5, 2, 1, 1], dim=1)
        seen = [5, 7, 8, 9]
        passes = [
            model(input_ids=step, attention_mask=mask[:, :n], past_key_values=cache).logits
            for step, n in zip(steps, seen, strict=True)
        ]
        found.append(torch.cat(passes, 1).double()[mask.bool()])
    assert "outside" not in caplog.text
    assert graph_runner(model).capturable == (device.type == "cuda")
    expected, triton = found
    # float noise moves a few levels
    error = (triton - expected).norm() / expected.norm()
    assert error < (1e-2 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("kv", ["affine", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@torch.no_grad()
def test_keys_whose_bias_is_apart_give_the_logits_of_the_reference(
    make_model, ids, device, dtype, kv, caplog
):
    """In torch, with a warning, and on the kernel: a padded prefill, a chunk, and steps.

    In 16 bits they are nearer to the reference than it is to itself in float32; without the bias
    all would be far off.
    """

    def make():
        model = make_model(dtype, attention_bias=True, **SHAPE)
        for name, bias in model.named_parameters():
            if name.endswith("k_proj.bias"):
                bias.data.copy_(torch.linspace(-30, 20, len(bias)))
        return model.to(device)

    quant, rotations = QuantConfig(weights=SYMMETRIC), RotationSet(r3=hadamard_rotation(64))
    networks = QuantizedNetworks(make, quant, KVS[kv])
    weights = quantize_rtn(networks.fused(rotations), quant, ClipSearch(), {})
    ids = ids[:, :9].to(device)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def logits(operations, wide=False, bias=True):
        model = networks.fused(rotations)
        for name, parameter in model.named_parameters():
            if name.endswith("k_proj.bias") and not bias:
                parameter.data.zero_()
        model = model.float() if wide else model
        integer_runtime(model, networks.parts(model, rotations, weights), operations)
        cache, passes = new_cache(model, 9), []
        for begin, end in ((0, 5), (5, 7), (7, 8), (8, 9)):
            told = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
            passes.append(model(input_ids=ids[:, begin:end], past_key_values=cache, **told).logits)
        return torch.cat(passes, 1).double()[mask.bool()]

    reference, triton = logits(REFERENCE), triton_operations()

    def error(found):
        return ((found - reference).norm() / reference.norm()).item()

    assert error(logits(REFERENCE, bias=False)) > 0.5
    bound = 1e-2 if dtype == torch.float32 else error(logits(REFERENCE, wide=True))
    assert bound < 0.3
    for operations in (triton, replace(triton, biased=True)):
        caplog.clear()
        assert error(logits(operations)) < bound
        assert ("bias is apart: new tokens attend" in caplog.text) == (not operations.biased)


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@torch.no_grad()
def test_an_input_too_wide_to_quantize_falls_back_with_a_warning(
    make_model, ids, device, group, monkeypatch, caplog
):
    """Whatever the groups of its weight: an input without groups is quantized as one row."""

    def make():
        return make_model(torch.float32, **{**SHAPE, "intermediate_size": 128}).to(device)

    quant = QuantConfig(weights=TensorQuant(symmetric=True, group_size=group))
    networks = QuantizedNetworks(make, quant, KVConfig())
    rotations, ids = RotationSet(), ids[:, :3].to(device)
    weights = quantize_rtn(networks.fused(rotations), quant, ClipSearch(), {})
    monkeypatch.setattr(gpu, "_WIDEST_GROUP", 64)
    found = []
    for operations in (REFERENCE, triton_operations()):
        model = networks.fused(rotations)
        with caplog.at_level(logging.WARNING):
            integer_runtime(model, networks.parts(model, rotations, weights), operations)
        found.append(model(ids).logits.double())
    (warning,) = [r.message for r in caplog.records if "outside the 4-bit" in r.message]
    assert "model.layers.0.mlp.down_proj (a group of 128 inputs" in warning
    expected, triton = found
    assert (triton - expected).norm() < 1e-2 * expected.norm()
