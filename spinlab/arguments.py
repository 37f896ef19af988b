"""The words of the command line before Hydra reads them.

Hydra has a grammar for values, in which a path may not hold = or # or an accent, and tells of
mistakes in the terms of that grammar. Here such values are quoted, and mistakes become sentences.
"""

import re
import shlex
from os.path import expanduser
from typing import NoReturn

from hydra._internal.utils import get_args_parser  # there is no public parser of its options
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from spinlab.compose import CONF, options_of, setting_names
from spinlab.errors import InputError, did_you_mean

# what a value may begin with or hold to have parts, for which only the user knows what is meant
_STRUCTURE = re.compile(r"^\s*\w+\s*\(|['\"\[\]{}]")


def prepared(words: list[str]) -> list[str]:
    """Return a command line's words as Hydra takes them, the settings first.

    Paths need no quotes beside the shell's, and `~` is the home folder. Raises InputError.
    """
    parser = get_args_parser()
    parser.error = _refuse  # pyright: ignore[reportAttributeAccessIssue]
    options, others = parser.parse_known_args(words)
    if options.experimental_rerun is not None:
        raise InputError(
            "write +experiment=NAME, with a plus and without dashes; --experimental-rerun would "
            "unpickle a file and is not supported"
        )
    unknown = [word for word in others if word.startswith("-")]
    if unknown:
        raise InputError(
            f"unknown option {unknown[0]}: settings are written without dashes, as name=value, "
            "and --hydra-help lists the options"
        )
    settings = [*options.overrides, *others]
    left = list(words)
    for word in settings:
        left.remove(word)
    return [*map(_prepared, settings), *left]


def quoted(setting: str) -> str:
    """Return a setting as a shell takes it whose value is meant as it stands."""
    key, _, value = setting.partition("=")
    return shlex.quote(f"{key}={_in_quotes(value)}")


def _in_quotes(value: str) -> str:
    return QuotedString(value, Quote.double).with_quotes()


def _refuse(message: str) -> NoReturn:
    raise InputError(message)


def _prepared(word: str) -> str:
    key, equals, value = word.partition("=")
    if not equals and not word.startswith("~"):
        raise InputError(_without_value(word))
    if equals and (not key or _read(f"{key}=1") is None):
        raise InputError(f"{word!r} names no setting: write name=value")
    override = _read(word)
    if override is None:
        word = f"{key}={_readable(value)}"
        override = _read(word)
    if override is None:
        raise InputError(
            f"{key}={value} cannot be read, as quotes, commas and brackets have a meaning: where "
            f"they are part of the value write {quoted(f'{key}={value}')}"
        )
    _check_group(override, word)
    return word


def _without_value(word: str) -> str:
    name = word.lstrip("+")
    if name in options_of("experiment"):
        return f"{word!r} has no name before it: write +experiment={name}"
    if name in ("experiment", "method", "sweep"):
        return f"{word!r} has no value: write +{name}=NAME"
    if name in setting_names():
        return f"{word!r} has no value: write {word}=VALUE"
    return f"{word!r} is not of the form name=value: {did_you_mean(name, setting_names())}"


def _read(setting: str) -> Override | None:
    """Read a setting by Hydra's grammar; None where it has no reading."""
    try:
        return OverridesParser.create().parse_override(setting)
    except HydraException:
        return None


def _readable(value: str) -> str:
    """Quote the parts of a value that have no reading; commas stay between them."""
    if value[:1] + value[-1:] == "[]":
        return f"[{_readable(value[1:-1])}]"
    parts = value.split(",")
    return ",".join(
        part if _STRUCTURE.search(part) or _read(f"key={part}") else _in_quotes(expanduser(part))
        for part in parts
    )


def _check_group(override: Override, word: str) -> None:
    """Refuse a value for a group of files that is no name; Hydra would fail on its type."""
    group = override.key_or_group
    if override.is_delete() or not group or not (CONF / group).is_dir():
        return
    values = override.sweep_iterator() if override.is_sweep_override() else [override.value()]
    for value in values:
        if value in (None, "") or isinstance(value, bool | int | float):
            names = did_you_mean(str(value), options_of(group), "--help")
            raise InputError(f"{word}: {group} takes the name of a file in conf/{group}: {names}")
