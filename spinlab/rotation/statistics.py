"""What calibration text says about a model's activations, for smoothing, DuQuant and WUSH."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from spinlab.model.hooks import temporary_hooks
from spinlab.model.modules import linears_of


@dataclass(frozen=True)
class Statistics:
    """Hold per input of quantized linears, by its key, on the CPU, in float32 but for moments.

    peaks    (in,) the largest |input| of each channel
    weights  (in,) the largest |weight| of each channel, over the linears that read it
    means    (length, in) inputs averaged over windows, position by position, for DuQuant's search
             (appendix E.4; its code averages the first layer's input and passes that on through
             quantized layers, here every input is averaged where it is read)
    values   by layer: (length, kv_heads·head_dim) values of all heads, averaged alike
    moments  (k, b, b) float64 second moments E[xᵀx] within each of k blocks of an input
    weight_moments  (k, b, b) float64 E[wᵀw] within each, over the rows of linears that read it

    Means and values are large, and gathered only for a search; moments for blocks that are asked
    for.
    """

    peaks: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    means: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    weight_moments: dict[str, torch.Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the stored form."""
        return {f"{kind}.{k}": t for kind, kept in vars(self).items() for k, t in kept.items()}

    @staticmethod
    def from_tensors(stored: dict[str, torch.Tensor]) -> "Statistics":
        """Rebuild statistics from their stored form."""
        found = Statistics()
        for name, tensor in stored.items():
            kind, _, key = name.partition(".")
            getattr(found, kind)[key] = tensor
        return found


@torch.no_grad()
def gather_statistics(
    model: PreTrainedModel,
    windows: torch.Tensor,
    searches: bool = True,
    blocks: Mapping[str, int] | None = None,
) -> Statistics:
    """Run windows (samples, length) of token ids through a model whose norms are folded.

    `searches` gathers whole activations too, not only their peaks; blocks: the orders of the blocks
    of which second moments are gathered, by the keys of inputs.
    """
    found, blocks = Statistics(), blocks or {}
    rows: dict[str, int] = {}
    with temporary_hooks() as hooks:
        for site, linear in linears_of(model):
            if not site.quantized:
                continue
            key = site.key
            peak = linear.weight.abs().amax(0).float().cpu()
            first = key not in found.weights
            found.weights[key] = peak if first else torch.maximum(found.weights[key], peak)
            if key in blocks:
                _add(found.weight_moments, key, _products(linear.weight.detach(), blocks[key]))
                rows[key] = rows.get(key, 0) + site.out_features
            if first:
                gather = _Gather(found, key, searches, blocks.get(key, 0))
                hooks.append(linear.register_forward_pre_hook(gather))
            if searches and site.writes == "R2":
                hooks.append(linear.register_forward_hook(_GatherValues(found, str(site.layer))))
        for window in tqdm(windows, desc="statistics"):
            model(input_ids=window[None].to(model.device), use_cache=False)
    for kept, count in (
        (found.means, len(windows)),
        (found.values, len(windows)),
        (found.moments, windows.numel()),
        (found.peaks, 1),
    ):
        for key in kept:
            kept[key] = (kept[key] / count).cpu()
    for key, moment in found.weight_moments.items():
        found.weight_moments[key] = (moment / rows[key]).cpu()
    return found


def _products(rows: torch.Tensor, block: int) -> torch.Tensor:
    """Return Σ xᵀx over rows (n, in) within each block: (in/block, block, block) float64."""
    tiles = rows.double().unflatten(-1, (-1, block)).transpose(0, 1)  # (k, n, block)
    return tiles.mT @ tiles


def _add(kept: dict[str, torch.Tensor], key: str, part: torch.Tensor) -> None:
    kept[key] = kept[key] + part if key in kept else part


@dataclass
class _Gather:
    """Pre-hook that adds a linear's input to the statistics; block: of moments, 0 for none."""

    found: Statistics
    key: str
    whole: bool
    block: int

    def __call__(self, module: nn.Module, args: tuple) -> None:
        x = cast(torch.Tensor, args[0])[0].float()
        peaks, peak = self.found.peaks, x.abs().amax(0)
        peaks[self.key] = torch.maximum(peaks[self.key], peak) if self.key in peaks else peak
        if self.whole:
            means = self.found.means
            means[self.key] = means[self.key] + x if self.key in means else x.clone()
        if self.block:
            _add(self.found.moments, self.key, _products(x, self.block))


@dataclass
class _GatherValues:
    """Hook that adds the values of a layer to the statistics."""

    found: Statistics
    key: str

    def __call__(self, module: nn.Module, args: tuple, out: torch.Tensor) -> None:
        _add(self.found.values, self.key, out[0].float())
