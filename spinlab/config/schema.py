"""Settings as a node of omegaconf, typed by their dataclasses."""

import json
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf

from spinlab.errors import InputError

T = TypeVar("T")


def writable_schema(of: Any) -> DictConfig:
    """Return a dataclass, or its type, as a node that other settings may merge into.

    omegaconf marks nodes of frozen dataclasses read-only, which would forbid every override.
    """

    def writable(node: DictConfig) -> None:
        OmegaConf.set_readonly(node, False)
        for key in node:
            if OmegaConf.is_dict(child := node._get_node(key)):
                writable(cast(DictConfig, child))

    schema = OmegaConf.structured(of)
    writable(schema)
    return schema


def stored(of: type[T], found: Any) -> T:
    """Return the dataclass that `spinlab.config.plain` gave. Raises InputError for anything else.

    What is missing has its default.
    """
    try:
        if not isinstance(found, Mapping):
            raise InputError("it is no list of names and values")
        if "${" in json.dumps(found):  # which omegaconf would look up
            raise InputError("it refers to what lies elsewhere (${...})")
        given = OmegaConf.create(dict(found))
        return cast(T, OmegaConf.to_object(OmegaConf.merge(writable_schema(of), given)))
    except Exception as error:  # settings that are none fail in any way
        raise InputError(str(error).partition("\n")[0]) from error
