"""A transformed checkpoint: stock weights with R1 and R2 fused, and a manifest of all the rest.

The checkpoint alone computes the original's function in any tool. What needs an online half (R3,
R4, cross-head, transforms of single inputs), and the ranges that were learned, are not in its
weights: the manifest holds them, and loading the folder as `model.path` fuses and runs both halves
together, so neither is forgotten.
"""

import logging
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spinlab.config import Config
from spinlab.export.base import Subject
from spinlab.export.folder import check_folder, new_folder
from spinlab.export.identity import digests_of, mark
from spinlab.export.parts import fused_in
from spinlab.export.stock import check_stock, save_stock
from spinlab.model.files import MANIFEST
from spinlab.rotation.rotations import RotationSet

__all__ = ["check", "save_transformed", "write"]

log = logging.getLogger(__name__)


def check(setting: str, target: Path, config: Config) -> None:
    """Raise InputError for a family without such files, and as `check_folder` does."""
    check_folder(setting, target, config)
    check_stock(setting, config)


def write(subject: Subject, path: str) -> None:
    """Write the rotated model with its manifest."""
    save_transformed(subject.rotated(), subject.tokenizer(), subject.rotations, path)


def save_transformed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rotations: RotationSet,
    path: str,
) -> None:
    """Save a model whose residual stream and heads are rotated, and the rest as its manifest.

    A new folder appears at once and whole. In an earlier export its own files are replaced and
    others stay; raises InputError for any other folder. The model is overwritten.
    """
    about = rotations.about or {}
    fused = fused_in(rotations)
    with new_folder("export.transformed", path) as partial:
        save_stock(model, tokenizer, partial)
        about = {**about, "fused": [*about.get("fused", []), *fused], "files": digests_of(partial)}
        left = replace(rotations, r1=None, r2=None, latents={}, about=about)
        left.save(partial / MANIFEST)
        mark(partial)
    log.info("%-12s transformed model in %s", "export", path)
