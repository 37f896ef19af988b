"""The quantized network itself, packed, for `spinlab.load` (`spinlab.artefact`)."""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from spinlab.config import Config
from spinlab.errors import InputError
from spinlab.export.base import Subject
from spinlab.export.folder import check_folder, new_folder
from spinlab.export.listing import write_listing
from spinlab.export.network import REST, ROTATIONS, WEIGHTS, Network
from spinlab.export.parts import fused_in
from spinlab.export.stock import save_generation
from spinlab.model.modules import map_of
from spinlab.rotation.rotations import RotationSet
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
    config, weights, rotations = subject.config, subject.weights(), subject.rotations
    network = Network(config.model.dtype, config.seed, config.quant, config.kv)
    gains: dict[str, torch.Tensor] = {}
    if config.quant.tied.quantizes:  # its file needs no head, but what makes one of the embedding
        gains = _final_gain(subject.original())
    rest: dict[str, torch.Tensor] = {}
    model: PreTrainedModel | None = None
    for model in subject.fused_parts(weights):  # the last one has the ends
        tensors = model.state_dict() | gains
        names = network.rest(model, weights)
        rest |= {name: tensors[name].cpu().contiguous() for name in names}
        del tensors
    assert model is not None
    with new_folder("export.artefact", path) as partial:
        model.config.save_pretrained(partial)
        assert model.generation_config is not None
        save_generation(model.generation_config, partial)
        subject.tokenizer().save_pretrained(partial)
        save_weights(weights, partial / WEIGHTS)
        write_tensors(partial / REST, rest)
        _what_is_left(rotations, tied=bool(gains)).save(partial / ROTATIONS)
        write_listing(partial, "artefact", subject.record(), {"network": network.as_json()})
    log.info("%-12s quantized network in %s", "export", path)


def _final_gain(original: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the gain of a model's last norm, by name."""
    name = f"{map_of(original).final_norm}.weight"
    return {name: original.state_dict()[name].clone()}


def _what_is_left(rotations: RotationSet, tied: bool) -> RotationSet:
    """Return what is not in the weights already. tied: R1 is still to be given to the ends."""
    about = rotations.about or {}
    fused = fused_in(rotations)
    fused += ["weight ranges"] if rotations.weight_clips else []
    about = {**about, "fused": [*about.get("fused", []), *fused]}
    r1 = rotations.r1 if tied else None
    return replace(rotations, r1=r1, r2=None, latents={}, weight_clips={}, about=about)
