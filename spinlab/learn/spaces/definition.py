"""The plain definition: every weight is rotated, and rounded, at each forward pass, by autograd.

`ActivationSpace` and `WeightSpace` must equal it and be faster; tests and `spinlab.bench` compare.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from spinlab.config import LearnConfig, ObjectiveConfig, TensorQuant
from spinlab.errors import InputError
from spinlab.fakequant.insert import weight_format
from spinlab.formats import IntegerFormat, format_of
from spinlab.formats.integer import at_least_float32, smallest_scale
from spinlab.formats.quantizer import StraightThrough
from spinlab.kv.base import RowCodec
from spinlab.kv.cache import kv_path_of, set_kv_path
from spinlab.kv.layers import rounded
from spinlab.kv.path import KVPath, Sides
from spinlab.learn.learned import LogParameters
from spinlab.learn.spaces.base import LearningSpace, Parts
from spinlab.model.attention import capped
from spinlab.model.map import Site
from spinlab.model.modules import decoder_of, ends_of, linears_of
from spinlab.rotation.fuse import rotated_weight, rotations_at
from spinlab.weights.rtn import round_to_nearest, search_ratios


class PlainSpace(LearningSpace):
    """Make the weights W' = Lᵀ W R of a network functions of R1 and R2, its keys one of R3.

    dtype is that of the rotating: float64, as in SpinQuant's published code, unless given.
    """

    @classmethod
    def check(cls, learn: LearnConfig) -> None:
        """Refuse what the definition leaves out."""
        if "inputs" in learn.rotations or learn.lr.input_clip or learn.lr.kv_clip:
            raise InputError(
                "the plain definition has R1, R2, R3 and weight ranges: leave inputs out of "
                "learn.rotations and set learn.lr.input_clip=0 learn.lr.kv_clip=0"
            )

    def __init__(self, parts: Parts, dtype: torch.dtype = torch.float64) -> None:
        model = parts.model
        super().__init__(parts)
        self.dtype, self.quant, self.search = dtype, parts.quant, parts.search
        self.ranges = LogParameters(self.learn.lr.clip, most=1.0)
        self.clip: dict[str, torch.Tensor] = {}
        self.linears = list(linears_of(model))
        self.frozen = {site.path: linear.weight.detach() for site, linear in self.linears}
        self.biases = {site.path: linear.bias for site, linear in self.linears}
        self.model, self.kv = model, kv_path_of(model)
        decoder = decoder_of(model)  # first of all, as a cache is made of the path
        decoder.register_forward_pre_hook(lambda module, args: self._write(), prepend=True)
        self.ends = ends_of(model)
        self.end_weights = [end.weight.detach() for end in self.ends]

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        r1 = self.rotations.r1
        return x if r1 is None else (x.to(self.dtype) @ r1.to(self.dtype)).to(x.dtype)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        r1 = self.rotations.r1
        return x if r1 is None else (x.to(self.dtype) @ r1.mT.to(self.dtype)).to(x.dtype)

    def head_loss(
        self,
        hidden: torch.Tensor,
        head: torch.Tensor,
        ids: torch.Tensor,
        objective: ObjectiveConfig,
        teacher: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss on whole logits and its terms: torch's own losses, by autograd."""
        logits = self._logits(hidden, self.ends[1].weight)
        terms = {}
        if objective.cross_entropy:
            terms["cross_entropy"] = nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        if objective.kl:
            assert teacher is not None
            known = self._logits(*teacher)
            if objective.kl_top_k:
                known, places = known.topk(min(objective.kl_top_k, known.shape[-1]))
                logits = logits.gather(-1, places)
            both = logits.log_softmax(-1), known.log_softmax(-1)
            terms["kl"] = nn.functional.kl_div(*both, reduction="batchmean", log_target=True)
        loss = sum(
            (getattr(objective, name) * term for name, term in terms.items()), hidden.sum() * 0
        )
        return loss, terms

    def _logits(self, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """Return the logits of every token but the last: (batch·(tokens-1), vocabulary)."""
        logits = nn.functional.linear(hidden[:, :-1], head, self.head_bias)
        return capped(at_least_float32(logits), self.logit_cap).flatten(0, 1)

    def begin(self, index: int) -> None:
        """Search clip ratios where it is time to; learned ones start from the first search."""
        fresh = self.learn.quantize_weights and index % self.learn.clip_refresh == 0
        if not fresh or self.ranges.logs:
            return
        with torch.no_grad():
            weights = {site.path: weight for site, _, _, weight in self._rotated()}
        self.clip = {
            site.path: search_ratios(weights[site.path], format, self.search)
            for site, _ in self.linears
            if (format := weight_format(site, self.quant)) is not None
        }
        if self.learn.lr.clip:
            self.ranges.start(self.clip)

    def _rotated(self) -> Iterator[tuple[Site, nn.Linear, torch.Tensor | None, torch.Tensor]]:
        """Yield site, module, what rotates its output, and rotated weight of every linear."""
        both = self.rotations.r1, self.rotations.r2
        r1, r2 = (None if r is None else r.to(self.dtype) for r in both)
        for site, linear in self.linears:
            reads, writes = rotations_at(site, r1, r2)
            frozen = self.frozen[site.path]
            weight = rotated_weight(frozen.to(self.dtype), reads, writes)
            yield site, linear, writes, weight.to(frozen.dtype)

    def _write(self) -> None:
        r1, r3 = self.rotations.r1, self.rotations.r3
        if r3 is not None:
            path = self.kv.turned_by(cast(Any, _FreeHeads(r3.to(self.dtype))))
            set_kv_path(self.model, _FreePath(**vars(path)))
        if r1 is not None:
            for end, weight in zip(self.ends, self.end_weights, strict=True):
                rotated = weight.to(self.dtype) @ r1.to(self.dtype)
                _replace(end, "weight", rotated.to(weight.dtype))
        for site, linear, writes, weight in self._rotated():
            _replace(linear, "weight", self._rounded(site, weight))
            bias = self.biases[site.path]
            if bias is not None and writes is not None:
                rotated = rotated_weight(bias.to(self.dtype)[:, None], None, writes)[:, 0]
                _replace(linear, "bias", rotated.to(bias.dtype))

    def _rounded(self, site: Site, weight: torch.Tensor) -> torch.Tensor:
        format = weight_format(site, self.quant)
        if not self.learn.quantize_weights or format is None:
            return weight
        if self.ranges.logs:
            return _learned_step(weight, format, self.ranges.logs[site.path].exp())
        clip = self.clip[site.path]
        rounding = lambda w: round_to_nearest(w, format, clip).dequantize(w.dtype)  # noqa: E731
        return StraightThrough.apply(weight, rounding)  # type: ignore[no-any-return]

    def collect(self) -> None:
        """Take over what autograd left."""
        for name, parameter in self.rotations.parameters.items():
            assert parameter.grad is not None
            gradient = parameter.grad
            for layer, part in enumerate(gradient[None] if gradient.dim() == 2 else gradient):
                self.rotations.add_gradient(name, layer, part)

    def step(self, rate: float) -> None:
        self.ranges.step(rate)


@dataclass(frozen=True)
class _FreePath(KVPath):
    """Turn heads by a free matrix, (n, n) or one for each layer, and round by ranges."""

    def sides(self, layer: int) -> Sides:
        keys, values = super().sides(layer)
        return Sides(_by_range(keys), values)

    def turn_queries(self, query: torch.Tensor, layer: int = 0) -> torch.Tensor:
        r3 = self.r3_at(layer)
        assert r3 is not None
        return rounded(self.on_turned(r3, query), _by_range(self.queries))


class _FreeHeads:
    """Stand for an R3: (n, n), or one for each layer."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix

    def at(self, layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        matrix = self.matrix if self.matrix.dim() == 2 else self.matrix[layer]
        return lambda x: (x.to(matrix.dtype) @ matrix).to(x.dtype)


def _by_range(codec: RowCodec | None) -> RowCodec | None:
    """Return what rounds as a codec does, with its gradient by the range."""
    if codec is None:
        return None
    stand_in = SimpleNamespace(run=codec.run, pass_through=codec.pass_by_range)
    return cast(RowCodec, stand_in)


def _learned_step(weight: torch.Tensor, format: TensorQuant, clip: torch.Tensor) -> torch.Tensor:
    """Round symmetrically with a range clip·max|w| that takes part in the gradient (LSQ)."""
    assert format.symmetric, "asymmetric ranges are not plain: their ends move one by one"
    grid = format_of(format)
    assert isinstance(grid, IntegerFormat), "other formats have levels of their own"
    grouped = weight.unflatten(-1, (-1, format.group_size or weight.shape[-1]))
    top = grouped.abs().max(-1, keepdim=True).values * clip
    scale = (top / grid.highest).clamp(min=smallest_scale(top.dtype))
    exact = grouped / scale
    levels = exact + (exact.round() - exact).detach()
    outside = (grouped > top) | (grouped < top * (grid.lowest / grid.highest))
    clipped = levels.detach().clamp(grid.lowest, grid.highest)
    return (torch.where(outside, clipped, levels) * scale).flatten(-2)


def _replace(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor with a graph behind it where a parameter was."""
    module._parameters.pop(name, None)
    object.__setattr__(module, name, tensor)
