"""The RotationSet: the four rotations of one model as a value that can be saved and loaded."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from spinlab.config import RotationConfig
from spinlab.errors import InputError
from spinlab.model.seams import Dimensions
from spinlab.rotation.online import OnlineRotation, online_rotation
from spinlab.rotation.orthogonal import (
    assert_orthogonal,
    orthogonality_error,
    random_orthogonal,
    randomized_hadamard,
)


@dataclass(frozen=True)
class RotationSet:
    """Hold R1 (hidden, hidden) and R2 (layers, head_dim, head_dim), float64, and online R3, R4.

    A rotation that is switched off is None. `about` is JSON-ready: how the set came to be.
    """

    r1: torch.Tensor | None = None
    r2: torch.Tensor | None = None
    r3: OnlineRotation | None = None
    r4: OnlineRotation | None = None
    about: dict | None = None

    def __post_init__(self) -> None:
        for name in ("r1", "r2"):
            matrix = getattr(self, name)
            if matrix is not None:
                assert_orthogonal(name.upper(), matrix)

    def orthogonality(self) -> dict[str, float]:
        """Return max|RRᵀ-I| of every rotation that is on."""
        found = {name: getattr(self, name) for name in ("r1", "r2")}
        found |= {f"{n}.{f}": t for n in ("r3", "r4") for f, t in self._factors(n).items()}
        return {name: orthogonality_error(t) for name, t in found.items() if t is not None}

    def _factors(self, name: str) -> dict[str, torch.Tensor]:
        online: OnlineRotation | None = getattr(self, name)
        return {} if online is None else {"left": online.left, "right": online.right}

    def save(self, path: Path) -> None:
        """Write all rotations and `about` into one safetensors file."""
        tensors = {name: getattr(self, name) for name in ("r1", "r2")}
        tensors |= {f"{n}.{f}": t for n in ("r3", "r4") for f, t in self._factors(n).items()}
        tensors = {k: t.cpu().contiguous() for k, t in tensors.items() if t is not None}
        save_file(tensors, path, metadata={"about": json.dumps(self.about or {}, sort_keys=True)})

    @staticmethod
    def load(path: Path, dimensions: Dimensions | None = None) -> "RotationSet":
        """Read a set back; with `dimensions`, refuse rotations made for another model."""
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = json.loads((file.metadata() or {}).get("about", "{}"))
        online = {
            n: OnlineRotation(tensors[f"{n}.left"], tensors[f"{n}.right"])
            for n in ("r3", "r4")
            if f"{n}.left" in tensors
        }
        loaded = RotationSet(tensors.get("r1"), tensors.get("r2"), about=about, **online)
        if dimensions is not None:
            loaded.check(dimensions, path)
        return loaded

    def check(self, dimensions: Dimensions, path: Path | str = "rotations") -> None:
        """Raise InputError where a rotation does not fit a model of these dimensions."""
        head = (dimensions.head_dim,) * 2
        wanted = {"r1": (dimensions.hidden,) * 2, "r2": (dimensions.layers, *head)}
        for name, shape in wanted.items():
            matrix = getattr(self, name)
            if matrix is not None and tuple(matrix.shape) != shape:
                raise InputError(f"{path}: {name} is {tuple(matrix.shape)}, the model has {shape}")
        for name, width in (("r3", dimensions.head_dim), ("r4", dimensions.intermediate)):
            online = getattr(self, name)
            if online is not None and online.width != width:
                raise InputError(f"{path}: {name} has width {online.width}, the model has {width}")


def initial_rotations(
    config: RotationConfig, dimensions: Dimensions, generator: torch.Generator
) -> RotationSet:
    """Draw the rotations an experiment starts from.

    R1 and R2 may be identity, random (Haar) or hadamard (randomized); R3 and R4 are exact
    Hadamard matrices as in QuaRot and SpinQuant, or random, or off.
    """
    r1 = _matrix(config.r1, dimensions.hidden, generator)
    heads = [_matrix(config.r2, dimensions.head_dim, generator) for _ in range(dimensions.layers)]
    r2 = None if config.r2 == "none" else torch.stack([h for h in heads if h is not None])
    return RotationSet(
        r1,
        r2,
        online_rotation(config.r3, dimensions.head_dim, generator),
        online_rotation(config.r4, dimensions.intermediate, generator),
    )


def _matrix(kind: str, n: int, generator: torch.Generator) -> torch.Tensor | None:
    makers = {
        "none": lambda: None,
        "identity": lambda: torch.eye(n, dtype=torch.float64),
        "random": lambda: random_orthogonal(n, generator),
        "hadamard": lambda: randomized_hadamard(n, generator),
    }
    return makers[kind]()
