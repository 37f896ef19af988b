"""A quantized network in compressed-tensors' words: its config, and the tensors of its linears.

Read in compressed-tensors 0.20.0. Element i of a row of levels lies at bits 4·(i mod 8) of its
int32, moved to start at 0; a scale stands for a row, or for a group of it. An online transform is
`<linear>.<name>_input.weight` (b, b), which inputs are multiplied by, block by block, and divided
by sqrt(b). Hadamard matrices are stored as their signs, which any dtype holds; another orthogonal R
as sqrt(b)·R under the type `random-hadamard`, for readers divide every type alike.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from spinlab.errors import InputError
from spinlab.export.floats import LAYOUTS, float_group, packed_floats
from spinlab.export.profiles import Scheme, by_scheme
from spinlab.export.scales import stored_scale
from spinlab.model.split import SplitLinear
from spinlab.rotation.hadamard import hadamard_matrix
from spinlab.rotation.online import OnlineRotation
from spinlab.weights.quantized import QuantizedWeight

TRANSFORM = "R4"  # the name of the transform, and of its group in the config


class Transform(NamedTuple):
    """Say what turns inputs: its type, the order of its blocks, and before which linears it stands.

    linears: seen from their layers.
    """

    kind: str
    order: int
    linears: list[str]


def check_installed(setting: str) -> None:
    """Raise InputError where the package is missing."""
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{setting} needs the package compressed-tensors: "
            "pip install -e '.[compressed-tensors]'"
        ) from error


def stock_names(model: PreTrainedModel) -> dict[str, str]:
    """Return the stock names of all linears by their paths; parts of one linear share its name.

    model: as its family prepares it.
    """
    modules = dict(model.named_modules())
    split = {n: m for n, m in modules.items() if isinstance(m, SplitLinear)}
    whole = {f"{name}.{part}": name for name, module in split.items() for part in module.names}
    linears = (name for name, module in modules.items() if isinstance(module, nn.Linear))
    return {name: whole.get(name, name) for name in linears}


def packed(
    name: str, parts: Sequence[QuantizedWeight], dtype: torch.dtype, top: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the tensors of a linear whose rows are those of the parts, one after another.

    top: the largest scale of all linears that readers fuse with it. Raises InputError for scales
    that the dtype does not hold.
    """
    if parts[0].format.name != "integer":
        return packed_floats(name, parts, top)
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    levels = torch.cat([part.levels for part in parts]).to(torch.int8).cpu()
    return {
        "weight_packed": pack_to_int32(levels, parts[0].format.bits),
        "weight_scale": torch.cat([stored_scale(name, part, dtype) for part in parts]),
        "weight_shape": torch.tensor(levels.shape),
    }


def transform_of(rotation: OnlineRotation) -> tuple[str, torch.Tensor]:
    """Return the type of an online rotation, and one block of it times the root of its order.

    The block is (b, b) in float64: ±1 for Hadamard matrices.
    """
    block = torch.kron(rotation.left, rotation.right)
    order = len(block)
    scaled = block * order**0.5
    if rotation.flat:
        scaled = scaled.sign()
        if order & (order - 1) == 0 and torch.equal(scaled, hadamard_matrix(order).double()):
            return "hadamard", scaled
    return "random-hadamard", scaled


def quantization_config(
    linears: Collection[str], schemes: Mapping[str, Scheme], transform: Transform | None
) -> dict[str, Any]:
    """Return the entry of a stock model's config that tells how it is stored.

    linears: the stock names of all of them. schemes: of those that are quantized.
    """
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.transform import TransformConfig

    groups = by_scheme(schemes)
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "version": compressed_tensors.__version__,
        "format": LAYOUTS[groups[0][0].format],
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": [name for name in linears if name not in schemes],
        # a class of modules goes before the parts of a fused linear where vLLM looks for a scheme
        "config_groups": {
            f"group_{i}": _group(scheme, names if len(groups) > 1 else ["Linear"])
            for i, (scheme, names) in enumerate(groups)
        },
    }
    QuantizationConfig.model_validate(config)
    if transform is not None:
        config["transform_config"] = _transform_config(transform)
        TransformConfig.model_validate(config["transform_config"])
    return config


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """Say what readers of any version know, and leave out what they set by default."""
    if scheme.format != "integer":
        return float_group(scheme, targets)
    common = {"type": "int", "symmetric": True}
    grouped = {"strategy": "group", "group_size": scheme.group_size}
    weights = grouped if scheme.group_size else {"strategy": "channel"}
    inputs = {"num_bits": scheme.inputs, **common, "strategy": "token", "dynamic": True}
    return {
        "targets": targets,
        "weights": {"num_bits": scheme.weights, **common, **weights, "dynamic": False},
        "input_activations": inputs if scheme.inputs < 16 else None,
        "output_activations": None,
        "format": LAYOUTS[scheme.format],
    }


def _transform_config(transform: Transform) -> dict[str, Any]:
    targets = [f"re:.*{re.escape(name)}$" for name in transform.linears]
    apply = [{"targets": targets, "location": "input", "inverse": False, "ignore": []}]
    group = {"type": transform.kind, "apply": apply, "head_dim": transform.order}
    group |= {"randomize": False, "requires_grad": False}
    return {"config_groups": {TRANSFORM: group}}
