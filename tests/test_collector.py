"""Modules are left out of garbage collection; what comes later is collected as ever."""

import gc
import weakref

import pytest

from spinlab.cache import Cache
from spinlab.collector import leave_modules, resting


class Knot:
    """Refer to itself, so that only a collection frees it."""

    def __init__(self) -> None:
        self.own = self


def test_a_cache_leaves_modules_and_nothing_that_is_made_later(tmp_path):
    Cache(tmp_path)
    assert gc.get_freeze_count() > 100_000  # torch and transformers are loaded
    leave_modules()
    knot = weakref.ref(Knot())
    gc.collect()
    assert knot() is None


def test_no_collection_starts_while_modules_load_whatever_happens():
    with pytest.raises(ImportError), resting():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
