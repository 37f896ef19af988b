"""Models of well-known shapes with random weights, made where they are needed."""

from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

SHAPES: dict[str, dict[str, Any]] = {
    "toy": {
        "vocab_size": 128,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "smollm2_135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "llama2_7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama2_13b": {
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
    "llama2_70b": {
        "vocab_size": 32000,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
DTYPES = {
    "toy": torch.float32,
    "smollm2_135m": torch.float32,
    "llama2_7b": torch.bfloat16,
    "llama2_13b": torch.bfloat16,
    "llama2_70b": torch.bfloat16,
}


def random_llama(name: str, layers: int | None, device: torch.device) -> PreTrainedModel:
    """Draw a model of a named shape on the device itself, head and embedding apart.

    layers: fewer than the shape has, for a quick look.
    """
    shape = {**SHAPES[name], "max_position_embeddings": 4096, "tie_word_embeddings": False}
    if layers is not None:
        shape["num_hidden_layers"] = layers
    with device:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=DTYPES[name])
    return cast(PreTrainedModel, model).eval().requires_grad_(False)
