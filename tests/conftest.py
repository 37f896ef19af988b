"""Shared fixtures: tiny stock models that stand for the real ones."""

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from spinlab.model.load import exact_norms
from spinlab.model.seams import LLAMA

ARCHITECTURE = {
    "vocab_size": 64,
    "hidden_size": 24,  # 12·2: no power of two
    "intermediate_size": 40,  # 20·2
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,  # not hidden / heads
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """Return a maker of identical tiny Llamas with random weights and norm gains."""

    def make(dtype: torch.dtype = torch.float64, seed: int = 0, **changes) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**{**ARCHITECTURE, **changes}))
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.data.uniform_(0.3, 2.0)
                else:
                    parameter.data.mul_(10)  # logits with some spread
        if dtype == torch.float64:
            exact_norms(model, LLAMA)
        return model.to(dtype).eval().requires_grad_(False)

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
