"""The CPU's integer product is exact on every processor."""

import os
import subprocess
import sys

import pytest
import torch

from spinlab.config import ClipSearch, TensorQuant
from spinlab.fakequant.activations import InputPath
from spinlab.formats import IntegerFormat
from spinlab.formats.quantizer import TokenQuantizer
from spinlab.runtime.kernels.matmul import KERNELS, cpu, kernel_for, reference
from spinlab.runtime.stock.linear import IntegerLinear
from spinlab.weights.rtn import rtn

CPU = torch.device("cpu")
STOCK = torch._int_mm


def refusing(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """torch 2.11 on a CPU."""
    if left.dtype != torch.int8:
        raise RuntimeError("Expected self dtype to be of type int8 but got unsigned char")
    return STOCK(left, right)


def saturating(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A processor that adds pairs of products of unsigned with signed bytes in 16 bits."""
    shift = 128 if left.dtype == torch.int8 else 0  # the library makes signed bytes unsigned
    products = (left.int() + shift)[:, :, None] * right.int()
    pairs = torch.nn.functional.pad(products, (0, 0, 0, products.shape[1] % 2)).unflatten(
        1, (-1, 2)
    )
    sums = pairs.sum(2).clamp(-(2**15), 2**15 - 1).sum(1)
    return (sums - shift * right.sum(0)).int()


def both(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return saturating(left, right) if left.dtype == torch.int8 else refusing(left, right)


def garbling(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A library that is wrong wherever the result is wide."""
    found = STOCK(left, right)
    return found + (found.shape[1] > 2)


@pytest.fixture
def int_mm(monkeypatch):
    """Put another product in the place of torch's, and forget what was tried."""

    def put(product) -> None:
        monkeypatch.setattr(torch, "_int_mm", product)
        cpu._right_product.cache_clear()

    yield put
    cpu._right_product.cache_clear()


def operands(tokens: int, width: int, most: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(tokens)
    levels = torch.randint(256, (tokens, width), generator=g, dtype=torch.uint8)
    weight = torch.randint(-most, most, (24, width), generator=g, dtype=torch.int8)
    levels[0], weight[0] = 255, -most
    return levels, weight


@pytest.mark.parametrize("product", [STOCK, refusing, saturating, both, garbling])
def test_products_are_exact_whatever_the_library_does(int_mm, product):
    """Oracle: int64. Every kind of bytes, rows from one to many, odd widths and the width 1."""
    int_mm(product)
    for tokens in (1, 2, 16, 17):
        for width in (1, 2, 7, 64):
            levels, weight = operands(tokens, width)
            narrow = weight.clamp(-64, 63)
            for rows in (levels, levels.view(torch.int8)):
                found, found_narrow = cpu.matmul(rows, weight), cpu.matmul_narrow(rows, narrow)
                assert found.dtype == found_narrow.dtype == torch.int32
                assert torch.equal(found.long(), rows.long() @ weight.long().T)
                assert torch.equal(found_narrow.long(), rows.long() @ narrow.long().T)


def how(most: int) -> dict | None:
    """Return how products are called, None for not at all."""
    return getattr(cpu._right_product(most), "keywords", None)


def test_the_fastest_way_that_is_right_is_taken(int_mm, caplog):
    int_mm(refusing)
    assert how(128) == how(64) == {"swap": True, "unsigned": False}
    int_mm(saturating)
    assert how(64) == {"swap": False, "unsigned": True}
    assert not caplog.messages
    assert cpu._right_product(128) is reference.matmul
    for _ in range(2):
        cpu.matmul(*operands(3, 8))
    (line,) = caplog.messages  # once, not for each product
    assert "multiplied in floating point, which is exact and slower" in line
    int_mm(garbling)
    assert cpu._right_product(64) is reference.matmul


def test_weights_of_few_bits_are_multiplied_as_narrow_ones():
    """Their levels, moved into int8, stay within what the product was tried with."""
    for bits in (2, 4, 6):
        assert kernel_for("cpu", IntegerFormat(bits, False), CPU) is cpu.matmul_narrow
        assert (
            max(IntegerFormat(bits, False).highest, -IntegerFormat(bits, True).lowest)
            <= cpu._NARROW
        )
    assert kernel_for("cpu", IntegerFormat(8, True), CPU) is cpu.matmul
    assert kernel_for("torch", IntegerFormat(4, True), CPU) is KERNELS["torch"]
    on_gpu = kernel_for("torch", IntegerFormat(4, True), torch.device("cuda"))
    assert on_gpu is KERNELS["cublas"]


@pytest.mark.parametrize(("width", "group"), [(1, 0), (12, 1)])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_linears_take_one_column_at_a_time(tokens, width, group):
    """Groups of one input, or a width of one; oracle: the floats behind both, in float64."""
    g = torch.Generator().manual_seed(0)
    weight = rtn(torch.randn(6, width, generator=g), TensorQuant(bits=8), ClipSearch())
    quantizer = TokenQuantizer(IntegerFormat(8, False), group)
    x = torch.randn(tokens, width, generator=g)
    linear = IntegerLinear(weight, None, InputPath(None, quantizer), cpu.matmul, torch.float32)
    wanted = quantizer.round(x).double() @ weight.dequantize(torch.float64).T
    assert torch.allclose(linear(x).double(), wanted, atol=1e-5)


WITHOUT_VNNI = """
import torch
from spinlab.runtime.kernels.matmul import cpu
for tokens in (1, 5, 40):
    g = torch.Generator().manual_seed(tokens)
    levels = torch.randint(256, (tokens, 576), generator=g, dtype=torch.uint8)
    weight = torch.randint(-128, 128, (24, 576), generator=g, dtype=torch.int8)
    levels[0], weight[0] = 255, -128
    for rows in (levels, levels.view(torch.int8)):
        for product, w in ((cpu.matmul, weight), (cpu.matmul_narrow, weight.clamp(-64, 63))):
            assert torch.equal(product(rows, w).long(), rows.long() @ w.long().T)
"""


def test_products_are_exact_on_a_processor_without_vnni():
    """In a process whose library is told to do without, where the processor has it."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_VNNI], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
