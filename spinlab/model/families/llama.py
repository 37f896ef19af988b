"""Llama, and the families that took its module names over: Mistral, Qwen2, Qwen3, and others.

Qwen3's norms of single queries and keys stay as they are: they act between linears that write no
rotated space and R3. SmolLM3 turns the queries and keys of some layers by no RoPE, which R3 does
not miss.
"""

from dataclasses import replace
from functools import partial

from spinlab.model.families.decoder import read_decoder
from spinlab.model.families.names import Names
from spinlab.model.map import Family

NAMES = Names(
    layers="model.layers",
    embedding="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    rope="model.rotary_emb",
    attention="self_attn",
    mlp="mlp",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    queries="self_attn.q_proj",
    keys="self_attn.k_proj",
    values="self_attn.v_proj",
    out="self_attn.o_proj",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
)

LLAMA = Family(partial(read_decoder, names=replace(NAMES, adds=True)))
