"""Transforms of single inputs while they are learned: scales, and dual transforms' rotations.

A linear computes T(x) T*(W)ᵀ = x Wᵀ, where T divides by a scale, turns in blocks, permutes and
turns in blocks again (`spinlab.rotation.inputs.ScaledDual`), and T* multiplies by the scale. Scales
are not folded into what produces the input: the first rotation runs online anyhow.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from spinlab.errors import InputError
from spinlab.learn.learned.log_numbers import LogNumbers, part_of
from spinlab.model.map import input_key
from spinlab.rotation.duquant import DualTransform, turn_blocks
from spinlab.rotation.inputs import ScaledDual
from spinlab.rotation.orthogonal import polar

PARTS = ("first", "second")


@dataclass(eq=False)
class LiveTransform:
    """One input's transform in a step; `first` and `second` collect gradients.

    first: (k, b, b) with the scale's inverse in its rows; second: (k, b, b); deal: the permutation
    (in,) with its inverse.
    """

    first: torch.Tensor
    second: torch.Tensor
    deal: tuple[torch.Tensor, torch.Tensor]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Transform inputs x: (..., in), in their own dtype."""
        dealt = _Deal.apply(turn_blocks(x, self.first), *self.deal)
        return turn_blocks(dealt, self.second)  # type: ignore[arg-type]


class _Deal(torch.autograd.Function):
    """Permute the last dimension; backward with the inverse permutation, which is fast and exact.

    autograd's own way adds up by index, and in deterministic mode sorts for it.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, permutation: torch.Tensor, inverse: torch.Tensor):
        ctx.save_for_backward(inverse)
        return _dealt(x, permutation)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (inverse,) = ctx.saved_tensors
        return _dealt(gradient, inverse), None, None


def _dealt(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return x[..., order], or for order (n, in) and x (n, rows, in) each x[i] by its own."""
    if order.dim() == 1:
        return x.index_select(-1, order)
    return x.gather(-1, order[:, None].expand(x.shape))


def check_duals(inputs: Mapping[str, ScaledDual]) -> None:
    """Raise InputError where an input has no dual transform that could be learned."""
    for key, transform in inputs.items():
        if transform.dual is None:
            raise InputError(
                f"learn.rotations=[inputs] learns dual transforms, and input {key} has a scale "
                "only: use rotation=duquant"
            )


