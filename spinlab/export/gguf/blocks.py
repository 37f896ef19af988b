"""Tensors as GGUF holds them: float16 and float32, and blocks of 32 levels with a float16 scale.

Q4_0 is d·(q - 8) with 4 bits for q, the first 16 numbers of a block in the low halves of its bytes;
Q8_0 is d·q with q in a signed byte, -128 among them. Symmetric integers in groups of 32 inputs are
the same numbers: only their scale is rounded, to d.
"""

import gguf
import numpy as np
import torch

from spinlab.config import TensorQuant
from spinlab.errors import InputError
from spinlab.export.scales import stored_scale
from spinlab.formats import IntegerFormat, name_of
from spinlab.weights.quantized import QuantizedWeight

BLOCK = 32
TYPES = {4: gguf.GGMLQuantizationType.Q4_0, 8: gguf.GGMLQuantizationType.Q8_0}  # by bits


def fits(format: TensorQuant) -> bool:
    """Tell whether a type of GGUF holds what a format makes; 16 bits stand for float16."""
    levels = format.format == "integer" and format.symmetric and format.group_size == BLOCK
    return not format.quantizes or (levels and format.bits in TYPES)


def half(name: str, numbers: torch.Tensor) -> np.ndarray:
    """Return numbers in float16; raise InputError where one is beyond it."""
    rounded = numbers.detach().cpu().to(torch.float16)
    if not rounded.isfinite().all():
        raise InputError(
            f"{name} holds {numbers.abs().max().item():.3g}, and GGUF stores float16, up to 65504: "
            "use another export"
        )
    return rounded.numpy()


def type_of(name: str, weight: QuantizedWeight) -> gguf.GGMLQuantizationType:
    """Return the type of blocks that hold a weight; raise InputError where none does."""
    format, width = weight.format, weight.levels.shape[1] // weight.groups
    symmetric = isinstance(format, IntegerFormat) and format.symmetric
    if not symmetric or format.bits not in TYPES or width != BLOCK:
        kind = f"{'symmetric ' if format.symmetric else ''}{name_of(format)}"
        raise InputError(
            f"{name} is {kind} of {format.bits} bits in groups of {width} inputs, and blocks of "
            f"GGUF are symmetric integers of 4 or 8 bits in groups of {BLOCK}: use another export"
        )
    return TYPES[format.bits]


def packed(name: str, weight: QuantizedWeight) -> np.ndarray:
    """Return a weight (out, in) as blocks: (out, bytes of a row) uint8.

    Raises InputError for what blocks, or their scales, do not hold.
    """
    kind, rows = type_of(name, weight), weight.levels.shape[0]
    scales = stored_scale(name, weight, torch.float16).numpy()[..., None].view(np.uint8)
    levels = weight.levels.cpu().unflatten(1, (-1, BLOCK)).numpy()
    if kind == TYPES[4]:
        low, high = np.split((levels + 8).astype(np.uint8), 2, axis=-1)
        numbers = low | high << 4
    else:
        numbers = levels.astype(np.int8).view(np.uint8)
    return np.concatenate((scales, numbers), axis=-1).reshape(rows, -1)
