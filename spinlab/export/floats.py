"""MXFP4 and NVFP4 in compressed-tensors' words. Read in compressed-tensors 0.20.0.

A byte holds the codes of two neighbours, the first in its low half. A weight's scales are bytes of
E8M0, or E4M3 numbers with one float32 that they are divided by. Levels and scales are spinlab's
own, with no bit rounded.

An input in NVFP4 has one such float32, `input_global_scale`, from calibration, and a reader gives
every group the scale max|x|/6 times that, rounded to E4M3 (`dynamic: local`). Inputs of that name
are spinlab's `CalibratedNVFP4`, whose scale of the tensor is its inverse, a power of two.
"""

from collections.abc import Sequence
from typing import Any

import torch

from spinlab.errors import InputError
from spinlab.export.profiles import Scheme
from spinlab.formats import NVFP4
from spinlab.formats.minifloat import codes_of
from spinlab.formats.nvfp4 import CalibratedNVFP4
from spinlab.weights.quantized import QuantizedWeight

LAYOUTS = {  # by the format of weights
    "integer": "pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}
_STRATEGIES = {"mxfp4": "group", "nvfp4": "tensor_group"}
_SCALES = {"mxfp4": torch.uint8, "nvfp4": torch.float8_e4m3fn}


def packed_floats(
    name: str, parts: Sequence[QuantizedWeight], top: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the tensors of a linear whose rows are those of the parts, one after another.

    top: the largest scale of all linears that readers fuse with it, which take one scale of the
    tensor for all. Raises InputError where that leaves the scales of this one no place.
    """
    format = parts[0].format
    codes = codes_of(torch.cat([part.levels for part in parts]).cpu())
    scale = torch.cat([part.scale for part in parts]).cpu()
    found = {"weight_packed": codes[:, ::2] | codes[:, 1::2] << 4}
    if not isinstance(format, NVFP4):
        return found | {"weight_scale": format.store_scale(scale)["scale"]}
    stored = format.store_scale(scale, top.reshape(1))
    if not torch.equal(format.load_scale(stored), scale):
        raise InputError(
            f"the scales of {name} are too small beside those of the linears that read the same "
            "input, with which readers fuse it: use export.artefact"
        )
    found["weight_scale"] = stored["scale"]
    return found | {"weight_global_scale": 1 / stored["tensor_scale"]}


def packed_input(scheme: Scheme, peak: float | None) -> dict[str, torch.Tensor]:
    """Return what readers are told of a linear's input, none but of one in NVFP4.

    peak: the largest magnitude that calibration found; None for formats that do not ask for it.
    """
    if scheme.inputs == 16 or scheme.format != "nvfp4":
        return {}
    assert peak is not None, "calibration comes before any network of such inputs"
    tensor = CalibratedNVFP4(4, True).tensor_scale(torch.tensor([peak]))
    return {"input_global_scale": 1 / tensor}


def float_group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """Return the entry of linears with such weights, whose inputs are floats or like them."""
    common = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": scheme.group_size}
    dtype = str(_SCALES[scheme.format])
    dynamic = "local" if scheme.format == "nvfp4" else True
    common |= {"strategy": _STRATEGIES[scheme.format], "scale_dtype": dtype, "zp_dtype": dtype}
    return {
        "targets": targets,
        "weights": {**common, "dynamic": False},
        "input_activations": {**common, "dynamic": dynamic} if scheme.inputs < 16 else None,
        "output_activations": None,
        "format": LAYOUTS[scheme.format],
    }
