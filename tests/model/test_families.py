"""Every family in the table, tiny and in float64: what rotations promise holds for each."""

import pytest
import torch

from spinlab.config import KVConfig, QuantConfig, RotationConfig
from spinlab.kv.cache import CodedCache, attach_kv
from spinlab.kv.path import KVPath
from spinlab.model.families import FAMILIES
from spinlab.model.modules import layers_of, linear_at, linears_of, map_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.check import BrokenSite, check_invariance, logits, logits_error
from spinlab.rotation.initial import initial_rotations
from spinlab.rotation.online import hadamard_rotation
from tests.shapes import CUT_OFF

UNTIED = {"tie_word_embeddings": False}
MULTI_HEAD = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 12}
SLIDES_WITHOUT_ROPE = {"use_sliding_window": True, "sliding_window": 5, "no_rope_layers": [1, 0]}
SOME_LAYERS_SLIDE = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}

MULTIPLIERS = {
    **{"embedding_multiplier": 3.0, "residual_multiplier": 0.3},
    **{"attention_multiplier": 0.2, "logits_scaling": 5.0},
}

SLIDES = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {**YARN, "rope_theta": 5e4},
}

# caps that scores and logits of the tiny models reach; layers that slide first
CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}
LOCAL_FIRST = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
GLOBAL_FIRST = {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]}
GEMMA = {"query_pre_attn_scalar": 6}  # no head_dim
GEMMA_YARN = {"rope_parameters": TWO_ROPES, "attention_bias": True}
NO_DENSE_LAYER = {"first_k_dense_replace": 0, "moe_intermediate_size": 20}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
# the best of the best groups of experts; RoPE that stretches scales attention too
LIMITED = {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2}
SCALED = {"rope_parameters": {**YARN, "rope_theta": 1e4, "mscale_all_dim": 0.7}}

# the base shape has tied embeddings, 4 query and 2 key/value heads of 8 = not hidden 24 / heads 4
SHAPES = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, **UNTIED}),
    ("llama", {"num_key_value_heads": 1, "head_dim": 24}),
    ("mistral", {"sliding_window": 5}),
    ("mistral", {"sliding_window": None, **MULTI_HEAD, **UNTIED}),
    ("qwen2", {"head_dim": None, "hidden_size": 48}),
    ("qwen2", {"head_dim": 16, **SOME_LAYERS_SLIDE, **UNTIED}),
    ("qwen3", {"head_dim": 16}),
    ("qwen3", {"attention_bias": True, **SOME_LAYERS_SLIDE, **MULTI_HEAD, **UNTIED}),
    ("smollm3", {"no_rope_layers": [1, 0]}),
    ("smollm3", {"attention_bias": True, "no_rope_layers": [0, 1], **UNTIED}),
    ("smollm3", {"head_dim": 16, **SLIDES_WITHOUT_ROPE, **UNTIED}),
    ("seed_oss", {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}),
    ("ministral", {**SLIDES, **UNTIED}),
    ("phi3", {"head_dim": None, "hidden_size": 48}),
    ("phi3", {"sliding_window": 5, **MULTI_HEAD, **UNTIED}),
    ("phi3", {"head_dim": 24, "num_key_value_heads": 1}),
    ("glm", {"attention_bias": True}),
    ("glm", {**MULTI_HEAD, **UNTIED}),
    ("glm4", {"head_dim": 24, "num_key_value_heads": 1}),
    ("glm4", {"attention_bias": True, **UNTIED}),
    ("granite", MULTIPLIERS),
    ("cohere", {"logit_scale": 0.3}),
    ("cohere", {"attention_bias": True, "use_qk_norm": True, **MULTI_HEAD, **UNTIED}),
    ("stablelm", {}),
    ("stablelm", {"use_qkv_bias": True, "num_key_value_heads": 4, **UNTIED}),
    ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True, **UNTIED}),
    ("olmo2", {}),
    ("olmo2", {"attention_bias": True, **MULTI_HEAD, **UNTIED}),
    ("olmo2", {"num_key_value_heads": 1, "head_dim": 24}),
    ("olmo3", {"sliding_window": 5}),
    ("olmo3", {**SLIDES, "rope_parameters": TWO_ROPES, "attention_bias": True, **UNTIED}),
    ("exaone4", {"head_dim": 12}),
    ("exaone4", {**SLIDES, **UNTIED}),
    ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    ("gemma", {}),
    ("gemma", {"attention_bias": True, **MULTI_HEAD, **UNTIED}),
    ("gemma2", {**CAPS, **LOCAL_FIRST, **GEMMA}),
    ("gemma2", {**CAPS, **GLOBAL_FIRST, "attention_bias": True, **MULTI_HEAD, **UNTIED}),
    ("gemma2", {"attn_logit_softcapping": None, "head_dim": 24, "num_key_value_heads": 1}),
    ("gemma3_text", {**LOCAL_FIRST, **GEMMA}),
    ("gemma3_text", {**CAPS, **GLOBAL_FIRST, **GEMMA_YARN, "head_dim": 12, **UNTIED}),
    ("granite", {"attention_bias": True, "mlp_bias": True, **MULTIPLIERS, **MULTI_HEAD, **UNTIED}),
    ("qwen3_moe", EXPERTS),
    ("qwen3_moe", {"attention_bias": True, "norm_topk_prob": True, **EXPERTS, **UNTIED}),
    ("qwen3_moe", {**EXPERTS, "moe_intermediate_size": 40, "mlp_only_layers": [0]}),
    ("olmoe", {"num_experts": 5, "num_experts_per_tok": 2}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 5, **UNTIED}),
    ("qwen2_moe", {}),
    ("qwen2_moe", {"qkv_bias": False, "norm_topk_prob": True, **SOME_LAYERS_SLIDE, **UNTIED}),
    ("granitemoe", {**MULTIPLIERS, "attention_bias": True}),
    ("glm4_moe", {"attention_bias": True}),
    ("glm4_moe", {"use_qk_norm": True, **NO_DENSE_LAYER, **UNTIED}),
    ("llama4_text", {}),
    ("llama4_text", {"use_qk_norm": False, "num_experts_per_tok": 2, "attention_bias": True}),
    ("llama4_text", {"interleave_moe_layer_step": 2, "no_rope_layers": [1, 1], **UNTIED}),
    ("gpt_oss", {"sliding_window": 5}),
    ("gpt_oss", {"attention_bias": False, "rope_parameters": YARN, **CUT_OFF, **UNTIED}),
    ("phimoe", {}),
    ("phimoe", {"attention_bias": True, "lm_head_bias": True, "sliding_window": 5, **UNTIED}),
    ("deepseek_v2", {}),
    ("deepseek_v2", {"q_lora_rank": None, **LIMITED, "mlp_bias": True, **UNTIED}),
    ("deepseek_v2", {"first_k_dense_replace": 2, "attention_bias": True}),
    ("deepseek_v3", {"attention_bias": True, **UNTIED}),
    ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False, "norm_topk_prob": False}),
    ("deepseek_v3", {"first_k_dense_replace": 0, "v_head_dim": 12, **SCALED}),
]
# with four norms a layer: of heads, or behind blocks
NORMED = ("exaone4", "gemma2", "glm4", "olmo2", "olmo3", "olmoe", "qwen3", "qwen3_moe")
every_shape = pytest.mark.parametrize(("family", "changes"), SHAPES, ids=str)
one_of_each = pytest.mark.parametrize("family", sorted(FAMILIES))


