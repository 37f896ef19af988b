"""The kernel of a block of columns against its definition, on a GPU or in the interpreter."""

import pytest
import torch

from spinlab.config import ClipSearch, GPTQConfig, QronosConfig, TensorQuant, WeightsConfig
from spinlab.weights import gptq as rounding
from spinlab.weights.mismatch import gptaq, mismatch, qronos

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def moments(width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return H of correlated inputs, one of which is always 0, and D of others near them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(200, width, generator=g) @ torch.randn(width, width, generator=g)
    x[:, 3] = 0
    lack = 0.1 * torch.randn(200, width, generator=g)
    return 2 * x.T @ x / 200, 2 * lack.T @ x / 200


def rounded(monkeypatch, method: str, format: TensorQuant, kernel: bool, **changes):
    """Return the weight of 11 x 32, by the kernel or by its definition, and how often it ran."""
    device = DEVICE if kernel else torch.device("cpu")
    calls = []

    def launched(*args):
        calls.append(args)
        return real(*args)

    real = rounding.round_columns
    monkeypatch.setattr(rounding, "has_kernel", lambda *_: kernel)
    monkeypatch.setattr(rounding, "round_columns", launched)
    hessian, cross = (moment.to(device) for moment in moments(32))
    weight = torch.randn(11, 32, generator=torch.Generator().manual_seed(1)).to(device)
    if method == "gptq":
        config = WeightsConfig("gptq", ClipSearch(), GPTQConfig(**changes))
        found = rounding.gptq(weight, rounding.error_spread(hessian, config.gptq), format, config)
    else:
        own = QronosConfig(**changes)
        config = WeightsConfig("qronos", ClipSearch(), qronos=own)
        sweep = {"gptaq": gptaq, "qronos": qronos}[method]
        found = sweep(weight, mismatch(hessian, cross, own), format, config)
    monkeypatch.undo()
    return found.cpu(), len(calls)


@pytest.mark.parametrize(
    ("format", "changes"),
    [
        (TensorQuant(), {"block_size": 12}),
        (TensorQuant(bits=3, symmetric=True), {"block_size": 128}),
        (TensorQuant(group_size=8), {"block_size": 12}),
        (TensorQuant(group_size=16), {"block_size": 8}),
        (TensorQuant(group_size=8), {"act_order": True, "static_groups": True, "block_size": 20}),
        (TensorQuant(symmetric=True, group_size=16, format="nvfp4"), {"block_size": 12}),
        (TensorQuant(symmetric=True, group_size=32, format="mxfp4"), {"block_size": 20}),
        (TensorQuant(6, True, 32, format="mxfp6_e2m3"), {"block_size": 12}),
        (TensorQuant(8, True, 0, format="fp8"), {"block_size": 20}),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["gptq", "gptaq", "qronos"])
def test_a_block_in_one_launch_is_rounded_as_column_by_column(monkeypatch, method, format, changes):
    pytest.importorskip("triton")
    expected, none = rounded(monkeypatch, method, format, kernel=False, **changes)
    found, calls = rounded(monkeypatch, method, format, kernel=True, **changes)
    assert not none
    assert calls >= 32 / changes["block_size"]
    assert torch.equal(found.levels, expected.levels)
    assert torch.allclose(found.scale, expected.scale, rtol=1e-6)
    assert torch.equal(found.zero, expected.zero)
