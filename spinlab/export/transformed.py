"""A transformed checkpoint: stock weights with R1 and R2 fused, and a manifest of all the rest.

The checkpoint alone computes the original's function in any tool. What needs an online half (R3,
R4, cross-head, transforms of single inputs) is not in its weights: the manifest holds it, and
loading the folder as `model.path` fuses and runs both halves together, so neither is forgotten.
"""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spinlab.model.split import join_fused
from spinlab.rotation.rotations import RotationSet

log = logging.getLogger(__name__)

MANIFEST = "transform.safetensors"


def save_transformed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rotations: RotationSet,
    folder: Path,
) -> None:
    """Save a model whose residual stream and heads are rotated, and the rest as its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    fused = [name for name in ("r1", "r2") if getattr(rotations, name) is not None]
    about = {**(rotations.about or {}), "fused": fused}
    join_fused(model)
    model.to(torch.device("cpu"))  # pyright: ignore[reportArgumentType]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    replace(rotations, r1=None, r2=None, about=about).save(folder / MANIFEST)
    log.info("%-12s transformed model in %s", "export", folder)


def manifest_of(path: str | None) -> Path | None:
    """Return the manifest of a transformed checkpoint; None for an ordinary one."""
    manifest = Path(path or "").expanduser() / MANIFEST
    return manifest if path and manifest.is_file() else None
