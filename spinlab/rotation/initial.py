"""The rotations an experiment starts from, drawn at random or made from activations."""

import logging
from collections.abc import Mapping

import torch

from spinlab.config import RotationConfig
from spinlab.config.checks import choice
from spinlab.config.rotation import SEARCHED
from spinlab.errors import InputError
from spinlab.model.seams import Dimensions
from spinlab.rotation.duquant import (
    DualTransform,
    dual_transforms,
    largest_block,
    random_mixers,
)
from spinlab.rotation.hadamard import hadamard_matrix, has_hadamard
from spinlab.rotation.inputs import ScaledDual, smoothing_scale
from spinlab.rotation.kinds import KINDS
from spinlab.rotation.online import OnlineRotation, hadamard_rotation
from spinlab.rotation.rotations import RotationSet
from spinlab.rotation.statistics import Statistics, input_key

log = logging.getLogger(__name__)

_MOST_ROWS = 8192  # of the residual stream that R1's search looks at
_SEARCHED_AT_ONCE = 10  # inputs whose activations lie on the device together


def initial_rotations(
    config: RotationConfig,
    dimensions: Dimensions,
    generator: torch.Generator,
    statistics: Statistics | None = None,
    device: torch.device | str = "cpu",
) -> RotationSet:
    """Draw the rotations an experiment starts from.

    statistics: needed where `config.needs_statistics`. device: where DuQuant's searches run; the
    result is on the CPU.
    """
    check_rotations(config, dimensions)
    maker = _Maker(config, dimensions, generator, statistics, device)
    r1 = maker.matrix("r1", config.r1, dimensions.hidden, 0)
    heads = [
        maker.matrix("r2", config.r2, dimensions.head_dim, layer)
        for layer in range(dimensions.layers)
    ]
    r2 = None if config.r2 == "none" else torch.stack([h for h in heads if h is not None])
    r3 = maker.online("r3", config.r3, dimensions.head_dim)
    r4 = maker.online("r4", config.r4, dimensions.intermediate)
    return RotationSet(r1, r2, r3, r4, cross_head_rotation(config, dimensions), maker.inputs())


def check_rotations(config: RotationConfig, dimensions: Dimensions) -> None:
    """Raise InputError for an unknown kind, or where settings do not fit these dimensions."""
    for name, searched in (("r1", SEARCHED), ("r2", SEARCHED), ("r3", ()), ("r4", ())):
        choice(f"rotation.{name}", getattr(config, name), ("none", *KINDS, *searched))
    block, width = config.r4_block, dimensions.intermediate
    if config.online and config.r4 != "none" and block and width % block:
        raise InputError(f"rotation.r4_block={block} does not divide {width}, the R4 width")
    # grouped-query attention reads one value channel in several heads
    shared = dimensions.kv_heads != dimensions.heads
    scaled = config.smooth is not None and "o" in config.smooth_groups
    if scaled and shared and not config.online:
        raise InputError(
            "rotation.smooth of the o input runs online on a model with grouped queries: take o "
            "out of rotation.smooth_groups, or set rotation.online=true"
        )


def cross_head_rotation(config: RotationConfig, dimensions: Dimensions) -> OnlineRotation | None:
    """Return QuaRot's Hadamard across the heads of the o_proj input, where one exists.

    With R2 inside the heads the o_proj input is turned by H_heads ⊗ R2 (QuaRot sec. 4, stage 1c).
    Head counts such as 9, 14 and 15 have no Hadamard matrix: there R2 alone remains, and a log
    line says so.
    """
    if config.cross_head == "none" or not config.online:
        return None
    if not has_hadamard(dimensions.heads):
        log.warning(
            "cross_head: no Hadamard matrix of order %d, the number of heads: R2 alone turns the "
            "o_proj input",
            dimensions.heads,
        )
        return None
    across = hadamard_matrix(dimensions.heads).double() / dimensions.heads**0.5
    return OnlineRotation(across, torch.eye(dimensions.head_dim))


