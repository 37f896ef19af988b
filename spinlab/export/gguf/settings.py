"""Which settings a GGUF file can hold: what runs online is refused, and what blocks cannot hold."""

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from spinlab.config import Config
from spinlab.errors import InputError
from spinlab.export.gguf.architecture import architecture_of
from spinlab.export.gguf.blocks import BLOCK, fits
from spinlab.export.gguf.layout import stacks_of
from spinlab.export.identity import manifest_of
from spinlab.export.targets import place_of
from spinlab.model.map import ModelMap

_ONLINE_PARTS = ("first", "second", "permutation", "scale")  # of a transform of a single input


def check_settings(setting: str, config: Config, model_map: ModelMap) -> None:
    """Raise InputError for a network that llama.cpp does not run, naming the nearest that it does.

    R3 turns queries and keys alike and cancels: without a quantized cache it is left out.
    """
    for what, cure in _online(config, model_map):
        raise InputError(f"{setting}: llama.cpp runs no {what} in front of a linear: {cure}")
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


def _online(config: Config, model_map: ModelMap) -> Iterator[tuple[str, str]]:
    """Yield what runs online before a linear, and how to do without it."""
    rotation = config.rotation
    manifest = manifest_of(config.model.path)
    if manifest is not None or (rotation.load or "").endswith(".safetensors"):
        file = manifest or place_of(rotation.load or "")
        source = f"model.path={config.model.path}" if manifest else f"rotation.load={rotation.load}"
        for what in _online_in(file):
            yield f"{what} of {source}", "use rotations that were made without it"
        return
    for name in {"r4", "cross_head"} & set(rotation.used):
        kind = getattr(rotation, name)
        yield f"rotation.{name}={kind}", f"set rotation.{name}=none"
    if rotation.inputs != "none":
        yield f"rotation.inputs={rotation.inputs}", "set rotation=no_had"
    if rotation.smooth is not None:
        for input in model_map.inputs:
            if input.name in rotation.smooth_groups and not input.folds:
                groups = f"rotation.smooth_groups=[{','.join(rotation.smooth_groups)}]"
                yield f"scales of {input.name} inputs ({groups})", f"leave out {input.name}"


def _online_in(file: Path) -> list[str]:
    """Name what a file of rotations brings that runs online before a linear."""
    try:
        with safe_open(file, framework="pt") as stored:
            names = [name.split(".") for name in stored.keys()]  # noqa: SIM118
    except (OSError, SafetensorError):
        return []  # who reads it says what is wrong with it
    found = {name[0] for name in names if name[0] in ("r4", "cross_head")}
    inputs = any(name[0] == "inputs" and name[-1] in _ONLINE_PARTS for name in names)
    return [*sorted(found), *(["transforms of single inputs"] if inputs else [])]
