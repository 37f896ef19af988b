"""Random models have published shapes, and outliers where they are planted."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from spinlab.config import ModelConfig
from spinlab.errors import InputError
from spinlab.model.families import FAMILIES
from spinlab.model.load import load_model, source_digest
from spinlab.model.random import architecture_of, random_model
from tests.shapes import fitted

CONF = Path(__file__).parents[2] / "conf" / "model"
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
}
PARAMETERS = {  # of the published checkpoints: the totals that the hub shows
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "mistral_7b": 7_248_023_552,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
    "phi3_mini": 3_821_079_552,
    "tinyllama_1b": 1_100_048_384,
    "smollm3_3b": 3_075_098_624,
    "granite_3_1_2b": 2_533_531_648,
    "olmo2_7b": 7_298_617_344,
    "stablelm2_1_6b": 1_644_515_328,
    "command_r_35b": 34_980_831_232,
    "gemma_2b": 2_506_172_416,
    "gemma2_2b": 2_614_341_888,
    "gemma3_1b": 999_885_952,
    "gemma3_270m": 268_098_176,
    "qwen3_30b_a3b": 30_532_122_624,
    "mixtral_8x7b": 46_702_792_704,
    "deepseek_v2_lite": 15_706_484_224,
}


def shaped(**changes) -> ModelConfig:
    shape = fitted(changes.get("model_type", "llama"), {**SHAPE, **changes})
    return ModelConfig(architecture=shape, outlier_channels=2)


def test_an_architecture_that_was_changed_is_read_as_before():
    """It is checked once; who asks again gets a copy of its own."""
    first = architecture_of(shaped())
    first.hidden_size = 48
    assert architecture_of(shaped()).hidden_size == 24
    assert load_model(shaped(), None, 0).config.hidden_size == 24


@pytest.mark.parametrize("name", PARAMETERS)
def test_configured_shapes_are_those_of_the_published_models(name):
    config = ModelConfig(**yaml.safe_load((CONF / f"{name}.yaml").read_text()))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture_of(config))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    theta = config.architecture.get("rope_theta", 10_000.0)
    rope = model.config.rope_parameters
    assert rope.get("full_attention", rope)["rope_theta"] == theta
    assert source_digest(replace(config, weights="random"))["random"] == config.architecture


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_random_models_of_every_family_load_and_run(family):
    whole = family in ("stablelm", "olmoe")  # their heads make up the stream
    stream = {"hidden_size": 48, "head_dim": 12} if whole else {}
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    stream |= {"rope_parameters": rope} if stream else {}
    model = load_model(replace(shaped(model_type=family, **stream), dtype="bfloat16"), None, seed=0)
    assert model.config.model_type == family
    assert model.dtype == torch.bfloat16
    assert model(torch.arange(16)[None]).logits.isfinite().all()


def test_outliers_are_planted_in_the_stream_and_not_in_single_heads():
    model = random_model(shaped(model_type="qwen3"), 0)
    layer = model.model.layers[0]
    for norm in (layer.input_layernorm, layer.post_attention_layernorm, model.model.norm):
        assert (norm.weight < 0.1).sum() == 2
    for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
        assert norm.weight.min() > 0.4
        assert norm.weight.std() > 0.1


def test_biases_are_not_the_zeros_that_transformers_starts_with():
    model = random_model(shaped(model_type="qwen2"), 0)
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    assert len(biases) == 6  # q, k, v of two layers
    assert all(0.02 < bias.abs().max() < 0.1 for bias in biases)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hiden_size": 24}, "hiden_size is no field of llama: did you mean hidden_size"),
        ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias is no field of qwen2"),
        (
            {"model_type": "qwen3_next"},
            "'qwen3_next' cannot be rotated, because it is a mixture",
        ),
        ({"model_type": "nonsense"}, "'nonsense' is not known"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok=9 is not in 1"),
        ({"hidden_size": 25}, r"hidden size \(25\) is not a multiple"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be positive"),
        ({"model_type": "qwen3", "num_key_value_heads": 3}, "num_key_value_heads=3 does not"),
        ({"head_dim": 7}, "head_dim"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is out of range"),
        ({"hidden_size": 10**12}, "hidden_size=1000000000000 is out of range"),
        ({"rope_scaling": {"rope_type": "moebius"}}, "transformers lacks moebius"),
        ({"rope_theta": "steep"}, "transformers makes no model of it"),
        ({"hidden_act": "nonsense"}, "transformers lacks nonsense"),
    ],
    ids=str,
)
def test_an_impossible_shape_is_one_sentence(changes, sentence):
    with pytest.raises(InputError, match=sentence) as mistake:
        random_model(shaped(**changes), 0)
    assert "\n" not in str(mistake.value)


def test_more_outliers_than_channels_are_refused():
    with pytest.raises(InputError, match="outlier_channels=25 is more than hidden_size=24"):
        random_model(replace(shaped(), outlier_channels=25), 0)


def test_a_seed_is_one_model_and_the_callers_random_numbers_stay():
    """Of the CPU's generator, as seeding all devices would have it."""
    config = ModelConfig(architecture=SHAPE, outlier_channels=0)
    before = torch.random.get_rng_state()
    one, again, other = (random_model(config, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    read = "model.layers.0.mlp.up_proj"
    found, same, apart = (m.get_submodule(read).weight for m in (one, again, other))
    assert torch.equal(found, same) and not torch.equal(found, apart)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        stock = AutoModelForCausalLM.from_config(architecture_of(config))
    assert torch.equal(stock.get_submodule(read).weight, found)
