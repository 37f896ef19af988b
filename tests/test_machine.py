"""What is left to a process: the least of several limits, each read from where it stands."""

import errno
import resource
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from spinlab import machine
from spinlab.machine import left_on_host, memory_for, out_of_memory

GIB = 2**30


def group(folder, limit, used, names, **stat):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    lines = "".join(f"{name} {count}\n" for name, count in stat.items())
    (folder / "memory.stat").write_text(lines)


V2 = ("memory.max", "memory.current")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def test_a_control_group_and_those_above_it_bind_but_files_it_caches_do_not(tmp_path):
    (tmp_path / "self").write_text("0::/a/b\n")
    group(tmp_path / "a" / "b", "max", 5 * GIB, V2)
    group(tmp_path / "a", 8 * GIB, 5 * GIB, V2, anon=2 * GIB, active_file=GIB, inactive_file=GIB)
    assert list(machine._of_groups(tmp_path, tmp_path / "self")) == [5 * GIB]


def test_a_container_of_the_first_version_sees_its_own_group_as_the_root(tmp_path):
    (tmp_path / "self").write_text("4:memory:/docker/0123\n1:cpu:/docker/0123\n")
    group(tmp_path / "memory", 4 * GIB, 3 * GIB, V1, cache=1, total_cache=2 * GIB)
    assert list(machine._of_groups(tmp_path, tmp_path / "self")) == [3 * GIB]


def test_a_machine_without_control_groups_has_none(tmp_path):
    assert list(machine._of_groups(tmp_path, tmp_path / "self")) == []
    (tmp_path / "self").write_text("0::/\n")
    assert list(machine._of_groups(tmp_path, tmp_path / "self")) == []


def test_the_address_space_binds_beside_what_is_free(monkeypatch):
    used = psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (used + GIB // 4, -1))
    assert left_on_host() == pytest.approx(GIB // 4, abs=GIB // 16)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, -1))
    free = left_on_host()
    assert GIB // 4 < free <= psutil.virtual_memory().total
    swap = SimpleNamespace(free=GIB)
    monkeypatch.setattr(psutil, "swap_memory", lambda: swap)
    for count in (lambda s: left_on_host(s), lambda s: memory_for(torch.device("cpu"), s)):
        assert count(True) - count(False) == pytest.approx(GIB, abs=GIB // 4)
    free = left_on_host()
    monkeypatch.setattr(machine.parallel, "launched_here", lambda: 4)
    assert left_on_host() == pytest.approx(free / 4, rel=0.1)
    assert left_on_host(alone=True) == pytest.approx(free, rel=0.1)
    assert memory_for(torch.device("cpu")) > GIB // 4


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (MemoryError(), "host"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "host"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "GPU"),
        (RuntimeError("CUDA error: out of memory"), "GPU"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "GPU"),
        (RuntimeError("std::bad_alloc"), "host"),
    ],
)
def test_errors_that_say_that_memory_ran_out_are_told_from_others(error, place):
    assert out_of_memory(error).startswith(f"the {place}'s memory ran out: ")


def test_real_allocators_are_understood():
    for allocate in (lambda: torch.empty(2**50), lambda: np.empty(2**50)):
        with pytest.raises((RuntimeError, MemoryError)) as failed:
            allocate()
        assert "host's memory" in out_of_memory(failed.value)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(errno.ENOSPC, "full")])
def test_other_errors_are_left_alone(error):
    assert out_of_memory(error) is None
