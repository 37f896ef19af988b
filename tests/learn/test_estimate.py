"""The estimate against what autograd really keeps and what torch really multiplies."""

import logging
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from spinlab import parallel
from spinlab.bench.models import SHAPES
from spinlab.config import (
    LearnConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    QuantConfig,
    RatesConfig,
    RotationConfig,
    TensorQuant,
)
from spinlab.config.rotation import BlocksConfig
from spinlab.errors import InputError
from spinlab.learn import (
    announce,
    choose_checkpoint,
    choose_shards,
    estimate_of,
    placement,
)
from spinlab.learn import duration as module
from spinlab.learn.spaces.owners import TOGETHER
from spinlab.model.load import load_model
from spinlab.model.modules import map_of
from spinlab.rotation.rotations import RotationSet

GIB = 2**30
CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
_INPUTS = {
    "quantize_weights": True,
    "lr": RatesConfig(clip=0.01, scale=0.01, input_clip=0.01),
    "rotations": ["r1", "r2", "inputs"],
}
SPACES = {
    "16-bit weights": {},
    "16-bit weights, Euclidean norms": {"optimizer": OptimizerConfig(grad_norm="euclidean")},
    "quantized weights": {"quantize_weights": True, "lr": RatesConfig(clip=0.01)},
    "and scales": _INPUTS,
    "and blocks": _INPUTS,
}
STARTS = {
    "and scales": RotationConfig(inputs="scales"),
    "and blocks": RotationConfig(r4="none", inputs="blocks", blocks=BlocksConfig(16)),
}
SETTINGS = dict(steps=1, batch=2, micro_batch=2, sequence_length=128)
QUANT = QuantConfig(weights=TensorQuant(symmetric=True))


@pytest.fixture
def learner(request, make_model, learner_of):
    """A learner in one of the spaces."""
    make = partial(make_model, torch.float32, **SHAPE)
    learn = LearnConfig(**SETTINGS, **SPACES[request.param])
    return learner_of(make, learn, QUANT, start=STARTS.get(request.param))


def batch_of(learn: LearnConfig) -> torch.Tensor:
    shape = (learn.batch, learn.sequence_length)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1))


def meta_llama(name: str, dtype: torch.dtype = torch.bfloat16):
    with torch.device("meta"):
        config = LlamaConfig(**SHAPES[name], tie_word_embeddings=False)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


