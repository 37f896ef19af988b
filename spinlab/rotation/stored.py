"""The door for files of rotations: what one must hold to be taken for those of a model.

Everything is held against one table of rules: names and shapes while only the file's header is
read, then the numbers, then what the file says of itself.
"""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from spinlab.config.kv import KEPT
from spinlab.errors import InputError
from spinlab.model.map import Input, ModelMap
from spinlab.rotation.faults import (
    no_permutation,
    no_ratio,
    no_scale,
    not_invertible,
    not_orthogonal,
)
from spinlab.rotation.inputs import to_channels, to_rows
from spinlab.rotation.rotations import GAINS, ONLINE, ROUNDED, WORDS, RotationSet, kv_clip_key

Shape = tuple[int, ...]

_FLOATS = ("F64", "F32", "F16", "BF16")
_BLOCKS, _MAP, _DUAL = {"first"}, {"matrix"}, {"first", "permutation", "second"}
_SCALES = {"scale", "folded_scale"}
# what code reads of `about`; anything else in it is nobody's business
_ABOUT = {
    "family": str,
    "model": dict,
    "fused": list,
    "files": dict,
    "learn": dict,
    "trained": dict,
    "trained.weights_bits": int,
    "trained.formats": dict,
}


@dataclass(frozen=True)
class Rule:
    """Say what a stored tensor must be: its shape, tested and in words, its numbers, its dtype."""

    fits: Callable[[Shape], bool]
    shape: str
    fault: Callable[[torch.Tensor], str | None]
    dtypes: tuple[str, ...] = _FLOATS


def read_stored(
    path: Path, model_map: ModelMap, parts: Collection[str] | None = None
) -> RotationSet:
    """Read a file that `RotationSet.save` wrote, now or in an earlier version, for such a model.

    parts: how the names of tensors begin whose numbers are read; all of them without it.
    Raises InputError, naming the tensor and what is wrong with it, for any other file.
    """
    rules = rules_of(model_map)
    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            words = _words(path, file.metadata() or {})
            for name in names:
                found = file.get_slice(name)
                check_shape(f"{path}: {name}", tuple(found.get_shape()), rules.get(name))
                if found.get_dtype() not in rules[name].dtypes:
                    wanted = " or ".join(rules[name].dtypes)
                    raise InputError(f"{path}: {name} is {found.get_dtype()}, not {wanted}")
            read = [n for n in names if parts is None or n.partition(".")[0] in parts]
            tensors = {name: file.get_tensor(name) for name in read}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is no file of rotations: {error}") from error
    for name, tensor in tensors.items():
        if (fault := rules[name].fault(tensor)) is not None:
            raise InputError(f"{path}: {name} {fault}")
    _check_parts(path, tensors, words["blocks"], model_map)
    turned = next((n for n in names if n == "r1" or n.startswith("latents.")), None)
    if words[GAINS] and turned:
        raise InputError(f"{path}: {turned} needs gains folded, and the file says {GAINS}")
    return RotationSet.from_tensors(tensors, **words)


