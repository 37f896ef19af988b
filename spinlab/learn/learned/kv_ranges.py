"""Learned ranges of the cache: a static clip ratio for the keys and one for the values of a layer.

Every token and head still has its own extremes; the ratio says how much of their range is kept, as
for inputs (`spinlab.learn.learned.input_ranges`).
"""

from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from spinlab.config.kv import KEPT, Kept
from spinlab.formats.gradient import round_in_range
from spinlab.kv.base import RowCodec
from spinlab.kv.cache import kv_path_of, set_kv_path
from spinlab.kv.codecs.affine import AffineCodec
from spinlab.kv.path import Sides
from spinlab.learn.learned.log_parameters import LogParameters
from spinlab.model.modules import map_of
from spinlab.rotation.rotations import kv_clip_key


def learn_kv_ranges(model: PreTrainedModel, lr: float) -> LogParameters:
    """Put learned clip ratios in place of those of a model's codecs; return them by `kv_clip_key`.

    What stays in 16 bits is left as it is. Ratios are float32 scalars and stay <= 1. Gradients
    gather where the backward pass leaves them, until the next step.
    """
    ratios, path = LogParameters(lr, most=1.0), kv_path_of(model)
    layers = [path.sides(layer)._asdict() for layer in range(len(map_of(model).layers))]
    starts: dict[str, torch.Tensor] = {}

    def learned(layer: int, side: Kept) -> RowCodec | None:
        codec = layers[layer][side]
        if codec is None:
            return None
        assert isinstance(codec, AffineCodec), "settings are checked"
        key = kv_clip_key(layer, side)
        starts[key] = torch.tensor(codec.clip_ratio, dtype=torch.float32, device=model.device)
        parts = codec.grid, codec.width, codec.group_size, codec.clip_ratio
        return LearnedCodec(*parts, ratios=ratios, key=key)

    sides = tuple(Sides(*(learned(layer, side) for side in KEPT)) for layer in range(len(layers)))
    set_kv_path(model, replace(path, layers=sides))
    if starts:
        ratios.start(starts)
    return ratios


@dataclass(frozen=True, eq=False)
class LearnedCodec(AffineCodec):
    """Stand in for an affine codec where nothing is stored, and round within a learned range."""

    ratios: LogParameters = field(kw_only=True)
    key: str = field(kw_only=True)

    def __eq__(self, other: object) -> bool:
        return self is other  # the ratio is its own

    __hash__ = object.__hash__

    def pass_through(self, x: torch.Tensor) -> torch.Tensor:
        """Round x: (..., width), with a gradient for x and for the ratio."""
        return round_in_range(x, self.ratios.logs[self.key], self.quantizer.format, self.group_size)

    def pass_by_range(self, x: torch.Tensor) -> torch.Tensor:
        """Do the same, which knows the range already."""
        return self.pass_through(x)
