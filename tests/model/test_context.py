"""Windows are held against the model's context."""

import pytest
from transformers import LlamaConfig

from spinlab.compose import composed
from spinlab.errors import InputError
from spinlab.model.context import check_context, context_of
from spinlab.model.random import architecture_of


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (None, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 16384),  # Vicuna-16k
        ({"rope_type": "dynamic", "factor": 2.0}, 8192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        (  # Llama 3.2: the config counts its stretched positions itself
            {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 1024,
             "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            4096,
        ),
    ],
)  # fmt: skip
def test_the_context_is_what_positions_are_made_for(rope, expected):
    settings = LlamaConfig(
        max_position_embeddings=4096, rope_parameters=rope and dict(rope, rope_theta=1e4)
    )
    assert context_of(settings) == expected


def test_a_sliding_window_is_no_limit():
    config = composed(
        "+experiment=toy",
        "model=random",
        "model.architecture.max_position_embeddings=4096",
        "+model.architecture.sliding_window=128",
        "+model.architecture.model_type=mistral",
        "eval.window=4096",
    )
    settings = architecture_of(config.model)
    assert (settings.sliding_window, context_of(settings)) == (128, 4096)
    check_context(config, settings)


def test_a_window_in_use_is_held_against_the_context_and_another_is_not():
    settings = LlamaConfig(max_position_embeddings=512)
    unused = ["learn=none", "learn.sequence_length=9999", "weights.gptq.sequence_length=9999"]
    check_context(composed("+experiment=toy", *unused), settings)
    with pytest.raises(InputError, match=r"gptq.sequence_length=9999 is longer than the 512"):
        check_context(composed("+experiment=toy", *unused, "weights=gptq"), settings)


@pytest.mark.parametrize("name", ["toy", "smollm2_135m_w4a4kv4", "smollm2_135m_w4a4kv4_full"])
@pytest.mark.parametrize("method", ["", "+method=quarot", "+method=spinquant_had"])
def test_committed_windows_fit_their_models(name, method):
    context = {"toy": 512}.get(name, 8192)
    config = composed(f"+experiment={name}", *([method] if method else []))
    check_context(config, LlamaConfig(max_position_embeddings=context))
