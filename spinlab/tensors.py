"""Files of tensors: on the disk whole or not at all, and what was altered there is found."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from spinlab import parallel
from spinlab.files import canonical, replacing

log = logging.getLogger(__name__)

_ABOUT = "spinlab"  # the entry of the metadata


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], told: Mapping[str, Any] | None = None
) -> None:
    """Write tensors and one entry of JSON-ready words, whole or not at all.

    The tensors are contiguous and in the host's memory. Equal content gives equal bytes, which more
    than one entry would not: safetensors writes them in any order.
    """
    metadata = {name: json.dumps(words, sort_keys=True) for name, words in (told or {}).items()}
    with replacing(path) as temporary:
        temporary.touch()  # for those who may read a new file: safetensors makes it for its owner
        mode = temporary.stat().st_mode
        save_file(dict(tensors), temporary, metadata or None)
        temporary.chmod(mode)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], about: Any = None) -> None:
    """Write tensors and JSON-ready `about`, with a digest of both, as `write_tensors` does."""
    digest = _tensors_digest(tensors, about)
    write_tensors(path, tensors, {_ABOUT: {"about": about, "sha256": digest}})


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """Return the tensors that `save_tensors` wrote, and what is said about them.

    Raises ValueError if the file is torn or altered.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            told = json.loads(file.metadata()[_ABOUT])
        about, digest = told["about"], told["sha256"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"it is torn ({type(error).__name__}: {error})") from error
    if _tensors_digest(tensors, about) != digest:
        raise ValueError("its content does not have its digest")
    return tensors, about


def kept_tensors(path: Path) -> tuple[dict[str, torch.Tensor], Any] | None:
    """Return what an earlier run left by `save_tensors`, the same on all processes, if anything.

    A torn or altered file is dropped with a warning, to be made again.
    """
    found = None
    if parallel.is_main() and path.exists():
        try:
            found = read_tensors(path)
        except ValueError as error:
            log.warning("the progress in %s is damaged and is dropped: %s", path.name, error)
            path.unlink()
    if not parallel.share(found is not None):
        return None
    return found or read_tensors(path)


def _tensors_digest(tensors: Mapping[str, torch.Tensor], about: Any) -> str:
    """Digest names, dtypes, shapes and bytes of tensors, and what is said about them."""
    sha = hashlib.sha256(canonical(about))
    for name, tensor in sorted(tensors.items()):
        sha.update(canonical([name, str(tensor.dtype), list(tensor.shape)]))
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
