"""Rotations from elsewhere and for elsewhere: SpinQuant's R.bin, and files of our own.

An R.bin is a pickled dictionary: `R1` (hidden, hidden) and `model.layers.N.self_attn.R2`
(head_dim, head_dim) for every layer, float32. It is read by torch's weights-only unpickler, which
builds tensors and plain containers and nothing else.
"""

import logging
import re
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from spinlab.errors import InputError, ResultError
from spinlab.model.seams import Dimensions
from spinlab.rotation.orthogonal import orthogonality_error, polar
from spinlab.rotation.rotations import RotationSet

log = logging.getLogger(__name__)

_R2 = "model.layers.{}.self_attn.R2"
MANIFEST = "transform.safetensors"  # beside a transformed model: what its weights lack
_DRIFT = 1e-2  # of max|RRᵀ-I|: what learning in float32 without projection leaves, with room


def read_rotations(
    path: Path, dimensions: Dimensions, family: str, manifest: bool = False
) -> RotationSet:
    """Read a RotationSet (.safetensors) or an R.bin, made for a model of these dimensions.

    `manifest` says that the file belongs to the model itself, which has some of it in its weights.

    Foreign matrices drift off orthogonality while they are learned: they are projected onto it,
    and the deviation is logged. Raises InputError, with the measured deviation, for what is no
    rotation, and for the wrong size or family.
    """
    if not path.is_file():
        raise InputError(f"rotation.load={path} does not exist")
    found = _read_bin(path) if path.suffix == ".bin" else _read_own(path)
    fused = (found.about or {}).get("fused")
    if fused and not manifest:
        raise InputError(
            f"{path} is the manifest of a transformed model, which has {', '.join(fused)} in its "
            "weights: give the model's folder as model.path"
        )
    made_for = (found.about or {}).get("family", family)
    if made_for != family:
        raise InputError(f"{path} was made for a {made_for} model, this one is {family}")
    found.check(dimensions, path)
    return found


def write_bin(rotations: RotationSet, path: Path) -> None:
    """Write R1 and R2 in SpinQuant's layout; what runs online has no place in it.

    Raises InputError where R1 or R2 is off, or where transforms or clip ratios of inputs would be
    lost.
    """
    if rotations.r1 is None or rotations.r2 is None or rotations.inputs or rotations.clips:
        raise InputError(f"{path}: an R.bin holds R1 and R2 and nothing else; use .safetensors")
    heads = {_R2.format(layer): r2.float().clone() for layer, r2 in enumerate(rotations.r2)}
    torch.save({"R1": rotations.r1.float(), **heads}, path)


def manifest_of(path: str | None) -> Path | None:
    """Return the manifest of a transformed checkpoint; None for an ordinary one."""
    manifest = Path(path or "").expanduser() / MANIFEST
    return manifest if path and manifest.is_file() else None


def _read_own(path: Path) -> RotationSet:
    try:
        found = RotationSet.load(path)
    except (
        SafetensorError,
        RuntimeError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
    ) as error:
        raise InputError(f"{path} is no file of rotations: {error}") from error
    except ResultError as error:
        raise InputError(f"{path}: {error}") from error
    return found


def _read_bin(path: Path) -> RotationSet:
    tensors = _tensors(path)
    layers = {int(m[1]) for key in tensors if (m := re.fullmatch(_R2.format(r"(\d+)"), key))}
    wanted = {"R1"} | {_R2.format(layer) for layer in range(len(layers))}
    if tensors.keys() != wanted or not layers:
        extra = ", ".join(sorted(tensors.keys() ^ wanted)[:3]) or "no R2"
        raise InputError(f"{path} has not the keys of an R.bin (R1, {_R2.format('N')}): {extra}")
    try:
        heads = torch.stack([tensors[_R2.format(layer)] for layer in range(len(layers))])
    except RuntimeError as error:
        raise InputError(f"{path}: its R2 are not of one size") from error
    r1, r2 = (_projected(f"{path}: {n}", t) for n, t in (("R1", tensors["R1"]), ("R2", heads)))
    return RotationSet(r1, r2, about={"file": path.name})


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """Load a pickled dictionary of tensors, and nothing else."""
    try:
        with warnings.catch_warnings():  # of pickle protocols other than torch's own
            warnings.simplefilter("ignore", UserWarning)
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler fed with other bytes fails in any way
        raise InputError(
            f"{path} is not a plain dictionary of tensors, and nothing else is unpickled"
        ) from error
    plain = isinstance(found, dict) and all(
        isinstance(k, str) and isinstance(t, torch.Tensor) and t.numel() for k, t in found.items()
    )
    if not plain:
        raise InputError(f"{path} is not a plain dictionary of tensors")
    return found


def _projected(name: str, matrix: torch.Tensor) -> torch.Tensor:
    """Return the nearest orthogonal matrices to (..., n, n), if they are near."""
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise InputError(f"{name} is {tuple(matrix.shape)}, not square")
    error = orthogonality_error(matrix)
    if not error <= _DRIFT:
        raise InputError(
            f"{name} is not orthogonal: max|RRᵀ-I| = {error:.1e}, more than the {_DRIFT:.0e} that "
            "learning leaves"
        )
    log.info("%s: max|RRᵀ-I| = %.1e, projected", name, error)
    return polar(matrix)


def with_online(loaded: RotationSet, drawn: RotationSet) -> RotationSet:
    """Complete an R.bin's R1 and R2 by online rotations that the settings draw."""
    return replace(loaded, r3=drawn.r3, r4=drawn.r4, cross_head=drawn.cross_head)
