"""Compose settings: the schema, and the YAML files under conf/ that hold the differences to it."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from spinlab.config import Config, plain
from spinlab.config.schema import writable_schema
from spinlab.config.values import nodes
from spinlab.errors import InputError, did_you_mean

CONF = Path(__file__).parent.parent / "conf"


@cache
def register() -> None:
    """Make the schema known to Hydra under the name that conf/config.yaml starts from."""
    ConfigStore.instance().store(name="schema", node=writable_schema(Config))


def composed(*overrides: str) -> Config:
    """Return the settings that `python -m spinlab` would run with these overrides."""
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        whole = compose("config", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(whole)  # names of experiments tell which method was chosen
    with open_dict(whole):
        del whole["hydra"]
    return settings(whole)


def settings(composed: DictConfig) -> Config:
    """Return composed settings as dataclasses. Raises InputError for one that nothing reads."""
    for name in _unread(composed):
        raise InputError(f"unknown setting {name!r}: {did_you_mean(name, setting_names())}")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config


def setting_names() -> list[str]:
    """Return the dotted names of all settings, and the groups that are added with a plus."""
    return [*dict(nodes(plain(Config()))), "+experiment", "+method", "+sweep"]


def options_of(group: str) -> list[str]:
    """Return the names of a group's files."""
    folder = CONF / group
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def _unread(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Name what was added (with a plus) where the schema has no field for it."""
    schema = OmegaConf.get_type(node)
    if not is_dataclass(schema):
        return  # free keys: a model's architecture
    known = {f.name for f in fields(schema)}
    for key in map(str, node):
        if key not in known:
            yield prefix + key
        elif OmegaConf.is_dict(child := node._get_node(key)):
            yield from _unread(cast(DictConfig, child), f"{prefix}{key}.")