def read_about(path: Path) -> dict[str, Any]:
    """Return what a file of rotations says of itself; raise InputError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            return _words(path, file.metadata() or {})["about"]
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is no file of rotations: {error}") from error


def rules_of(model_map: ModelMap) -> dict[str, Rule]:
    """Return the rule of every tensor that rotations of such a model may have, by its name."""
    widths, layers = model_map.widths, len(model_map.layers)
    rules = {"r1": exactly((model_map.hidden,) * 2, not_orthogonal)}
    for name, width in model_map.latents.items():
        rules[f"latents.{name}"] = exactly((width, width), not_orthogonal)
    if "r2" in widths:
        rules["r2"] = exactly((layers, widths["r2"], widths["r2"]), not_orthogonal)
    for name, width in _online_widths(model_map).items():
        rule = _online_rule(width, layers if name == "r3" else 0)
        rules |= {f"{name}.left": rule, f"{name}.right": rule}
    for input in model_map.inputs:
        rules |= _input_rules(f"inputs.{input.key}", input.width)
        rules[f"clip.{input.key}"] = exactly((), no_ratio)
        rules[f"peak.{input.key}"] = exactly((), partial(no_scale, least=0.0))
    for layer in range(layers):
        rules |= {f"kv_clip.{kv_clip_key(layer, side)}": exactly((), no_ratio) for side in KEPT}
    for site in (s for s in model_map.sites if s.quantized):
        rows, width = site.out_features, site.in_features
        rules[f"weight_clip.{site.path}"] = Rule(
            lambda s, r=rows, w=width: len(s) == 3 and s[::2] == (r, 1) and _divides(s[1], w),
            f"({rows}, groups of {width} inputs, 1)",
            no_ratio,
        )
    return rules


def _online_rule(width: int, layers: int) -> Rule:
    """Return the rule of a factor of an online rotation; layers: that may have one each, or 0."""
    words = f"a square whose order divides {width}"
    words += f", or {layers} of them" if layers else ""

    def fits(shape: Shape) -> bool:
        own = bool(layers) and len(shape) == 3 and shape[0] == layers
        return _tiles((1, *(shape[1:] if own else shape)), width)

    return Rule(fits, words, not_orthogonal)


def _input_rules(prefix: str, width: int) -> dict[str, Rule]:
    """Return the rules of one input's transform."""
    words = f"square blocks that tile {width}, or one for all"
    dual = Rule(lambda s: _tiles(s, width), words, not_orthogonal)
    order = exactly((width,), no_permutation, ("I64",))
    scales = {f"{prefix}.{name}": exactly((width,), no_scale) for name in _SCALES}
    parts = {f"{prefix}.first": dual, f"{prefix}.second": dual, f"{prefix}.permutation": order}
    parts[f"{prefix}.matrix"] = Rule(
        lambda s: _tiles(s, width) and s[0] * s[1] == width,
        f"square blocks that tile {width}",
        not_invertible,
    )
    return parts | scales


def exactly(
    shape: Shape, fault: Callable[[torch.Tensor], str | None], dtypes: tuple[str, ...] = _FLOATS
) -> Rule:
    """Return the rule of a tensor that can have one shape only."""
    return Rule(lambda found: found == shape, str(shape), fault, dtypes)


def check_shape(what: str, shape: Shape, rule: Rule | None) -> None:
    """Raise InputError for a tensor that the model has no place for, or not of this shape."""
    if rule is None:
        raise InputError(f"{what} has no place among the rotations of this model")
    if not rule.fits(shape):
        raise InputError(f"{what} is {shape}, the model has {rule.shape}")


def _online_widths(model_map: ModelMap) -> dict[str, int]:
    """Return the widths of what may run online, by its name in files."""
    gated = model_map.gated_widths
    own = {f"r4.{width}": width for width in gated} if len(gated) > 1 else {}
    return {name: model_map.widths[name] for name in ONLINE if name in model_map.widths} | own


