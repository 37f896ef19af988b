"""Gemma 2 and 3: stock logits with both caps, what rotations cannot pass, and what is refused."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma3 import modeling_gemma3

from spinlab.compose import composed
from spinlab.config import KVConfig, ModelConfig, RotationConfig
from spinlab.errors import InputError
from spinlab.export.base import check_exports
from spinlab.model import attention
from spinlab.model.bytes import byte_tokenizer
from spinlab.model.load import check_model, exact_norms, load_model, prepared
from spinlab.model.modules import map_of
from spinlab.model.random import architecture_of, random_model
from spinlab.model.settings import on_meta
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.check import logits, logits_error
from spinlab.rotation.initial import check_rotations
from spinlab.rotation.inputs import in_gains
from spinlab.rotation.rotations import RotationSet
from spinlab.runtime.fused.convert import why_not_runtime

SHAPE = {
    **{"vocab_size": 256, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5},
    **{"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 6},
    "initializer_range": 0.2,
}
CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}
FAMILIES = {"gemma2": CAPS, "gemma3_text": {"final_logit_softcapping": 2.0}}
every_family = pytest.mark.parametrize("family", FAMILIES)


def config_of(family: str, dtype: str = "float64", **changes) -> ModelConfig:
    shape = {**SHAPE, **FAMILIES[family], "model_type": family, **changes}
    return ModelConfig(architecture=shape, dtype=dtype, outlier_channels=2)


def plain(family: str, dtype: torch.dtype = torch.float64, **changes):
    """Return transformers' own model, with its own plain attention."""
    made = AutoModelForCausalLM.from_config(
        architecture_of(config_of(family, **changes)), attn_implementation="eager"
    )
    made.load_state_dict(random_model(config_of(family, **changes), 0).state_dict())
    return made.to(dtype).eval().requires_grad_(False)


@pytest.fixture
def wide_stock(monkeypatch):
    """Let stock norms and probabilities be float64 in float64 models; the rest is transformers'."""

    def norm(self, x):
        return self._norm(x) * (1 + self.weight)

    softmax = nn.functional.softmax
    monkeypatch.setattr(modeling_gemma2.Gemma2RMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_gemma3.Gemma3RMSNorm, "forward", norm)
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim, dtype: softmax(x, dim))


@every_family
def test_a_loaded_model_has_the_stock_logits(ids, wide_stock, family):
    expected = logits(plain(family), ids)
    assert logits_error(logits(load_model(config_of(family), None, 0), ids), expected) < 1e-12


# what config.json of google/gemma-2-2b and gemma-3-1b-pt says beside its widths, in the words of
# their time
HUB = {
    "gemma2": {
        **{"attention_bias": False, "hidden_act": "gelu_pytorch_tanh", "rope_theta": 20_000.0},
        **{"hidden_activation": "gelu_pytorch_tanh", "cache_implementation": "hybrid"},
    },
    "gemma3_text": {
        **{"sliding_window_pattern": 2, "rope_local_base_freq": 20_000, "rope_theta": 3e5},
        **{"rope_scaling": None, "cache_implementation": "hybrid", "attn_logit_softcapping": None},
    },
}


@every_family
def test_a_checkpoint_in_the_words_of_its_time_has_the_stock_logits(tmp_path, ids, family):
    """Three layers, of which the second sees all; bases of RoPE that no default gives."""
    kept = {name: value for name, value in SHAPE.items() if name != "layer_types"}
    settings = {**kept, **FAMILIES[family], **HUB[family], "num_hidden_layers": 3}
    stock_config = AutoConfig.for_model(family, **settings)
    stock = AutoModelForCausalLM.from_config(stock_config, attn_implementation="eager")
    for name, parameter in stock.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(-0.5, 0.5)
    stock.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    told = {"model_type": family, "architectures": [type(stock).__name__], **settings}
    (tmp_path / "config.json").write_text(json.dumps(told))
    config = ModelConfig(weights="pretrained", path=str(tmp_path), dtype="float64")
    check_model(config)
    model, described = load_model(config, None, 0), map_of(load_model(config, None, 0))
    assert [layer.attention.window for layer in described.layers] == [5, None, 5]
    expected = logits(stock.double().eval(), ids)
    assert logits_error(logits(model, ids), expected) < 1e-5  # whose norms are float32


@every_family
def test_caps_and_windows_matter_to_the_stock_logits(ids, family):
    """Otherwise the tests of this file would see none of them."""
    expected = logits(plain(family), ids)
    changes = [{"sliding_window": 64}, *({name: None} for name in FAMILIES[family])]
    for change in changes:
        assert logits_error(logits(plain(family, **change), ids), expected) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capped_attention_has_the_bits_of_plain_attention(ids, dtype):
    """A left-padded batch; rows of padding see nothing, and are nobody's."""
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    capped = random_model(config_of("gemma2"), 0).to(dtype).eval()
    found, expected = (m(ids, attention_mask=mask).logits for m in (capped, plain("gemma2", dtype)))
    seen = mask.bool()
    assert capped.config._attn_implementation == attention.PLAIN
    assert torch.equal(found[seen], expected[seen]) and found.isfinite().all()


