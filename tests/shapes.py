"""Tiny shapes of families that need more than widths, heads and layers."""

from typing import Any

from transformers import GptOssConfig

# heads of 6 + 4 numbers with values of 8; a mixture behind a layer with one MLP of another width
LATENTS = {
    **{"kv_lora_rank": 12, "q_lora_rank": 16, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4},
    **{"v_head_dim": 8, "n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 2},
    **{"moe_intermediate_size": 20, "first_k_dense_replace": 1},
}
DEEPSEEK = {"deepseek_v2": LATENTS, "deepseek_v3": {**LATENTS, "n_group": 2, "topk_group": 1}}
# where gates and ups are cut off, which older configurations do not say
CUT_OFF = {"swiglu_limit": 0.5} if hasattr(GptOssConfig(), "swiglu_limit") else {}


def fitted(family: str, shape: dict[str, Any]) -> dict[str, Any]:
    """Return a shape as a family has it: heads of DeepSeek have keys of their own, no head_dim."""
    if family not in DEEPSEEK:
        return shape
    heads = {"num_key_value_heads": shape["num_attention_heads"]}
    return {**DEEPSEEK[family], **{n: x for n, x in shape.items() if n != "head_dim"}, **heads}
