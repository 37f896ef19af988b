"""Rotations from elsewhere and for elsewhere: SpinQuant's R.bin, and files of our own.

An R.bin is a pickled dictionary: `R1` (hidden, hidden) and `model.layers.N.self_attn.R2`
(head_dim, head_dim) for every layer, float32. It is read by torch's weights-only unpickler, which
builds tensors and plain containers and nothing else.
"""

import io
import logging
import os
import warnings
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from spinlab.errors import InputError
from spinlab.model.map import ModelMap
from spinlab.rotation.faults import not_orthogonal
from spinlab.rotation.online import (
    LayerRotations,
    OnlineRotation,
    WidthRotations,
    hadamard_rotation,
)
from spinlab.rotation.orthogonal import orthogonality_error, polar
from spinlab.rotation.rotations import ONLINE, RotationSet
from spinlab.rotation.stored import check_shape, exactly, read_about, read_stored

log = logging.getLogger(__name__)

_R2 = "model.layers.{}.self_attn.R2"
# of max|RRᵀ-I|: what learning in float32 without projection leaves, with room; numbers rounded to
# bfloat16 are off by 2^-9 of themselves, which makes at most 2·2^-9 = 4e-3
_DRIFT = 1e-2
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_rotations(path: Path, model_map: ModelMap, manifest: bool = False) -> RotationSet:
    """Read a RotationSet (.safetensors) or an R.bin, made for such a model.

    `manifest` says that the file belongs to the model itself, which has some of it in its weights.

    Foreign matrices drift off orthogonality while they are learned: they are projected onto it,
    and the deviation is logged. Raises InputError, with the measured deviation, for what is no
    rotation, and for the wrong size or family.
    """
    if not os.path.isfile(path):
        raise InputError(f"rotation.load={path} does not exist")
    read = _read_bin if path.suffix == ".bin" else read_stored
    found, family = read(path, model_map), model_map.family
    fused = (found.about or {}).get("fused")
    if fused and not manifest:
        raise InputError(
            f"{path} belongs to an exported model, which has {', '.join(fused)} in its weights: "
            "take a file of export.rotations, or the folder of export.transformed as model.path"
        )
    made_for = (found.about or {}).get("family", family)
    if made_for != family:
        raise InputError(f"{path} was made for a {made_for} model, this one is {family}")
    return found


def write_bin(rotations: RotationSet, path: Path) -> None:
    """Write R1 and R2 in SpinQuant's layout; what runs online has no place in it.

    Raises InputError where R1 or R2 is off, or where anything would be lost: transforms of inputs,
    learned ranges, online rotations that the settings do not make again.
    """
    lost = {"transforms of inputs": rotations.inputs, "clip ratios of inputs": rotations.clips}
    lost |= {"clip ratios of keys and values": rotations.kv_clips}
    lost |= {"learned weight ranges": rotations.weight_clips}
    lost |= {"rotations of latents": rotations.latents}
    lost |= {f"{n} that is no exact Hadamard": not made_again(rotations, n) for n in ONLINE}
    for what, there in lost.items():
        if there:
            raise InputError(
                f"an R.bin holds R1 and R2 and nothing else, and there are {what}; use .safetensors"
            )
    if rotations.r1 is None or rotations.r2 is None:
        raise InputError("an R.bin needs R1 and R2, and one is off; use .safetensors")
    heads = {_R2.format(layer): r2.float().clone() for layer, r2 in enumerate(rotations.r2)}
    content = io.BytesIO()  # on a full disk torch says what nobody understands
    torch.save({"R1": rotations.r1.float(), **heads}, content)
    path.write_bytes(content.getbuffer())


def is_rotations(path: Path) -> bool:
    """Tell whether a file holds rotations, by the names in it or by what it says of itself."""
    try:
        if zipfile.is_zipfile(path):
            return "R1" in _tensors(path)
        read_about(path)
    except InputError:
        return False
    return True


