"""Kernels run on a GPU where there is one, else in Triton's interpreter (`tests/conftest.py`)."""

import pytest
import torch
from triton.runtime import interpreter


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
