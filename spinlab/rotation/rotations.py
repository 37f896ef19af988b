"""The RotationSet: every transform of one model as a value that can be saved and loaded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open

from spinlab.config.kv import Kept
from spinlab.model.map import Input, Site
from spinlab.rotation.blocks import BlockRotation, InvertibleBlocks, inverse_error
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.online import (
    InputTransform,
    LayerRotations,
    OnlineRotation,
    WidthRotations,
)
from spinlab.rotation.orthogonal import check_orthogonal, orthogonality_error
from spinlab.tensors import write_tensors

_FUSED = ("r1", "r2")
ONLINE = ("r3", "r4", "cross_head")
_NUMBERS = {"clip": "clips", "kv_clip": "kv_clips", "peak": "peaks"}  # fields, by tensors' names
# entry of a file's metadata: `about`, the blocks of online rotations, GAINS where they are kept,
# and ROUNDED where transforms of inputs multiply by rounded matrices
WORDS = "rotations"
GAINS = "keeps_gains"
ROUNDED = "rounded_inputs"


@dataclass(frozen=True)
class RotationSet:
    """Hold R1 (hidden, hidden) and R2 (layers, head_dim, head_dim), float64, and what runs online.

    A rotation that is switched off is None; R3 is one for all layers, or one for each, R4 one for
    all inputs, or one for each of their widths. `inputs` are transforms of single inputs, by the
    key of the input. What was learned together with the rotations is part of the set: `clips`, the
    clip ratios of input quantizers by that key, `kv_clips`, those of codecs by layer and side
    (`3.keys`), and `weight_clips`, those of weights by the path of the linear: (out, in/g, 1).
    `about` is JSON-ready: how the set came to be. `peaks`: the largest magnitudes of inputs behind
    the rotations, by key, as calibration found them for formats that ask for it. `latents`:
    (width, width), float64, of latents that heads are made of, by name; fused, one for all layers.
    keeps_gains: norms keep their gains, and `inputs` are maps of what they give with them; R1 and
    latents have them folded into the linears behind.
    """

    r1: torch.Tensor | None = None
    r2: torch.Tensor | None = None
    r3: OnlineRotation | LayerRotations | None = None
    r4: OnlineRotation | WidthRotations | None = None
    cross_head: OnlineRotation | None = None  # (heads·head_dim): across heads, not in them
    inputs: Mapping[str, ScaledDual] = field(default_factory=dict)
    clips: Mapping[str, float] = field(default_factory=dict)
    kv_clips: Mapping[str, float] = field(default_factory=dict)
    weight_clips: Mapping[str, torch.Tensor] = field(default_factory=dict)
    about: dict | None = None
    peaks: Mapping[str, float] = field(default_factory=dict)
    latents: Mapping[str, torch.Tensor] = field(default_factory=dict)
    keeps_gains: bool = False

    def __post_init__(self) -> None:
        assert not self.keeps_gains or (self.r1 is None and not self.latents)
        for name in _FUSED:
            matrix = getattr(self, name)
            if matrix is not None:
                check_orthogonal(name.upper(), matrix)
        for name, matrix in self.latents.items():
            check_orthogonal(name, matrix)

    def online(self, site: Site) -> InputTransform | None:
        """Return what runs before a linear, if anything."""
        own = self.inputs.get(site.key)
        return own if own is not None and own.is_online else self.behind(site)

    def for_network(self, site: Site) -> InputTransform | None:
        """Return `online`, for one network: what is copied to its device is gone with it."""
        found = self.online(site)
        return replace(found) if isinstance(found, ScaledDual) else found

    def behind(self, place: Site | Input) -> OnlineRotation | None:
        """Return what runs where an input has no online transform of its own, if anything."""
        found = {"R4": self.r4, "R2": self.cross_head}.get(place.reads or "")
        width = place.in_features if isinstance(place, Site) else place.width
        return None if found is None else found.of(width)

    def orthogonality(self) -> dict[str, float]:
        """Return max|RRᵀ-I| of every rotation that is on, and max|TT⁻¹-I| of inputs' other maps."""
        found = {name: getattr(self, name) for name in _FUSED}
        found |= self._factors() | self._latents()
        errors = {name: orthogonality_error(t) for name, t in found.items() if t is not None}
        turning = [t for t in self.inputs.values() if t.dual is not None]
        maps = [t.dual.first for t in turning if isinstance(t.dual, InvertibleBlocks)]
        maps += [factor.blocks for t in turning if t.rounded for factor in t.factors()]
        if maps:
            errors["inverses"] = max(inverse_error(blocks) for blocks in maps)
        duals = [t.dual for t in turning if isinstance(t.dual, BlockRotation)]
        parts = [part for dual in duals for part in dual.tensors().values()]
        if blocks := [part for part in parts if part.is_floating_point()]:
            errors["inputs"] = max(orthogonality_error(block) for block in blocks)
        return errors

    def _online(self) -> "dict[str, OnlineRotation | LayerRotations]":
        """Return what runs online by its name; of R4 by width, where inputs have several."""
        found: dict[str, OnlineRotation | LayerRotations] = {}
        for name in ONLINE:
            online: OnlineRotation | LayerRotations | WidthRotations | None = getattr(self, name)
            if isinstance(online, WidthRotations):
                found |= {f"{name}.{width}": own for width, own in online.by_width.items()}
            elif online is not None:
                found[name] = online
        return found

    def _factors(self) -> dict[str, torch.Tensor]:
        """Return the factors of what runs online."""
        online = self._online().items()
        return {f"{n}.{f}": getattr(r, f) for n, r in online for f in ("left", "right")}

    def _latents(self) -> dict[str, torch.Tensor]:
        return {f"latents.{name}": matrix for name, matrix in self.latents.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the stored form, but for `about` and the blocks of online rotations."""
        found = {name: getattr(self, name) for name in _FUSED}
        found |= self._factors() | self._latents()
        for key, transform in self.inputs.items():
            found |= {f"inputs.{key}.{part}": t for part, t in transform.tensors().items()}
        for prefix, name in _NUMBERS.items():
            for key, number in getattr(self, name).items():
                found[f"{prefix}.{key}"] = torch.tensor(number, dtype=torch.float64)
        found |= {f"weight_clip.{name}": ratio for name, ratio in self.weight_clips.items()}
        return {name: t.cpu().contiguous() for name, t in found.items() if t is not None}

    @staticmethod
    def from_tensors(
        tensors: Mapping[str, torch.Tensor],
        about: dict,
        blocks: Mapping[str, int],
        keeps_gains: bool = False,
        rounded_inputs: bool = False,
    ) -> "RotationSet":
        """Rebuild a set from its stored form."""
        online = {
            n: _online(tensors[f"{n}.left"], tensors[f"{n}.right"], blocks.get(n, 1))
            for n in (name.removesuffix(".left") for name in tensors)
            if n.partition(".")[0] in ONLINE and f"{n}.left" in tensors
        }
        of_inputs: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in _part(tensors, "inputs.").items():
            key, _, part = name.rpartition(".")
            of_inputs.setdefault(key, {})[part] = tensor
        inputs = {
            key: ScaledDual.from_tensors(stored, rounded_inputs)
            for key, stored in of_inputs.items()
        }
        numbers = {
            name: {key: number.item() for key, number in _part(tensors, f"{prefix}.").items()}
            for prefix, name in _NUMBERS.items()
        }
        weight_clips = _part(tensors, "weight_clip.")
        latents = {name: t.double() for name, t in _part(tensors, "latents.").items()}
        r1, r2 = (tensors[n].double() if n in tensors else None for n in _FUSED)
        r3, r4, cross_head = (online.get(name) for name in ONLINE)
        assert not isinstance(r4, LayerRotations) and not isinstance(cross_head, LayerRotations)
        by_width = [own for name, own in online.items() if name.startswith("r4.")]
        if by_width:
            r4 = WidthRotations([own for own in by_width if isinstance(own, OnlineRotation)])
        found = RotationSet(r1, r2, r3, r4, cross_head, inputs, about=about)
        numbers |= {"weight_clips": weight_clips, "latents": latents, "keeps_gains": keeps_gains}
        return replace(found, **numbers)

    def save(self, path: Path) -> None:
        """Write everything into one safetensors file; equal sets give equal bytes."""
        blocks = {name: rotation.blocks for name, rotation in self._online().items()}
        words = {"about": self.about or {}, "blocks": blocks}
        words |= {GAINS: True} if self.keeps_gains else {}
        words |= {ROUNDED: True} if any(t.rounded for t in self.inputs.values()) else {}
        write_tensors(path, self.tensors(), {WORDS: words})

    @staticmethod
    def load(path: Path) -> "RotationSet":
        """Read back what `save` wrote in a stage; `spinlab.rotation.exchange` reads other files."""
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            words = json.loads(file.metadata()[WORDS])
        return RotationSet.from_tensors(
            tensors,
            words["about"],
            words["blocks"],
            words.get(GAINS, False),
            words.get(ROUNDED, False),
        )


AS_IT_IS = RotationSet(keeps_gains=True)  # the original's own weights


def kv_clip_key(layer: int, side: Kept) -> str:
    """Return the name of the clip ratio of keys or of values of a layer: `3.keys`."""
    return f"{layer}.{side}"


def _online(
    left: torch.Tensor, right: torch.Tensor, blocks: int
) -> OnlineRotation | LayerRotations:
    """Rebuild a rotation from factors (a, a) and (b, b), or those of all layers from stacks."""
    if left.dim() == 2:
        return OnlineRotation(left, right, blocks)
    pairs = zip(left, right, strict=True)
    return LayerRotations([OnlineRotation(*pair, blocks) for pair in pairs])


def _part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
