"""Tiny quantized networks, and the artefacts that they are written to."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from spinlab.config import (
    ClipSearch,
    Config,
    EvalConfig,
    KVConfig,
    ModelConfig,
    QuantConfig,
    RotationConfig,
    TensorQuant,
)
from spinlab.export.artefact import write
from spinlab.export.base import Subject
from spinlab.model.bytes import byte_tokenizer
from spinlab.model.load import load_model
from spinlab.model.modules import map_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.initial import initial_rotations
from spinlab.rotation.rotations import RotationSet
from spinlab.weights.ends import quantize_tied
from spinlab.weights.layerwise import quantize_rtn
from tests.conftest import EXPERTS

SHAPE = {
    **{"vocab_size": 260, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"max_position_embeddings": 64, "tie_word_embeddings": True, "initializer_range": 0.2},
}
ENDS = TensorQuant(bits=8, symmetric=True)
RECORD = {"experiment": "tiny", "key": "k", "metrics": {"ppl/text/integer": 9.5}, "stages": [1]}
Exported = tuple[Path, PreTrainedModel]


@pytest.fixture
def export(tmp_path) -> Callable[..., Exported]:
    """Return what exports a tiny network; it returns the folder, and the network that was meant."""

    def make(
        family: str = "llama",
        dtype: str = "float32",
        quant: QuantConfig | None = None,
        kv: KVConfig | None = None,
        change: Callable[[RotationSet], RotationSet] = lambda rotations: rotations,
        rotation: RotationConfig | None = None,
        name: str = "artefact",
        backend: str = "cpu",
    ) -> Exported:
        shape = {**SHAPE, "model_type": family, **EXPERTS.get(family, {})}
        settings = ModelConfig(architecture=shape, dtype=dtype)

        def original() -> PreTrainedModel:
            return load_model(settings, None, 0)

        quant, kv = quant or QuantConfig(), kv or KVConfig()
        measured = EvalConfig(variants=["fake"], tasks=[])
        config = Config(model=settings, quant=quant, kv=kv, seed=3, eval=measured)
        networks = QuantizedNetworks(original, quant, kv, config.seed)
        generator = torch.Generator().manual_seed(0)
        model_map = map_of(original())
        rotations = change(initial_rotations(rotation or RotationConfig(), model_map, generator))
        rotations = replace(rotations, about={"family": family})
        tied = quantize_tied(original, quant, ClipSearch())
        weights = quantize_rtn(networks.fused(rotations, tied), quant, ClipSearch(), {}) | tied
        subject = Subject(
            config,
            rotations,
            lambda: RECORD,
            original=original,
            rotated=lambda: networks.stream_rotated(rotations),
            fused=lambda weights: networks.fused(rotations, weights),
            tokenizer=byte_tokenizer,
            weights=lambda: weights,
            dtype=lambda: torch.bfloat16,
        )
        write(subject, str(tmp_path / name))
        return tmp_path / name, networks.integer(rotations, weights, backend)

    return make
