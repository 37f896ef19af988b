"""Remember what Hydra reads and merges: tests compose settings thousands of times in a session."""

import pickle
from dataclasses import astuple
from functools import cache
from typing import Any

import pytest


def remember_settings(patch: pytest.MonkeyPatch) -> None:
    """Let Hydra parse each file of conf/ once, and merge each choice of its files once.

    All of them stay, as bytes that leave no process: a copy is read from them five times sooner
    than nodes are copied, and no garbage collection walks them. Values, and what a plus or a tilde
    changes, are put on top every time.
    """
    from hydra._internal import defaults_list
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.config_repository import ConfigRepository
    from hydra.core.config_store import ConfigStore
    from omegaconf import base

    load = ConfigRepository.load_config
    merge = ConfigLoaderImpl._compose_config_from_defaults_list
    files, merged = dict[Any, Any](), dict[Any, bytes]()

    def read(self, config_path: str) -> Any:
        asked = config_path, _places(self)
        if asked not in files:
            files[asked] = load(self, config_path)
        return files[asked]  # of which lists of choices only read

    def together(self, defaults: list, repo: Any) -> Any:
        asked = *map(astuple, defaults), _places(repo)
        if asked not in merged:
            merged[asked] = pickle.dumps(merge(self, defaults, _Copies(repo)))
        return pickle.loads(merged[asked])  # whoever composes changes it

    patch.setattr(ConfigRepository, "load_config", read)
    patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", together)
    # each reader of files has a copy of all schemas, of which it takes copies again
    patch.setattr(ConfigStore, "__deepcopy__", lambda self, memo: self, raising=False)
    # of all choices so far, made for each file; lists of defaults here name no other choice
    patch.setattr(defaults_list, "_create_interpolation_map", lambda *told: None)
    patch.setattr(base, "parse", cache(base.parse))  # trees, which are only looked at


class _Copies:
    """A reader of files whose result is the caller's own: merging takes its nodes."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def load_config(self, config_path: str) -> Any:
        return pickle.loads(pickle.dumps(self._reader.load_config(config_path)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


def _places(reader: Any) -> tuple[str, ...]:
    return tuple(source.path for source in reader.get_sources())
