"""Replayed CUDA graphs equal eager steps, whatever happened before."""

import copy

import pytest
import torch

from spinlab.config import ClipSearch, CodecConfig, KVConfig, QuantConfig, TensorQuant
from spinlab.errors import InputError
from spinlab.model.modules import decoder_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.rotations import RotationSet
from spinlab.runtime.fused import graphs
from spinlab.runtime.fused.cache import IntegerCache
from spinlab.runtime.fused.convert import graph_runner, integer_runtime, new_cache
from spinlab.runtime.fused.operations import REFERENCE, triton_operations
from spinlab.weights.layerwise import quantize_rtn

CUDA = torch.cuda.is_available()
# the kernels take no widths as odd as the small model's
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
SETTINGS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def make_runtime(make_model):
    """Return a maker of runtime models that take graphs: real ones on a GPU, else the stub's."""

    def original(seed, changes):
        shape = (torch.float32, seed) if CUDA else (torch.float64, seed)
        model = make_model(*shape, **(SHAPE if CUDA else {}), **changes)
        for name, bias in model.named_parameters():
            if name.endswith("k_proj.bias"):
                bias.data.copy_(torch.linspace(-30, 20, len(bias)))
        return model.cuda() if CUDA else model

    def make(seed=0, kv=None, **changes):
        quant = QuantConfig(weights=TensorQuant(symmetric=True))
        networks = QuantizedNetworks(lambda: original(seed, changes), quant, kv or KVConfig())
        fused = networks.fused(RotationSet())
        weights = quantize_rtn(fused, quant, ClipSearch(), {})
        operations = triton_operations() if CUDA else REFERENCE
        integer_runtime(fused, networks.parts(fused, RotationSet(), weights), operations)
        assert graph_runner(fused).capturable == CUDA
        graph_runner(fused).capturable = True
        return fused

    return make


@pytest.fixture
def model(make_runtime):
    return make_runtime()


@pytest.fixture
def ids(ids):
    return ids.cuda() if CUDA else ids


@pytest.fixture(autouse=True)
def captures(monkeypatch) -> list[int]:
    """Count captures; where there is no GPU, stand in for them."""
    found: list[int] = []
    real = graphs.capture if CUDA else stand_in

    def counted(step, cache, stream):
        replay, result = real(step, cache, stream)
        found.append(len(result))
        return replay, result

    monkeypatch.setattr(graphs, "capture", counted)
    return found


def stand_in(step, cache, stream):
    """Return a replay that runs the step again on the slots alone, as a CUDA graph would.

    What the host knows of the cache stays as it was at the capture.
    """
    frozen = IntegerCache(cache.pool)
    frozen._slots, frozen.filled, frozen.padded = [cache.slots], cache.filled, cache.padded
    step(frozen)
    frozen.rewind(cache.filled)
    result = step(frozen)
    frozen.rewind(cache.filled)
    return lambda: result.copy_(step(frozen)), result


def eager(model, parts, cache, **asked):
    """Return what passes give without graphs, side by side; the oracle, bit for bit."""
    runner = graph_runner(model)
    runner.enabled = False
    found = [model(input_ids=part, past_key_values=cache, **asked).logits for part in parts]
    runner.enabled = True
    return torch.cat(found, 1)


@torch.no_grad()
def test_replayed_steps_equal_eager_ones_and_the_whole_pass(model, ids, captures):
    whole, parts = model(ids).logits, ids.split([20, 1, 1, 1, 1], dim=1)
    expected = eager(model, parts, new_cache(model, 24))
    cache, logits = new_cache(model, 24), []
    with torch.inference_mode():
        for part in parts:
            out = model(input_ids=part, past_key_values=cache)
            assert out.past_key_values is cache
            logits.append(out.logits)
    assert captures == [2]
    assert cache.get_seq_length() == int(cache.slots.length) == 24
    found = torch.cat(logits, 1)  # copies: no step overwrote the one before
    assert torch.equal(found, expected)
    # in float32 noise moves a few levels
    assert (found - whole).norm() <= (5e-2 if CUDA else 1e-8) * whole.norm()


@torch.no_grad()
def test_generate_runs_on_graphs_unless_they_are_off(model, ids, captures):
    padded = ids[:, :8].clone()
    mask = torch.ones_like(padded)
    padded[1, :3] = mask[1, :3] = 0
    found = model.generate(padded, attention_mask=mask, **SETTINGS)
    assert captures == [2]
    graph_runner(model).enabled = False
    assert torch.equal(model.generate(padded, attention_mask=mask, **SETTINGS), found)
    assert captures == [2]


@torch.no_grad()
def test_replayed_steps_know_the_positions_of_keys_whose_bias_is_apart(make_runtime, ids, captures):
    """Of a padded batch, whose sequences differ in them; oracle: without graphs."""
    model = make_runtime(attention_bias=True)
    padded, mask = ids[:, :8].clone(), torch.ones_like(ids[:, :8])
    padded[1, :3] = mask[1, :3] = 0
    found = model.generate(padded, attention_mask=mask, **SETTINGS)
    assert captures == [2]
    graph_runner(model).enabled = False
    assert torch.equal(model.generate(padded, attention_mask=mask, **SETTINGS), found)