@pytest.mark.parametrize("learner", SPACES, indirect=True)
def test_activations_are_what_autograd_keeps(learner, kept_bytes):
    check_kept(learner, kept_bytes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_activations_of_other_attention_and_norms_are_what_autograd_keeps(
    learner_of, family, dtype, kept_bytes
):
    """Soft caps keep scores, 6·128 of each token; norms of 1 + weight read float32."""
    config = ModelConfig(architecture={**SHAPE, "model_type": family}, dtype=dtype)
    learn = LearnConfig(**SETTINGS, rotations=["r2"])
    start = RotationConfig(r1="none", r4="none")
    check_kept(
        learner_of(lambda: load_model(config, None, 0), learn, QUANT, start=start), kept_bytes
    )


def check_kept(learner, kept_bytes):
    found = kept_bytes(learner, batch_of(learner.learn))
    expected = estimate_of(learner.model, learner.learn, QUANT, 1).activations
    assert expected == pytest.approx(found, rel=0.25)


@pytest.mark.parametrize("learner", SPACES, indirect=True)
def test_operations_are_what_torch_multiplies(learner):
    with FlopCounterMode(display=False) as counter:
        learner.gradients(0, batch_of(learner.learn))
    found = estimate_of(learner.model, learner.learn, QUANT, 1)
    assert found.flops + found.wide_flops == pytest.approx(counter.get_total_flops(), rel=0.25)


def test_a_7b_in_16_bits_takes_its_weights_and_what_waits_for_the_backward_pass():
    found = estimate_of(meta_llama("llama2_7b"), LearnConfig(), QuantConfig(), 1)
    assert found.weights == pytest.approx(2 * 6.74e9, rel=0.01)
    kept = 2 * 2048 * 32 * (10 * 4096 + 3 * 11008)  # by hand: q, k, v and the stream are as wide
    assert found.activations == pytest.approx(kept, rel=0.01)
    per_token = 2 * 2 * 6.6e9 + 12 * 32 * 4096**2 + 7 * 32 * 2048 * 4096  # R1, attention
    assert found.flops == pytest.approx(per_token * 100 * 8 * 2048, rel=0.01)


def test_processes_share_the_layers_and_the_tokens():
    model, learn = meta_llama("llama2_7b"), LearnConfig()
    one, four = (estimate_of(model, learn, QuantConfig(), n) for n in (1, 4))
    layers, ends = 32 * 202.4e6 * 2, 32000 * 4096 * 2
    shared = (layers + ends) / 4 + 3 * layers / 32 + 2 * ends  # one end is gathered, one not shared
    assert four.weights == pytest.approx(shared, rel=0.01)
    assert four.activations == one.activations
    assert four.flops == one.flops / 4


def test_rounded_weights_in_shards_are_a_processs_part_and_three_layers():
    """By hand, in 16 bits: written, gradient and teacher in shards, beside them what is frozen."""
    learn = LearnConfig(quantize_weights=True, shard="on", objective=ObjectiveConfig(kl=1.0))
    model, layers, end = meta_llama("llama2_7b"), 32 * 202.4e6, 32000 * 4096
    for processes in (2, 8):
        found = estimate_of(model, learn, QUANT, processes)
        of_layers = layers / processes * (4 + 4 + 2 + 2)
        gathered = layers / 32 * (3 * 2 + 2 + 4)  # three of them, and a gradient as it is sent
        ends = 2 * 2 * (2 * end + end / processes)
        assert found.shards and found.weights == pytest.approx(
            of_layers + gathered + ends, rel=0.01
        )
        whole = estimate_of(model, learn, QUANT, processes, shards=False)
        assert not whole.shards and whole.flops == found.flops
        assert whole.weights > 1.4 * found.weights


@pytest.mark.parametrize("rounded", [False, True])
def test_weights_are_spread_as_the_settings_say_and_rounded_ones_where_they_must(
    device_with, rounded
):
    model, learn = meta_llama("llama2_7b"), LearnConfig(quantize_weights=rounded)
    off, on = (replace(learn, shard=how) for how in ("off", "on"))
    device_with(0)
    assert not choose_shards(model, on, QUANT, 1, CPU).shards
    assert not choose_shards(model, off, QUANT, 4, CPU).shards
    assert choose_shards(model, learn, QUANT, 4, CPU).shards
    device_with(1000 * GIB)
    assert choose_shards(model, on, QUANT, 4, CPU).shards
    assert choose_shards(model, learn, QUANT, 4, CPU).shards is not rounded
    whole = estimate_of(model, off, QUANT, 4)
    device_with(whole.bytes(True))  # with layers that are run again
    assert choose_shards(model, learn, QUANT, 4, CPU).shards is not rounded
    device_with(whole.bytes(True) - 1)
    assert choose_shards(model, learn, QUANT, 4, CPU).shards


def test_of_few_layers_shards_are_no_less(device_with):
    learn = LearnConfig(quantize_weights=True, sequence_length=16)
    config = {**SHAPE, "num_hidden_layers": 1, "model_type": "llama"}
    model = load_model(ModelConfig(architecture=config), None, 0)
    device_with(0)
    assert not choose_shards(model, learn, QUANT, 2, CPU).shards


def test_whole_weights_that_do_not_fit_are_refused_with_the_setting_that_spreads_them(
    device_with, monkeypatch
):
    monkeypatch.setattr(parallel, "world", lambda: 2)
    learn = LearnConfig(shard="off")
    device_with(GIB)
    with pytest.raises(InputError, match=r"learn\.shard=auto or more processes"):
        choose_checkpoint(estimate_of(meta_llama("llama2_7b"), learn, QUANT, 2), learn, CPU)


def test_quantized_weights_are_kept_four_times_and_half_of_that_is_shared_out():
    learn = LearnConfig(quantize_weights=True, lr=RatesConfig(clip=0.01))
    one, two = (
        estimate_of(meta_llama("smollm2_135m", torch.float32), learn, QUANT, n) for n in (1, 2)
    )
    layers, ends = 30 * 3.54e6, 2 * 49152 * 576
    assert one.weights == pytest.approx(4 * (4 * layers + ends), rel=0.01)
    assert two.weights == pytest.approx(
        4 * (3 * layers + ends), rel=0.01
    )  # frozen, before rounding


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"kl": 1.0}, "rest"),
        ({"layer_mse": 1.0}, "activations"),
        ({"kl": 1.0, "layer_mse": 1.0}, "flops"),
    ],
)
def test_further_terms_take_more(changes, field):
    model = meta_llama("smollm2_135m")
    both = [LearnConfig(objective=ObjectiveConfig(**terms)) for terms in ({}, changes)]
    less, more = (getattr(estimate_of(model, learn, QUANT, 1), field) for learn in both)
    assert more > less


