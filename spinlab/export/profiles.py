"""Profiles of compressed-tensors: the formats that its readers run, and which settings fit them.

What a profile cannot carry is refused, with the nearest setting that it can.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from spinlab.config import Config, QuantConfig, TensorQuant
from spinlab.config.quant import CALIBRATED, KINDS, Kind
from spinlab.errors import InputError
from spinlab.export.overrides import changed, typed, value_typed
from spinlab.export.parts import PARTS, of_settings
from spinlab.fakequant.insert import check_patterns, weight_format
from spinlab.formats import FORMATS, format_of
from spinlab.model.map import ModelMap

# clip ratios of inputs, by their bits: that of the package's reader, whose scale is max|x| over
# 2^(b-1) - 1/2, where spinlab's is over 2^(b-1) - 1; and none, which is spinlab's default
_RATIOS = {8: (254 / 255, 1.0), 4: (14 / 15, 1.0)}
_CLOSE = 1e-6


@dataclass(frozen=True)
class Profile:
    """Describe what most linears have; quant.overrides may give single ones what `_OTHERS` has.

    weights, inputs: bits, of which inputs of 16 are floats. preset: of conf/quant, which fits.
    formats: of weights. of_inputs: their format.
    """

    weights: tuple[int, ...]
    inputs: int
    preset: str
    formats: tuple[str, ...] = ("integer",)
    of_inputs: str = "integer"

    def takes(self, inputs: TensorQuant) -> bool:
        """Tell whether inputs of a run have the bits and the format that this one is for."""
        alike = inputs.format == self.of_inputs or not inputs.quantizes
        return inputs.bits == self.inputs and alike

    @property
    def group(self) -> int:
        """Return how many numbers share a scale where the format says so, else 0."""
        return FORMATS[self.formats[0]](4, True).group

    @property
    def others(self) -> tuple[int, ...]:
        """Return the bits that overrides may give to a weight or an input."""
        return (4, 16) if self.group else _OTHERS


_MXFP4 = ("mxfp4", "mxfp4_floor", "mxfp4_mse")
_NVFP4 = ("nvfp4", "nvfp4_four_over_six")
PROFILES = {
    "vllm_w4a8": Profile((4,), 8, "w4a8_vllm"),
    "vllm_w4a4": Profile((4,), 4, "w4a4_vllm"),
    "weights_only": Profile((4, 8), 16, "w4a16"),
    "mxfp4": Profile((4,), 4, "mxfp4", _MXFP4, "mxfp4"),
    "mxfp4_weights": Profile((4,), 16, "mxfp4_weights", _MXFP4),
    "nvfp4": Profile((4,), 4, CALIBRATED, _NVFP4, CALIBRATED),
    "nvfp4_weights": Profile((4,), 16, "nvfp4_weights", _NVFP4),
}
_OTHERS = (4, 8, 16)  # bits of weights, and of inputs
_GROUPS = (0, 128, 64, 32)  # that vLLM's kernels take; 0: per channel
FORM = "compressed-tensors"
CANNOT = ("r3", "cross_head", "inputs", "scales", "clips", "kv_clips")  # parts of rotations


class Scheme(NamedTuple):
    """Describe a quantized linear: bits of its weight in groups (0: per channel), and of inputs.

    format: `Format.name` of its weight, and of inputs of fewer than 16 bits.
    """

    weights: int
    group_size: int
    inputs: int
    format: str = "integer"


_Found = tuple[str, Any, Any]  # a setting of a format, its value, and the nearest that fits


class _Fault(NamedTuple):
    """Name a setting that does not fit, its value, and the nearest that does.

    entry: of the override whose format it is, by its place in the list.
    """

    place: str
    field: str
    found: Any
    nearest: Any
    entry: tuple[int, Kind] | None = None

    @property
    def name(self) -> str:
        return f"{self.place}.{self.field}"


def check_profile(setting: str, config: Config) -> None:
    """Raise InputError for settings that the profile cannot carry: for all of them at once."""
    name = config.export.profile
    profile = PROFILES[name]
    faults = [*_faults_of_formats(profile, config.quant), *_faults_elsewhere(config)]
    parts = [PARTS[part] for part in of_settings(config, CANNOT)]
    if not faults and not parts:
        return
    found = [f"{fault.name}={value_typed(fault.found)}" for fault in faults]
    found, nearest = [*found, *(p.name for p in parts)], list(_nearest_settings(config, faults))
    nearest += [p.cure for p in parts]
    raise InputError(
        f"{setting}: export.profile={name} has no place for {', '.join(found)}: set "
        f"{' '.join(nearest)} (quant={profile.preset} kv=kv16 fit it)"
        + "".join(f", or {other}" for other in _other_profiles(name, config.quant))
    )


def _other_profiles(name: str, quant: QuantConfig) -> Iterator[str]:
    """Yield other profiles for these weights, with the preset where inputs are to be others.

    There are none for what is wrong elsewhere.
    """
    format, inputs = quant.weights.format, quant.activations
    if PROFILES[name].takes(inputs) and format in PROFILES[name].formats:
        return
    alike = {n: p for n, p in PROFILES.items() if format in p.formats and n != name}
    taking = [n for n, p in alike.items() if p.takes(inputs)]
    if taking or format == "integer":
        yield from (f"export.profile={n}" for n in taking)
    else:
        yield from (f"export.profile={n} with quant={p.preset}" for n, p in alike.items())


def ranges_differ(quant: QuantConfig) -> bool:
    """Tell whether inputs have another range than the package's reader gives them."""
    inputs = (f for f in quant.formats("activations") if f.quantizes and f.format == "integer")
    return any(abs(f.clip_ratio - _RATIOS[f.bits][0]) > _CLOSE for f in inputs)


