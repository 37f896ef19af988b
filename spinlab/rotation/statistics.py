"""What calibration text says about a model's activations, for smoothing, DuQuant and WUSH."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from spinlab.model.hooks import temporary_hooks
from spinlab.model.modules import linears_of, map_of
from spinlab.model.shares import watched


@dataclass(frozen=True)
class Statistics:
    """Hold per input of quantized linears, by its key, on the CPU, in float32 but for moments.

    peaks    (in,) the largest |input| of each channel
    weights  (in,) the largest |weight| of each channel, over the linears that read it
    means    (length, in) inputs averaged over windows, position by position, for DuQuant's search
             (appendix E.4; its code averages the first layer's input and passes that on through
             quantized layers, here every input is averaged where it is read); of the rows that
             an expert gets, by the order in which they come
    values   by layer: (length, kv_heads·head_dim) values of all heads, averaged alike
    moments  (k, b, b) float64 second moments E[xᵀx] within each of k blocks of an input
    weight_moments  (k, b, b) float64 E[wᵀw] within each, over the rows of linears that read it

    Means and values are large, and gathered only for a search; moments for blocks that are asked
    for. An expert without tokens has no means and moments, and peaks of 0.
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
    gathered: dict[str, _Gather] = {}
    whole = watched(map_of(model))
    with temporary_hooks() as hooks:
        for site, linear in linears_of(model):
            key = site.key
            if whole[key] == site.path:
                found.peaks[key] = linear.weight.new_zeros(site.in_features, dtype=torch.float32)
                gathered[key] = _Gather(found, key, windows.shape[1], searches, blocks.get(key, 0))
                hooks.append(linear.register_forward_pre_hook(gathered[key]))
            if not site.quantized:
                continue
            peak = linear.weight.abs().amax(0).float().cpu()
            first = key not in found.weights
            found.weights[key] = peak if first else torch.maximum(found.weights[key], peak)
            if key in blocks:
                _add(found.weight_moments, key, _products(linear.weight.detach(), blocks[key]))
                rows[key] = rows.get(key, 0) + site.out_features
            if searches and site.writes == "R2":
                hooks.append(linear.register_forward_hook(_GatherValues(found, str(site.layer))))
        for window in tqdm(windows, desc="statistics", disable=map_of(model).only is not None):
            model(input_ids=window[None].to(model.device), use_cache=False)
    for kept in (found.means, found.values):
        for key in kept:
            kept[key] = (kept[key] / len(windows)).cpu()
    for key, gather in gathered.items():
        found.peaks[key] = found.peaks[key].cpu()
        if key in found.moments:
            found.moments[key] = (found.moments[key] / gather.rows).cpu()
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
    """Pre-hook that adds a linear's input to the statistics.

    length: tokens of a window; block: of moments, 0 for none; rows: that it has seen.
    """

    found: Statistics
    key: str
    length: int
    whole: bool
    block: int
    rows: int = 0

    def __call__(self, module: nn.Module, args: tuple) -> None:
        x = cast(torch.Tensor, args[0]).flatten(0, -2).float()
        self.rows += len(x)
        peaks = self.found.peaks
        peaks[self.key] = torch.maximum(peaks[self.key], x.abs().amax(0))
        if self.whole:
            _add(self.found.means, self.key, nn.functional.pad(x, (0, 0, 0, self.length - len(x))))
        if self.block:
            _add(self.found.moments, self.key, _products(x, self.block))


@dataclass
class _GatherValues:
    """Hook that adds the values of a layer to the statistics."""

    found: Statistics
    key: str

    def __call__(self, module: nn.Module, args: tuple, out: torch.Tensor) -> None:
        _add(self.found.values, self.key, out.flatten(0, -2).float())