@pytest.mark.parametrize(
    "changes", [{"lr": RatesConfig(input_clip=0.01)}, {"rotations": ["r1", "r2", "inputs"]}]
)
def test_what_is_learned_of_inputs_keeps_them_once_more(changes):
    model, rounded = meta_llama("smollm2_135m"), {"quantize_weights": True, "micro_batch": 2}
    settings = [LearnConfig(**rounded, **more) for more in ({}, changes)]
    less, more = (estimate_of(model, learn, QuantConfig(), 1).activations for learn in settings)
    widths = sum(input.width for input in map_of(model).inputs)
    assert more - less == 2 * 2048 * widths * model.dtype.itemsize


def test_ranges_of_keys_and_values_keep_these_once_more():
    model, rates = meta_llama("smollm2_135m"), (RatesConfig(), RatesConfig(kv_clip=0.01))
    settings = [LearnConfig(quantize_weights=True, micro_batch=2, lr=lr) for lr in rates]
    less, more = (estimate_of(model, learn, QuantConfig(), 1).activations for learn in settings)
    attentions = [layer.attention for layer in map_of(model).layers]
    values = sum(attention.kv_heads * attention.head_dim for attention in attentions)
    assert more - less == 2 * 2048 * 2 * values * model.dtype.itemsize


@pytest.mark.parametrize("rounded", [False, True])
def test_a_learned_r3_keeps_keys_thrice_more(rounded):
    model, names = meta_llama("smollm2_135m"), (["r1", "r2"], ["r1", "r2", "r3"])
    settings = [LearnConfig(quantize_weights=rounded, rotations=n, micro_batch=2) for n in names]
    less, more = (estimate_of(model, learn, QuantConfig(), 1) for learn in settings)
    attentions = [layer.attention for layer in map_of(model).layers]
    keys = sum(attention.kv_heads * attention.head_dim for attention in attentions)
    found = more.activations - less.activations
    assert found == 2 * 2048 * 3 * keys * model.dtype.itemsize
    assert more.rest >= less.rest


def test_terms_on_single_activations_keep_nothing_for_a_backward_pass():
    learn = LearnConfig(objective=ObjectiveConfig(cross_entropy=0, whip=1))
    found = estimate_of(meta_llama("smollm2_135m"), learn, QUANT, 1)
    assert found.activations == found.activations_checkpointed == 0
    assert found.flops > 0


@pytest.fixture
def device_with(monkeypatch):
    """Return a function that gives the device so many bytes."""

    def give(count: int) -> None:
        for place in (module, placement):
            monkeypatch.setattr(place, "memory_for", lambda device, swap=True: count)

    return give


def test_layers_are_run_again_only_where_memory_asks_for_it(device_with):
    found = estimate_of(meta_llama("llama2_7b"), LearnConfig(), QuantConfig(), 1)
    for has, again in ((found.bytes(False), False), (found.bytes(False) - 1, True)):
        device_with(has)
        assert choose_checkpoint(found, LearnConfig(), CPU) is again
    assert found.bytes(True) < found.bytes(False) - 8 * GIB
    device_with(found.bytes(False))
    assert choose_checkpoint(found, LearnConfig(checkpoint="on"), CPU) is True


def test_swap_lets_a_run_start_but_layers_are_run_again_before_it_is_used(monkeypatch):
    found = estimate_of(meta_llama("llama2_7b"), LearnConfig(), QuantConfig(), 1)
    swapped = {True: found.bytes(False), False: found.bytes(True) - GIB}
    monkeypatch.setattr(placement, "memory_for", lambda device, swap=True: swapped[swap])
    assert choose_checkpoint(found, LearnConfig(checkpoint="off"), CPU) is False
    assert choose_checkpoint(found, LearnConfig(), CPU) is True


