"""Gated MLPs of a network under learning: silu(gate)·up in one pass, there and back.

A scale that is folded into up_proj divides what up_proj gives. In torch that, the gate and their
gradients go through memory some twenty times; the kernels read and write each number once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu
from transformers import PreTrainedModel

from spinlab.device import has_kernels
from spinlab.model.modules import map_of

_STEP, _BLOCK = 32, 128  # rows and columns of a program

Factor = Callable[[], torch.Tensor]


def fuse_gates(model: PreTrainedModel, factors: dict[str, Factor]) -> set[str]:
    """Let gated MLPs multiply gate and up in one pass; return the paths of the up_projs.

    factors: what the outputs of linears are multiplied by, (rows,) each, where they are, by path.
    MLPs with another activation stay as they are.
    """
    fused: set[str] = set()
    for layer in map_of(model).layers:
        mlp = layer.mlp
        if mlp is not None and mlp.by_silu:
            parts = (model.get_submodule(path) for path in (mlp.gate, mlp.up, mlp.down))
            forward = partial(_forward, *parts, factors.get(mlp.up))
            model.get_submodule(mlp.path).forward = forward  # type: ignore[method-assign]
            fused.add(mlp.up)
    return fused


def _forward(
    gate: nn.Module, up: nn.Module, down: nn.Module, factor: Factor | None, x: torch.Tensor
) -> torch.Tensor:
    return down(gated(gate(x), up(x), None if factor is None else factor()))


def gated(gate: torch.Tensor, up: torch.Tensor, factor: torch.Tensor | None = None) -> torch.Tensor:
    """Return silu(gate)·(up·factor): gate and up (..., width), factor (width,), if there is one.

    Each product is rounded to the dtype of gate and up, as it is in a network whose up_proj holds
    the factor.
    """
    if has_kernels(gate.device, gate.dtype):
        return _Gated.apply(gate, up, factor)  # type: ignore[no-any-return]
    return silu(gate) * (up if factor is None else up * factor.to(up.dtype))


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, factor: torch.Tensor | None):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up, factor)
        out = torch.empty_like(gate)
        _launch("gate_kernel", gate, up, factor, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor):
        gate, up, factor = ctx.saved_tensors
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        programs, width = -(-gate.numel() // gate.shape[-1] // _STEP), gate.shape[-1]
        size = (programs, width) if factor is not None else (0, width)
        sums = torch.empty(size, dtype=torch.float32, device=gate.device)
        given = gradients[0].contiguous(), of_gate, of_up, sums
        _launch("gate_gradient_kernel", gate, up, factor, *given)
        of_factor = None if factor is None else sums.sum(0).to(factor.dtype)
        return of_gate, of_up, of_factor


def _launch(
    name: str,
    gate: torch.Tensor,
    up: torch.Tensor,
    factor: torch.Tensor | None,
    *rest: torch.Tensor,
) -> None:
    from spinlab.learn.spaces import gate_kernels  # loads Triton

    width = gate.shape[-1]
    rows = gate.numel() // width
    if rows:
        grid = -(-rows // _STEP), -(-width // _BLOCK)
        kernel: Any = getattr(gate_kernels, name)[grid]
        known = gate if factor is None else factor.contiguous()
        constants = {"WIDTH": width, "SCALED": factor is not None, "STEP": _STEP, "BLOCK": _BLOCK}
        kernel(gate, up, known, *rest, rows, **constants, num_warps=4)
