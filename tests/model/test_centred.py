"""StableLM and Cohere: LayerNorms become RMSNorms and the function stays; what does not work."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from spinlab.compose import composed
from spinlab.config import KVConfig, ModelConfig
from spinlab.errors import InputError
from spinlab.export.base import check_exports
from spinlab.model.load import check_model, check_weights, load_model
from spinlab.model.modules import embedding_of, head_of, map_of, prepare
from spinlab.model.random import random_model
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.check import logits, logits_error
from spinlab.rotation.rotations import RotationSet
from spinlab.runtime.fused.convert import why_not_runtime

SHAPE = {
    **{"model_type": "stablelm", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "initializer_range": 0.2,
}
ONLINE_OFF = ["rotation.r3=none", "rotation.r4=none"]
CHANGES = [
    {},
    {"use_qkv_bias": True, "tie_word_embeddings": True},
    {"use_parallel_residual": True, "qk_layernorm": True},
]


def stock(**changes):
    """Return a stock model in float64, whose LayerNorms have gains and biases."""
    config = ModelConfig(architecture={**SHAPE, **changes}, outlier_channels=2)
    return random_model(config, 0).double().eval().requires_grad_(False)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_prepared_model_has_the_stock_logits(ids, changes):
    """Oracle: transformers' own model, LayerNorms and all."""
    expected, model = logits(stock(**changes), ids), prepare(stock(**changes))
    of_heads = [n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    assert all("self_attn" in name for name in of_heads)
    assert bool(of_heads) == ("qk_layernorm" in changes)
    assert logits_error(logits(model, ids), expected) < 1e-12
    biases = [norm.bias for norm in stock().modules() if isinstance(norm, nn.LayerNorm)]
    assert len(biases) == 5 and all(bias.abs().min() > 0 for bias in biases)


def test_the_stream_of_a_prepared_model_has_mean_zero(ids):
    kept, model = [], prepare(stock())
    for norm in map_of(model).norms:
        hook = lambda module, args: kept.append(args[0])  # noqa: E731
        model.get_submodule(norm.path).register_forward_pre_hook(hook)
    model(ids)
    assert len(kept) == 5
    assert all(x.mean(-1).abs().max() < 1e-13 * x.std() for x in kept)


def test_one_norm_before_both_blocks_carries_the_scale_of_none():
    model_map = map_of(prepare(stock(use_parallel_residual=True)))
    norm = model_map.norms[0]
    assert len(model_map.norms) == 3 and len(norm.readers) == 5
    assert {i.name: i.producer is None for i in model_map.inputs if i.layer == 0} == {
        **{"qkv": True, "gate_up": True},
        **{"o": False, "down": False},
    }


def test_norms_of_single_heads_that_are_no_rmsnorms_run_in_torch():
    config = ModelConfig(architecture={**SHAPE, "qk_layernorm": True})
    model = load_model(config, None, 0)
    path = QuantizedNetworks(lambda: model, None, KVConfig()).kv_path(model, RotationSet())
    assert "go through norms that are no RMSNorms" in str(why_not_runtime(model, path))


@pytest.mark.parametrize("changes", [{}, {"use_qk_norm": True, "attention_bias": True}], ids=str)
def test_a_prepared_cohere_has_the_stock_logits(ids, changes):
    """Stock norms are float32 whatever the dtype, and so is the oracle's error; ties are cut."""
    changes = {"model_type": "cohere", "logit_scale": 0.3, **changes}
    expected, model = logits(stock(**changes), ids), prepare(stock(**changes))
    assert logits_error(logits(model, ids), expected) < 1e-5
    described = map_of(model)
    assert described.logit_divisor == pytest.approx(1 / 0.3)
    assert [len(norm.readers) for norm in described.norms] == [5, 5, 1]
    path = QuantizedNetworks(lambda: model, None, KVConfig()).kv_path(model, RotationSet())
    sentence = "no RMSNorms" if "use_qk_norm" in changes else "turns neighbours"
    assert sentence in str(why_not_runtime(model, path))


@pytest.mark.parametrize("family", ["stablelm", "cohere"])
@pytest.mark.parametrize("export", ["checkpoint", "transformed", "compressed_tensors"])
def test_a_rotated_model_is_no_stock_checkpoint(tmp_path, export, family):
    settings = ["model=random", f"+model.architecture.model_type={family}", *ONLINE_OFF]
    config = composed("+experiment=toy", *settings, f"export.{export}={tmp_path / 'c'}")
    with pytest.raises(InputError, match=rf"'{family}' cannot hold a rotated model.*artefact"):
        check_exports(config)


@pytest.mark.parametrize("family", ["stablelm", "cohere"])
def test_a_tied_checkpoint_is_loaded_with_a_head_of_its_own(tmp_path, save_checkpoint, ids, family):
    """What reads its config goes on seeing the tie that the files have."""
    save_checkpoint(tmp_path, model_type=family, hidden_size=32, tie_word_embeddings=True)
    config = ModelConfig(weights="pretrained", path=str(tmp_path), dtype="float64")
    check_model(config)
    check_weights(config)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert stored.config.tie_word_embeddings
    model = load_model(config, None, 0)
    assert head_of(model).weight is not embedding_of(model).weight
    assert not torch.equal(head_of(model).weight, embedding_of(model).weight)
    # stock norms of the one are float32
    assert logits_error(logits(model, ids), logits(stored.eval(), ids)) < 1e-5


def test_heads_of_another_width_than_the_streams_share_are_refused():
    with pytest.raises(InputError, match="leave head_dim out"):
        random_model(ModelConfig(architecture={**SHAPE, "head_dim": 16}), 0)
    config = ModelConfig(architecture={**SHAPE, "hidden_size": 48})
    with pytest.raises(InputError, match="choose partial_rotary_factor"):
        random_model(config, 0)
