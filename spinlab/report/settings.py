"""The settings of a record, with those that its code did not have yet."""

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from spinlab.config import Config, WeightsConfig, plain
from spinlab.config.rotation import keeps_gains
from spinlab.config.values import values_of
from spinlab.errors import InputError

# Settings, and groups of them, that came while names stayed those of today's schema. Their defaults
# do what was done without them, but for those below.
LATER = (
    *("data.held_out", "quant.calibration", "weights.gptaq", "weights.qronos"),
    *("rotation.blocks", "rotation.r1_block", "rotation.r3_per_layer", "rotation.wush"),
    *("rotation.latents", "rotation.gains", "rotation.factors"),
    *("runtime.offload", "learn.shard"),
    *("eval.attention", "eval.continued", "eval.needle", "learn.lr.kv_clip", "learn.lr.r3"),
    *("kv.key_bias", "kv.overrides", "kv.first_layers", "kv.last_layers", "kv.sinks", "kv.window"),
    *(
        f"kv.{side}.{part}"
        for side in ("keys", "values", "queries")
        for part in ("run", "lloyd_max", "qjl")
    ),
)
# What was done without a setting where that is not what the default does: always, and by the family
# of a model.
_ONCE: Mapping[str, Any] = {
    **{f"weights.{name}.strength": 1.0 for name in ("gptaq", "qronos")},
    "rotation.gains": "folded",
}
_BEFORE: Mapping[str, Mapping[str, Any]] = {"qwen2": {"kv.key_bias": "coded"}}
# what decides where gains are unless rotation.gains says it: arguments of `keeps_gains`
GAINS_FOLLOW = tuple(f"rotation.{name}" for name in ("r1", "latents", "smooth", "inputs"))
_ROUNDING = {field.name for field in fields(WeightsConfig)} - {"method", "clip"}
_SCHEMA = 3


def settings_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's settings by their dotted names, those that came later included.

    Without those of methods of rounding that are not the record's own: nothing read them, and their
    defaults may have changed. A record of an older schema has all it had, and no others.
    """
    own = values_of(record["config"])
    if record["schema"] != _SCHEMA:
        return by_effect(own)
    before = _BEFORE.get(record.get("model", {}).get("family", ""), {})
    found, method = {**_defaults(), **_ONCE, **before, **own}, own.get("weights.method")
    others = tuple(f"weights.{name}" for name in _ROUNDING if name != method)
    return by_effect({n: value for n, value in found.items() if not stands_in(n, others)})


def by_effect(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings by their dotted names with what `auto` comes to, where others decide that."""
    names = "rotation.gains", *GAINS_FOLLOW
    if not settings.keys() >= set(names):  # older, or of a benchmark that turns nothing
        return settings
    if settings.get("rotation.load"):  # the file decides
        return {name: value for name, value in settings.items() if name != names[0]}
    kept = keeps_gains(*(settings[name] for name in names))
    return settings | {"rotation.gains": "kept" if kept else "folded"}


def settings_of_today(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings_of` a record. Raises InputError for an older schema, with other names."""
    if record["schema"] != _SCHEMA:
        raise InputError(
            f"a record of {record['experiment']} has schema {record['schema']}, whose settings are "
            f"not those of {_SCHEMA}: run it again"
        )
    return settings_of(record)


def stands_in(name: str, stems: tuple[str, ...]) -> bool:
    """Tell whether a setting is one of these, or in one of these groups."""
    return any(f"{name}.".startswith(f"{stem}.") for stem in stems)


@cache
def _defaults() -> Mapping[str, Any]:
    values = values_of(plain(Config()))
    return {name: value for name, value in values.items() if stands_in(name, LATER)}
