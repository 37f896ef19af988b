"""Models come as they were saved, in every dtype, on every device."""

import json

import pytest
import torch

from spinlab.config import ModelConfig
from spinlab.errors import InputError
from spinlab.model.families import FAMILIES, family_of
from spinlab.model.load import check_model, load_model, meta_model, source_digest
from spinlab.model.modules import linears_of, map_of
from spinlab.model.random import random_model
from tests.conftest import EXPERTS
from tests.shapes import fitted

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
RANDOM = ModelConfig(architecture=SHAPE, outlier_channels=2)


def test_random_weights_follow_the_seed():
    first, again, other = (random_model(RANDOM, seed) for seed in (0, 0, 1))
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_planted_channels_are_loud_in_the_stream_and_quiet_for_readers():
    model = random_model(RANDOM, 0)
    loudness = model.model.embed_tokens.weight.abs().mean(0)
    planted = loudness.topk(2).indices
    assert (loudness[planted] > 10 * loudness.median()).all()
    gains = model.model.layers[0].input_layernorm.weight
    assert (gains[planted] < 0.1).all()


def test_a_local_checkpoint_loads_as_saved(tmp_path):
    model = random_model(RANDOM, 0)
    model.save_pretrained(tmp_path)
    config = ModelConfig(weights="pretrained", path=str(tmp_path))
    loaded = load_model(config, None, seed=0)
    ids = torch.arange(16)[None]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert set(source_digest(config)) >= {"config.json", "model.safetensors"}


def test_a_changed_weight_changes_the_digest(tmp_path):
    config = ModelConfig(weights="pretrained", path=str(tmp_path))
    digests = []
    for seed in (0, 1):
        random_model(RANDOM, seed).save_pretrained(tmp_path)
        digests.append(source_digest(config))
    assert digests[0] != digests[1]


def test_float64_models_are_float64_throughout():
    """transformers' RMSNorm computes in float32; a float64 forward must not."""
    config = ModelConfig(architecture=SHAPE, dtype="float64")
    model, single = load_model(config, None, seed=0), random_model(config, 0).eval()
    ids = torch.arange(16)[None]
    exact, rough = model(ids).logits, single(ids).logits
    assert exact.dtype == torch.float64
    assert torch.allclose(exact.float(), rough, atol=1e-5)
    x = torch.randn(3, 24, dtype=torch.float64)
    norm = model.model.norm
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    assert torch.allclose(norm(x), expected, atol=1e-14)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_a_model_on_the_meta_device_has_the_tensors_of_the_loaded_one(family, dtype):
    stream = {"hidden_size": 32} if family == "stablelm" else {}  # its heads make it up
    shape = {**SHAPE, **EXPERTS.get(family, {}), **stream, "model_type": family}
    shape = fitted(family, shape)
    config = ModelConfig(architecture=shape, dtype=dtype)
    shapes, loaded = meta_model(config, None), load_model(config, None, seed=0)
    assert all(tensor.is_meta for tensor in shapes.state_dict().values())

    def described(model):
        return {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}

    assert described(shapes) == described(loaded)


def test_dimensions_come_from_the_modules_not_from_hidden_over_heads():
    model_map = map_of(random_model(RANDOM, 0))
    assert (model_map.hidden, model_map.width("r2")) == (24, 8)


def test_every_linear_of_a_layer_is_a_site():
    model = random_model(RANDOM, 0)
    named = {site.path for site, _ in linears_of(model)}
    every = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert named == every - {"lm_head"}


def test_unknown_families_and_empty_shapes_are_refused():
    with pytest.raises(
        InputError, match=r"'exaone' is not known: supported are cohere, deepseek_v2, deepseek_v3"
    ):
        family_of("exaone")
    with pytest.raises(InputError, match=r"model.architecture"):
        random_model(ModelConfig(name="nothing"), 0)


def test_a_quantized_checkpoint_is_refused_before_it_is_read(tmp_path):
    settings = {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"stored quantized \(awq\).* it was made from"):
        check_model(ModelConfig(weights="pretrained", path=str(tmp_path)))
    settings = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"\(mxfp4\).*Mxfp4Config\(dequantize=True\)"):
        check_model(ModelConfig(weights="pretrained", path=str(tmp_path)))
