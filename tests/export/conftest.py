"""What exports are given, made of tiny models."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from spinlab.config import Config
from spinlab.export.base import Subject
from spinlab.fakequant.peaks import input_peaks
from spinlab.model.bytes import byte_tokenizer
from spinlab.model.load import cast_model
from spinlab.model.modules import map_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.initial import initial_rotations
from spinlab.weights.layerwise import quantize_rtn


@pytest.fixture
def make_subject(make_family_model, fitting) -> Callable[..., Subject]:
    """Return a maker of subjects: float32 models of a family, rotated and rounded to nearest.

    Rotations that a family refuses are left out.
    """

    def make(model_type: str, config: Config, seed: int = 0, **changes) -> Subject:
        def original():
            return cast_model(make_family_model(model_type, seed, **changes), torch.float32)

        model_map, generator = map_of(original()), torch.Generator().manual_seed(seed)
        config = replace(config, rotation=fitting(config.rotation, model_map))
        rotations = initial_rotations(config.rotation, model_map, generator)
        networks = QuantizedNetworks(original, config.quant, config.kv)
        if config.quant.calibrates:
            text = torch.randint(0, 50, (4, 16), generator=generator)
            peaks = input_peaks(networks.rotated(rotations), text, config.quant)
            rotations = replace(rotations, peaks=peaks)

        def weights():
            model = networks.fused(rotations)
            return quantize_rtn(model, config.quant, config.weights.clip, {})

        return Subject(
            config,
            replace(rotations, about={"family": model_type}),
            lambda: {"name": "tiny"},
            original=original,
            rotated=lambda: networks.stream_rotated(rotations),
            fused=lambda rounded: networks.fused(rotations, rounded),
            tokenizer=byte_tokenizer,
            weights=weights,
            dtype=lambda: torch.bfloat16,
        )

    return make