def test_every_family_is_tested():
    assert {family for family, _ in SHAPES} == set(FAMILIES)


@every_shape
@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_rotations_keep_the_logits(make_family_model, fitting, ids, family, changes, kind):
    original = make_family_model(family, **changes)
    config = fitting(RotationConfig(r1=kind, r2=kind, r3=kind, r4=kind), map_of(original))
    generator = torch.Generator().manual_seed(0)
    rotations = initial_rotations(config, map_of(original), generator)
    networks = QuantizedNetworks(
        lambda: make_family_model(family, **changes), QuantConfig(), KVConfig()
    )
    rotated = networks.rotated(rotations)
    assert logits_error(logits(rotated, ids), logits(original, ids)) < 1e-9


@pytest.mark.parametrize("site", ["self_attn.qkv_proj.v_proj", "mlp.gate_up_proj.up_proj"])
def test_a_broken_part_of_a_fused_linear_is_named(make_family_model, ids, site):
    original = make_family_model("phi3")
    networks = QuantizedNetworks(lambda: make_family_model("phi3"), QuantConfig(), KVConfig())
    rotations = initial_rotations(
        RotationConfig(), map_of(original), torch.Generator().manual_seed(0)
    )
    rotated = networks.rotated(rotations)
    weight = rotated.get_submodule(f"model.layers.1.{site}").weight
    weight.data = weight.data.roll(1, 0)
    with pytest.raises(BrokenSite, match=f"model.layers.1.{site}"):
        check_invariance(lambda: original, lambda: rotated, rotations, ids[:1])


@every_shape
def test_every_linear_of_a_layer_is_a_site(make_family_model, family, changes):
    model = make_family_model(family, **changes)
    named = {site.path for site, _ in linears_of(model)}
    every = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert named == every - {"lm_head"}


