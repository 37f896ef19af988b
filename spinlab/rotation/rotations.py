"""The RotationSet: every transform of one model as a value that can be saved and loaded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open

from spinlab.config.kv import Kept
from spinlab.model.map import Input, Site
from spinlab.rotation.blocks import InvertibleBlocks, inverse_error
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.online import InputTransform, LayerRotations, OnlineRotation
from spinlab.rotation.orthogonal import check_orthogonal, orthogonality_error
from spinlab.tensors import write_tensors

_FUSED = ("r1", "r2")
ONLINE = ("r3", "r4", "cross_head")
_NUMBERS = {"clip": "clips", "kv_clip": "kv_clips", "peak": "peaks"}  # fields, by tensors' names
WORDS = "rotations"  # entry of a file's metadata: `about` and the blocks of online rotations


@dataclass(frozen=True)
class RotationSet:
    """Hold R1 (hidden, hidden) and R2 (layers, head_dim, head_dim), float64, and what runs online.

    A rotation that is switched off is None; R3 is one for all layers, or one for each. `inputs` are
    transforms of single inputs, by the key of the input. What was learned together with the
    rotations is part of the set: `clips`, the clip ratios of input quantizers by that key,
    `kv_clips`, those of codecs by layer and side (`3.keys`), and `weight_clips`, those of weights
    by the path of the linear: (out, in/g, 1). `about` is JSON-ready: how the set came to be.
    `peaks`: the largest magnitudes of inputs behind the rotations, by key, as calibration found
    them for formats that ask for it.
    """

    r1: torch.Tensor | None = None
    r2: torch.Tensor | None = None
    r3: OnlineRotation | LayerRotations | None = None
    r4: OnlineRotation | None = None
    cross_head: OnlineRotation | None = None  # (heads·head_dim): across heads, not in them
    inputs: Mapping[str, ScaledDual] = field(default_factory=dict)
    clips: Mapping[str, float] = field(default_factory=dict)
    kv_clips: Mapping[str, float] = field(default_factory=dict)
    weight_clips: Mapping[str, torch.Tensor] = field(default_factory=dict)
    about: dict | None = None
    peaks: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _FUSED:
            matrix = getattr(self, name)
            if matrix is not None:
                check_orthogonal(name.upper(), matrix)

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
        return {"R4": self.r4, "R2": self.cross_head}.get(place.reads or "")

    def orthogonality(self) -> dict[str, float]:
        """Return max|RRᵀ-I| of every rotation that is on, and max|TT⁻¹-I| of inputs' other maps."""
        found = {name: getattr(self, name) for name in _FUSED}
        found |= {f"{n}.{f}": t for n in ONLINE for f, t in self._factors(n).items()}
        errors = {name: orthogonality_error(t) for name, t in found.items() if t is not None}
        duals = [t.dual for t in self.inputs.values() if t.dual is not None]
        others = [dual for dual in duals if isinstance(dual, InvertibleBlocks)]
        if others:
            errors["inverses"] = max(inverse_error(dual.first) for dual in others)
        elif duals:
            parts = [part for dual in duals for part in dual.tensors().values()]
            blocks = [part for part in parts if part.is_floating_point()]
            errors["inputs"] = max(orthogonality_error(block) for block in blocks)
        return errors

    def _factors(self, name: str) -> dict[str, torch.Tensor]:
        online: OnlineRotation | LayerRotations | None = getattr(self, name)
        return {} if online is None else {"left": online.left, "right": online.right}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the stored form, but for `about` and the blocks of online rotations."""
        found = {name: getattr(self, name) for name in _FUSED}
        found |= {f"{n}.{f}": t for n in ONLINE for f, t in self._factors(n).items()}
        for key, transform in self.inputs.items():
            found |= {f"inputs.{key}.{part}": t for part, t in transform.tensors().items()}
        for prefix, name in _NUMBERS.items():
            for key, number in getattr(self, name).items():
                found[f"{prefix}.{key}"] = torch.tensor(number, dtype=torch.float64)
        found |= {f"weight_clip.{name}": ratio for name, ratio in self.weight_clips.items()}
        return {name: t.cpu().contiguous() for name, t in found.items() if t is not None}

    @staticmethod
    def from_tensors(
        tensors: Mapping[str, torch.Tensor], about: dict, blocks: Mapping[str, int]
    ) -> "RotationSet":
        """Rebuild a set from its stored form."""
        online = {
            n: _online(tensors[f"{n}.left"], tensors[f"{n}.right"], blocks.get(n, 1))
            for n in ONLINE
            if f"{n}.left" in tensors
        }
        of_inputs: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in _part(tensors, "inputs.").items():
            key, _, part = name.rpartition(".")
            of_inputs.setdefault(key, {})[part] = tensor
        inputs = {key: ScaledDual.from_tensors(stored) for key, stored in of_inputs.items()}
        numbers = {
            name: {key: number.item() for key, number in _part(tensors, f"{prefix}.").items()}
            for prefix, name in _NUMBERS.items()
        }
        weight_clips = _part(tensors, "weight_clip.")
        r1, r2 = (tensors[n].double() if n in tensors else None for n in _FUSED)
        r3, r4, cross_head = (online.get(name) for name in ONLINE)
        assert not isinstance(r4, LayerRotations) and not isinstance(cross_head, LayerRotations)
        found = RotationSet(r1, r2, r3, r4, cross_head, inputs, about=about)
        return replace(found, weight_clips=weight_clips, **numbers)

    def save(self, path: Path) -> None:
        """Write everything into one safetensors file; equal sets give equal bytes."""
        blocks = {n: getattr(self, n).blocks for n in ONLINE if getattr(self, n) is not None}
        write_tensors(path, self.tensors(), {WORDS: {"about": self.about or {}, "blocks": blocks}})

    @staticmethod
    def load(path: Path) -> "RotationSet":
        """Read back what `save` wrote in a stage; `spinlab.rotation.exchange` reads other files."""
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            words = json.loads(file.metadata()[WORDS])
        return RotationSet.from_tensors(tensors, words["about"], words["blocks"])


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
