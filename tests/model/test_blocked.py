"""The table of blocked families against transformers itself, built without memory on `meta`."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
)

from spinlab.config import ModelConfig
from spinlab.errors import InputError
from spinlab.model.families import FAMILIES, family_of
from spinlab.model.families.blocked import BLOCKED
from spinlab.model.load import load_model

NEEDED = {"nemotron": {"num_key_value_heads": 8}}  # what has no default


def empty(model_type):
    config = AutoConfig.for_model(model_type, **NEEDED.get(model_type, {}))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def families(word):
    return sorted(family for family, reason in BLOCKED.items() if word in reason)


def stream_norm(model):
    """Make the class of a model's first norm anew, of width 8 and with memory."""
    norms = (m for m in model.modules() if type(m).__name__.endswith("Norm"))
    return type(next(norms))(8)


@pytest.mark.parametrize("family", families("subtracts the mean"))
def test_these_norms_subtract_the_mean(family):
    names = {type(m).__name__ for m in empty(family).modules()}
    assert any("LayerNorm" in name for name in names)
    assert not any("RMSNorm" in name for name in names)


@pytest.mark.parametrize("family", ["cohere2", "olmo"])
def test_layer_norms_of_their_own_subtract_the_mean_too(family):
    norm = stream_norm(empty(family))
    x = torch.randn(3, 8)
    assert torch.allclose(norm(x + 5), norm(x), atol=1e-4)


@pytest.mark.parametrize("family", families("mixture of experts"))
def test_these_experts_are_stacked_in_one_tensor(family):
    stacked = [n for n, p in empty(family).named_parameters() if "experts" in n and p.ndim == 3]
    assert stacked


@pytest.mark.parametrize("family", families("recurrent scan"))
def test_these_layers_scan(family):
    names = {type(module).__name__.lower() for module in empty(family).modules()}
    assert any(word in name for name in names for word in ("mixer", "rglru", "rwkv"))


@pytest.mark.parametrize("family", families("vision tower"))
def test_these_text_models_lie_beside_a_vision_tower(family):
    names = {name.rpartition(".")[2] for name, _ in empty(family).named_modules()}
    assert {"vision_tower", "language_model"} <= names


def test_the_text_model_beside_a_vision_model_is_saved_by_itself_as_it_is_told(tmp_path):
    text = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    text |= {"num_local_experts": 4, "intermediate_size_mlp": 40, "pad_token_id": 0}
    vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"intermediate_size": 32, "image_size": 28, "vision_output_dim": 8}
    vision |= {"projector_input_dim": 8, "projector_output_dim": 8}
    both = Llama4ForConditionalGeneration(
        Llama4Config(vision_config=vision, text_config=text)
    ).eval()
    both.save_pretrained(tmp_path / "both")
    settings = ModelConfig(path=str(tmp_path / "both"), dtype="float32")
    with pytest.raises(InputError, match=r"Llama4ForCausalLM\.from_pretrained"):
        load_model(settings, None, 0)
    Llama4ForCausalLM.from_pretrained(tmp_path / "both").save_pretrained(tmp_path / "text")
    found = load_model(ModelConfig(path=str(tmp_path / "text"), dtype="float32"), None, 0)
    ids = torch.arange(12)[None]
    expected = both(input_ids=ids).logits
    assert torch.allclose(found(ids).logits, expected, atol=1e-5 * expected.std().item())


@pytest.mark.parametrize("family", sorted(BLOCKED))
def test_a_blocked_family_is_refused_in_one_sentence(family):
    assert family not in FAMILIES
    with pytest.raises(InputError) as refusal:
        family_of(family)
    sentence = str(refusal.value)
    assert f"{family!r} cannot be rotated, because {BLOCKED[family]}: supported are" in sentence
    assert "\n" not in sentence


def test_every_reason_is_checked_here():
    words = ("subtracts the mean", "mixture of experts", "scan", "vision tower", "vision model")
    assert sorted(f for word in words for f in families(word)) == sorted(BLOCKED)
