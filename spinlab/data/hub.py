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

_SWITCH = "HF_HUB_OFFLINE"  # read at every request, by its clients' modules
_PATIENCE = 5.0  # seconds for the hub to answer


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Switch the hub off for a while if it does not answer: its clients would retry for a minute.

    Switched off, they serve what an earlier connection left in their caches, and fail at once for
    the rest. Nothing changes where the hub answers, or HF_HUB_OFFLINE has switched it off already.
    """
    from datasets import config

    switches = [(vars(module), module.HF_HUB_OFFLINE) for module in (constants, config)]
    try:
        if not _answers():
            for module, _ in switches:
                module[_SWITCH] = True
        yield
    finally:
        for module, before in switches:
            module[_SWITCH] = before


@cache
def _answers() -> bool:
    """Tell whether the hub can be reached; any status is an answer."""
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except (HTTPError, OfflineModeIsEnabled):
        return False
    return True