@pytest.mark.parametrize("size", [1, 3])
@torch.no_grad()
def test_padding_longer_than_the_chunks_is_read_before_graphs_run(model, ids, size, captures):
    padded = ids[:, :9].clone()
    mask = torch.ones_like(padded)
    padded[1, :5] = mask[1, :5] = 0
    settings = {**SETTINGS, "attention_mask": mask, "prefill_chunk_size": size}
    found = model.generate(padded, **settings)
    assert captures == [2]
    graph_runner(model).enabled = False
    assert torch.equal(model.generate(padded, **settings), found)


@torch.no_grad()
def test_a_cache_that_grew_is_captured_anew(model, ids, captures):
    def run(runs):
        cache = new_cache(model, 64)
        first = runs(model, ids[:, :11].split([10, 1], dim=1), cache)
        kept, cache.slots.capacity = cache.slots.graphs, 11  # as if it were full
        # the next step runs eagerly, and takes more memory
        return torch.cat([first, runs(model, ids[:, 11:].split(1, dim=1), cache)], 1), kept, cache

    def on_graphs(model, parts, cache):
        return torch.cat([model(input_ids=p, past_key_values=cache).logits for p in parts], 1)

    found, kept, cache = run(on_graphs)
    assert cache.slots.graphs is not kept and captures == [2, 2]
    del cache, kept
    assert torch.equal(found, run(eager)[0])


@torch.no_grad()
def test_a_graph_serves_the_caches_that_follow_on_its_slots(model, ids, captures):
    for start in (0, 5, 9):
        parts = ids[:, start : start + 12].split([start + 1, *[1] * (11 - start)], dim=1)
        cache = new_cache(model, 64)
        found = [model(input_ids=part, past_key_values=cache).logits for part in parts]
        del cache
        assert torch.equal(torch.cat(found, 1), eager(model, parts, new_cache(model, 64)))
    assert captures == [2]


@torch.no_grad()
def test_prompts_of_a_size_are_captured_once_where_asked_for(model, ids, captures):
    """By size and by the logits that are kept; steps behind them have a graph of their own."""
    graph_runner(model).prompts = True
    for start, kept in ((0, 0), (3, 0), (5, 1), (7, 1)):
        parts = ids[:, start : start + 11].split([10, 1], dim=1)
        asked = {"logits_to_keep": kept}
        expected = eager(model, parts, new_cache(model, 64), **asked)
        cache = new_cache(model, 64)
        mask = torch.ones_like(parts[0]) if start else None
        first = model(input_ids=parts[0], past_key_values=cache, attention_mask=mask, **asked)
        assert len(first.logits[0]) == (kept or 10) and cache.get_seq_length() == 10
        step = model(input_ids=parts[1], past_key_values=cache)
        assert torch.equal(torch.cat([first.logits, step.logits], 1), expected)
        del cache, first, step  # the next one's slots, with their graphs
    assert captures == [2, 2, 2]


@torch.no_grad()
def test_prompts_know_the_positions_of_keys_whose_bias_is_apart(make_runtime, ids, captures):
    model = make_runtime(model_type="qwen2")
    graph_runner(model).prompts = True
    parts = ids[:, :12].split([10, 1, 1], dim=1)
    expected = eager(model, parts, new_cache(model, 64))
    cache = new_cache(model, 64)
    for _ in range(2):  # the second prompt comes behind a crop
        found = [model(input_ids=part, past_key_values=cache).logits for part in parts]
        assert torch.equal(torch.cat(found, 1), expected)
        cache.crop(-12)
    assert captures == [2, 2]


SIXTEEN = CodecConfig(bits=16)
IN_FLOATS = {
    "packed": KVConfig(sinks=2, window=4),
    "plain": KVConfig(SIXTEEN, CodecConfig(bits=8), sinks=2, window=4),
    "sinks": KVConfig(sinks=3),
    "window": KVConfig(window=1),
}


