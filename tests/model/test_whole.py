"""A checkpoint is the whole model of its config, by transformers' own rules, and finite."""

import pytest
import torch

from spinlab.config import ModelConfig
from spinlab.errors import InputError
from spinlab.model import whole
from spinlab.model.families import FAMILIES
from spinlab.model.load import check_model, check_weights, load_model
from spinlab.model.modules import prepare
from spinlab.model.random import random_model
from spinlab.model.whole import is_finite
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
NORM = "model.layers.1.input_layernorm.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def local(folder) -> ModelConfig:
    return ModelConfig(weights="pretrained", path=str(folder))


def refusal(folder) -> str:
    with pytest.raises(InputError) as mistake:
        check_model(local(folder))
    assert "\n" not in str(mistake.value)
    return str(mistake.value)


@pytest.mark.parametrize(
    "name", [NORM, QUERY, "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"]
)
def test_a_missing_tensor_is_named(folder, name, change_tensors):
    change_tensors(folder, lambda tensors: tensors.pop(name))
    assert f"lacks {name}: it is not the whole llama model" in refusal(folder)


@pytest.mark.parametrize("part", ["q_norm.weight", "k_norm.weight"])
def test_a_missing_norm_of_single_heads_is_named(tmp_path, part, save_checkpoint, change_tensors):
    save_checkpoint(tmp_path, model_type="qwen3")
    change_tensors(tmp_path, lambda tensors: tensors.pop(f"model.layers.0.self_attn.{part}"))
    assert f"lacks model.layers.0.self_attn.{part}" in refusal(tmp_path)


QWEN3_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors: tensors.pop(EXPERT), f"lacks {EXPERT}: it is not the whole"),
        (
            lambda tensors: tensors.update({EXPERT: tensors[EXPERT][:-1].clone()}),
            f"has {EXPERT} of shape (23, 20) for (24, 20)",
        ),
        (
            lambda tensors: tensors.update({EXPERT.replace(".2.", ".9."): tensors[EXPERT].clone()}),
            f"holds {EXPERT.replace('.2.', '.9.')}, which qwen3_moe has no place for",
        ),
    ],
    ids=["missing", "of another shape", "left over"],
)
def test_a_matrix_of_an_expert_that_does_not_fit_is_named(
    tmp_path, save_checkpoint, change_tensors, change, sentence
):
    """In files experts have a tensor each, which transformers stacks as it loads them."""
    save_checkpoint(tmp_path, model_type="qwen3_moe", **QWEN3_MOE)
    check_model(local(tmp_path))
    change_tensors(tmp_path, change)
    assert sentence in refusal(tmp_path)


def test_a_mixture_in_shards_is_loaded_as_it_was_saved(tmp_path, save_checkpoint):
    shape = {"model_type": "mixtral", "num_local_experts": 4}
    save_checkpoint(tmp_path, size="20KB", **shape)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check_model(local(tmp_path))
    check_weights(local(tmp_path))
    found = load_model(local(tmp_path), None, 0).state_dict()
    expected = prepare(random_model(ModelConfig(architecture={**SHAPE, **shape}), 0)).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_missing_biases_are_counted(tmp_path, save_checkpoint, change_tensors):
    save_checkpoint(tmp_path, model_type="qwen2")
    change_tensors(
        tmp_path, lambda tensors: [tensors.pop(n) for n in [*tensors] if n.endswith("bias")]
    )
    assert "and 3 more tensors" in refusal(tmp_path)  # q, k, v of two layers, three of them named


def test_a_tensor_without_a_place_is_named(folder, change_tensors):
    change_tensors(folder, lambda tensors: tensors.update(extra=torch.zeros(3)))
    assert "holds extra, which llama has no place for" in refusal(folder)


@pytest.mark.parametrize("name", [NORM, QUERY])
def test_a_tensor_of_another_shape_is_named_with_both(folder, name, change_tensors):
    def cut(tensors):
        tensors[name] = tensors[name][:-1].contiguous()

    change_tensors(folder, cut)
    assert f"has {name} of shape (" in refusal(folder)


def test_layers_that_the_config_does_not_count_are_not_dropped(folder, change_json):
    change_json(folder / "config.json", lambda settings: settings.update(num_hidden_layers=1))
    assert "holds model.layers.1." in refusal(folder)


def test_another_prefix_is_refused(folder, change_tensors):
    def rename(tensors):
        for name in [*tensors]:
            tensors[f"module.{name}"] = tensors.pop(name)

    change_tensors(folder, rename)
    assert "lacks " in refusal(folder)
    assert "holds module.lm_head.weight" in refusal(folder)


