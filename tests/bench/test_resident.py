"""What is a process's own of its resident memory, against mappings of known sizes.

The mappings are the system's and not the allocator's: that one hands out again what other tests
have freed and left resident, and then nothing grows.
"""

import mmap
import time
from pathlib import Path

import numpy as np
import pytest

from spinlab.bench.resident import Watch, own_bytes

SIZE = 128 * 2**20
pytestmark = pytest.mark.skipif(not own_bytes(), reason="RssAnon is read from Linux")


def test_what_was_there_for_a_while_is_seen():
    before = own_bytes()
    with Watch() as watch:
        with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
            for first in range(0, SIZE, mmap.PAGESIZE):
                pages[first] = 1
            time.sleep(0.1)
        after = own_bytes()
    assert before + 0.9 * SIZE < watch.most < before + 1.5 * SIZE
    assert after < before + 0.5 * SIZE


def test_pages_of_files_are_not_counted(tmp_path):
    file: Path = tmp_path / "numbers"
    np.ones(SIZE, dtype=np.uint8).tofile(file)
    before = own_bytes()
    with Watch() as watch:
        mapped = np.memmap(file, dtype=np.uint8, mode="r")
        assert int(mapped[::4096].sum()) == SIZE // 4096  # every page is read
        time.sleep(0.1)
    assert watch.most < before + 0.5 * SIZE
