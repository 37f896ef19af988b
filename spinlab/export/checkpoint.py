"""The rotated model as a stock checkpoint in 16 bits, for any other tool.

It computes the original's function, with nothing that runs online: R1, R2 and folded scales are in
the weights, and what weights cannot hold is refused. `spinlab.export.transformed` writes such
parts beside its weights, in a manifest that only spinlab reads.
"""

import logging
from pathlib import Path

from spinlab.config import Config
from spinlab.export.base import Subject
from spinlab.export.folder import check_folder, new_folder
from spinlab.export.listing import write_listing
from spinlab.export.parts import check_made, check_settings
from spinlab.export.stock import check_stock, save_stock
from spinlab.finite import check_finite
from spinlab.model.load import cast_model
from spinlab.rotation.rotations import ONLINE

log = logging.getLogger(__name__)

_FORM = "a checkpoint in 16 bits"
_CANNOT = (
    *ONLINE,
    "inputs",
    "scales",
    "clips",
    "kv_clips",
    "weight_clips",
)  # names of `parts.PARTS`


def check(setting: str, target: Path, config: Config) -> None:
    """Raise InputError for rotations or a family that such a file cannot hold.

    As `check_folder` does, too.
    """
    check_settings(setting, _FORM, _CANNOT, config)
    check_folder(setting, target, config)
    check_stock(setting, config)


def write(subject: Subject, path: str) -> None:
    """Write the fused model, rounded once from the run's dtype to 16 bits."""
    check_made(f"export.checkpoint={path}", _FORM, _CANNOT, subject.rotations)
    dtype = subject.dtype()
    model = cast_model(subject.fused({}), dtype)
    check_finite(dict(model.named_parameters()), f"weights do not fit into {dtype}")
    with new_folder("export.checkpoint", path) as partial:
        save_stock(model, subject.tokenizer(), partial)
        write_listing(partial, "checkpoint", subject.record())
    log.info("%-12s rotated model in 16 bits in %s", "export", path)