def made_again(rotations: RotationSet, name: str) -> bool:
    """Tell whether the settings alone make an online rotation.

    It is off, or Hadamard's, or an R3 that turns nothing; in every layer, if each has its own.
    """
    online: OnlineRotation | LayerRotations | WidthRotations | None = getattr(rotations, name)
    if online is None or name == "cross_head":  # across heads there is no other kind
        return True
    if isinstance(online, WidthRotations):
        return all(map(_is_hadamard, online.by_width.values()))
    if isinstance(online, LayerRotations):
        return all(map(_is_hadamard, online.layers)) or _is_identity(online)
    return _is_hadamard(online) or (name == "r3" and _is_identity(online))


def _is_identity(online: OnlineRotation | LayerRotations) -> bool:
    found = online.dense()
    return torch.equal(found, torch.eye(online.width).to(found).expand_as(found))


def _is_hadamard(online: OnlineRotation) -> bool:
    size = online.width // online.blocks
    try:
        expected = hadamard_rotation(online.width, size if size & (size - 1) == 0 else 0)
    except InputError:  # there is none of this width
        return False
    pairs = [(online.left, expected.left), (online.right, expected.right)]
    return online.blocks == expected.blocks and all(torch.equal(a, b) for a, b in pairs)


def _read_bin(path: Path, model_map: ModelMap) -> RotationSet:
    tensors = _tensors(path)
    names = [_R2.format(layer) for layer in range(len(model_map.layers))]
    if tensors.keys() != {"R1", *names}:
        odd = ", ".join(sorted(tensors.keys() ^ {"R1", *names})[:3])
        raise InputError(
            f"{path} has not the keys of an R.bin of {len(names)} layers (R1, "
            f"{_R2.format('N')}): {odd}"
        )
    # before anything is computed with them
    orders = {"R1": model_map.hidden, **dict.fromkeys(names, model_map.width("r2"))}
    for name, order in orders.items():
        rule = exactly((order, order), partial(not_orthogonal, most=_DRIFT))
        check_shape(f"{path}: {name}", tuple(tensors[name].shape), rule)
        if (fault := rule.fault(tensors[name])) is not None:
            raise InputError(f"{path}: {name} {fault}")
    heads = torch.stack([tensors[name].double() for name in names])
    r1, r2 = (_projected(f"{path}: {n}", t) for n, t in (("R1", tensors["R1"]), ("R2", heads)))
    return RotationSet(r1, r2, about={"file": path.name})


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """Load a pickled dictionary of tensors, and nothing else."""
    try:
        with warnings.catch_warnings():  # of pickle protocols other than torch's own
            warnings.simplefilter("ignore", UserWarning)
            mapped = zipfile.is_zipfile(path)  # what is too large is refused before it is read
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # an unpickler fed with other bytes fails in any way
        raise InputError(
            f"{path} is not a plain dictionary of tensors, and nothing else is unpickled"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise InputError(f"{path} is not a plain dictionary of tensors")
    for name, tensor in found.items():
        if not isinstance(tensor, torch.Tensor) or not _is_plain(tensor):
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise InputError(
                f"{path} is not a plain dictionary of tensors: {name:.60} ({kind}) is no dense "
                "tensor of floats"
            )
    return {name: tensor.detach() for name, tensor in found.items()}


def _is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is dense, holds numbers, and numbers of a float dtype."""
    dense = tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_meta)
    return dense and tensor.dtype in _FLOATS


def _projected(name: str, matrix: torch.Tensor) -> torch.Tensor:
    """Return the nearest orthogonal matrices to (..., n, n), which are near."""
    log.info("%s: max|RRᵀ-I| = %.1e, projected", name, orthogonality_error(matrix))
    return polar(matrix)


def with_online(loaded: RotationSet, drawn: RotationSet) -> RotationSet:
    """Complete an R.bin's R1 and R2 by the other rotations that the settings draw."""
    online = {name: getattr(drawn, name) for name in ONLINE}
    return replace(loaded, latents=drawn.latents, **online)
