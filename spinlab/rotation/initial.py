"""The rotations an experiment starts from, drawn at random or made from activations."""

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch

from spinlab.config import RotationConfig
from spinlab.model.map import ModelMap
from spinlab.rotation.blocks import BlockMap, BlockRotation, InvertibleBlocks, power_block
from spinlab.rotation.duquant import (
    DualTransform,
    dual_transforms,
    largest_block,
    random_mixers,
)
from spinlab.rotation.fits import check_rotations
from spinlab.rotation.hadamard import hadamard_matrix, has_hadamard
from spinlab.rotation.inputs import ScaledDual, smoothing_scale
from spinlab.rotation.kinds import KINDS
from spinlab.rotation.online import (
    LayerRotations,
    OnlineRotation,
    WidthRotations,
    hadamard_rotation,
)
from spinlab.rotation.rotations import RotationSet
from spinlab.rotation.statistics import Statistics
from spinlab.rotation.wush import wush_blocks

log = logging.getLogger(__name__)

_MOST_ROWS = 8192  # of the residual stream that R1's search looks at
_SEARCHED_AT_ONCE = 10  # inputs whose activations lie on the device together


def initial_rotations(
    config: RotationConfig,
    model_map: ModelMap,
    generator: torch.Generator,
    statistics: Statistics | None = None,
    device: torch.device | str = "cpu",
) -> RotationSet:
    """Draw the rotations an experiment starts from.

    statistics: needed where `config.needs_statistics`. device: where DuQuant's searches run; the
    result is on the CPU.
    """
    check_rotations(config, model_map)
    assert statistics is not None or not config.needs_statistics
    maker = _Maker(config, model_map, generator, statistics, device)
    stream = maker.stream()
    r3, r4 = maker.heads(), maker.of_mlp()
    across = cross_head_rotation(config, model_map)
    return replace(stream, r3=r3, r4=r4, cross_head=across, inputs=maker.inputs())


def stream_rotations(
    config: RotationConfig, model_map: ModelMap, generator: torch.Generator
) -> RotationSet:
    """Draw what is fused alone, R1, R2 and those of latents, as `initial_rotations` does.

    None may be made from statistics: these are to be those of what such rotations give.
    """
    check_rotations(config, model_map)
    return _Maker(config, model_map, generator, None, "cpu").stream()


def block_orders(config: RotationConfig, model_map: ModelMap) -> dict[str, int]:
    """Return the orders of the blocks that turn inputs, by the keys of inputs, where any do."""
    size = {"blocks": config.blocks.size, "wush": config.wush.size}.get(config.inputs)
    if size is None:
        return {}
    r4 = "r4" in config.used and config.r4 != "identity"
    inputs = [input for input in model_map.inputs if not (r4 and input.reads == "R4")]
    of_width = {width: power_block(width, size) for width in sorted({i.width for i in inputs})}
    return {input.key: of_width[input.width] for input in inputs}


def cross_head_rotation(config: RotationConfig, model_map: ModelMap) -> OnlineRotation | None:
    """Return QuaRot's Hadamard across the heads that attention gives, where one exists.

    With R2 inside the heads that input is rotated by H_heads ⊗ R2 (QuaRot sec. 4, stage 1c).
    Head counts such as 9, 14 and 15 have no Hadamard matrix: there R2 alone remains, and a log
    line says so.
    """
    if config.cross_head == "none" or not config.online:
        return None
    head_dim = model_map.width("r2")
    heads = model_map.width("cross_head") // head_dim
    if not has_hadamard(heads):
        log.warning(
            "cross_head: no Hadamard matrix of order %d, the number of heads: R2 alone rotates "
            "what they give",
            heads,
        )
        return None
    across = hadamard_matrix(heads).double() / heads**0.5
    return OnlineRotation(across, torch.eye(head_dim))


