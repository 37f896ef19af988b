"""Which settings a GGUF file can hold: what runs online is refused, and what blocks cannot hold."""

from collections.abc import Iterator
from typing import Any

from spinlab.config import Config, FormatChange, QuantConfig
from spinlab.config.quant import Kind
from spinlab.errors import InputError
from spinlab.export import parts
from spinlab.export.gguf.architecture import architecture_of
from spinlab.export.gguf.blocks import BLOCK, TYPES, fits
from spinlab.export.gguf.layout import stacks_of
from spinlab.export.overrides import changed, of_weights, typed
from spinlab.fakequant.insert import rounded_sites
from spinlab.model.map import ModelMap

FORM = "a GGUF file"
ONLINE = ("r4", "cross_head", "inputs", "scales")  # names of `parts.PARTS`


def check_settings(setting: str, config: Config, model_map: ModelMap) -> None:
    """Raise InputError for a network that llama.cpp does not run, naming the nearest that it does.

    R3 turns queries and keys alike and cancels: without a quantized cache it is left out.
    """
    parts.check_settings(setting, FORM, ONLINE, config)
    kind = config.export.gguf_type
    if kind == "f16":
        return
    bits = int(kind[1])
    if changes := list(_changes(config, bits)):
        raise InputError(
            f"{setting} with export.gguf_type={kind} holds rounded weights alone, symmetric "
            f"integers of {bits} bits in groups of {BLOCK} inputs: set {' '.join(changes)}"
        )
    _check_overrides(setting, config.quant, model_map)
    _check_joined(setting, config, model_map)


def _changes(config: Config, bits: int) -> Iterator[str]:
    """Yield the settings that differ from what blocks of so many bits hold."""
    quant = config.quant
    wanted = {"format": "integer", "bits": bits, "symmetric": True, "group_size": BLOCK}
    for name, value in wanted.items():
        if getattr(quant.weights, name) != value:
            yield f"quant.weights.{name}={str(value).lower()}"
    for name in ("head", "embedding"):
        if not fits(getattr(quant, name)):
            yield f"quant.{name}.bits=16"
    if quant.activations.quantizes:
        yield "quant.activations.bits=16"
    if any((entry.activations.bits or 16) < 16 for entry in quant.overrides):
        yield typed(of_weights(quant.overrides))
    if config.kv.codes(*config.kv.sides):
        yield "kv=kv16"
        if config.kv.overrides:
            yield "kv.overrides=[]"


def _check_overrides(setting: str, quant: QuantConfig, model_map: ModelMap) -> None:
    """Refuse overrides that give a linear what no block holds, where the others' format fits."""
    sites = [site for site, format in rounded_sites(model_map, quant) if not fits(format)]
    changes: dict[tuple[int, Kind], dict[str, Any]] = {}
    for site in sites:
        place = quant.override_at("weights", site.path)
        assert place is not None
        changes[place, "weights"] = _nearest(quant.overrides[place].weights)
    if changes:
        patterns = ", ".join(quant.overrides[place].pattern for place, _ in changes)
        raise InputError(
            f"{setting}: quant.overrides[{patterns}] must give weights 4, 8 or 16 bits, "
            f"symmetric, in groups of {BLOCK}: set {typed(changed(quant.overrides, changes))}"
        )


def _nearest(change: FormatChange) -> dict[str, Any]:
    """Return what a change must be instead, where it says something that blocks do not hold."""
    wanted = {"format": "integer", "symmetric": True, "group_size": BLOCK}
    nearest = {name: value for name, value in wanted.items() if name in change.given}
    if (bits := change.bits) is not None and bits not in TYPES:
        nearest["bits"] = min(TYPES, key=lambda known: abs(known - bits))
    return nearest


def _check_joined(setting: str, config: Config, model_map: ModelMap) -> None:
    """Refuse types that differ among linears whose rows lie in one tensor."""
    architecture = architecture_of(model_map)
    if architecture is None or not architecture.joined:
        return
    for layer in model_map.layers:
        for stack in stacks_of(architecture, layer):
            if len({config.quant.format_at("weights", path) for path in stack.paths}) > 1:
                raise InputError(
                    f"{setting}: {', '.join(stack.paths)} lie in one tensor: let quant.overrides "
                    "give them one format"
                )
