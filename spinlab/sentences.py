"""Errors of the command line as sentences: what Hydra and OmegaConf say, in a user's terms."""

import re
import sys
from collections.abc import Callable
from dataclasses import fields

from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from spinlab.arguments import quoted
from spinlab.compose import options_of, setting_names
from spinlab.errors import InputError, did_you_mean

_PLUGINS = {
    "launcher/submitit": "hydra-submitit-launcher",
    "launcher/joblib": "hydra-joblib-launcher",
    "launcher/ray": "hydra-ray-launcher",
    "launcher/rq": "hydra-rq-launcher",
    "sweeper/optuna": "hydra-optuna-sweeper",
    "sweeper/ax": "hydra-ax-sweeper",
    "sweeper/nevergrad": "hydra-nevergrad-sweeper",
}


def sentence(error: BaseException) -> str:
    """Say an error in one sentence, with the nearest names for a misspelt one."""
    text = _line(error)
    if isinstance(error, InputError):
        return text
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return f"{type(error).__name__}: {text}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing(error.missing_cfg_file, list(error.options or []))
    if error.__cause__ is not None:
        text = f"{text}: {_line(error.__cause__)}"
    for pattern, say in _SENTENCES:
        if found := re.search(pattern, text):
            return say(*found.groups())
    return re.split(r" full_key:| Config search path:", text)[0]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _missing(file: str, options: list[str]) -> str:
    """Say that a group has no such file; a group of Hydra's may come with a package."""
    group, _, wanted = file.removesuffix(".yaml").partition("/")
    if group == "hydra":
        package = next((p for name, p in _PLUGINS.items() if wanted.startswith(name)), None)
        kind, _, wanted = wanted.partition("/")
        if package:
            return f"{group}/{kind}={wanted} needs a package: pip install {package}"
        return f"unknown {group}/{kind} {wanted!r}: {did_you_mean(wanted, options)}"
    if not wanted:
        return f"there is no file {file!r} of settings"
    if group == "quant" and _is_format(wanted):
        kind = wanted.partition("_")[0]
        beside = f"quant={kind}" if kind in options_of(group) else "a preset of its kind"
        return (
            f"{wanted} is no preset of quant, but a format: set quant.weights.format={wanted} "
            f"quant.activations.format={wanted} beside {beside}"
        )
    return f"unknown {group} {wanted!r}: {did_you_mean(wanted, options_of(group), '--help')}"


def _is_format(name: str) -> bool:
    # here, as it brings torch, which no other sentence waits for
    from spinlab.formats import FORMATS

    return name in FORMATS


def _unknown(name: str, *_: str) -> str:
    return f"unknown setting {name!r}: {did_you_mean(name, setting_names())}"


def _part(whole: str, part: str) -> str:
    inner = [name for name in setting_names() if name.rpartition(".")[0] == part]
    return f"{whole}: {part} has settings of its own: {', '.join(inner)}"


def _in_list(whole: str, name: str, kind: str) -> str:
    rooms = [room for name, room in sys.modules.items() if name.startswith("spinlab.config")]
    found = next(getattr(room, kind) for room in rooms if hasattr(room, kind))
    known = [f.name for f in fields(found)]
    return f"{whole}: {name} is unknown: {did_you_mean(name, known)}"


def _second(group: str) -> str:
    if group == "method":
        return "this experiment has a method already: write method=NAME, without a plus"
    plus = "+" if group in ("experiment", "sweep") else ""
    return f"{group} is chosen already: write {plus}{group}=NAME, once"


def _comma(setting: str) -> str:
    key, _, value = setting.partition("=")
    return (
        f"{setting} is several values: write {key}=[{value}] for a list, -m to run one after the "
        f"other, and {quoted(setting)} for one value with a comma"
    )


_SENTENCES: tuple[tuple[str, Callable[..., str]], ...] = (
    (
        r"Could not override 'experiment'",
        lambda: "write +experiment=NAME, with a plus: an experiment is added to the defaults",
    ),
    (
        r"Could not override 'method'",
        lambda: "write +method=NAME after +experiment=NAME: a method is added to the defaults",
    ),
    (
        r"Could not override 'sweep'",
        lambda: "write +sweep=NAME after +experiment=NAME: a sweep is added to the defaults",
    ),
    (r"Multiple values for (\w+)\b", _second),
    (r"^([\w/]+) appears more than once", _second),
    (
        r"Key '\w+' is not in struct.* full_key: ([\w.]+).* reference_type=Dict",
        "{0} is not there yet: write +{0}=VALUE, with a plus".format,
    ),
    (r"Could not override .* use \+(\S+=\[.*\]): Key '(\w+)' not in '(\w+)'", _in_list),
    (r"Key '\w+' not in '\w+' full_key: ([\w.]+)", _unknown),
    (r"Could not override '([\w.@/]+)'|Key '(\w+)' (?:is )?not in", _unknown),
    (r"Ambiguous value for argument '(.+)' 1\. To use", _comma),
    (
        r"merging override (([\w.]+)=.*): Invalid value assigned: (\w+) is not a ListConfig",
        lambda whole, key, _: f"{whole} is no list: write {key}=[{whole.partition('=')[2]}]",
    ),
    (
        r"merging override ([\w.]+=\[.*): (?:Invalid type|Merge error).* value: (.*) full_key",
        "{}: {} is no set of settings, as {{bits: 8}}".format,
    ),
    (r"merging override (([\w.]+)=.*): Invalid type assigned: \w+ is not a subclass of", _part),
    (r"missing mandatory value: \w+ full_key: (\S+)", "{} is missing: give it a value".format),
    (r"merging override (\S+=.*): field '([\w.]+)' is not Optional", "{}: {} needs a value".format),
    (
        r"merging override ([\w.]+)\.\w+=.*: Value '\{\}' of type 'dict'",
        "{} is one value: it has no settings of its own".format,
    ),
    (
        r"merging override (~\S+?):? .*does not support deletion|Could not delete from config\. '",
        lambda *_: "a setting cannot be deleted: give it another value, or null where it takes it",
    ),
    (
        r"merging override (\S+=.*?): (.*?)(?: full_key:.*)?$",
        lambda whole, reason: f"{whole}: {reason[:1].lower()}{reason[1:]}",
    ),
)
