"""The quantized network itself, packed, for `spinlab.load` (`spinlab.artefact`)."""

import logging
from dataclasses import replace
from pathlib import Path

from spinlab.config import Config
from spinlab.errors import InputError
from spinlab.export.base import Subject
from spinlab.export.folder import check_folder, new_folder
from spinlab.export.listing import write_listing
from spinlab.export.network import REST, ROTATIONS, WEIGHTS, Network
from spinlab.tensors import write_tensors
from spinlab.weights.quantized import save_weights

log = logging.getLogger(__name__)


def check(setting: str, target: Path, config: Config) -> None:
    """Raise InputError for a network that is not quantized, and as `check_folder` does."""
    if not config.quant.rounds_weights:
        raise InputError(
            f"{setting} holds rounded weights, and all have 16 bits here: set quant.weights.bits, "
            "or use export.checkpoint"
        )
    check_folder(setting, target, config)


def write(subject: Subject, path: str) -> None:
    """Write the network that the variants `fake` and `integer` are."""
    config, weights = subject.config, subject.weights()
    network = Network(config.model.dtype, config.seed, config.quant, config.kv)
    model = subject.fused(weights)
    own = {f"{name}.weight" for name in weights}
    rest = {n: t.cpu().contiguous() for n, t in model.state_dict().items() if n not in own}
    with new_folder("export.artefact", path) as partial:
        model.config.save_pretrained(partial)
        assert model.generation_config is not None
        model.generation_config.save_pretrained(partial)
        subject.tokenizer().save_pretrained(partial)
        save_weights(weights, partial / WEIGHTS)
        write_tensors(partial / REST, rest)
        replace(subject.rotations, r1=None, r2=None).save(partial / ROTATIONS)
        write_listing(partial, "artefact", subject.record, {"network": network.as_json()})
    log.info("%-12s quantized network in %s", "export", path)
