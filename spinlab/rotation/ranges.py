"""Learned ranges belong to the formats they were learned for: which of them a run can use."""

import logging
from dataclasses import replace
from typing import Any

from spinlab.config import KVConfig, QuantConfig, plain
from spinlab.config.values import text, values_of
from spinlab.config.weights import KEEP_RANGES
from spinlab.rotation.rotations import RotationSet

log = logging.getLogger(__name__)

_PARTS = {  # of `formats_of`, in their order
    "weights": ("weights", "overrides"),
    "inputs": ("activations", "overrides", "o_proj_per_head"),
    "cache": ("keys", "values", "key_bias", "overrides", "first_layers", "last_layers"),
}


def formats_of(quant: QuantConfig, kv: KVConfig) -> dict[str, Any]:
    """Name, JSON-ready, the formats that learned ranges belong to: weights, inputs and cache."""

    def changes(kind: str) -> list[Any]:
        entries = [[entry.pattern, getattr(entry, kind).given] for entry in quant.overrides]
        return [entry for entry in entries if entry[1]]

    return {
        "weights": [plain(quant.weights), changes("weights")],
        "inputs": [plain(quant.activations), changes("activations"), quant.o_proj_per_head],
        "cache": [plain(getattr(kv, name)) for name in _PARTS["cache"]],
    }


def with_fitting_ranges(
    rotations: RotationSet, quant: QuantConfig, kv: KVConfig, method: str
) -> RotationSet:
    """Return a set without the learned ranges that a run's formats or method cannot use."""
    lost = _lost(rotations, formats_of(quant, kv), method)
    return replace(rotations, **{kind: {} for kind in lost}) if lost else rotations


def warn_of_lost_ranges(
    rotations: RotationSet, quant: QuantConfig, kv: KVConfig, method: str, name: str
) -> None:
    """Say so where a file of that name carries learned ranges that a run cannot use."""
    for reason in _lost(rotations, formats_of(quant, kv), method).values():
        log.warning("%s carries %s", name, reason)


def _lost(rotations: RotationSet, used: dict[str, Any], method: str) -> dict[str, str]:
    """Return the kinds of ranges that do not fit, by their field, and why."""
    trained = (rotations.about or {}).get("trained", {})
    found = trained.get("formats", {})
    if "inputs" not in found and "activations" in trained:  # a file of an earlier version
        found = {**found, "inputs": [trained["activations"], *used["inputs"][1:]]}
    lost: dict[str, str] = {}
    if rotations.weight_clips and method not in KEEP_RANGES:
        lost["weight_clips"] = (
            f"weight ranges learned for rounding to nearest, and weights={method} finds its own: "
            f"they are not used; weights={', '.join(KEEP_RANGES)} use them"
        )
    elif rotations.weight_clips and found.get("weights") != used["weights"]:
        lost["weight_clips"] = (
            f"weight ranges learned for {_difference('weights', found, used)}: they are not used, "
            "the clip search finds others"
        )
    if rotations.clips and found.get("inputs", used["inputs"]) != used["inputs"]:
        lost["clips"] = (
            f"clip ratios of inputs learned for {_difference('inputs', found, used)}: they are not "
            "used, quant.activations.clip_ratio holds"
        )
    if rotations.kv_clips and found.get("cache") != used["cache"]:
        lost["kv_clips"] = (
            f"clip ratios of keys and values learned for {_difference('cache', found, used)}: they "
            "are not used, the settings' hold"
        )
    return lost


def _difference(kind: str, found: dict[str, Any], used: dict[str, Any]) -> str:
    """Say what ranges were learned for and what a run has, where these differ."""
    if kind not in found:
        return "formats that it does not name"
    there, here = (
        values_of(dict(zip(_PARTS[kind], formats[kind], strict=False))) for formats in (found, used)
    )
    names = [name for name in here | there if there.get(name) != here.get(name)]
    told = (
        ", ".join(f"{name}={text(values.get(name))}" for name in names) for values in (there, here)
    )
    return ", and this run has ".join(told)