class _Maker:
    """Make matrices of any kind, in a fixed order of random draws."""

    def __init__(
        self,
        config: RotationConfig,
        dimensions: Dimensions,
        generator: torch.Generator,
        statistics: Statistics | None,
        device: torch.device | str,
    ) -> None:
        assert statistics is not None or not config.needs_statistics
        self.config, self.dimensions, self.generator = config, dimensions, generator
        self.statistics, self.device = statistics, device
        self._mixers: dict[int, torch.Tensor] = {}

    def matrix(self, where: str, kind: str, n: int, layer: int) -> torch.Tensor | None:
        """Make an (n, n) rotation, or None."""
        if kind == "none":
            return None
        if kind == "duquant":
            return self._dual(self._rows(where, layer)).dense()
        return KINDS[kind](n, self.generator, where)

    def online(self, where: str, kind: str, n: int) -> OnlineRotation | None:
        """Make an online rotation: Hadamard ones are exact, as in QuaRot and SpinQuant."""
        if kind in ("none", "identity") or not self.config.online:
            return None
        if kind in ("hadamard", "exact_hadamard"):
            block = self.config.r4_block if where == "r4" else 0
            return hadamard_rotation(n, block, where)
        dense = self.matrix(where, kind, n, 0)
        assert dense is not None
        return OnlineRotation(torch.ones(1, 1), dense)

    def inputs(self) -> dict[str, ScaledDual]:
        """Make the transforms of single inputs: scales, dual transforms, or both."""
        config, found = self.config, {}
        if self.statistics is None:
            return found
        keys = list(self.statistics.peaks)
        scales = {k: self._scale(k) for k in keys if k.partition(".")[2] in self._smoothed}
        duals = self._duals(scales) if config.inputs == "duquant" else {}
        for key in keys:
            _, _, group = key.partition(".")
            scale, dual = scales.get(key), duals.get(key)
            if scale is not None or dual is not None:
                # grouped-query attention reads one value channel in several heads
                shared = group == "o" and self.dimensions.kv_heads != self.dimensions.heads
                found[key] = ScaledDual(scale, not shared, dual)
        return found

    @property
    def _smoothed(self) -> list[str]:
        return [] if self.config.smooth is None else self.config.smooth_groups

    def _scale(self, key: str) -> torch.Tensor:
        assert self.statistics is not None and self.config.smooth is not None
        peaks, weights = self.statistics.peaks[key], self.statistics.weights[key]
        return smoothing_scale(peaks, weights, self.config.smooth)

    def _rows(self, where: str, layer: int) -> torch.Tensor:
        """Return the activations (rows, n) that R1 or R2 of a layer shall flatten."""
        assert self.statistics is not None
        if where == "r2":
            values = self.statistics.values[str(layer)].to(self.device)
            return values.unflatten(-1, (-1, self.dimensions.head_dim)).flatten(0, 1)
        readers = ("qkv", "gate_up")
        keys = [input_key(i, group) for i in range(self.dimensions.layers) for group in readers]
        rows = torch.cat([self.statistics.means[key] for key in keys])
        highest = rows.abs().amax(-1).argsort(descending=True, stable=True)
        return rows[highest[:_MOST_ROWS]].to(self.device)

    def _duals(self, scales: Mapping[str, torch.Tensor]) -> dict[str, DualTransform]:
        """Search the dual transforms of all inputs, each divided by its scale if it has one."""
        assert self.statistics is not None
        by_group: dict[str, list[str]] = {}
        for key in self.statistics.means:
            by_group.setdefault(key.partition(".")[2], []).append(key)
        found: dict[str, DualTransform] = {}
        for keys in by_group.values():
            for begin in range(0, len(keys), _SEARCHED_AT_ONCE):
                some = keys[begin : begin + _SEARCHED_AT_ONCE]
                rows = [self.statistics.means[key].to(self.device) for key in some]
                scaled = [
                    x / scales[key].to(x) if key in scales else x
                    for key, x in zip(some, rows, strict=True)
                ]
                found |= zip(some, self._searched(torch.stack(scaled)), strict=True)
        return found

    def _dual(self, rows: torch.Tensor) -> DualTransform:
        return self._searched(rows[None])[0]

    def _searched(self, x: torch.Tensor) -> list[DualTransform]:
        """Search the dual transforms of activations x: (n, rows, width)."""
        settings = self.config.duquant
        block = largest_block(x.shape[-1], settings.block_size)
        if block not in self._mixers:
            mixers = random_mixers(block, settings.steps, self.generator)
            self._mixers[block] = mixers.to(self.device)
        found = dual_transforms(x, self._mixers[block], True, settings.legacy_index)
        return [dual.to("cpu") for dual in found]
