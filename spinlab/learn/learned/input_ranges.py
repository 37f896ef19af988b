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
from spinlab.learn.learned.log_numbers import LogNumbers


class InputRanges:
    """Put learned clip ratios in place of those of input paths, by `input_key`, and move them.

    Paths that quantize nothing are left as they are. Ratios are float32 and stay <= 1. Gradients
    gather where the backward pass leaves them, until the next step.
    """

    def __init__(self, paths: Mapping[str, InputPath], lr: float, device: torch.device) -> None:
        self.numbers = LogNumbers(lr, most=1.0)
        starts: dict[str, torch.Tensor] = {}
        for key, path in paths.items():
            if path.quantizer is not None:
                format, group_size = path.quantizer.format, path.quantizer.group_size
                ratio = torch.as_tensor(path.quantizer.clip_ratio, dtype=torch.float32)
                starts[key] = ratio.to(device)
                path.quantizer = LearnedRange(self.numbers, key, format, group_size)  # type: ignore[assignment]
        if starts:
            self.numbers.start(starts)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move all ratios by what gathered since the last step, at `rate` times the base rate."""
        logs = self.numbers.logs
        gradients = {
            key: torch.zeros_like(log) if log.grad is None else log.grad
            for key, log in logs.items()
        }
        if gradients:
            self.numbers.step(gradients, rate)

    def ratios(self) -> dict[str, float]:
        """Return the ratios as they stand."""
        return {key: self.numbers.number(key).item() for key in self.numbers.logs}

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a resumed run needs, as named tensors."""
        return self.numbers.state()

    def load_state(self, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
        """Continue from what `state` returned."""
        self.numbers.load_state(tensors, device)


@dataclass(frozen=True)
class LearnedRange:
    """Stand in for a TokenQuantizer where an input path rounds within a learned range."""

    numbers: LogNumbers
    key: str
    format: Format
    group_size: int

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize and dequantize x: (..., C), with a gradient for x and for the ratio."""
        return round_in_range(x, self.numbers.logs[self.key], self.format, self.group_size)
