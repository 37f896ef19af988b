"""Learned clip ratios of inputs: they start where paths stand, descend, and can be switched off."""

import pytest
import torch

from spinlab.config import KVConfig, QuantConfig, TensorQuant
from spinlab.fakequant.activations import InputPath
from spinlab.formats import IntegerFormat
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.learn import recompute_layers
from spinlab.learn.learned import LogParameters, learn_input_ranges
from spinlab.learn.teacher import unquantized
from spinlab.model.modules import linears_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.online import hadamard_rotation
from spinlab.rotation.rotations import RotationSet

CPU = torch.device("cpu")
X = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))


def paths(**changes) -> dict[str, InputPath]:
    four, three = (
        TokenQuantizer(IntegerFormat(4, False), **changes),
        TokenQuantizer(IntegerFormat(3, True), 64),
    )
    rotation = hadamard_rotation(128)
    return {
        "0.qkv": InputPath(None, four, readers=3),
        "0.down": InputPath(rotation, three),
        "1.o": InputPath(None, None),
    }


def ratios(ranges: LogParameters) -> dict[str, float]:
    return {key: ranges.value(key).item() for key in ranges.logs}


def descend(ranges: LogParameters, made: dict[str, InputPath], steps: range) -> list[float]:
    """Lower the rounding error; a step sees some of the tokens, in two micro-batches."""
    errors = []
    for i in steps:
        x, total = X.roll(i, 0)[:48], 0.0
        for part in x.split(24):
            for path in made.values():
                rotated = part if path.rotation is None else path.rotation(part)
                error = (path(part) - rotated).square().sum()
                if error.requires_grad:
                    error.backward()
                    total += error.item()
        errors.append(total)
        ranges.step(1.0)
    return errors


def test_ranges_start_where_the_paths_stand_and_keep_their_values():
    plain, made = paths(clip_ratio=0.9), paths(clip_ratio=0.9)
    ranges = learn_input_ranges(made, 0.01, CPU)
    assert ratios(ranges) == pytest.approx({"0.qkv": 0.9, "0.down": 1.0}, rel=1e-6)
    for key, path in made.items():
        assert torch.allclose(path(X), plain[key](X), atol=1e-6)
    assert made["1.o"].quantizer is None


def test_descending_the_ratios_lowers_the_rounding_error():
    made = paths()
    ranges = learn_input_ranges(made, 0.03, CPU)
    errors = descend(ranges, made, range(25))
    assert errors[-1] < 0.9 * errors[0]
    assert 0.5 < ratios(ranges)["0.qkv"] < 0.98


def test_ratios_never_grow_beyond_one():
    made = paths()
    ranges = learn_input_ranges(made, 0.5, CPU)
    for _ in range(3):
        (made["0.qkv"](X.clone()) * -X.sign()).sum().backward()  # louder values lower this
        ranges.step(1.0)
    assert max(ratios(ranges).values()) <= 1


def test_gradients_of_micro_batches_add_up_and_are_used_once():
    whole, split = paths(), paths()
    ranges, parts = learn_input_ranges(whole, 0.1, CPU), learn_input_ranges(split, 0.1, CPU)
    whole["0.qkv"](X).square().sum().backward()
    for x in X.split(16):
        split["0.qkv"](x).square().sum().backward()
    logs = ranges.logs, parts.logs
    assert torch.allclose(logs[0]["0.qkv"].grad, logs[1]["0.qkv"].grad, rtol=1e-5)
    ranges.step(1.0)
    parts.step(1.0)
    assert ratios(ranges) == pytest.approx(ratios(parts))
    assert ratios(ranges)["0.down"] == 1  # it was not run
    assert all(log.grad is None for log in logs[0].values())


def test_a_resumed_run_takes_the_same_steps():
    whole, first, second = paths(), paths(), paths()
    ranges = {id(made): learn_input_ranges(made, 0.05, CPU) for made in (whole, first, second)}
    descend(ranges[id(whole)], whole, range(6))
    descend(ranges[id(first)], first, range(3))
    state = {k: v.clone() for k, v in ranges[id(first)].state().items()}
    ranges[id(second)].load_state(state, CPU)
    descend(ranges[id(second)], second, range(3, 6))
    assert ratios(ranges[id(second)]) == ratios(ranges[id(whole)])


@pytest.mark.parametrize("recompute", [False, True])
def test_a_networks_inputs_learn_and_can_be_switched_off(make_model, ids, recompute):
    def make():
        return make_model(torch.float32)

    quant = QuantConfig(weights=TensorQuant(bits=16))
    network = QuantizedNetworks(make, quant, KVConfig()).learnable(RotationSet())
    made = {site.key: linear.path for site, linear in linears_of(network)}
    before = network(ids).logits
    ranges = learn_input_ranges(made, 0.1, CPU)
    assert torch.equal(network(ids).logits, before)
    if recompute:
        recompute_layers(network)
    network(ids).logits.square().sum().backward()
    assert len(ranges.logs) == 8
    assert all(log.grad.abs() > 0 for log in ranges.logs.values())
    ranges.step(1.0)
    assert not torch.equal(network(ids).logits, before)
    with unquantized(network):
        quiet = network(ids).logits
    assert torch.allclose(quiet, make()(ids).logits, atol=1e-4)
    learned = QuantizedNetworks(make, quant, KVConfig()).learnable(
        RotationSet(clips=ratios(ranges))
    )
    assert torch.equal(learned(ids).logits, network(ids).logits)


def test_nothing_quantized_means_nothing_to_learn():
    ranges = learn_input_ranges({"0.o": InputPath(None, None)}, 0.1, CPU)
    ranges.step(1.0)
    assert ratios(ranges) == ranges.state() == {}