@pytest.mark.parametrize(
    ("setting", "share", "words"),
    [
        ("off", 0.9, ["learn.checkpoint=off", "use learn.checkpoint=on, a smaller learn.micro"]),
        ("on", 0.1, ["learn.checkpoint=on", "learn.micro_batch than 2", "learn.sequence_length"]),
        ("auto", 0.1, ["learning needs about 15.3 GiB", "cpu has 3.2 for it", "more processes"]),
    ],
)
def test_a_run_that_cannot_fit_is_refused(device_with, setting, share, words):
    learn = LearnConfig(checkpoint=setting, micro_batch=2)
    found = estimate_of(meta_llama("llama2_7b"), learn, QuantConfig(), 1)
    device_with(int(found.bytes(False) * share))
    with pytest.raises(InputError) as refused:
        choose_checkpoint(found, learn, CPU)
    assert all(word in str(refused.value) for word in words), refused.value
    assert ("use learn.checkpoint=on" in str(refused.value)) == (setting == "off")


def test_it_is_told_in_one_line(device_with, caplog, monkeypatch):
    monkeypatch.setattr(module, "_rate", lambda width, dtype, device: 4e14)
    device_with(80 * GIB)
    found = estimate_of(meta_llama("llama2_7b"), LearnConfig(), QuantConfig(), 1)
    with caplog.at_level(logging.INFO):
        announce(found, False, CPU)
        announce(found, True, CPU)
    plain, again = (record.getMessage() for record in caplog.records)
    assert plain.startswith("learn        about ")
    assert " of 80.0 GiB (weights 12.6, activations 9." in plain
    assert "recomputed" in again


def test_a_tiny_run_is_not_timed(device_with, caplog, make_model, monkeypatch):
    monkeypatch.setattr(module, "_rate", None)
    with caplog.at_level(logging.INFO):
        announce(estimate_of(make_model(), LearnConfig(steps=2), QUANT, 1), False, CPU)
    assert "about" not in caplog.text


def test_a_probe_measures_a_plausible_rate():
    assert 1e8 < module._rate(64, torch.float32, CPU) < 1e13
    assert module.memory_for(CPU) > GIB / 4


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("rounded", [False, True])
def test_a_model_without_numbers_tells_what_the_network_that_learns_would(
    make_family_model, learner_of, family, rounded
):
    make = partial(make_family_model, family)
    shape = make()
    start = RotationSet(r2=torch.eye(map_of(shape).width("r2")).double()[None].repeat(2, 1, 1))
    learn = LearnConfig(**SETTINGS, quantize_weights=rounded, rotations=["r2"])
    learner = learner_of(make, learn, QUANT, start=start, apart=rounded)
    found = estimate_of(learner.model, learn, QUANT, 2)
    assert estimate_of(shape.to("meta"), learn, QUANT, 2, CPU) == found


SHARED = LearnConfig(quantize_weights=True, lr=RatesConfig(clip=0.01), sequence_length=64)


def shared_out(processes: int, **changes):
    """The estimate of a process that runs 8 sequences at once, whatever their number."""
    learn = replace(SHARED, batch=8 * processes, micro_batch=8, **changes)
    return estimate_of(meta_llama("llama2_7b"), learn, QUANT, processes)


def test_gradients_under_way_and_operations_of_weights_are_a_processs_own():
    """By hand: the head's chunk is small here, so that work on weights counts."""
    one, two, four = (shared_out(n) for n in (1, 2, 4))
    largest = 4 * 4096 * 11008  # one linear of the MLP at a time, in float32
    assert two.rest - one.rest == 2 * largest
    assert four.rest - one.rest == 4 * largest
    of_weights = SHARED.steps * 2 * 2 * 32 * 202.4e6 * 4096
    assert one.wide_flops - two.wide_flops == pytest.approx(of_weights / 2, rel=0.01)
    assert one.wide_flops - four.wide_flops == pytest.approx(of_weights * 3 / 4, rel=0.01)


def test_linears_that_are_worked_on_together_count_together(monkeypatch):
    alone = shared_out(1)
    monkeypatch.setitem(TOGETHER, "cpu", 1 << 27)
    largest = 4 * 4096 * 11008
    assert shared_out(1).rest - alone.rest == 4 * (4 << 27) - 4 * largest  # eight of attention's
    # 32 layers on 32 processes: one linear each
    assert shared_out(32).rest - alone.rest == 32 * largest


