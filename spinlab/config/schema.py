"""Settings as a node of omegaconf, typed by their dataclasses."""

from typing import Any, cast

from omegaconf import DictConfig, OmegaConf


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