class LearnedInputs:
    """Hold the transforms of all inputs: rotations stacked over layers by group, scales by key."""

    def __init__(
        self,
        inputs: Mapping[str, ScaledDual],
        lr_scale: float,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        check_duals(inputs)
        self.start, self.device, self.dtype = dict(inputs), device, dtype
        self.layers: dict[str, list[int]] = {}
        for key in inputs:
            layer, _, group = key.partition(".")
            self.layers.setdefault(group, []).append(int(layer))
        self.stacks = self._stacks()
        self.deals = {group: self._deal(group) for group in self.layers}
        self.scales = LogNumbers(lr_scale)
        if lr_scale:
            self.scales.start({key: self._scale(key) for key in inputs})
        # of a step: by input, what runs before it; by group, both rotations of the weights behind
        # it, (layers, k, b, b), and their gradients; by input, those of log scales
        self.live: dict[str, LiveTransform] = {}
        self.of_weight: dict[str, list[torch.Tensor]] = {}
        self.pulled: dict[str, list[torch.Tensor]] = {}
        self.of_scales: dict[str, torch.Tensor] = {}

    def _scale(self, key: str) -> torch.Tensor:
        transform = self.start[key]
        scale = torch.ones(transform.width) if transform.scale is None else transform.scale
        return scale.to(self.device, self.dtype)

    def _duals(self, group: str) -> list[DualTransform]:
        """Return the dual transforms of a group."""
        keys = [input_key(layer, group) for layer in self.layers[group]]
        return [dual for key in keys if (dual := self.start[key].dual) is not None]

    def _stacks(self) -> dict[str, torch.Tensor]:
        """Return the rotations of every group, (layers, k, b, b) by `group.part`, k = in/b."""
        found: dict[str, torch.Tensor] = {}
        for group in self.layers:
            for part in PARTS:
                blocks = torch.stack([_apart(dual, part) for dual in self._duals(group)])
                found[f"{group}.{part}"] = blocks.to(self.device, self.dtype)
        return found

    def _deal(self, group: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the permutations of a group and their inverses: (layers, in) each."""
        stacked = torch.stack([dual.permutation for dual in self._duals(group)]).to(self.device)
        return stacked, stacked.argsort(-1)

    def begin(self, rotations: Mapping[str, torch.Tensor]) -> None:
        """Start a step with the stacked rotations as they stand."""
        self.live, self.of_weight = {}, {}
        for group, layers in self.layers.items():
            first, second = (_plain(rotations[f"{group}.{part}"]) for part in PARTS)
            online, weight = self._firsts(group, first)
            self.of_weight[group] = [weight, second]
            self.pulled[group] = [torch.zeros_like(x) for x in self.of_weight[group]]
            deal = self.deals[group]
            for place, layer in enumerate(layers):
                self.live[input_key(layer, group)] = LiveTransform(
                    _leaf(online[place]), _leaf(second[place]), (deal[0][place], deal[1][place])
                )

    def of_weights(self, group: str, layers: list[int], weights: torch.Tensor) -> torch.Tensor:
        """Return the weights (n, out, in) of n layers that belong to transformed inputs."""
        if group not in self.layers:
            return weights
        places = [self.layers[group].index(layer) for layer in layers]
        return self._turned(group, places, weights, [x[places] for x in self.of_weight[group]])

    def _turned(
        self, group: str, places: list[int], weights: torch.Tensor, parts: list[torch.Tensor]
    ) -> torch.Tensor:
        orders = (order[places] for order in self.deals[group])
        dealt = _Deal.apply(_turn_each(weights, parts[0]), *orders)
        return _turn_each(dealt, parts[1])  # type: ignore[arg-type]

    def pull(
        self, group: str, layers: list[int], weights: torch.Tensor, gradients: torch.Tensor
    ) -> torch.Tensor:
        """Take in the gradients of `of_weights` and return those of the weights: (n, out, in)."""
        if group not in self.layers:
            return gradients
        places = [self.layers[group].index(layer) for layer in layers]
        with torch.enable_grad():
            leaf = weights.detach().requires_grad_()
            parts = [_leaf(x[places]) for x in self.of_weight[group]]
            self._turned(group, places, leaf, parts).backward(gradients.to(weights.dtype))
        for whole, part in zip(self.pulled[group], parts, strict=True):
            assert part.grad is not None
            whole[places] += part.grad
        assert leaf.grad is not None
        return leaf.grad

    def _log_scales(self, group: str) -> torch.Tensor:
        """Return the log scales of a group: (layers, in)."""
        keys = [input_key(layer, group) for layer in self.layers[group]]
        if self.scales.logs:
            return torch.stack([self.scales.logs[key].detach() for key in keys])
        return torch.stack([self._scale(key) for key in keys]).log()

    def _firsts(self, group: str, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return first rotations with scales in their rows, for inputs and for weights."""
        rows = self._log_scales(group).view(*first.shape[:-1], 1)
        return first * (-rows).exp(), first * rows.exp()

    def _leaves(self, group: str, part: str) -> torch.Tensor:
        """Return the gradients that one kind of leaf of a group gathered, stacked over layers."""
        lives = [self.live[input_key(layer, group)] for layer in self.layers[group]]
        return torch.stack([getattr(live, part).grad for live in lives])

    def gradients(self, name: str, rotations: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the gradients of a stack, by `group.part`; those of scales are kept for `step`."""
        group, _, part = name.rpartition(".")
        if part == "second":
            return self._leaves(group, "second") + self.pulled[group][1]
        return self._first_gradients(group, _plain(rotations[name]))

    def _first_gradients(self, group: str, first: torch.Tensor) -> torch.Tensor:
        online, weight = self._firsts(group, first)
        of_online, of_weight = self._leaves(group, "first"), self.pulled[group][0]
        of_logs = (of_weight * weight - of_online * online).sum(-1).flatten(1)
        keys = [input_key(layer, group) for layer in self.layers[group]]
        self.of_scales |= dict(zip(keys, of_logs.unbind(), strict=True))
        rows = self._log_scales(group).view(*weight.shape[:-1], 1)
        return of_online * (-rows).exp() + of_weight * rows.exp()

    def step(self, rate: float) -> None:
        """Move the scales."""
        if self.scales.logs:
            self.scales.step(self.of_scales, rate)
        self.of_scales = {}

    def result(self, rotations: Mapping[str, torch.Tensor]) -> dict[str, ScaledDual]:
        """Return the transforms as they stand, on the host, rotations projected in float64."""
        exact = {name: polar(stack.detach()).cpu() for name, stack in rotations.items()}
        found: dict[str, ScaledDual] = {}
        for group, layers in self.layers.items():
            scales = self._log_scales(group).double().exp().cpu()
            for place, layer in enumerate(layers):
                first, second = (exact[f"{group}.{part}"][place] for part in PARTS)
                dual = DualTransform(first, self.deals[group][0][place].cpu(), second)
                found[input_key(layer, group)] = ScaledDual(scales[place], False, dual)
        return found

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a resumed run needs beside the rotations."""
        return {f"scales.{name}": tensor for name, tensor in self.scales.state().items()}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Continue from what `state` returned."""
        self.scales.load_state(part_of(tensors, "scales."), self.device)


def _turn_each(weights: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Multiply the blocks of every weight (n, out, in) by its own rotations (n, k, b, b)."""
    tiles = weights.unflatten(-1, (-1, rotations.shape[-1]))
    return torch.einsum("nrkb,nkbc->nrkc", tiles, rotations.to(weights.dtype)).flatten(-2)


def _apart(dual: DualTransform, part: str) -> torch.Tensor:
    """Return one rotation for every block: (k, b, b), also where all shared one."""
    blocks: torch.Tensor = getattr(dual, part)
    return blocks.expand(dual.width // blocks.shape[-1], -1, -1)


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_()


def _plain(stack: torch.Tensor) -> torch.Tensor:
    """Return a parameter's numbers: geoopt's remember their manifold, what follows does not."""
    return stack.as_subclass(torch.Tensor).detach()