def test_steps_of_capped_attention_are_what_they_are_at_once(ids, monkeypatch):
    model = load_model(config_of("gemma2"), None, 0)
    expected = logits(model, ids)
    monkeypatch.setattr(attention, "_SCORES", 2 * 4 * 24 * 7)  # 7 tokens at a time
    assert logits_error(logits(model, ids), expected) < 1e-13


@every_family
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_scale_of_embeddings_is_there_without_a_checkpoint(family, dtype):
    """Oracle: stock modules, which round the square root of the width to the weights' dtype."""
    dtype = getattr(torch, dtype)
    model = prepared(on_meta(architecture_of(config_of(family))), dtype)
    found, stock = model.model.embed_tokens, plain(family, dtype).model.embed_tokens
    assert found.weight.is_meta and not found.embed_scale.is_meta
    assert torch.equal(found.embed_scale.to(dtype), stock.embed_scale.to(dtype))
    assert "embed_scale" not in "".join(model.state_dict())


@every_family
def test_norms_of_a_model_in_16_bits_round_as_stock_ones_do(family):
    """1 + weight is no number of 16 bits; the norm before it becomes torch's where one learns."""
    stock, model = (random_model(config_of(family), 0).bfloat16() for _ in range(2))
    exact_norms(model)
    for norm in map_of(model).norms:
        module = stock.get_submodule(norm.path)
        shape = 64, len(module.weight)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        expected = module(x).float()
        error = (model.get_submodule(norm.path)(x).float() - expected).abs() / expected.abs()
        assert error.max() <= 2**-7 and (error > 0).float().mean() < 0.01  # ties of sums


def test_scales_are_what_a_gain_of_one_and_a_weight_holds():
    scale = torch.logspace(-3, 4, 1000, dtype=torch.float64)
    held = in_gains(scale, 1.0)
    weight = 1 / held - 1
    assert torch.allclose(weight.bfloat16().double(), weight, rtol=0, atol=1e-12)
    assert weight.min() > -1
    ordinary = scale.log().abs() < 2.5
    assert ((held / scale).log().abs()[ordinary] < 2**-5).all()
    nearest = (1 / scale - 1).bfloat16().double()
    assert torch.allclose(weight[scale < 200], nearest[scale < 200], rtol=0, atol=1e-12)
    assert torch.equal(in_gains(scale, 0.0), in_gains(scale))


@every_family
def test_r1_is_refused_with_its_reason(family):
    model_map = map_of(load_model(config_of(family), None, 0))
    with pytest.raises(
        InputError, match=r"rotation\.r1 does not fit .* R1 cannot pass those gains"
    ):
        check_rotations(RotationConfig(), model_map)
    check_rotations(RotationConfig(r1="none"), model_map)


@every_family
def test_no_r1_would_keep_the_function(ids, family):
    """R1 as if the norms behind the blocks had no gains: the oracle of the refusal."""
    model, original = (load_model(config_of(family), None, 0) for _ in range(2))
    networks = QuantizedNetworks(lambda: model, None, KVConfig())
    r1 = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(0)))[0]
    rotations = RotationSet(r1=r1.double())
    with pytest.raises(InputError, match="cannot pass those gains"):
        networks.fused(rotations)
    object.__setattr__(map_of(model), "cannot", {})
    assert logits_error(logits(networks.fused(rotations), ids), logits(original, ids)) > 1e-2


SENTENCES = {
    "gemma2": ({}, "caps its scores at 1.5"),
    "gemma2 without caps": ({"attn_logit_softcapping": None}, "activation is gelu_pytorch_tanh"),
    "gemma3_text": ({}, "activation is gelu_pytorch_tanh"),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_what_no_kernel_computes_runs_in_torch(case):
    changes, sentence = SENTENCES[case]
    model = load_model(config_of(case.partition(" ")[0], **changes), None, 0)
    path = QuantizedNetworks(lambda: model, None, KVConfig()).kv_path(model, RotationSet())
    assert sentence in str(why_not_runtime(model, path))


@every_family
def test_a_file_for_llama_cpp_is_refused(tmp_path, family):
    settings = ["model=random", f"+model.architecture.model_type={family}", "rotation.r1=none"]
    config = composed("+experiment=toy", *settings, f"export.gguf={tmp_path / 'm.gguf'}")
    with pytest.raises(InputError, match=f"the family '{family}' has no place in it"):
        check_exports(config)


def test_attention_in_both_directions_is_refused():
    with pytest.raises(InputError, match="use_bidirectional_attention=true lets tokens see"):
        random_model(config_of("gemma3_text", use_bidirectional_attention=True), 0)


def test_a_model_with_a_vision_tower_is_refused_with_its_reason():
    config = ModelConfig(architecture={**SHAPE, "model_type": "gemma3"})
    with pytest.raises(InputError, match=r"beside a vision tower.*as gemma3_text"):
        random_model(config, 0)
