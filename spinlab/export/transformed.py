"""A transformed checkpoint: stock weights with R1 and R2 fused, and a manifest of all the rest.

The checkpoint alone computes the original's function in any tool. What needs an online half (R3,
R4, cross-head, transforms of single inputs), and the ranges that were learned, are not in its
weights: the manifest holds them, and loading the folder as `model.path` fuses and runs both halves
together, so neither is forgotten.
"""

import logging
import os
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spinlab.config import Config
from spinlab.errors import InputError
from spinlab.export.base import Subject
from spinlab.export.identity import digests_of, files_of, mark
from spinlab.export.targets import (
    check_not_read,
    check_replaceable,
    place_of,
    sole_writer,
    try_to_write,
)
from spinlab.files import sync, writing
from spinlab.model.files import MANIFEST
from spinlab.model.modules import restore
from spinlab.rotation.rotations import RotationSet

log = logging.getLogger(__name__)


def check(setting: str, target: Path, config: Config) -> None:
    """Raise InputError for a folder that holds something else, or that the model is read from."""
    check_not_read(setting, target, "model.path", config.model.path)
    check_replaceable(setting, target)
    try_to_write(target)
    try_to_write(target.parent)  # where it is made before it gets its name


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
    folder, about = place_of(path), rotations.about or {}
    fused = [name for name in ("r1", "r2") if getattr(rotations, name) is not None]
    restore(model)
    model.to(torch.device("cpu"))  # pyright: ignore[reportArgumentType]
    with writing(folder.parent, "export.transformed"), sole_writer(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        about = {**about, "fused": [*about.get("fused", []), *fused], "files": digests_of(partial)}
        replace(rotations, r1=None, r2=None, about=about).save(partial / MANIFEST)
        mark(partial)
        _install(partial, folder, path)
    log.info("%-12s transformed model in %s", "export", path)


def _install(partial: Path, folder: Path, path: str) -> None:
    """Give a finished export its place, and leave alone what is not its own there."""
    setting = f"export.transformed={path}"
    check_replaceable(setting, folder)
    new = [file.relative_to(partial) for file in partial.rglob("*") if file.is_file()]
    for name in new:
        (partial / name).chmod(partial.stat().st_mode & 0o666)  # safetensors: for its owner alone
        sync(partial / name)
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(partial, folder)
        return
    old = {Path(name) for name in files_of(folder) or ()} or _files_of_earlier_version(folder, new)
    for name in new:
        if (folder / name).exists() and name not in old:
            raise InputError(f"{setting} holds {name}, which is not of the earlier export: move it")
    # the config names the new manifest: until that is there too, the folder is no export
    order = {Path("config.json"): 0, Path(MANIFEST): 2}
    for name in sorted(new, key=lambda name: (order.get(name, 1), name)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / name, folder / name)
    for name in old - set(new):
        (folder / name).unlink(missing_ok=True)


def _files_of_earlier_version(folder: Path, new: list[Path]) -> set[Path]:
    """Return what an export that does not list its files must have written."""
    weights = (*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json")
    return {*new, *(file.relative_to(folder) for file in weights)}
