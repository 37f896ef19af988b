"""The RotationSet: every transform of one model as a value that can be saved and loaded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from spinlab.errors import InputError
from spinlab.model.seams import Dimensions, Seam
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.online import InputTransform, OnlineRotation
from spinlab.rotation.orthogonal import check_orthogonal, orthogonality_error
from spinlab.rotation.statistics import input_key

_FUSED = ("r1", "r2")
_ONLINE = ("r3", "r4", "cross_head")


@dataclass(frozen=True)
class RotationSet:
    """Hold R1 (hidden, hidden) and R2 (layers, head_dim, head_dim), float64, and what runs online.

    A rotation that is switched off is None. `inputs` are transforms of single groups of linears,
    by `input_key`, and `clips` the clip ratios of their quantizers that were learned together with
    the rotations. `about` is JSON-ready: how the set came to be.
    """

    r1: torch.Tensor | None = None
    r2: torch.Tensor | None = None
    r3: OnlineRotation | None = None
    r4: OnlineRotation | None = None
    cross_head: OnlineRotation | None = None  # (heads·head_dim): turns across heads, not in them
    inputs: Mapping[str, ScaledDual] = field(default_factory=dict)
    clips: Mapping[str, float] = field(default_factory=dict)
    about: dict | None = None

    def __post_init__(self) -> None:
        for name in _FUSED:
            matrix = getattr(self, name)
            if matrix is not None:
                check_orthogonal(name.upper(), matrix)

    def online(self, layer: int, seam: Seam) -> InputTransform | None:
        """Return what runs before a linear, if anything."""
        own = self.inputs.get(input_key(layer, seam.group))
        if own is not None and own.is_online:
            return own
        return {"R4": self.r4, "R2": self.cross_head}.get(seam.reads or "")

    def orthogonality(self) -> dict[str, float]:
        """Return max|RRᵀ-I| of every rotation that is on."""
        found = {name: getattr(self, name) for name in _FUSED}
        found |= {f"{n}.{f}": t for n in _ONLINE for f, t in self._factors(n).items()}
        errors = {name: orthogonality_error(t) for name, t in found.items() if t is not None}
        duals = [t.dual for t in self.inputs.values() if t.dual is not None]
        if duals:
            blocks = [block for dual in duals for block in (dual.first, dual.second)]
            errors["inputs"] = max(orthogonality_error(block) for block in blocks)
        return errors

    def _factors(self, name: str) -> dict[str, torch.Tensor]:
        online: OnlineRotation | None = getattr(self, name)
        return {} if online is None else {"left": online.left, "right": online.right}

    def save(self, path: Path) -> None:
        """Write all rotations and `about` into one safetensors file."""
        tensors = {name: getattr(self, name) for name in _FUSED}
        tensors |= {f"{n}.{f}": t for n in _ONLINE for f, t in self._factors(n).items()}
        for key, transform in self.inputs.items():
            tensors |= {f"inputs.{key}.{part}": t for part, t in transform.tensors().items()}
        for key, ratio in self.clips.items():
            tensors[f"clip.{key}"] = torch.tensor(ratio, dtype=torch.float64)
        tensors = {k: t.cpu().contiguous() for k, t in tensors.items() if t is not None}
        blocks = {n: getattr(self, n).blocks for n in _ONLINE if getattr(self, n) is not None}
        about = {"about": self.about or {}, "blocks": blocks}
        save_file(tensors, path, {k: json.dumps(v, sort_keys=True) for k, v in about.items()})

    @staticmethod
    def load(path: Path) -> "RotationSet":
        """Read back what `save` wrote; raise ValueError for any other file of tensors."""
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        about, blocks = (json.loads(metadata.get(name, "{}")) for name in ("about", "blocks"))
        online = {
            n: OnlineRotation(tensors[f"{n}.left"], tensors[f"{n}.right"], blocks.get(n, 1))
            for n in _ONLINE
            if f"{n}.left" in tensors
        }
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("inputs."):
                key, _, part = name.removeprefix("inputs.").rpartition(".")
                parts.setdefault(key, {})[part] = tensor
        inputs = {key: ScaledDual.from_tensors(stored) for key, stored in parts.items()}
        clips = {n.removeprefix("clip."): tensors[n].item() for n in tensors if n[:5] == "clip."}
        r1, r2 = (tensors[n].double() if n in tensors else None for n in _FUSED)
        known = {*_FUSED, *(f"{n}.{part}" for n in _ONLINE for part in ("left", "right"))}
        unknown = {n for n in tensors if n not in known and not n.startswith(("inputs.", "clip."))}
        if unknown or "blocks" not in metadata:
            raise ValueError(f"it holds {min(unknown)}" if unknown else "spinlab did not write it")
        return RotationSet(r1, r2, inputs=inputs, clips=clips, about=about, **online)

    def check(self, dimensions: Dimensions, path: Path | str = "rotations") -> None:
        """Raise InputError where a rotation does not fit a model of these dimensions."""
        head = (dimensions.head_dim,) * 2
        wanted = {"r1": (dimensions.hidden,) * 2, "r2": (dimensions.layers, *head)}
        for name, shape in wanted.items():
            matrix = getattr(self, name)
            if matrix is not None and tuple(matrix.shape) != shape:
                raise InputError(f"{path}: {name} is {tuple(matrix.shape)}, the model has {shape}")
        widths = {
            "r3": dimensions.head_dim,
            "r4": dimensions.intermediate,
            "cross_head": dimensions.heads * dimensions.head_dim,
        }
        for name, width in widths.items():
            online = getattr(self, name)
            if online is not None and online.width != width:
                raise InputError(f"{path}: {name} has width {online.width}, the model has {width}")
        of_group = {
            "qkv": dimensions.hidden,
            "gate_up": dimensions.hidden,
            "o": dimensions.heads * dimensions.head_dim,
            "down": dimensions.intermediate,
        }
        known = {
            input_key(n, group): w
            for n in range(dimensions.layers)
            for group, w in of_group.items()
        }
        for key, transform in self.inputs.items():
            if transform.width != known.get(key):
                raise InputError(f"{path}: the transform of input {key} does not fit the model")
        for key, ratio in self.clips.items():
            if key not in known:
                raise InputError(f"{path}: the clip ratio of input {key} does not fit the model")
            if not 0 < ratio <= 1:
                raise InputError(f"{path}: the clip ratio of input {key} is {ratio}, not in (0, 1]")
