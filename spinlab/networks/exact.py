"""Quantized networks in float64, where no float noise flips a level."""

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from spinlab.model.load import cast_model, exact_norms
from spinlab.model.modules import linears_of
from spinlab.networks.quantized import QuantizedNetworks
from spinlab.rotation.rotations import RotationSet
from spinlab.weights.quantized import QuantizedWeight, empty_weight


class ExactNetworks(QuantizedNetworks):
    """Networks that compute in float64, for the gate of the hand-off.

    Numbers are those of the original's own dtype, and what has levels is never there in float64: a
    gate takes no more memory than the network that it is for.
    """

    def _bare(
        self, rotations: RotationSet, weights: Mapping[str, QuantizedWeight]
    ) -> PreTrainedModel:
        model = self.fused(rotations, weights)
        for site, linear in linears_of(model):
            if site.path in weights:
                empty_weight(linear, torch.float64)
        exact_norms(model)
        return cast_model(model, torch.float64)
