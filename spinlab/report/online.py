"""What a network runs online beside its linears, as its settings say."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from spinlab.config import Config, plain
from spinlab.config.values import values_of
from spinlab.report.settings import stands_in
from spinlab.rotation.hadamard import has_hadamard

Settings = Mapping[str, Any]  # by dotted names

# transforms of inputs: their title, and the setting of their blocks' size
INPUTS = {
    "duquant": ("dual transforms", "rotation.duquant.block_size"),
    "blocks": ("blocks", "rotation.blocks.size"),
    "wush": ("maps in blocks", "rotation.wush.size"),
}
EXACT = ("hadamard", "exact_hadamard")  # online they are one matrix, and have kernels of their own
OFF = ("none", "identity")


def online_parts(settings: Settings, heads: int) -> dict[str, str]:
    """Return what runs online by its titles, each with what its time depends on but for widths.

    heads: of the model; there is no Hadamard matrix across some numbers of them. Scales that do not
    fold are left out: whether they do is the model's affair, not the method's.
    """
    if not settings["rotation.online"]:
        return {}
    found: dict[str, str] = {}
    learned = settings.get("learn.rotations", []) if settings["learn.steps"] else []
    r3, r4, across = (settings[f"rotation.{name}"] for name in ("r3", "r4", "cross_head"))
    if r3 != "none":  # an identity is there to be learned
        own = ", by layer" if settings.get("rotation.r3_per_layer") else ""
        found["R3"] = ("Hadamard" if r3 in EXACT and "r3" not in learned else "dense") + own
    if r4 not in OFF:
        block = settings.get("rotation.r4_block", 0)
        found["R4"] = f"{'Hadamard' if r4 in EXACT else 'dense'}, blocks of {block or 'its width'}"
    if across not in OFF and has_hadamard(heads):
        found["across heads"] = "Hadamard"
    if (inputs := settings["rotation.inputs"]) in INPUTS:
        title, size = INPUTS[inputs]
        shared = inputs == "duquant" and "inputs" not in learned  # searched blocks share a matrix
        same = ", all the same" * shared
        found[title] = f"blocks of {settings[size]}{same}{factors_words(settings)}"
    return found


def factors_words(settings: Settings) -> str:
    """Say that what turns inputs is rounded, where it is; behind a comma."""
    return ", in bfloat16" if settings.get("rotation.factors") == "bfloat16" else ""


def online_settings(config: Config) -> dict[str, Any]:
    """Return what decides on the form of a method's rotations, by dotted names."""
    settings = values_of(plain(config))
    return {n: v for n, v in settings.items() if n.startswith(("rotation.", "learn."))}


def online_form(settings: Settings, heads: int) -> dict[str, Any]:
    """Return `online_parts`, with number formats that are not those by default.

    Networks of one form take one time on one shape. How far values are clipped takes none, nor does
    the text on which ranges were found.
    """
    usual = {n: v for n, v in defaults().items() if stands_in(n, ("quant", "kv"))}
    apart = [n for n in usual if n.endswith(("clip_ratio", "key_bias"))]
    timed = {n: v for n, v in usual.items() if not stands_in(n, ("quant.calibration", *apart))}
    others = {n: settings[n] for n, v in timed.items() if settings.get(n, v) != v}
    return {**online_parts(settings, heads), **others}


@cache
def defaults() -> Settings:
    """Return all settings as they are by default."""
    return values_of(plain(Config()))
