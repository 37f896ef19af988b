"""A transformed checkpoint: stock weights with R1 and R2 fused, and a manifest of all the rest.

The checkpoint alone computes the original's function in any tool. What needs an online half (R3,
R4, cross-head, transforms of single inputs) is not in its weights: the manifest holds it, and
loading the folder as `model.path` fuses and runs both halves together, so neither is forgotten.
"""

import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spinlab.errors import InputError
from spinlab.model.split import join_fused
from spinlab.rotation.exchange import MANIFEST
from spinlab.rotation.rotations import RotationSet

log = logging.getLogger(__name__)


def save_transformed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rotations: RotationSet,
    folder: Path,
) -> None:
    """Save a model whose residual stream and heads are rotated, and the rest as its manifest.

    The folder appears at once and whole. One that is there already is replaced if it is an earlier
    export; raises InputError for any other.
    """
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise InputError(
            f"export.transformed={folder} is there and no earlier export: name another"
        )
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    about = rotations.about or {}
    fused = [name for name in ("r1", "r2") if getattr(rotations, name) is not None]
    about = {**about, "fused": [*about.get("fused", []), *fused]}
    join_fused(model)
    model.to(torch.device("cpu"))  # pyright: ignore[reportArgumentType]
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    replace(rotations, r1=None, r2=None, about=about).save(partial / MANIFEST)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    log.info("%-12s transformed model in %s", "export", folder)
