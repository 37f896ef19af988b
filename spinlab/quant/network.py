"""The fake-quantized network: stock modules, each rotated linear behind its InputPath."""

import torch
from torch import nn
from transformers import PreTrainedModel

from spinlab.config import QuantConfig
from spinlab.model.seams import Seam, dimensions_of, family_of, layers_of, linear_at
from spinlab.quant.affine import Grid
from spinlab.quant.inputs import InputPath, TokenQuantizer, check_group
from spinlab.rotation.online import OnlineRotation


class FakeQuantLinear(nn.Linear):
    """A linear whose input goes through a rotation and a round trip on the integer grid."""

    def __init__(self, linear: nn.Linear, path: InputPath) -> None:
        nn.Module.__init__(self)  # takes the linear's parameters over instead of making its own
        self.out_features, self.in_features = linear.weight.shape
        self.weight, self.bias = linear.weight, linear.bias
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.path(x), self.weight, self.bias)


def input_paths(
    model: PreTrainedModel, r4: OnlineRotation | None, config: QuantConfig | None
) -> list[dict[str, InputPath]]:
    """Make one InputPath per layer and group of readers. Without `config` nothing is rounded."""
    family = family_of(model.config.model_type)
    groups = {seam.group: seam for seam in family.seams}
    readers = {g: sum(s.group == g for s in family.seams) for g in groups}
    quantizers = {g: token_quantizer(model, seam, config) for g, seam in groups.items()}
    return [
        {
            g: InputPath(r4 if seam.reads == "R4" else None, quantizers[g], readers[g])
            for g, seam in groups.items()
        }
        for _ in layers_of(model)
    ]


def token_quantizer(
    model: PreTrainedModel, seam: Seam, config: QuantConfig | None
) -> TokenQuantizer | None:
    """Return the quantizer of a seam's input; None where inputs stay 16-bit.

    o_proj reads the heads' outputs and may have one scale per head. Raises InputError where the
    group size does not divide the width.
    """
    if config is None or config.activations.bits == 16:
        return None
    tensor, dimensions = config.activations, dimensions_of(model.config)
    width = input_width(model, seam)
    group = tensor.group_size
    if seam.reads == "R2" and config.o_proj_per_head:
        group = min(group or dimensions.head_dim, dimensions.head_dim)
    check_group("quant.activations.group_size", group, width, seam.name)
    return TokenQuantizer(Grid(tensor.bits, tensor.symmetric), group, tensor.clip_ratio)


def input_width(model: PreTrainedModel, seam: Seam) -> int:
    """Return the input width of a seam's linear."""
    return linear_at(layers_of(model)[0], seam.name).weight.shape[1]


def insert_fake_quant(
    model: PreTrainedModel, r4: OnlineRotation | None, config: QuantConfig | None
) -> None:
    """Swap every rotated linear for one behind its InputPath, in place."""
    family = family_of(model.config.model_type)
    for layer, paths in zip(layers_of(model), input_paths(model, r4, config), strict=True):
        for seam in family.seams:
            path = paths[seam.group]
            layer.set_submodule(seam.name, FakeQuantLinear(linear_at(layer, seam.name), path))
