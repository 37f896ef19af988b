"""Tiny models of every family, rotated and rounded, as an export is given them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from spinlab.config import (
    ClipSearch,
    CodecConfig,
    Config,
    EvalConfig,
    ExportConfig,
    KVConfig,
    LearnConfig,
    ModelConfig,
    QuantConfig,
    RotationConfig,
    TensorQuant,
)
from spinlab.export.base import Subject
from spinlab.model.bytes import byte_tokenizer
from spinlab.model.load import load_model
from spinlab.model.modules import map_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.initial import initial_rotations
from spinlab.weights.layerwise import quantize_rtn

SHAPE = {
    **{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128},
    **{"initializer_range": 0.15, "tie_word_embeddings": True},
}


def settings(kind: str = "f16", path: str = "m.gguf", **shape: Any) -> Config:
    """Return the settings of an export whose networks the type holds."""
    off = TensorQuant(bits=16, symmetric=True)
    bits = {"f16": 16, "q4_0": 4, "q8_0": 8}[kind]
    levels = TensorQuant(bits=bits, symmetric=True, group_size=32) if bits < 16 else off
    codec = CodecConfig(bits=16)
    return Config(
        model=ModelConfig(architecture={**SHAPE, **shape}),
        rotation=RotationConfig(r4="none"),
        quant=QuantConfig(weights=levels, activations=off),
        kv=KVConfig(keys=codec, values=codec),
        learn=LearnConfig(steps=0),
        eval=EvalConfig(variants=["fp", "fake"], task_variants=["fake"]),
        export=ExportConfig(gguf=path, gguf_type=kind),
    )


def original(config: Config) -> PreTrainedModel:
    """Return a model of the settings' shape with drawn weights, gains and biases."""
    model = load_model(config.model, None, 0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.3, generator=generator)
        elif "norm" in name:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return model


@pytest.fixture
def make_original() -> Callable[[Config], PreTrainedModel]:
    return original


@pytest.fixture
def make_subject() -> Callable[..., Subject]:
    """Return a maker of subjects of these models."""

    def make(config: Config, tokenizer: PreTrainedTokenizerBase | None = None) -> Subject:
        networks = QuantizedNetworks(lambda: original(config), config.quant, config.kv)
        generator = torch.Generator().manual_seed(2)
        rotations = initial_rotations(config.rotation, map_of(original(config)), generator)
        weights = {}
        if config.quant.rounds_weights:
            weights = quantize_rtn(networks.fused(rotations), config.quant, ClipSearch(), {})
        return Subject(
            config,
            rotations,
            {"key": "0123", "metrics": {"ppl": 1.5}, "stages": []},
            rotated=lambda: networks.stream_rotated(rotations),
            fused=lambda replaced: networks.fused(rotations, replaced),
            tokenizer=lambda: tokenizer or byte_tokenizer(),
            weights=lambda: weights,
        )

    return make


@pytest.fixture
def read_back() -> Callable[..., PreTrainedModel]:
    """Return transformers' reader of a file; config: where a GGUF does not tell it all."""

    def read(file: Path, config: Any = None) -> PreTrainedModel:
        if config is not None:
            config = type(config).from_dict(config.to_dict())
        load: Any = AutoModelForCausalLM.from_pretrained
        more = {} if config is None else {"config": config}
        return load(file.parent, gguf_file=file.name, dtype=torch.float32, **more).eval()

    return read


@pytest.fixture
def make_settings() -> Callable[..., Config]:
    return settings


@pytest.fixture
def changed() -> Callable[..., Config]:
    """Return what exchanges settings of one part of a config."""

    def change(config: Config, part: str, **values: Any) -> Config:
        return replace(config, **{part: replace(getattr(config, part), **values)})

    return change
