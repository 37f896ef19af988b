"""Compose settings: the schema, and the YAML files under conf/ that hold the differences to it."""

from pathlib import Path
from typing import cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from spinlab.config import Config

CONF = Path(__file__).parent.parent / "conf"


def register() -> None:
    """Make the schema known to Hydra under the name that conf/config.yaml starts from."""
    ConfigStore.instance().store(name="schema", node=_schema())


def composed(*overrides: str) -> Config:
    """Return the settings that `python -m spinlab` would run with these overrides."""
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = OmegaConf.to_object(compose("config", list(overrides)))
    assert isinstance(config, Config)
    return config


def _schema() -> DictConfig:
    """Return the schema as a node that YAML may merge into.

    omegaconf marks nodes of frozen dataclasses read-only, which would forbid every override.
    """

    def writable(node: DictConfig) -> None:
        OmegaConf.set_readonly(node, False)
        for key in node:
            if OmegaConf.is_dict(child := node._get_node(key)):
                writable(cast(DictConfig, child))

    schema = OmegaConf.structured(Config)
    writable(schema)
    return schema
