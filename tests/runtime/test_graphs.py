import pytest
import torch

from spinlab import device as devices
from spinlab.config import KVConfig, QuantConfig, RotationConfig, TensorQuant, WeightsConfig
from spinlab.device import choose_backend
from spinlab.errors import InputError
from spinlab.model.seams import dimensions_of
from spinlab.networks import Networks
from spinlab.rotation.initial import initial_rotations
from spinlab.runtime import graphs
from spinlab.runtime.handoff import graph_runner, integer_runtime, new_cache
from spinlab.runtime.operations import REFERENCE
from spinlab.weights.layerwise import quantize_rtn


@pytest.fixture
def model(make_model):
    """A runtime's model that takes graphs, which `eager` stands for."""
    quant = QuantConfig(weights=TensorQuant(symmetric=True))
    networks = Networks(make_model, quant, KVConfig())
    dimensions = dimensions_of(make_model().config)
    rotations = initial_rotations(RotationConfig(), dimensions, torch.Generator().manual_seed(0))
    fused = networks.fused(rotations)
    weights = quantize_rtn(networks.fused(rotations), quant, WeightsConfig(), {})
    integer_runtime(fused, weights, rotations, quant, KVConfig(), REFERENCE)
    graph_runner(fused).capturable = True
    return fused


@pytest.fixture(autouse=True)
def captures(monkeypatch) -> list[int]:
    """Stand in for CUDA graphs where there is no GPU: a replay runs the step again."""
    found: list[int] = []

    def eager(step, forget, stream):
        step()
        forget()
        result = step()
        forget()
        found.append(len(result))
        return lambda: result.copy_(step()), result

    monkeypatch.setattr(graphs, "capture", eager)
    return found


def test_replayed_steps_equal_the_whole_pass(model, ids, captures):
    expected = model(ids).logits
    cache = new_cache(model, 24)
    logits = [model(input_ids=ids[:, :20], past_key_values=cache).logits]
    with torch.inference_mode():
        for i in range(20, 24):
            out = model(input_ids=ids[:, i : i + 1], past_key_values=cache)
            assert out.past_key_values is cache
            logits.append(out.logits)
    assert captures == [2]
    assert cache.get_seq_length() == int(cache.slots.length) == 24
    found = torch.cat(logits, 1)  # copies: no step overwrote the one before
    assert torch.allclose(found, expected, atol=1e-8 * expected.std().item(), rtol=0)


def test_generate_runs_on_graphs_unless_they_are_off(model, ids, captures):
    padded = ids[:, :8].clone()
    mask = torch.ones_like(padded)
    padded[1, :3] = mask[1, :3] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(padded, attention_mask=mask, **settings)
    assert captures == [2]
    graph_runner(model).enabled = False
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings), found)
    assert captures == [2]


def test_a_cache_that_grew_is_captured_anew(model, ids, captures):
    expected = model(ids).logits
    cache = new_cache(model, 64)
    model(input_ids=ids[:, :10], past_key_values=cache)
    model(input_ids=ids[:, 10:11], past_key_values=cache)
    graph, cache.slots.capacity = cache.slots.graph, 11
    for i in range(11, 24):  # the first of them runs eagerly, and takes more memory
        last = model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits
    assert cache.slots.graph is not graph and captures == [2, 2]
    assert torch.allclose(last, expected[:, -1:], atol=1e-8 * expected.std().item(), rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"output_hidden_states": True},
        {"labels": torch.zeros(2, 1, dtype=torch.int64)},
        {"return_dict": False},
        {"use_cache": False},
        {"input_ids": torch.zeros(2, 2, dtype=torch.int64)},
        {"past_key_values": None},
        {"input_ids": None, "inputs_embeds": torch.zeros(2, 1, 24)},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_other_calls_go_to_the_stock_pass(model, ids, changes):
    cache = new_cache(model, 24)
    plain = {"input_ids": ids[:, :1], "past_key_values": cache, "logits_to_keep": 1}
    runner = graph_runner(model)
    assert not runner.takes(plain)  # nothing to look back at
    model(input_ids=ids[:, :4], past_key_values=cache)
    assert runner.takes(plain)
    assert not runner.takes({**plain, **changes})


def test_the_reference_operations_are_not_captured(make_model):
    quant = QuantConfig(weights=TensorQuant(bits=16), activations=TensorQuant(bits=16))
    networks = Networks(make_model, quant, KVConfig())
    rotations = initial_rotations(
        RotationConfig(), dimensions_of(make_model().config), torch.Generator().manual_seed(0)
    )
    found = networks.fused(rotations)
    integer_runtime(found, {}, rotations, quant, KVConfig(), REFERENCE)
    assert not graph_runner(found).capturable


def test_the_back_end_follows_the_device(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_backend("auto", cpu) == "cpu"
    with pytest.raises(InputError, match=r"backend=triton needs a CUDA device"):
        choose_backend("triton", cpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_backend("auto", gpu) == "reference"
    with pytest.raises(InputError, match=r"compute capability 8.0 or more, and cuda has 7.5"):
        choose_backend("triton", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_backend("auto", gpu) == choose_backend("triton", gpu) == "triton"
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    assert choose_backend("auto", gpu) == "reference"
    with pytest.raises(InputError, match="package triton, which is not installed"):
        choose_backend("triton", gpu)
