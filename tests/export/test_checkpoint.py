"""The rotated model in 16 bits: the original's function in any tool, or a sentence."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from spinlab.compose import composed
from spinlab.config import Config, LearnConfig, ModelConfig, RotationConfig
from spinlab.errors import InputError
from spinlab.export import checkpoint, parts
from spinlab.export.base import check_exports
from spinlab.export.listing import read_listing
from spinlab.export.stock import save_stock
from spinlab.model.bytes import byte_tokenizer
from spinlab.model.load import check_model, file_dtype, load_model
from spinlab.model.modules import restore
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.ranges import formats_of
from spinlab.rotation.rotations import RotationSet

FUSED = Config(rotation=RotationConfig(r3="none", r4="none"))
# every token goes to all experts, of all groups: no rounding changes who is chosen
ALL_CHOSEN = {"attention_bias": True, "num_experts_per_tok": 6, "topk_group": 2}
FAMILIES = {
    **{"llama": {}, "qwen2": {}, "phi3": {}, "qwen3": {"tie_word_embeddings": False}},
    **{"granite": {"residual_multiplier": 0.3, "logits_scaling": 5}, "olmo2": {}, "olmo3": {}},
    **{"gemma": {}, "gemma2": {"attn_logit_softcapping": 1.5}, "gemma3_text": {}},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    **{"qwen2_moe": {}, "llama4_text": {}, "gpt_oss": {}},
    "granitemoe": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "glm4_moe": {"n_routed_experts": 4, "n_group": 2, "topk_group": 1},
    **{"deepseek_v2": {"q_lora_rank": None}, "deepseek_v3": ALL_CHOSEN},
}
SMALL = ["+experiment=toy", "learn=none"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_any_tool_computes_the_originals_function(
    make_subject, make_family_model, tmp_path, ids, model_type
):
    subject = make_subject(model_type, FUSED, **FAMILIES[model_type])
    checkpoint.write(subject, str(tmp_path / "c"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    fused = subject.fused({})
    restore(fused)
    assert model.dtype == torch.bfloat16
    for name, tensor in fused.state_dict().items():  # rounded once
        dtype = torch.float32 if name.endswith("correction_bias") else torch.bfloat16
        assert torch.equal(model.state_dict()[name], tensor.to(dtype)), name
    expected = make_family_model(model_type, **FAMILIES[model_type])(ids).logits
    found = model.float()(ids).logits
    # each weight is off by 2^-9 of itself at most; two layers and the ends add up to a few of that
    assert (found - expected).norm() < 2**-6 * expected.norm()
    assert (found - expected).abs().max() > 0
    assert read_listing("it", tmp_path / "c", "checkpoint")["record"] == {}


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "olmo2", "gemma"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_tie_that_no_rotation_cuts_is_in_the_file(make_subject, tmp_path, model_type, tied):
    """No R1, and the last gain stays with its norm. Gemma 1 has R1, and a head of its own."""
    subject = make_subject(model_type, FUSED, tie_word_embeddings=tied)
    checkpoint.write(subject, str(tmp_path / "c"))
    stored, kept = load_file(tmp_path / "c" / "model.safetensors"), tied and model_type != "gemma"
    assert AutoConfig.from_pretrained(tmp_path / "c").tie_word_embeddings == kept
    assert ("lm_head.weight" in stored) != kept
    original = subject.original().state_dict()
    assert torch.equal(stored["model.norm.weight"], original["model.norm.weight"].bfloat16()) == (
        model_type != "gemma"
    )
    check_model(ModelConfig(weights="pretrained", path=str(tmp_path / "c")))


def test_an_export_is_taken_as_a_model_again_and_replaced_by_a_new_one(make_subject, tmp_path):
    place = str(tmp_path / "c")
    checkpoint.write(make_subject("llama", FUSED), place)
    settings = ModelConfig(weights="pretrained", path=place)
    check_model(settings)
    assert load_model(settings, None, 0).dtype == torch.float32
    assert file_dtype(settings, None) == torch.bfloat16
    checkpoint.write(make_subject("llama", FUSED, seed=1), place)
    check_model(settings)


def test_the_dtype_of_files_is_what_the_original_declares(tmp_path):
    assert file_dtype(composed("+experiment=toy").model, None) == torch.float16
    assert file_dtype(composed("model=random").model, None) == torch.bfloat16


def test_how_text_is_generated_goes_along_even_where_it_contradicts_itself(
    make_family_model, tmp_path
):
    model = make_family_model("llama")
    model.generation_config = GenerationConfig(temperature=0.6, top_p=0.9, eos_token_id=[7, 9])
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        model.generation_config.save_pretrained(tmp_path)
    save_stock(model, byte_tokenizer(), tmp_path)
    found = GenerationConfig.from_pretrained(tmp_path)
    assert (found.temperature, found.top_p, found.eos_token_id) == (0.6, 0.9, [7, 9])


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 32


def test_earlier_transformers_find_rope_and_tokenizer_by_their_own_names(
    make_family_model, tmp_path
):
    rope = {**LLAMA3, "rope_theta": 5e5}
    model = make_family_model("llama", rope_parameters=rope)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    save_stock(model, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (5e5, LLAMA3)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == rope
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert found("a text")["input_ids"] == tokenizer("a text")["input_ids"]
    message = [{"role": "user", "content": "hello"}]
    assert found.apply_chat_template(message, tokenize=False) == "hello"


def test_earlier_transformers_find_both_bases_of_rope(make_family_model, tmp_path):
    """Oracle: transformers' own reading of Gemma 3's published words."""
    linear = {"rope_type": "linear", "factor": 8.0}
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        "full_attention": {**linear, "rope_theta": 3e5},
    }
    model = make_family_model("gemma3_text", rope_parameters=rope)
    save_stock(model, byte_tokenizer(), tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == rope
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (3e5, 2e4)
    del config["rope_parameters"]
    assert AutoConfig.for_model(config.pop("model_type"), **config).rope_parameters == rope


REFUSED = {
    "R3, R4: set rotation.r3=none rotation.r4=none": [],
    "R4: set rotation.r4=none": ["rotation.r3=none"],
    "across heads: set rotation.cross_head=none": [
        "rotation=no_had",
        "rotation.cross_head=hadamard",
    ],
    "R3, online transforms of single inputs, online scales of inputs: set rotation.r3=none": [
        "+method=duquant"
    ],
    "ranges of weights: set learn.lr.clip=0": ["rotation=no_had", "learn=two_cores"],
    "ranges of inputs, learned ranges of weights: set learn.lr.input_clip=0 learn.lr.clip=0": [
        *("rotation=no_had", "learn=two_cores", "learn.lr.input_clip=0.01"),
    ],
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_weights_cannot_hold_is_refused_with_its_setting(tmp_path, sentence):
    config = composed(*SMALL, *REFUSED[sentence], f"export.checkpoint={tmp_path}/c")
    with pytest.raises(InputError, match=f"16 bits cannot hold .*{sentence}"):
        check_exports(config)


@pytest.mark.parametrize(
    "taken", [["rotation=no_had"], ["rotation.online=false"], ["+method=smoothquant"]]
)
def test_what_is_fused_or_folded_is_taken(tmp_path, taken):
    check_exports(composed(*SMALL, *taken, f"export.checkpoint={tmp_path}/c"))


BROUGHT = {
    "R4": {"r4.left": torch.ones(1, 1), "r4.right": torch.eye(4)},
    "online transforms of single inputs": {"inputs.0.qkv.first": torch.eye(4)},
    "online scales of inputs": {"inputs.0.o.scale": torch.ones(4)},
    "learned ranges of inputs": {"clip.0.qkv": torch.tensor(0.5)},
    "learned ranges of keys and values": {"kv_clip.0.keys": torch.tensor(0.5)},
}


@pytest.mark.parametrize("name", BROUGHT)
def test_what_a_file_of_rotations_brings_is_refused_before_any_work(tmp_path, monkeypatch, name):
    file = tmp_path / "R.safetensors"
    monkeypatch.setattr(RotationSet, "tensors", lambda self: BROUGHT[name])
    config = composed(*SMALL, f"rotation.load={file}", f"export.checkpoint={tmp_path}/c")
    RotationSet(about={"trained": {"formats": formats_of(config.quant, config.kv)}}).save(file)
    with pytest.raises(InputError, match=f"cannot hold {name}, which rotation.load=.* brings: use"):
        check_exports(config)
    learned = replace(config, learn=LearnConfig(steps=1))
    ranges = name.startswith("learned ranges")  # which are learned anew
    with nullcontext() if ranges else pytest.raises(InputError, match="brings"):
        check_exports(learned)


def test_what_settings_cannot_tell_is_refused_when_it_is_written(make_subject, tmp_path):
    scaled = {"0.o": ScaledDual(torch.ones(32), folded=False)}
    subject = replace(make_subject("llama", FUSED), rotations=RotationSet(inputs=scaled))
    with pytest.raises(InputError, match=r"online scales of inputs: set rotation\.smooth_groups"):
        checkpoint.write(subject, str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_every_part_of_rotations_is_named():
    fields = set(RotationSet.__dataclass_fields__) - {"r1", "r2", "about"}
    # without a function of theirs: what rounds inputs finds peaks, or files hold them, and gains
    # are in norms or in weights, which any checkpoint has
    fields -= {"peaks", "keeps_gains"}
    assert fields <= parts.PARTS.keys()
