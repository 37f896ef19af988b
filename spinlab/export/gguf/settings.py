"""Which settings a GGUF file can hold: what runs online is refused, and what blocks cannot hold."""

from collections.abc import Iterator

from spinlab.config import Config
from spinlab.errors import InputError
from spinlab.export import parts
from spinlab.export.gguf.architecture import architecture_of
from spinlab.export.gguf.blocks import BLOCK, fits
from spinlab.export.gguf.layout import stacks_of
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
    for entry in config.quant.overrides:
        if not fits(config.quant.format_at("weights", entry.pattern)):
            raise InputError(
                f"{setting}: quant.overrides[{entry.pattern}] must give weights 4, 8 or 16 bits, "
                f"symmetric, in groups of {BLOCK}"
            )
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
    elif quant.quantizes("activations"):
        yield "quant.overrides=[]"
    if any(side.quantizes for side in config.kv.sides.values()):
        yield "kv=kv16"


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