def schemes_of(setting: str, model_map: ModelMap, quant: QuantConfig) -> dict[str, Scheme]:
    """Return the scheme of every linear that is quantized, by its path.

    Raises InputError for what settings alone do not tell: an input that is rounded before a weight
    that is not, and linears with a common input, which readers fuse, of different schemes.
    """
    check_patterns(model_map, quant)
    found: dict[str, Scheme] = {}
    shared: dict[str, Scheme | None] = {}
    for site in model_map.sites:
        weight, inputs = weight_format(site, quant), quant.format_at("activations", site.path)
        if weight is None and site.quantized and inputs.quantizes:
            raise InputError(
                f"{setting}: {site.path} has a weight of 16 bits and an input of {inputs.bits}, "
                "which the format cannot express: give quant.overrides both or neither"
            )
        name = format_of(weight).name if weight else ""
        scheme = weight and Scheme(weight.bits, weight.group_size, inputs.bits, name)
        if shared.setdefault(site.key, scheme) != scheme:
            raise InputError(
                f"{setting}: {site.path} has another format than the linears that share its "
                "input, with which readers fuse it: give quant.overrides the same for all of them"
            )
        if scheme is not None:
            found[site.path] = scheme
    if not found:
        raise InputError(f"{setting}: no linear has a weight of fewer than 16 bits")
    return found


def _nearest_settings(config: Config, faults: Sequence[_Fault]) -> Iterator[str]:
    """Yield settings as a user would type them: overrides as a whole, since they are one list."""
    changes: dict[tuple[int, Kind], dict[str, Any]] = {}
    for fault in faults:
        if fault.entry is None:
            yield f"{fault.name}={value_typed(fault.nearest)}"
        else:
            changes.setdefault(fault.entry, {})[fault.field] = fault.nearest
    if changes:
        yield typed(changed(config.quant.overrides, changes))


def _faults_of_formats(profile: Profile, quant: QuantConfig) -> Iterator[_Fault]:
    """Yield what does not fit of the formats of linears, embedding and head.

    What an override has of the formats that it changes is told once.
    """
    usual = {
        "weights": list(_faults_of_weights(quant.weights, profile, profile.weights)),
        "activations": list(_faults_of_inputs(quant.activations, profile, (profile.inputs,))),
    }
    yield from (_Fault(f"quant.{kind}", *fault) for kind in KINDS for fault in usual[kind])
    others = {"weights": _faults_of_weights, "activations": _faults_of_inputs}
    for kind in KINDS:
        known = {fault[:2] for fault in usual[kind]}
        formats = zip(quant.overrides, quant.formats(kind)[1:], strict=True)
        for i, (entry, format) in enumerate(formats):
            given = getattr(entry, kind).given
            for fault in others[kind](format, profile, profile.others) if given else ():
                if fault[0] in given or fault[:2] not in known:
                    place = f"quant.overrides[{entry.pattern}].{kind}"
                    yield _Fault(place, *fault, entry=(i, kind))
    if quant.o_proj_per_head and quant.quantizes("activations"):
        yield _Fault("quant", "o_proj_per_head", True, False)
    for name in ("head", "embedding", "tied"):
        if (found := getattr(quant, name)).quantizes:
            yield _Fault(f"quant.{name}", "bits", found.bits, 16)


def _faults_of_weights(
    weights: TensorQuant, profile: Profile, bits: tuple[int, ...]
) -> Iterator[_Found]:
    if weights.bits not in bits:
        yield "bits", weights.bits, _nearest(weights.bits, bits)
    if not weights.quantizes:
        return
    yield from _faults_of_kind(weights, profile.formats)
    groups = (profile.group, profile.group) if profile.group else _GROUPS
    if weights.group_size not in groups:
        size = weights.group_size
        yield "group_size", size, _nearest(size, groups[1:])


def _faults_of_inputs(
    inputs: TensorQuant, profile: Profile, bits: tuple[int, ...]
) -> Iterator[_Found]:
    if inputs.bits not in bits:
        yield "bits", inputs.bits, _nearest(inputs.bits, bits)
    if not inputs.quantizes:
        return
    yield from _faults_of_kind(inputs, (profile.of_inputs,))
    if inputs.group_size != profile.group:
        yield "group_size", inputs.group_size, profile.group
    ratios = (1.0,) if profile.group else _RATIOS.get(inputs.bits, (1.0,))
    if all(abs(inputs.clip_ratio - ratio) > _CLOSE for ratio in ratios):
        yield "clip_ratio", inputs.clip_ratio, _nearest(inputs.clip_ratio, ratios)


def _faults_of_kind(format: TensorQuant, formats: tuple[str, ...]) -> Iterator[_Found]:
    if format.format not in formats:
        yield "format", format.format, formats[0]
    if not format.symmetric:
        yield "symmetric", False, True


def _faults_elsewhere(config: Config) -> Iterator[_Fault]:
    for side, codec in config.kv.sides.items():
        if codec.quantizes:
            yield _Fault(f"kv.{side}", "bits", codec.bits, 16)
    patterns = [entry.pattern for entry in config.kv.overrides]
    if patterns and config.kv.codes("keys", "values"):
        yield _Fault("kv", "overrides", patterns, [])


def _nearest(found: float, choices: tuple[Any, ...]) -> Any:
    return min(choices, key=lambda choice: abs(choice - found))


def by_scheme(schemes: Mapping[str, Scheme]) -> list[tuple[Scheme, list[str]]]:
    """Return the schemes, the most common first, each with the paths of its linears."""
    counted = Counter(schemes.values()).most_common()
    return [(scheme, [p for p, s in schemes.items() if s == scheme]) for scheme, _ in counted]