@every_shape
def test_dimensions_are_the_widths_of_the_weights(make_family_model, family, changes):
    model = make_family_model(family, **changes)
    found = map_of(model).dimensions
    shapes = {site.name.rpartition(".")[2]: m.weight.shape for site, m in linears_of(model)}
    assert all(
        m.weight.shape == (site.out_features, site.in_features) for site, m in linears_of(model)
    )
    if (latent := map_of(model).latent) is None:
        assert shapes["q_proj"] == (found.heads * found.head_dim, found.hidden)
        assert shapes["v_proj"] == (found.kv_heads * found.head_dim, found.hidden)
    else:
        source = model.config.q_lora_rank, "q_b_proj"
        source = source if source[0] else (found.hidden, "q_proj")
        assert shapes[source[1]] == (found.heads * found.head_dim, source[0])
        assert shapes["v_proj"] == (found.heads * model.config.v_head_dim, latent.width)
        assert shapes["k_proj"][0] + found.heads * latent.turned == found.heads * found.head_dim
        assert found.cached == (1, *(shapes[n][0] for n in ("turned_proj", "latent_proj")))
    assert shapes["down_proj"] == (found.hidden, found.intermediate)
    assert len(layers_of(model)) == found.layers


@every_shape
def test_scales_move_between_an_input_and_its_producer(make_family_model, ids, family, changes):
    """Rows or gains of the producer times s, columns of the readers by s: the same function."""
    model, original = (make_family_model(family, **changes) for _ in range(2))
    described = map_of(model)
    head_dim = described.dimensions.head_dim
    for input in described.inputs:
        if input.producer is None:  # the stream itself
            continue
        producer = model.get_submodule(input.producer)
        scale = torch.linspace(0.5, 2, len(producer.weight), dtype=torch.float64)
        of_rows = scale.view(-1, *[1] * (producer.weight.dim() - 1))
        producer.weight.data = (producer.weight.data + input.offset) * of_rows - input.offset
        if getattr(producer, "bias", None) is not None:
            producer.bias.data *= scale
        if input.shared > 1:  # query heads share their key/value head's scales
            scale = scale.view(-1, head_dim).repeat_interleave(input.shared, 0).flatten()
        for site in described.sites:
            if site.key == input.key:
                linear_at(model, site.path).weight.data /= scale
    assert logits_error(logits(model, ids), logits(original, ids)) < 1e-9


@every_shape
def test_generation_with_the_coded_cache_is_stock_generation(
    make_family_model, ids, family, changes
):
    """A left-padded batch, longer than every sliding window, step by step; biases are apart."""
    original, coded = (make_family_model(family, **changes) for _ in range(2))
    r3 = hadamard_rotation(map_of(coded).width("r3"))
    attach_kv(coded, KVPath(r3, apart=True), store=True)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings = {"do_sample": False, "min_new_tokens": 12, "max_new_tokens": 12, "pad_token_id": 0}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    expected, found = (m.generate(ids, attention_mask=mask, **settings) for m in (original, coded))
    assert isinstance(found.past_key_values, CodedCache)
    assert torch.equal(found.sequences, expected.sequences)
    steps = zip(found.logits, expected.logits, strict=True)
    assert all(logits_error(a, b) < 1e-9 for a, b in steps)


@pytest.mark.parametrize("family", ["mistral", "phi3", "olmo3", "gemma2", "gemma3_text", "gpt_oss"])
def test_a_sliding_window_is_seen_through_the_coded_cache(make_family_model, ids, family):
    sliding, whole = make_family_model(family, sliding_window=5), make_family_model(family)
    for model in (sliding, whole):
        attach_kv(model, KVPath(), store=True)
    near, far = logits(sliding, ids), logits(whole, ids)
    assert torch.allclose(near[:, :5], far[:, :5], atol=1e-12)
    assert not torch.allclose(near[:, 5:], far[:, 5:], atol=1e-3)


@one_of_each
def test_every_norm_of_a_float64_model_is_exact(make_family_model, family):
    model = make_family_model(family)
    norms = [m for n, m in model.named_modules() if n.rpartition(".")[2].endswith("norm")]
    norms = [norm for norm in norms if [*norm.parameters()]]  # Llama 4's of heads have no gains
    expected = {"cohere": 3, **dict.fromkeys(NORMED, 9)}
    expected |= dict.fromkeys(("deepseek_v2", "deepseek_v3"), 9)  # of two latents
    expected["gemma3_text"] = 13
    offset = 1 if family.startswith("gemma") else 0
    assert len(norms) == expected.get(family, 5)
    known = model.config.to_dict()
    epsilon = known.get("rms_norm_eps") or known["layer_norm_eps"]
    for norm in norms:
        x = torch.randn(3, len(norm.weight), dtype=torch.float64)
        mean = x.square().mean(-1, keepdim=True)
        expected = x / (mean + epsilon).sqrt() * (offset + norm.weight)
        assert torch.allclose(norm(x), expected, atol=1e-14, rtol=0)
