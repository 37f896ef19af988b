"""Layers read in calibration what they read in the model."""

from collections import Counter
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

from spinlab.fakequant.insert import insert_fake_quant
from spinlab.model.families import FAMILIES
from spinlab.model.layer import Layer
from spinlab.model.modules import linear_at, linears_of, map_of
from spinlab.rotation.online import hadamard_rotation
from spinlab.rotation.rotations import RotationSet
from spinlab.weights import calibration
from spinlab.weights.calibration import LayerInputs, batch_of
from spinlab.weights.layerwise import gather

READERS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(0, 64, (7, 12), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_layers_read_what_they_read_in_the_model(make_model, windows, batch, attention):
    model = make_model(num_hidden_layers=3)
    model.set_attn_implementation(attention)
    hidden = model(windows, output_hidden_states=True).hidden_states
    inputs = LayerInputs(model, windows, batch)
    for layer in range(3):
        assert torch.allclose(torch.cat(inputs.batches), hidden[layer], atol=1e-12)
        inputs.advance()


def test_every_layer_gets_its_own_mask(make_family_model, windows):
    """In Qwen2 the later layers may attend to a sliding window while the first see everything."""
    sliding = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    model = make_family_model("qwen2", num_hidden_layers=3, **sliding)
    hidden = model(windows, output_hidden_states=True).hidden_states
    inputs = LayerInputs(model, windows, 7)
    inputs.advance()
    inputs.advance()
    assert torch.allclose(inputs.batches[0], hidden[2], atol=1e-12)


def test_batched_windows_give_the_hessian_of_single_ones(make_model, windows):
    model = make_model(torch.float32)
    insert_fake_quant(model, RotationSet(r4=hadamard_rotation(40)), None)
    single, batched = (LayerInputs(model, windows, batch) for batch in (1, 3))
    for layer in range(2):
        for reader in READERS:
            linear = linear_at(model, f"model.layers.{layer}.{reader}")
            expected, found = gather(single, linear), gather(batched, linear)
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.max().item())
        single.advance()
        batched.advance()


def test_stopping_early_shows_a_linear_the_same_inputs(make_model, windows):
    """In whichever order they are asked for."""
    model = make_model(torch.float32)
    insert_fake_quant(model, RotationSet(), None)
    inputs = LayerInputs(model, windows, 3)
    inputs.advance()
    linears = [item for item in linears_of(model) if item[0].layer == 1]
    for site, linear in (*linears, *reversed(linears)):
        early: list[torch.Tensor] = []
        inputs.visit(linear, early.append)
        whole: list[torch.Tensor] = []
        hook = linear.register_forward_pre_hook(lambda _, args, kept=whole: kept.append(args[0]))
        for x in inputs.batches:
            inputs.layer(x, **inputs.arguments(x))
        hook.remove()
        assert all(torch.equal(a, b) for a, b in zip(early, whole, strict=True)), site


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_attention_and_gate_are_computed_once_a_layer(make_family_model, windows, family):
    """Every linear is changed once it was seen, as in rounding; the next layers see the change.

    Of many experts some are idle: no token is sent to them.
    """
    many = {"num_experts": 24, "num_experts_per_tok": 1} if family == "qwen3_moe" else {}
    model, plain = (make_family_model(family, num_hidden_layers=2, **many) for _ in range(2))
    inputs, idle, calls = LayerInputs(model, windows, 3), 0, Counter()
    for index, layer in enumerate(map_of(model).layers):
        calls.clear()
        count_calls(model, calls, layer)
        for site, linear in linears_of(model):
            if site.layer == index:
                seen: list[torch.Tensor] = []
                inputs.visit(linear, seen.append)
                for weight in (linear.weight, linear_at(plain, site.path).weight):
                    weight.data.mul_(1.25)
                whole: list[torch.Tensor] = []
                reader = linear_at(plain, site.path)
                hook = reader.register_forward_pre_hook(lambda _, x, kept=whole: kept.append(x[0]))
                plain(windows)
                hook.remove()
                idle += not whole
                expected = whole[0] if whole else torch.zeros(0, site.in_features)
                assert torch.allclose(torch.cat(seen), expected.double(), atol=1e-12), site
        inputs.advance()
        # for what the values read, and o_proj; one more tells what attention returns
        batches, told = len(inputs.batches), index == 0
        assert calls[layer.attention.keys] == 2 * batches + told, layer
        assert calls[layer.attention.out] == batches + told, layer
        if layer.mlp is not None:  # for down_proj, and where gate and up are apart, for up
            apart = layer.mlp.gate != layer.mlp.up
            assert calls[layer.mlp.gate] == batches * (1 + apart), layer
    assert (idle > 0) == bool(many)


def count_calls(model: PreTrainedModel, calls: Counter[str], layer: Layer) -> None:
    """Count what calls of a layer's keys, o_proj and gate_proj give something."""
    paths = {layer.attention.keys, layer.attention.out, *([layer.mlp.gate] if layer.mlp else ())}
    for path in paths:
        hook = partial(lambda path, *_: calls.update([path]), path)
        model.get_submodule(path).register_forward_hook(hook)


@pytest.mark.parametrize(("kept", "room"), [(0, 0), (1, 1.5), (2, 2)])
def test_inputs_of_down_proj_are_kept_as_far_as_there_is_room(
    make_model, windows, monkeypatch, kept, room
):
    model, windows = make_model(torch.float32), windows[:6]
    layer = map_of(model).layers[0]
    whole = torch.cat([model.model.layers[0](x, **a) for x, a in entering(model, windows)])
    assert layer.mlp is not None
    down, calls = linear_at(model, layer.mlp.down), Counter[str]()
    bytes_of_batch = 3 * windows.shape[1] * down.in_features * 4
    monkeypatch.setattr(calibration, "GATED_BYTES", room * bytes_of_batch)
    inputs = LayerInputs(model, windows, 3)
    inputs.visit(down, lambda x: None)
    count_calls(model, calls, layer)
    inputs.advance()
    assert calls[layer.mlp.gate] == 2 - kept
    assert torch.equal(torch.cat(inputs.batches), whole)


def entering(model: PreTrainedModel, windows: torch.Tensor) -> Iterator[tuple[torch.Tensor, dict]]:
    """Yield what the first layer is called with, three windows at a time."""
    inputs = LayerInputs(model, windows, 3)
    return ((x, inputs.arguments(x)) for x in inputs.batches)


def test_a_gpu_takes_many_windows_at_once_and_a_cpu_one():
    assert batch_of(torch.device("cpu"), 16) == 1
    assert batch_of(torch.device("cuda"), 2048) == 4
    assert batch_of(torch.device("cuda"), 100_000) == 1