def _tiles(shape: Shape, width: int) -> bool:
    """Tell whether (k, b, b) are blocks that tile a width, or one that all places share."""
    if len(shape) != 3 or shape[1] != shape[2] or not _divides(shape[1], width):
        return False
    return shape[0] in (1, width // shape[1])


def _divides(part: int, width: int) -> bool:
    return part > 0 and width % part == 0


def _check_parts(
    path: Path, tensors: Mapping[str, torch.Tensor], blocks: dict[str, int], model_map: ModelMap
) -> None:
    """Raise InputError where parts that belong together are not all there, or do not fit."""
    for name, width in _online_widths(model_map).items():
        factors = [tensors[n] for n in (f"{name}.left", f"{name}.right") if n in tensors]
        orders = [factor.shape[-1] for factor in factors]
        if len(orders) == 1:
            raise InputError(f"{path}: {name} has one of its two factors only")
        if len({factor.dim() for factor in factors}) > 1:
            raise InputError(f"{path}: {name} has one factor for all layers and one for each")
        if orders and (found := orders[0] * orders[1] * blocks.get(name, 1)) != width:
            raise InputError(f"{path}: {name} has width {found}, the model has {width}")
    own = [name for name in _online_widths(model_map) if name.startswith("r4.")]
    lacking = [name for name in own if f"{name}.left" not in tensors]
    if lacking and len(lacking) < len(own):
        raise InputError(f"{path}: it has no {lacking[0]} beside its rotations of other widths")
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("inputs."):
            key, _, part = name.removeprefix("inputs.").rpartition(".")
            parts.setdefault(key, {})[part] = tensor
    for key, found in parts.items():
        _check_input(f"{path}: inputs.{key}", found, model_map.input_at[key])


def _check_input(what: str, found: Mapping[str, torch.Tensor], input: Input) -> None:
    """Raise InputError where the parts of an input's transform make none."""
    turns = found.keys() - _SCALES
    if turns not in (set(), _BLOCKS, _MAP, _DUAL) or found.keys() >= _SCALES:
        raise InputError(
            f"{what} is no transform: it has {', '.join(sorted(found))}, where a dual one has "
            f"{', '.join(sorted(_DUAL))}, one in blocks first or matrix alone, and there is at "
            "most one scale"
        )
    if turns == _BLOCKS:
        count, size, _ = shape = tuple(found["first"].shape)
        if count * size != input.width:
            raise InputError(
                f"{what}.first is {shape}: alone it has a block of its own for every {size} of "
                f"{input.width} channels"
            )
    scale = found.get("folded_scale")
    if scale is not None and input.producer is None:
        raise InputError(f"{what}.folded_scale has no norm or linear to move into")
    if scale is not None and not torch.equal(to_channels(to_rows(scale, input), input), scale):
        raise InputError(
            f"{what}.folded_scale differs between heads that share values, whose rows carry it"
        )


def _words(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what a file says of itself, the blocks of its online rotations, and of gains."""
    try:
        if WORDS in metadata:
            words = json.loads(metadata[WORDS])
        elif "blocks" in metadata:  # a file of an earlier version
            words = {name: json.loads(metadata.get(name, "{}")) for name in ("about", "blocks")}
        else:
            raise InputError(f"{path} is no file of rotations: spinlab did not write it")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: its metadata is no JSON: {error}") from error
    sound = isinstance(words, dict) and all(
        isinstance(words.get(name), dict) for name in ("about", "blocks")
    )
    if not sound:
        raise InputError(f"{path}: its metadata must be two JSON objects, about and blocks")
    for name, count in words["blocks"].items():
        known = name.partition(".")[0] in ONLINE  # of R4, with a width
        if not known or type(count) is not int or count < 1:
            raise InputError(f"{path}: blocks of {name} are {count!r}, not a number from 1 on")
    check_about(path, words["about"])
    said = {name: words.get(name, False) for name in (GAINS, ROUNDED)}
    for name, value in said.items():
        if type(value) is not bool:
            raise InputError(f"{path}: {name} in its metadata is {value!r}, not true or false")
    return {name: words[name] for name in ("about", "blocks")} | said


def check_about(path: Path, about: Mapping[str, Any]) -> None:
    """Raise InputError where a file says of itself what is of the wrong type."""
    for name, wanted in _ABOUT.items():
        value: Any = about
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None and type(value) is not wanted:
            raise InputError(f"{path}: about.{name} is {value!r:.60}, not a {wanted.__name__}")
    files = about.get("files", {})
    words = [*about.get("fused", []), *files.values()]
    inside = all(".." not in Path(name).parts and not Path(name).is_absolute() for name in files)
    if not inside or not all(isinstance(word, str) for word in words):
        raise InputError(f"{path}: about.fused and about.files hold names and digests")
