"""Devices and back ends are chosen by what the machine has."""

import pytest
import torch

from spinlab import device as devices
from spinlab.device import choose_backend, choose_device, float32_products_for
from spinlab.errors import InputError


def test_the_back_end_follows_the_device(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_backend("auto", cpu) == "cpu"
    with pytest.raises(InputError, match=r"backend=triton needs a CUDA device"):
        choose_backend("triton", cpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert choose_backend("auto", gpu) == "torch"
    with pytest.raises(InputError, match=r"compute capability 8.0 or more, and cuda has 7.5"):
        choose_backend("triton", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_backend("triton", gpu) == "triton"
    assert choose_backend("auto", gpu) == "auto"  # the model decides
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    assert choose_backend("auto", gpu) == "torch"
    with pytest.raises(InputError, match="package triton, which is not installed"):
        choose_backend("triton", gpu)


def test_rocm_has_no_kernels_whatever_capability_it_reports(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert choose_backend("auto", gpu) == "torch"
    with pytest.raises(InputError, match="NVIDIA's CUDA, and this torch is built without it"):
        choose_backend("triton", gpu)


@pytest.mark.parametrize(("name", "expected"), [("cuda:1", [1]), ("cuda", []), ("cpu", [])])
def test_a_device_with_a_number_becomes_the_current_one(monkeypatch, name, expected):
    """Triton launches on the current device, wherever its tensors lie."""
    found: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    assert choose_device(name) == torch.device(name)
    assert found == expected


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        (torch.bfloat16, "cuda", "high"),
        (torch.float16, "cuda", "high"),
        (torch.float32, "cuda", "highest"),
        (torch.bfloat16, "cpu", "highest"),
    ],
)
def test_float32_products_are_coarser_only_on_a_gpu_for_16_bit_numbers(dtype, device, expected):
    with float32_products_for(dtype, torch.device(device)):
        assert torch.get_float32_matmul_precision() == expected
    with pytest.raises(ZeroDivisionError), float32_products_for(dtype, torch.device(device)):
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "highest"
