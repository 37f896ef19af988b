"""Kernels run on a GPU where there is one, else in Triton's interpreter (`tests/conftest.py`)."""

import pytest
import torch
from triton.runtime import interpreter

from spinlab.runtime.kernels.producers import launch as gpu
from spinlab.runtime.kernels.producers import reference as producers


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="session")
def numpy_scalars() -> None:
    """Let the interpreter of Triton 3.6 take loop bounds under NumPy 2.4 (triton issue 9171)."""
    stock = interpreter._patch_lang_tensor

    def patched(tensor, scope) -> None:
        stock(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched


@pytest.fixture
def run(device, monkeypatch):
    """Make inputs by a kernel and by definition; whatever the kernel leaves unwritten is poison."""

    def poisoned(*shape, **options):
        return torch.full(shape, 77, **options)

    def both(name, *arguments):
        arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty", poisoned)
            found = getattr(gpu, name)(*arguments)
            plain = getattr(gpu, name)(*arguments, summed=False)
        wanted = getattr(producers, name)(*arguments)
        bare = getattr(producers, name)(*arguments, summed=False)
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert torch.equal(found.sums.long(), sums(found))
        assert plain.sums is bare.sums is None
        assert all(map(torch.equal, (*plain[:3], *bare[:3]), (*found[:3], *wanted[:3])))
        return found, wanted

    return both


def sums(found):
    return found.levels.long().unflatten(1, (found.scale.shape[1], -1)).sum(2)
