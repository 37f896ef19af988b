"""Rotations while they are learned: where they stand, and the gradients that gather for them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spinlab import parallel
from spinlab.config import LearnConfig
from spinlab.learn.learned.inputs import LearnedInputs
from spinlab.learn.learned.log_parameters import part_of
from spinlab.learn.optim import on_manifold, tangent
from spinlab.model.map import Input
from spinlab.rotation.online import dense_rotation
from spinlab.rotation.orthogonal import polar
from spinlab.rotation.rotations import RotationSet


@dataclass(frozen=True)
class Sink:
    """Take parts of the gradient of one rotation: (n, n) each, in float32 or wider.

    add: generators M; add_half: what the Euclidean gradient needs beside them, H, where its norm is
    asked for (`spinlab.learn.spaces.rotate`).
    """

    add: Callable[[torch.Tensor], None]
    add_half: Callable[[torch.Tensor], None] | None = None


class LearnedRotations:
    """Hold R1 (hidden, hidden), R2 (layers, head_dim, head_dim), R3 and the transforms of inputs.

    Numbers are float32 or wider. A rotation that is off is None; an R1 or R2 that is on but not
    learned is a plain tensor. R3 is here only where it is learned: (head_dim, head_dim) for all
    layers, or (layers, head_dim, head_dim). `cast` holds them in the network's dtype for the length
    of a step. inputs: those of the model by their keys.
    """

    def __init__(
        self,
        start: RotationSet,
        learn: LearnConfig,
        inputs: Mapping[str, Input],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.dtype, self.wide = dtype, torch.promote_types(dtype, torch.float32)
        self.euclidean = learn.optimizer.grad_norm == "euclidean"
        self.all: dict[str, torch.Tensor | None] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        matrices = {"r1": start.r1, "r2": start.r2}
        if "r3" in learn.rotations and start.r3 is not None:
            matrices["r3"] = start.r3.dense()
        for name, matrix in matrices.items():
            held = None if matrix is None else matrix.to(device, self.wide, copy=True)
            if held is not None and name in learn.rotations:
                held = self.parameters[name] = on_manifold(held)
            self.all[name] = held
        self.inputs: LearnedInputs | None = None
        if "inputs" in learn.rotations and start.inputs:
            self.inputs = LearnedInputs(start, inputs, learn.lr.scale, device, self.wide)
            self.parameters |= self.inputs.parameters
        rates = {name: learn.lr.of_rotation(name) for name in self.parameters}
        self.held = {name for name, rate in rates.items() if not rate}  # they count in no norm
        self.cast: dict[str, torch.Tensor] = {}
        self._generators: dict[str, torch.Tensor] = {}
        self._gradients: dict[str, torch.Tensor] = {}
        self._halves: dict[str, torch.Tensor] = {}

    @property
    def r1(self) -> torch.Tensor | None:
        return self.all["r1"]

    @property
    def r2(self) -> torch.Tensor | None:
        return self.all["r2"]

    @property
    def r3(self) -> torch.Tensor | None:
        return self.all.get("r3")

    def begin(self) -> None:
        """Start a step: cast the rotations as they stand, forget the last gradients."""
        on = {name: held for name, held in self.all.items() if held is not None}
        self.cast = {name: held.detach().to(self.dtype) for name, held in on.items()}
        self._generators, self._gradients = self._zeros(), self._zeros()
        self._halves = self._zeros() if self.euclidean else {}
        for parameter in self.parameters.values():
            parameter.grad = None
        if self.inputs is not None:
            self.inputs.begin()

    def _zeros(self) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(p.data) for name, p in self.parameters.items()}

    def at(self, name: str, layer: int) -> torch.Tensor:
        """Return R1, R2 or R3 of a layer: (n, n) in the network's dtype."""
        return _of_layer(self.cast[name], layer)

    def anchor(self, name: str) -> torch.Tensor:
        """Return what requires a gradient exactly if a rotation is learned: it itself."""
        held = self.all[name]
        assert held is not None
        return held

    def sink(self, name: str, layer: int) -> Sink:
        """Return where the parts of the gradient of R1, R2 or R3 of a layer go."""

        def add(generator: torch.Tensor) -> None:
            self._at(self._generators, name, layer, generator)

        def add_half(half: torch.Tensor) -> None:
            self._at(self._halves, name, layer, half)

        return Sink(add, add_half if self.euclidean and name in self.parameters else None)

    def add_gradient(self, name: str, layer: int, gradient: torch.Tensor) -> None:
        """Add a Euclidean gradient (n, n): that of R1, R2 or R3 of a layer."""
        self._at(self._gradients, name, layer, gradient)

    def _at(self, sums: dict[str, torch.Tensor], name: str, layer: int, part: torch.Tensor) -> None:
        if name in self.parameters:
            _of_layer(sums[name], layer).add_(part)

    @torch.no_grad()
    def finish(self, most: float | None) -> torch.Tensor:
        """Give every learned rotation its Riemannian gradient and return the gradients' norm.

        It is that of the Euclidean metric, ½ (M - Mᵀ) R, whatever Euclidean gradient was handed
        in; summed over processes. The norm is that of all rotations together, of their Euclidean
        gradients (M + H + Hᵀ) R where `learn.optimizer.grad_norm` says so; if it exceeds `most`,
        gradients are scaled by most / norm.
        """
        if self.inputs is not None:
            self._gradients |= self.inputs.gradients()
        measured: list[torch.Tensor] = []
        for name, parameter in self.parameters.items():
            whole = self._generators[name] + self._gradients[name] @ parameter.detach().mT
            generator = parallel.sum_(whole.contiguous())
            parameter.grad = tangent(parameter.detach(), generator)
            if name in self.held:
                continue
            if self.euclidean:  # R does not change the norm
                half = parallel.sum_(self._halves[name])
                measured.append(generator + half + half.mT)
            else:
                measured.append(parameter.grad)
        norm = nn.utils.get_total_norm(measured)
        limit = float("inf") if most is None else most
        moved = [p for name, p in self.parameters.items() if name not in self.held]
        nn.utils.clip_grads_with_norm_(moved, limit, norm)
        return norm

    def step_scales(self, rate: float) -> None:
        """Move the scales of inputs, if they are learned, at `rate` times their base rate."""
        if self.inputs is not None:
            self.inputs.scales.step(rate)

    @torch.no_grad()
    def project(self) -> None:
        """Put the learned rotations back on the manifold they drift from."""
        for parameter in self.parameters.values():
            parameter.copy_(polar(parameter))

    def agree(self) -> None:
        """Give all processes the first one's bits."""
        parallel.share_tensors([p.data for p in self.parameters.values()])

    def result(self) -> dict[str, Any]:
        """Return what changed in the RotationSet, projected in float64, on the host."""
        found: dict[str, Any] = {
            n: None if r is None else polar(r.detach()).cpu() for n, r in self.all.items()
        }
        if "r3" in found:
            found["r3"] = dense_rotation(found["r3"])
        if self.inputs is not None:
            return {**found, "inputs": self.inputs.result()}
        return found

    def numbers(self) -> dict[str, torch.Tensor]:
        """Return everything learned that `result` holds, as it stands."""
        logs = {} if self.inputs is None else self.inputs.scales.logs
        scales = {f"scales.{group}": log.data for group, log in logs.items()}
        return {**{name: p.data for name, p in self.parameters.items()}, **scales}

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a resumed run needs, but for the optimizer of rotations."""
        scales = {} if self.inputs is None else self.inputs.scales.state()
        found = {f"rotation.{name}": p.detach() for name, p in self.parameters.items()}
        return found | {f"scales.{name}": value for name, value in scales.items()}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
        """Continue from what `state` returned."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"rotation.{name}"])
        if self.inputs is not None:
            self.inputs.scales.load_state(part_of(tensors, "scales."), device)


def _of_layer(held: torch.Tensor, layer: int) -> torch.Tensor:
    """Return what belongs to a layer: (n, n) of a stack for all, or the one that all share."""
    return held if held.dim() == 2 else held[layer]
