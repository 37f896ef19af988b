"""The quantized network as a compressed-tensors checkpoint, for vLLM and transformers.

Levels are spinlab's own, packed. Scales, and all that is not quantized, are rounded to the
checkpoint's 16 bits, to 2^-9 of themselves in bfloat16: that, and the order in which a reader adds,
is all that its network has apart from the run's `fake`. Inputs are quantized by the reader, in the
range that it chooses (`spinlab.export.profiles`), and ties are rounded its way.

R1 and R2 are in the weights, R4 is the reader's to apply (`transform_config`): vLLM does, on one
GPU, transformers leaves it out. Weights were rounded behind the exact R4. So where its matrix is
not one of signs, inputs are turned by one that 16 bits hold, which leaves them off by about 2^-10
of their length: no more than 16 bits do to them anyway.
"""

import logging
from pathlib import Path

import torch
from transformers import PreTrainedModel

from spinlab.config import Config
from spinlab.errors import InputError
from spinlab.export.base import Subject
from spinlab.export.floats import packed_input
from spinlab.export.folder import check_folder, new_folder
from spinlab.export.listing import write_listing
from spinlab.export.packing import (
    TRANSFORM,
    Transform,
    check_installed,
    packed,
    quantization_config,
    stock_names,
    transform_of,
)
from spinlab.export.parts import check_made, check_settings
from spinlab.export.profiles import (
    CANNOT,
    FORM,
    PROFILES,
    check_profile,
    ranges_differ,
    schemes_of,
)
from spinlab.export.stock import check_stock, save_stock
from spinlab.finite import check_finite
from spinlab.model.load import cast_model, meta_model
from spinlab.model.modules import map_of
from spinlab.rotation.online import OnlineRotation, WidthRotations
from spinlab.weights.quantized import QuantizedWeight

log = logging.getLogger(__name__)


def check(setting: str, target: Path, config: Config) -> None:
    """Raise InputError for what the profile cannot carry, and as `check_folder` does."""
    check_installed(setting)
    check_stock(setting, config)
    described = map_of(meta_model(config.model, None))
    if any(site.expert is not None for site in described.sites):
        raise InputError(
            f"{setting}: stock {described.family} models stack the weights of experts in one "
            "tensor, of which no packed form is written: use export.artefact"
        )
    if described.latent is not None:
        raise InputError(
            f"{setting}: stock {described.family} models keep keys and values of a head in one "
            "linear's rows, of which no packed form is written: use export.artefact"
        )
    check_profile(setting, config)
    check_settings(setting, FORM, CANNOT, config)
    schemes_of(setting, described, config.quant)
    check_folder(setting, target, config)


def write(subject: Subject, path: str) -> None:
    """Write the network that the variant `fake` is."""
    setting, quant = f"export.compressed_tensors={path}", subject.config.quant
    check_made(setting, FORM, CANNOT, subject.rotations)
    dtype, weights = subject.dtype(), subject.weights()
    model = cast_model(subject.fused(weights), dtype)
    found, names = schemes_of(setting, map_of(model), quant), stock_names(model)
    schemes = {names[place]: scheme for place, scheme in found.items()}
    parts: dict[str, list[QuantizedWeight]] = {name: [] for name in schemes}
    tops: dict[str, torch.Tensor] = {}  # by the input that linears are fused for
    fused: dict[str, str] = {}
    for site in (site for site in map_of(model).sites if site.path in found):
        name, weight = names[site.path], weights[site.path]
        parts[name].append(weight)
        fused[name] = site.key
        top = weight.scale.amax().cpu()
        tops[site.key] = torch.maximum(top, tops.get(site.key, top))
    transform, tensors = _transform(model, subject.rotations.r4, dtype)
    for name, some in parts.items():
        tensors |= {
            f"{name}.{n}": t for n, t in packed(name, some, dtype, tops[fused[name]]).items()
        }
        of_input = packed_input(schemes[name], subject.rotations.peaks.get(fused[name]))
        tensors |= {f"{name}.{n}": t for n, t in of_input.items()}
    stored = quantization_config(tuple(dict.fromkeys(names.values())), schemes, transform)
    wide = {name: t for name, t in tensors.items() if t.dtype.itemsize > 1}  # bytes are finite
    check_finite({**dict(model.named_parameters()), **wide}, f"weights do not fit into {dtype}")
    with new_folder("export.compressed_tensors", path) as partial:
        own = [f"{name}.weight" for name in schemes]
        settings = {"quantization_config": stored}
        save_stock(model, subject.tokenizer(), partial, tensors, own, settings)
        told = {"profile": subject.config.export.profile}
        write_listing(partial, "compressed_tensors", subject.record(), told)
    _tell(setting, subject.config, transform)


def _tell(setting: str, config: Config, transform: Transform | None) -> None:
    """Say what was written, and what its readers do otherwise."""
    profile = config.export.profile
    log.info("%-12s %s as %s", "export", setting, profile)
    if ranges_differ(config.quant):
        log.warning(
            "%s: readers choose the range of inputs, and transformers another than this run: "
            "quant=%s has its own",
            setting,
            PROFILES[profile].preset,
        )
    if transform is not None:
        log.warning(
            "%s has an online R4, which vLLM applies and transformers leaves out: docs/serving.md "
            "says how to apply it there",
            setting,
        )


def _transform(
    model: PreTrainedModel, r4: OnlineRotation | WidthRotations | None, dtype: torch.dtype
) -> tuple[Transform | None, dict[str, torch.Tensor]]:
    """Return what the config says of R4, and its tensor: one for all linears that it precedes."""
    if r4 is None:
        return None, {}
    assert isinstance(r4, OnlineRotation), "only mixtures, which are refused, have several widths"
    kind, block = transform_of(r4)
    sites = [site for site in map_of(model).sites if site.reads == "R4"]
    stored = {f"{sites[0].path}.{TRANSFORM}_input.weight": block.to(dtype)}
    return Transform(kind, len(block), sorted({site.name for site in sites})), stored