class _Maker:
    """Make matrices of any kind, in a fixed order of random draws."""

    def __init__(
        self,
        config: RotationConfig,
        model_map: ModelMap,
        generator: torch.Generator,
        statistics: Statistics | None,
        device: torch.device | str,
    ) -> None:
        self.config, self.map, self.generator = config, model_map, generator
        self.statistics, self.device = statistics, device
        self._mixers: dict[int, torch.Tensor] = {}

    def stream(self) -> RotationSet:
        """Make R1, then R2 for all layers, then one rotation for each latent."""
        r1 = self.matrix("r1", self.config.r1, 0)
        layers = range(len(self.map.layers))
        heads = [self.matrix("r2", self.config.r2, layer) for layer in layers]
        made = [head for head in heads if head is not None]
        kind, latents = self.config.latents, self.map.latents
        if kind == "none":
            latents = {}
        turned = {n: KINDS[kind](width, self.generator, n) for n, width in latents.items()}
        r2 = torch.stack(made) if made else None
        return RotationSet(r1, r2, latents=turned, keeps_gains=self.config.keeps_gains)

    def matrix(self, where: str, kind: str, layer: int) -> torch.Tensor | None:
        """Make an (n, n) rotation for the width that `where` (r1, r2, ...) acts on, or None."""
        if kind == "none":
            return None
        if kind == "duquant":
            return self._dual(self._rows(where, layer)).dense()
        width = self.map.width(where)
        block = (self.config.r1_block if where == "r1" else 0) or width
        parts = (KINDS[kind](block, self.generator, where) for _ in range(width // block))
        return torch.block_diag(*parts)

    def heads(self) -> OnlineRotation | LayerRotations | None:
        """Make R3, of all layers or of each; an identity is there to be learned."""
        kind = self.config.r3
        if kind == "none" or not self.config.online:
            return None
        width = self.map.width("r3")
        if not self.config.r3_per_layer:
            return self._online("r3", kind, width)
        return LayerRotations([self._online("r3", kind, width) for _ in self.map.layers])

    def of_mlp(self) -> OnlineRotation | WidthRotations | None:
        """Make R4, which is never learned: an identity is left out. Each width has its own."""
        kind, block = self.config.r4, self.config.r4_block
        if kind in ("none", "identity") or not self.config.online:
            return None
        made = [self._online("r4", kind, width, block) for width in self.map.gated_widths]
        return made[0] if len(made) == 1 else WidthRotations(made)

    def _online(self, where: str, kind: str, width: int, block: int = 0) -> OnlineRotation:
        """Make an online rotation: Hadamard ones are exact, as in QuaRot and SpinQuant."""
        if kind in ("hadamard", "exact_hadamard"):
            return hadamard_rotation(width, block, where)
        return OnlineRotation(torch.ones(1, 1), KINDS[kind](width, self.generator, where))

    def inputs(self) -> dict[str, ScaledDual]:
        """Make the transforms of single inputs: scales, rotations, or both."""
        found: dict[str, ScaledDual] = {}
        quantized = {site.key for site in self.map.sites if site.quantized}
        inputs = [input for input in self.map.inputs if input.key in quantized]
        scales = {i.key: self._scale(i.key) for i in inputs if i.kind in self._smoothed}
        rotations = self._rotations(scales)
        for input in inputs:
            scale, rotation = scales.get(input.key), rotations.get(input.key)
            folded = input.folds
            if scale is None and self.config.scales_inputs:
                # one for all can move into any producer there is
                scale = torch.ones(input.width, dtype=torch.float64)
                folded = input.producer is not None
            if scale is not None or rotation is not None:
                rounded = bool(self.config.rounds_factors)
                found[input.key] = ScaledDual(scale, folded, rotation, rounded)
        return found

    def _rotations(self, scales: Mapping[str, torch.Tensor]) -> Mapping[str, BlockMap]:
        """Make the maps of single inputs, by their keys."""
        if self.config.inputs == "duquant":
            return self._duals(scales)
        orders, inputs = block_orders(self.config, self.map), self.map.input_at
        if self.config.inputs == "wush":
            return {key: self._wush(key) for key in orders if key in self._known.moments}
        return {key: self._blocks(inputs[key].width, size) for key, size in orders.items()}

    @property
    def _known(self) -> Statistics:
        assert self.statistics is not None
        return self.statistics

    def _wush(self, key: str) -> InvertibleBlocks:
        known, percdamp = self._known, self.config.wush.percdamp
        moments = known.moments[key], known.weight_moments[key]
        return InvertibleBlocks(wush_blocks(*moments, percdamp))

    def _blocks(self, width: int, size: int) -> BlockRotation:
        """Draw a rotation of its own for each block of a width."""
        draw = KINDS[self.config.blocks.kind]
        blocks = [draw(size, self.generator, "blocks") for _ in range(width // size)]
        return BlockRotation(torch.stack(blocks))

    @property
    def _smoothed(self) -> list[str]:
        return [] if self.config.smooth is None else self.config.smooth_groups

    def _scale(self, key: str) -> torch.Tensor:
        assert self.config.smooth is not None
        peaks, weights = self._known.peaks[key], self._known.weights[key]
        offset = self.map.input_at[key].offset
        return smoothing_scale(peaks, weights, self.config.smooth, offset)

    def _rows(self, where: str, layer: int) -> torch.Tensor:
        """Return the activations (rows, n) that R1 or R2 of a layer shall flatten."""
        if where == "r2":
            values = self._known.values[str(layer)].to(self.device)
            return values.unflatten(-1, (-1, self.map.width("r2"))).flatten(0, 1)
        keys = [input.key for input in self.map.inputs if input.reads == "R1"]
        rows = torch.cat([self._known.means[key] for key in keys])
        highest = rows.abs().amax(-1).argsort(descending=True, stable=True)
        return rows[highest[:_MOST_ROWS]].to(self.device)

    def _duals(self, scales: Mapping[str, torch.Tensor]) -> dict[str, DualTransform]:
        """Search the dual transforms of all inputs, each divided by its scale if it has one."""
        by_name: dict[str, list[str]] = {}
        for key in self._known.means:
            by_name.setdefault(self.map.input_at[key].name, []).append(key)
        found: dict[str, DualTransform] = {}
        for keys in by_name.values():
            for begin in range(0, len(keys), _SEARCHED_AT_ONCE):
                some = keys[begin : begin + _SEARCHED_AT_ONCE]
                rows = [self._known.means[key].to(self.device) for key in some]
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
