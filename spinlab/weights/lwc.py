"""Learnable weight clipping: round to nearest in ranges that are trained layer by layer.

OmniQuant (Shao et al. 2024, arXiv 2308.13137, sec. 3.2 and eq. 2), as DuQuant uses it: each end of
a range is its extreme times sigmoid(gamma), and the gammas minimize the change of what a whole
decoder layer computes. DuQuant's code passes no gradient through the rounding of zero points, has
twice the step, and quantizes queries, keys and values while a layer learns.
"""

from functools import partial

import torch
from torch import nn
from torch.func import functional_call
from tqdm import tqdm

from spinlab.config import ClipSearch, TensorQuant
from spinlab.fakequant.insert import insert_fake_quant, rounded_sites
from spinlab.formats import Format, format_of
from spinlab.formats.base import peak_of
from spinlab.formats.integer import extremes, nearest
from spinlab.model.hooks import hidden_states
from spinlab.model.modules import linear_at, map_of
from spinlab.weights.base import Rounding, Weights
from spinlab.weights.calibration import LayerInputs
from spinlab.weights.ends import quantize_ends
from spinlab.weights.layerwise import kept_layer
from spinlab.weights.pairs import unquantized_inputs
from spinlab.weights.quantized import QuantizedWeight
from spinlab.weights.rtn import WEIGHT, round_to_range, starting_ratios

_LARGEST_GAMMA = 4.0  # sigmoid(4) = 0.982: beyond it a ratio near 1 would hardly feel its gradient


def quantize_lwc(rounding: Rounding) -> Weights:
    """Return every weight of fewer than 16 bits, rounded in learned ranges.

    The model is overwritten. A step takes one of the windows. A layer learns on the outputs of the
    quantized layers before it, with quantized inputs of its linears, towards what the original
    layer makes of the original's activations. Keys and values stay unquantized meanwhile. Finished
    layers are kept in `progress`; a later call continues with the same bits. Embedding and head
    are rounded to nearest.
    """
    assert rounding.windows is not None
    rounding.change(partial(insert_fake_quant, rotations=rounding.rotations, config=rounding.quant))
    original = LayerInputs(rounding.model, rounding.windows, batch=1)
    found = rounding.store()
    found.update(quantize_ends(rounding.model, rounding.quant, rounding.config.clip))
    quantized = LayerInputs(rounding.model, rounding.windows, batch=1)
    for index in tqdm(range(len(original.layers)), desc="lwc"):
        with rounding.layer(index):
            with unquantized_inputs(original.layer):
                original.advance()
            make = partial(_learn_layer, rounding, quantized, original.batches)
            found.update(kept_layer(rounding, index, make))
            quantized.advance()
    return found


def _learn_layer(
    rounding: Rounding, inputs: LayerInputs, targets: list[torch.Tensor]
) -> dict[str, QuantizedWeight]:
    """Learn the ranges of the current layer; targets: what it should return, batch by batch."""
    weights: dict[str, ClippedWeight] = {}
    for site, settings in rounded_sites(map_of(rounding.model), rounding.quant):
        if site.layer == inputs.index:
            weight = linear_at(rounding.model, site.path).weight
            weights[site.name] = ClippedWeight(weight, settings, rounding.config.clip)
    gammas = [gamma for weight in weights.values() for gamma in weight.gammas]
    if gammas:
        optimizer = torch.optim.AdamW(gammas, lr=rounding.config.lwc.lr, weight_decay=0.0)
        for _ in range(rounding.config.lwc.epochs):
            for x, target in zip(inputs.batches, targets, strict=True):
                optimizer.zero_grad()
                output_error(inputs, weights, x, target).backward()
                optimizer.step()
    prefix = map_of(rounding.model).layers[inputs.index].path
    return {f"{prefix}.{name}": weight.quantized() for name, weight in weights.items()}


def output_error(
    inputs: LayerInputs, weights: dict[str, "ClippedWeight"], x: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """Return the mean squared error of the current layer's output with its weights rounded.

    x, its input, and target: (windows, tokens, hidden).
    """
    rounded = {f"{name}.weight": weight.rounded() for name, weight in weights.items()}
    output = functional_call(inputs.layer, rounded, (x,), inputs.arguments(x))
    return nn.functional.mse_loss(hidden_states(output).float(), target.float())


class ClippedWeight:
    """Hold a weight (out, in) and the learnable gammas of its ranges: (out, in/g, 1) each.

    Asymmetric ranges have one for either end, symmetric ones share it. They start from
    `starting_ratios`, from .98 at most.
    """

    def __init__(self, weight: torch.Tensor, settings: TensorQuant, clip: ClipSearch) -> None:
        wide = weight.detach().float()
        self.dtype, self.format = weight.dtype, format_of(settings)
        self.grouped, self.lowest, self.highest = extremes(wide, settings.group_size)
        start = starting_ratios(wide, settings, clip).logit().clamp(max=_LARGEST_GAMMA)
        self.gammas = [nn.Parameter(start.clone()) for _ in range(2 - self.format.symmetric)]

    def _range(self) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            self.lowest * torch.sigmoid(self.gammas[0]),
            self.highest * torch.sigmoid(self.gammas[-1]),
        )

    def rounded(self) -> torch.Tensor:
        """Return the rounded weight (out, in) in its own dtype; its gradient reaches the gammas."""
        rounded: torch.Tensor = _Round.apply(self.grouped, *self._range(), self.format)  # type: ignore[assignment]
        return rounded.flatten(1).to(self.dtype)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        return round_to_range(self.grouped, *self._range(), self.format)


class _Round(torch.autograd.Function):
    """Round a grouped weight in given ranges, with the gradient of the ranges' ends."""

    @staticmethod
    def forward(
        ctx, grouped: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor, format: Format
    ) -> torch.Tensor:
        ctx.save_for_backward(grouped, lowest, highest)
        ctx.format = format
        peak = peak_of(format, lowest, highest, WEIGHT)
        parameters = format.choose(grouped, lowest, highest, peak)
        return format.decode(format.encode(grouped, parameters, nearest), parameters)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        grouped, lowest, highest = ctx.saved_tensors
        found = ctx.format.pull_back(grouped, gradient, lowest, highest, nearest)
        return None, found.lowest, found.highest, None