def test_a_bare_decoder_is_refused_for_the_head_that_it_lacks(tmp_path, save_checkpoint):
    """transformers would draw a fresh head; with tied embeddings none is missing."""
    for tied in (False, True):
        folder = tmp_path / str(tied)
        save_checkpoint(folder, tie_word_embeddings=tied)
        random_model(ModelConfig(architecture=SHAPE), 0).model.save_pretrained(tmp_path / "bare")
        (tmp_path / "bare" / "model.safetensors").rename(folder / "model.safetensors")
    assert "lacks lm_head.weight" in refusal(tmp_path / "False")
    check_model(local(tmp_path / "True"))


def test_integers_are_no_weights(folder, change_tensors):
    def round_off(tensors):
        tensors[QUERY] = tensors[QUERY].to(torch.int8)

    change_tensors(folder, round_off)
    assert f"{QUERY} holds I8 numbers" in refusal(folder)


# in one file and in many: every two of family, tie and size meet
SAVED = [
    (family, tied, ("1GB", "30KB")[(place + tied) % 2])
    for place, family in enumerate(sorted(FAMILIES))
    for tied in (False, True)
]


@pytest.mark.parametrize(("family", "tied", "size"), SAVED)
def test_what_transformers_saves_is_whole(tmp_path, family, tied, size, save_checkpoint):
    dtype = torch.bfloat16 if tied else torch.float16
    shape = {"model_type": family, "tie_word_embeddings": tied, **EXPERTS.get(family, {})}
    if family == "stablelm":  # its heads make up the stream
        shape["hidden_size"] = 32
    save_checkpoint(tmp_path, dtype, size, **shape)
    config = local(tmp_path)
    check_model(config)
    check_weights(config)
    settings = ModelConfig(architecture=fitted(family, {**SHAPE, **shape}))
    saved = random_model(settings, 0).to(dtype)
    expected = prepare(saved.float())
    loaded = load_model(config, None, 0)
    norm, embedding = loaded.model.norm.weight, loaded.model.embed_tokens.weight
    assert torch.equal(norm, expected.model.norm.weight)
    assert torch.equal(embedding, expected.model.embed_tokens.weight)


def test_old_frequencies_of_rope_and_a_stored_tied_head_are_harmless(
    tmp_path, save_checkpoint, change_tensors
):
    save_checkpoint(tmp_path, tie_word_embeddings=True)

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    before = load_model(local(tmp_path), None, 0)(torch.arange(9)[None]).logits
    change_tensors(tmp_path, add)
    check_model(local(tmp_path))
    check_weights(local(tmp_path))
    assert torch.equal(load_model(local(tmp_path), None, 0)(torch.arange(9)[None]).logits, before)


@pytest.mark.parametrize("size", ["1GB", "30KB"])
def test_a_head_of_its_own_beside_a_config_that_ties_it_is_refused(
    tmp_path, size, save_checkpoint, change_json, monkeypatch
):
    """transformers runs it untied, and its config goes on to say tied."""
    monkeypatch.setattr(whole, "_CHUNK", 24 * 7)  # compared in pieces
    save_checkpoint(tmp_path, size=size, tie_word_embeddings=False)
    check_weights(local(tmp_path))
    change_json(tmp_path / "config.json", lambda s: s.update(tie_word_embeddings=True))
    check_model(local(tmp_path))
    words = r"tie_word_embeddings=true, and lm_head.weight is not model.embed_tokens.weight"
    with pytest.raises(InputError, match=words):
        check_weights(local(tmp_path))


def test_loading_reads_the_report_too(folder, change_tensors):
    """The second line of defence: a file that changed since it was looked at."""
    change_tensors(folder, lambda tensors: tensors.pop(NORM))
    with pytest.raises(InputError, match=f"lacks {NORM}"):
        load_model(local(folder), None, 0)
    change_tensors(folder, lambda tensors: tensors.update({NORM: torch.ones(7)}))
    with pytest.raises(InputError, match=rf"has {NORM} of shape \(7,\) for \(24,\)"):
        load_model(local(folder), None, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_number_that_is_none_is_found(folder, dtype, bad, change_tensors):
    """In an embedding row, where no window of text need meet it."""

    def spoil(tensors):
        tensors["model.embed_tokens.weight"][201, 7] = bad
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(dtype)

    change_tensors(folder, spoil)
    with pytest.raises(InputError, match=r"model.embed_tokens.weight in model.safetensors holds"):
        check_weights(local(folder))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_largest_numbers_are_finite(dtype):
    limits = torch.finfo(dtype)
    assert is_finite(torch.tensor([limits.max, limits.min, limits.tiny, 0], dtype=dtype))
    assert is_finite(torch.empty(0, dtype=dtype))
    assert not is_finite(torch.tensor([1, torch.nan], dtype=dtype))