class OnGPU:
    """Say of a model on the meta device that it is on a GPU."""

    def __init__(self, model):
        self.model, self.device = model, torch.device("cuda")

    def __getattr__(self, name):
        return getattr(self.model, name)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_what_kernels_keep_is_less(activation, monkeypatch):
    """Of gate, activation and up two where one kernel takes both; of a logit one or two copies."""
    learn = replace(SHARED, sequence_length=2048, objective=ObjectiveConfig(kl=1.0))
    with torch.device("meta"):
        shape = {**SHAPES["llama2_7b"], "hidden_act": activation}
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    here = estimate_of(model, learn, QUANT, 1)
    there = estimate_of(OnGPU(model), learn, QUANT, 1)
    fewer = learn.micro_batch * 2048 * 32 * 11008 * 2 if activation == "silu" else 0
    assert here.activations - there.activations == fewer
    wide = estimate_of(OnGPU(model), replace(learn, dtype="float64"), QUANT, 1)
    # float64 has no kernels, attention's neither: probabilities in place of what it gives
    scores = 32 * ((2048 - 128) * 8 - 4)
    more = learn.micro_batch * 2048 * 32 * scores
    here = estimate_of(model, replace(learn, dtype="float64"), QUANT, 1)
    assert wide.activations - here.activations == more


def test_weights_are_turned_by_r1_where_it_is_learned():
    """By hand: blocks, scales and R2 are small beside the stream; R4 runs online in either."""
    changes = ({"rotations": ["r2"]}, {})
    without, turned = (shared_out(1, **change).wide_flops for change in changes)
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    assert turned - without == SHARED.steps * 2 * 2 * layers * 4096


def test_a_model_that_is_not_there_is_taken_to_where_it_will_learn():
    """By hand: a kernel gates in two numbers where torch keeps three; logits are overwritten."""
    learn = replace(SHARED, batch=8, micro_batch=8)
    here, there = (
        estimate_of(meta_llama("llama2_7b"), learn, QUANT, 1, device)
        for device in (None, torch.device("cuda", 0))
    )
    assert here.activations - there.activations == 8 * 64 * 32 * 11008 * 2
    assert (here.weights, here.flops) == (there.weights, there.flops)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_torch_has_no_fused_attention_probabilities_are_kept(
    make_model, learner_of, kept_bytes, dtype
):
    """On a GPU that is so for shared keys in float32; its plain one does the same on a CPU."""

    def on_gpu_alone(dtype: torch.dtype, **changes) -> int:
        model, learn = make_model(dtype, **SHAPE | changes), LearnConfig(**SETTINGS)
        found = (estimate_of(model, learn, QUANT, 1, torch.device(d)) for d in ("cuda", "cpu"))
        return next(found).activations - next(found).activations

    learner = learner_of(partial(make_model, dtype, **SHAPE), LearnConfig(**SETTINGS), QUANT)
    batch = batch_of(learner.learn)
    fused = kept_bytes(learner, batch)
    with sdpa_kernel(SDPBackend.MATH):
        found = kept_bytes(learner, batch) - fused
    assert on_gpu_alone(dtype) == pytest.approx(found, rel=0.1)
    own = on_gpu_alone(dtype, num_key_value_heads=6)
    assert (own > 0) == (dtype == torch.float64)
    assert on_gpu_alone(torch.bfloat16) == 0


@pytest.mark.parametrize("window", [64, 128])
def test_behind_the_mask_of_a_window_heads_get_copies_of_shared_keys(
    learner_of, kept_bytes, window
):
    architecture = {**SHAPE, "model_type": "gemma3_text", "sliding_window": window}
    architecture["layer_types"] = ["sliding_attention"] * 4
    config = ModelConfig(architecture=architecture, dtype="float32")
    start = RotationConfig(r1="none", r4="none")
    learn = LearnConfig(**SETTINGS, rotations=["r2"])
    learner = learner_of(lambda: load_model(config, None, 0), learn, QUANT, start=start)
    kept = kept_bytes(learner, batch_of(learn))
    here, there = (
        estimate_of(learner.model, learn, QUANT, 1, torch.device(d)).activations
        for d in ("cpu", "cuda")
    )
    assert here == pytest.approx(kept, rel=0.1)
    assert (there == here) == (window < 128)
