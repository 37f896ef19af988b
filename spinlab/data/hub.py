"""Data sets of the hub: asked for once, and taken from the local cache where it does not answer."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from huggingface_hub import constants
from huggingface_hub.errors import (
    HTTPError,  # of httpx or httpx2, by version  # pyright: ignore[reportPrivateImportUsage]
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import get_session

_PATIENCE = 5.0  # seconds for the hub to answer


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Switch the hub off for a while if it does not answer: its clients would retry for a minute.

    Switched off, they serve what an earlier connection left in their caches, and fail at once for
    the rest. Nothing changes where the hub answers, or HF_HUB_OFFLINE has switched it off already.
    """
    from datasets import config

    switches = (constants, config)
    before = [module.HF_HUB_OFFLINE for module in switches]
    try:
        if not _answers():
            for module in switches:
                module.HF_HUB_OFFLINE = True  # pyright: ignore[reportConstantRedefinition]
        yield
    finally:
        for module, value in zip(switches, before, strict=True):
            module.HF_HUB_OFFLINE = value  # pyright: ignore[reportConstantRedefinition]


@cache
def _answers() -> bool:
    """Tell whether the hub can be reached; any status is an answer."""
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except (HTTPError, OfflineModeIsEnabled):
        return False
    return True
