"""Settings of records in words: codecs of the cache, number formats, rotations, rounding.

All take settings by their dotted names (`spinlab.report.settings.settings_of`).
"""

from collections.abc import Mapping
from typing import Any

from spinlab.config.rotation import keeps_gains
from spinlab.config.values import text
from spinlab.config.weights import WeightsConfig, method_title
from spinlab.report.online import EXACT, INPUTS, OFF, Settings, factors_words
from spinlab.report.settings import GAINS_FOLLOW

_TURNS = {"random": "a random turn", "hadamard": "a Hadamard turn", "none": ""}
_LENGTHS = {
    "plain": "",
    "norm": "norm corrected",
    "least_squares": "least squares",
    "eden": "EDEN's scale",
}


def codec_words(settings: Settings, side: str) -> str:
    """Say what keys, values or queries of the cache are coded with."""
    stem = f"kv.{side}."
    own = {n.removeprefix(stem): v for n, v in settings.items() if n.startswith(stem)}
    bits, codec = own["bits"], own["codec"]
    if bits >= 16:
        return "16 bits"
    told = {"affine": [f"{bits} bits"], "kivi": [f"KIVI, {bits} bits", f"runs of {own['run']}"]}
    told |= {"lloyd_max": _of_levels(own), "qjl": _of_signs(own)}
    parts = told.get(codec, [_title(codec)])
    if codec in ("affine", "kivi"):
        parts += ["symmetric"] if own["symmetric"] else []
    if codec == "affine" and own["group_size"]:
        parts.append(f"groups of {own['group_size']}")
    if codec not in ("lloyd_max", "qjl") and own["clip_ratio"] != 1:
        parts.append(f"clipped at {own['clip_ratio']:g}")
    if side == "keys" and settings.get("kv.key_bias") == "coded":
        parts.append("with their bias")
    return ", ".join(parts)


def _of_levels(own: Settings) -> list[str]:
    residual = "one a sign of the rest" if own["lloyd_max.residual"] else ""
    more = (residual, _TURNS[own["lloyd_max.turn"]], _LENGTHS[own["lloyd_max.length"]])
    return [f"Lloyd-Max, {own['bits']} bits", *(part for part in more if part)]


def _of_signs(own: Settings) -> list[str]:
    parts = [f"QJL, {own['bits']} signs"]
    if not own["qjl.orthogonal"]:
        parts.append("independent rows")
    if outliers := own["qjl.outliers"]:
        parts.append(f"{outliers} outlier channels in {own['qjl.outlier_bits']}")
    return parts


def kept_words(settings: Settings) -> str:
    """Say what of the cache stays in 16 bits, and which layers have codecs of their own."""
    first, last = settings["kv.first_layers"], settings["kv.last_layers"]
    sinks, window = settings["kv.sinks"], settings["kv.window"]
    parts = [f"{sinks} first tokens"] if sinks else []
    parts += [f"{window} newest"] if window else []
    if first and first == last:
        parts.append(f"{first} layers at either end")
    else:
        ends = {"first": first, "last": last}
        parts += [f"{n} {end} layer{'s' if n > 1 else ''}" for end, n in ends.items() if n]
    parts += [_changed(entry) for entry in settings["kv.overrides"]]
    return ", ".join(parts)


def _changed(entry: Mapping[str, Any]) -> str:
    """Say what an override of layers changes."""
    given = {side: _given(entry[side]) for side in ("keys", "values") if side in entry}
    told = (f"{side} {text(change)}" for side, change in given.items() if change)
    return f"{entry['pattern']}: {', '.join(told)}"


def _given(change: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a change gives, without what it leaves as it is."""
    deep = {n: _given(v) if isinstance(v, Mapping) else v for n, v in change.items()}
    return {name: value for name, value in deep.items() if value not in (None, {})}


def format_words(settings: Settings) -> str:
    """Say the formats of weights and of inputs, once where they are the same."""
    weights, inputs = (_format(settings, kind) for kind in ("weights", "activations"))
    return weights if weights == inputs else f"{weights}; inputs {inputs}"


def _format(settings: Settings, kind: str) -> str:
    own = {n: settings[f"quant.{kind}.{n}"] for n in ("format", "bits", "symmetric", "group_size")}
    if own["bits"] >= 16:
        return "16 bits"
    if own["format"] != "integer":
        return _title(own["format"])
    parts = [f"INT{own['bits']}"]
    parts += [f"groups of {own['group_size']}"] if own["group_size"] else []
    parts += [] if own["symmetric"] else ["asymmetric"]
    return ", ".join(parts)


def _title(name: str) -> str:
    """Write the name of a format of floats as texts do: mxfp4_floor is `MXFP4 floor`."""
    family, *rest = name.split("_")
    return " ".join((family.upper(), *(w.upper() if w[1:2].isdigit() else w for w in rest)))


def rotation_words(settings: Settings) -> str:
    """Say what is turned, and by what where that is no Hadamard matrix."""
    parts = []
    for name in ("r1", "r2", "r3", "r4"):
        runs = name in ("r1", "r2") or settings["rotation.online"]
        if runs and (kind := settings[f"rotation.{name}"]) not in OFF:
            block = settings.get(f"rotation.{name}_block", 0)
            size = f" in blocks of {block}" if block else ""
            parts.append(f"{'' if kind in EXACT else f'{kind} '}{name.upper()}{size}")
    if settings["rotation.online"] and settings["rotation.cross_head"] not in OFF:
        parts.append("across heads")
    if (inputs := settings["rotation.inputs"]) in INPUTS:
        title, size = INPUTS[inputs]
        parts.append(f"{title} of {settings[size]} before inputs{factors_words(settings)}")
    if settings["rotation.smooth"] is not None:
        parts.append(f"smoothing {settings['rotation.smooth']:g}")
    if parts and settings["learn.steps"]:
        parts.append("learned")
    return ", ".join(parts) or "none"


def gains_words(settings: Settings) -> str:
    """Say that gains of norms were folded where nothing asks for it, else nothing."""
    kept = keeps_gains("auto", *(settings[name] for name in GAINS_FOLLOW))
    return "gains folded" if kept and settings.get("rotation.gains") == "folded" else ""


def rounding_words(settings: Settings) -> str:
    """Say how weights are rounded, and whether their ranges are searched."""
    method = settings["weights.method"]
    parts = [method_title(method)]
    if method != "lwc" and not settings["weights.clip.search"]:
        parts.append("whole range")
    usual = getattr(WeightsConfig(method).own, "strength", None)
    strength = settings.get(f"weights.{method}.strength", usual)
    if strength != usual:
        parts.append(f"strength {strength:g}")
    return ", ".join(parts)