@pytest.mark.parametrize("kv", IN_FLOATS.values(), ids=IN_FLOATS)
@torch.no_grad()
def test_graphs_keep_sinks_and_a_window_in_floats(make_runtime, ids, captures, kv):
    """Behind a prompt that is replayed, crops and padding, and on slots of a cache before."""
    model = make_runtime(kv=kv)
    graph_runner(model).prompts = True
    parts, mask = ids[:, :20].split([8, *[1] * 12], dim=1), torch.ones_like(ids)
    caches = [new_cache(model, 64), new_cache(model, 64)]

    def assert_eager(parts):
        found = [model(input_ids=part, past_key_values=caches[0]).logits for part in parts]
        assert torch.equal(torch.cat(found, 1), eager(model, parts, caches[1]))

    for less in (20, 15):
        assert_eager(parts)
        for cache in caches:
            cache.crop(-less)
    assert_eager(ids[:, 5:12].split(1, dim=1))
    assert captures == [2, 2]
    caches[:1] = []  # the next one's slots, with their graphs
    caches.insert(0, new_cache(model, 64))
    caches[1].reset()
    mask[1, :3] = 0
    for cache in caches:
        model(input_ids=ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
    assert_eager(ids[:, 6:16].split(1, dim=1))
    assert captures == [2, 2]


@torch.no_grad()
def test_prompts_behind_padding_and_prompts_unasked_for_run_eagerly(model, ids, captures):
    cache, mask = new_cache(model, 64), torch.ones_like(ids[:, :8])
    mask[1, :3] = 0
    prompt = {"input_ids": ids[:, :8], "past_key_values": cache}
    assert not graph_runner(model).takes(prompt)
    graph_runner(model).prompts = True
    assert graph_runner(model).takes(prompt)
    assert not graph_runner(model).takes({**prompt, "attention_mask": mask})
    assert not graph_runner(model).takes({**prompt, "logits_to_keep": torch.tensor([1])})
    model(**prompt, attention_mask=mask)
    cache.reset()
    found = model(**prompt).logits  # what an earlier prompt padded is none of this one's
    assert captures == [2] and torch.equal(found, eager(model, [ids[:, :8]], new_cache(model, 64)))


def fall_behind(*_) -> None:
    """Let the current stream do nothing for some 0.1 s."""
    if CUDA:
        torch.cuda._sleep(200_000_000)


def break_off(model, module, ids, cache):
    """Begin a pass that fails in a module."""
    hook = module.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=ids, past_key_values=cache)
    hook.remove()


@torch.no_grad()
def test_a_replay_after_a_pass_that_broke_off_writes_the_right_slot(model, ids):
    parts = ids[:, :10].split([8, 1, 1], dim=1)
    expected = eager(model, parts, new_cache(model, 64))[:, -1:]
    cache = new_cache(model, 64)
    for part in parts[:2]:
        model(input_ids=part, past_key_values=cache)
    break_off(model, decoder_of(model).get_submodule("norm"), ids[:, 9:11], cache)
    assert torch.equal(model(input_ids=parts[2], past_key_values=cache).logits, expected)


@torch.no_grad()
def test_a_capture_that_broke_off_leaves_the_cache_as_it_was(model, ids, captures):
    """Also where the GPU is behind: the broken step is at work when the next one begins."""
    parts = ids[:, :9].split([8, 1], dim=1)
    expected = eager(model, parts, new_cache(model, 64))[:, -1:]
    cache = new_cache(model, 64)
    model(input_ids=parts[0], past_key_values=cache)
    late = decoder_of(model).register_forward_pre_hook(fall_behind)
    break_off(model, model.lm_head, parts[1], cache)  # behind the decoder, which has counted
    late.remove()
    assert not captures and cache.get_seq_length() == int(cache.slots.length) == 8
    assert torch.equal(eager(model, parts[1:], cache), expected)


@torch.no_grad()
def test_a_graph_serves_no_model_but_its_own(make_runtime, model, ids):
    """Neither a model that meets a foreign cache, nor a copy."""
    cache = new_cache(model, 24)
    model(input_ids=ids[:, :8], past_key_values=cache)
    model(input_ids=ids[:, 8:9], past_key_values=cache)
    step = {"input_ids": ids[:, 9:10], "past_key_values": cache}
    with pytest.raises(InputError, match="cache belongs to another model"):
        make_runtime(1)(**step)
    assert model(**step).logits.any()
    del cache, step  # its slots wait for the next cache, with their graph
    twin = copy.deepcopy(model)
    assert graph_runner(twin) is twin.forward is not graph_runner(model)
    twin.lm_head.weight.zero_()
    own = new_cache(twin, 24)
    for part in ids[:, :9].split([8, 1], dim=1):
        assert not twin(input_ids=part, past_key_values=own).logits.any()


@pytest.mark.parametrize(
    ("name", "value"),
    [("output_hidden_states", True), ("return_dict", False), ("use_cache", False)],
)
@torch.no_grad()
def test_what_the_config_asks_for_goes_to_the_stock_pass(model, ids, name, value):
    cache = new_cache(model, 24)
    model(input_ids=ids[:, :4], past_key_values=cache)
    plain = {"input_ids": ids[:, :1], "past_key_values": cache}
    runner, usual = graph_runner(model), getattr(model.config, name)
    assert runner.takes(plain)
    setattr(model.config, name, value)
    assert not runner.takes(plain)
    assert runner.takes({**plain, name: usual})  # the caller's word counts more


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
        {"attention_mask": torch.ones(2, 1)},
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
    networks = QuantizedNetworks(make_model, quant, KVConfig())
    found = networks.fused(RotationSet())
    integer_runtime(found, networks.parts(found, RotationSet(), {}), REFERENCE)
    assert not graph_runner(found).capturable
