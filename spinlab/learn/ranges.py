"""Learned weight ranges: clip ratios that descend together with the rotations.

With weights quantized in the loop, plain straight-through gradients never tell a rotation, or a
clip ratio, that a smaller range is better. Here the rounding is differentiated as in LSQ (Esser et
al. 2020) and each channel's ratio is learned, as OmniQuant's learnable weight clipping does.
"""

import torch

from spinlab.config import TensorQuant
from spinlab.quant.affine import TIE, scale_and_zero
from spinlab.weights.rtn import weight_grid

_CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 26}
_BETAS = (0.8, 0.95)  # a run has tens of steps, so moments must forget fast


class ClipRatios:
    """Hold the clip ratios of many weights and move their logarithms by Adam; ratios stay <= 1."""

    def __init__(self, lr: float) -> None:
        self.lr = lr
        self.logs: dict[str, torch.nn.Parameter] = {}
        self.optimizer: torch.optim.Adam | None = None

    def start(self, ratios: dict[str, torch.Tensor]) -> None:
        """Start from searched ratios by name: (out, in/g, 1) each."""
        self.logs = {name: torch.nn.Parameter(ratio.log()) for name, ratio in ratios.items()}
        self.optimizer = torch.optim.Adam(self.logs.values(), lr=self.lr, betas=_BETAS, eps=1e-30)

    def ratio(self, name: str) -> torch.Tensor:
        return self.logs[name].detach().exp()

    @torch.no_grad()
    def step(self, gradients: dict[str, torch.Tensor], rate: float) -> None:
        """Move all ratios by the gradients of their logarithms, at `rate` times the base rate."""
        assert self.optimizer is not None
        for name, gradient in gradients.items():
            self.logs[name].grad = gradient
        self.optimizer.param_groups[0]["lr"] = self.lr * rate
        self.optimizer.step()
        for log in self.logs.values():
            log.clamp_(max=0)

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a resumed run needs, as named tensors."""
        if self.optimizer is None:
            return {}
        found: dict[str, torch.Tensor] = {}
        for name, log in self.logs.items():
            found[f"log.{name}"] = log.detach()
            found |= {f"{key}.{name}": value for key, value in self.optimizer.state[log].items()}
        return found

    def load_state(self, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
        """Continue from what `state` returned."""
        logs = {k.removeprefix("log."): v for k, v in tensors.items() if k.startswith("log.")}
        if not logs:
            return
        self.start({name: torch.empty_like(log, device=device) for name, log in logs.items()})
        assert self.optimizer is not None
        for name, log in logs.items():
            self.logs[name].data.copy_(log)
            keys = {key: f"{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[self.logs[name]] = {
                key: tensors[found].to("cpu" if key == "step" else device)
                for key, found in keys.items()
                if found in tensors
            }


def rounding_gradient(
    weight: torch.Tensor, gradient: torch.Tensor, format: TensorQuant, clip: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pull the gradient of a rounded weight back to the weight and to the log of its clip ratios.

    Inside the range rounding passes the gradient straight through, outside it passes none; the
    range, clip times the extremes of a channel or group, gets the rest (LSQ) and hands it to the
    extreme entries. The zero point counts as exact. weight, gradient: (out, in); clip and the
    second result: (out, in/g, 1). The first result overwrites `gradient`.
    """
    rows = max(1, _CHUNK_ELEMENTS[weight.device.type] // weight.shape[1])
    parts = zip(weight.split(rows), gradient.split(rows), clip.split(rows), strict=True)
    of_rows = _symmetric if format.symmetric else _asymmetric
    return gradient, torch.cat([of_rows(*part, format) for part in parts])


def _symmetric(
    weight: torch.Tensor, gradient: torch.Tensor, clip: torch.Tensor, format: TensorQuant
) -> torch.Tensor:
    """Turn `gradient` into the weight's; return the log ratio's. scale = clip·max|w| / highest."""
    grid = weight_grid(format)
    grouped = _groups(weight, format)
    peak, at_peak = grouped.abs().max(-1, keepdim=True)
    scale, _ = scale_and_zero(-peak * clip, peak * clip, grid)
    exact = grouped / scale
    levels = (exact + TIE).round_()
    kept = levels.clamp(grid.lowest, grid.highest)
    passed, clipped = _split(_groups(gradient, format), levels, kept)
    of_scale = _dot(passed, levels.sub_(exact)) + _dot(clipped, kept)
    share = of_scale * clip / grid.highest * grouped.gather(-1, at_peak).sign()
    passed.scatter_add_(-1, at_peak, share)
    return of_scale * scale


def _asymmetric(
    weight: torch.Tensor, gradient: torch.Tensor, clip: torch.Tensor, format: TensorQuant
) -> torch.Tensor:
    """The same for scale = clip·(max - min) / highest, where clipped entries sit on an end."""
    grid = weight_grid(format)
    grouped = _groups(weight, format)
    lowest, at_lowest = grouped.min(-1, keepdim=True)
    highest, at_highest = grouped.max(-1, keepdim=True)
    scale, zero = scale_and_zero(lowest * clip, highest * clip, grid)
    exact = grouped / scale
    levels = (exact + TIE).round_()
    kept = levels.clamp(grid.lowest - zero, grid.highest - zero)
    passed, clipped = _split(_groups(gradient, format), levels, kept)
    of_scale = _dot(passed, levels.sub_(exact)) / grid.highest
    of_top = (_dot(clipped, (kept > 0).to(clipped.dtype)) + of_scale) * clip * (highest > 0)
    of_bottom = (_dot(clipped, (kept <= 0).to(clipped.dtype)) - of_scale) * clip * (lowest < 0)
    passed.scatter_add_(-1, at_highest, of_top).scatter_add_(-1, at_lowest, of_bottom)
    return of_top * highest + of_bottom * lowest


def _groups(matrix: torch.Tensor, format: TensorQuant) -> torch.Tensor:
    return matrix.unflatten(-1, (-1, format.group_size or matrix.shape[-1]))


def _split(
    gradient: torch.Tensor, levels: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a gradient, in place, into that of entries inside and outside the range."""
    # products of differences: comparisons cost ten times as much on a CPU
    clipped = (levels - kept).abs_().clamp_(max=1).mul_(gradient)
    return gradient.sub_(clipped), clipped


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(-1, keepdim=True)
