"""Learned input ranges: one static clip ratio for each layer and group of linears.

Every token still has its own minimum and maximum; the ratio says how much of that range is kept. It
starts where the settings put it and descends together with the rotations.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from spinlab.fakequant.activations import InputPath
from spinlab.formats import Format
from spinlab.formats.gradient import round_in_range
from spinlab.learn.learned.log_parameters import LogParameters


def learn_input_ranges(
    paths: Mapping[str, InputPath], lr: float, device: torch.device
) -> LogParameters:
    """Put learned clip ratios in place of those of input paths, and return them by the same keys.

    Paths that quantize nothing are left as they are. Ratios are float32 scalars and stay <= 1.
    Gradients gather where the backward pass leaves them, until the next step.
    """
    ratios = LogParameters(lr, most=1.0)
    starts: dict[str, torch.Tensor] = {}
    for key, path in paths.items():
        if path.quantizer is not None:
            format, group_size = path.quantizer.format, path.quantizer.group_size
            ratio = torch.as_tensor(path.quantizer.clip_ratio, dtype=torch.float32)
            starts[key] = ratio.to(device)
            path.quantizer = LearnedRange(ratios, key, format, group_size)  # type: ignore[assignment]
    if starts:
        ratios.start(starts)
    return ratios


@dataclass(frozen=True)
class LearnedRange:
    """Stand in for a TokenQuantizer where an input path rounds within a learned range."""

    ratios: LogParameters
    key: str
    format: Format
    group_size: int

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize and dequantize x: (..., C), with a gradient for x and for the ratio."""
        return round_in_range(x, self.ratios.logs[self.key], self.format, self.group_size)
