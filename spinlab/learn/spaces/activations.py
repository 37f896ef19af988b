"""Learning with 16-bit weights: rotations act on what is quantized, weights stay as they are.

A rotated network differs from the original only where it rounds, so R1 is needed only around the
quantizers that read the residual stream, R2 around those of values and of what
reads them. No weight
is rotated and none gets a gradient. Where the norm of Euclidean gradients is asked for, R1's other
uses, which cancel, are accounted for where the stream is read.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from spinlab.config import LearnConfig
from spinlab.errors import InputError
from spinlab.fakequant.activations import InputPath
from spinlab.fakequant.insert import FakeQuantLinear
from spinlab.learn.learned import LearnedRotations
from spinlab.learn.spaces.base import LearningSpace, Parts
from spinlab.learn.spaces.heads import learn_heads
from spinlab.learn.spaces.local import LocalTerms
from spinlab.learn.spaces.rotate import (
    read_normed,
    read_stream,
    rotate,
    rotate_back,
    round_rotated,
)
from spinlab.model.families.experts import Scored
from spinlab.model.map import Site
from spinlab.model.modules import linears_of, map_of, norm_at
from spinlab.model.shares import watched

See = Callable[[torch.Tensor], None]  # looks at rotated activations


class ActivationSpace(LearningSpace):
    """Put the rotations into the input paths of a fake-quantized network, in place.

    Gradients reach the rotations as they arise, and the residual stream stays the original's.
    """

    @classmethod
    def check(cls, learn: LearnConfig) -> None:
        """Refuse what is learned from the rounding of weights."""
        needs = "it needs learn.quantize_weights=true and weights of fewer than 16 bits"
        if "inputs" in learn.rotations:
            raise InputError(f"learn.rotations=[inputs] shapes weights for their rounding: {needs}")
        for name in ("input_clip", "kv_clip"):
            if rate := getattr(learn.lr, name):
                raise InputError(
                    f"learn.lr.{name}={rate} learns ranges beside those of weights: {needs}"
                )

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        rotations, local = parts.rotations, parts.local
        self.rotations, self.watched = rotations, watched(map_of(parts.model))
        scored = _read_scored(parts.model)
        rotated: dict[tuple[InputPath, bool], InputPath] = {}
        for site, linear in linears_of(parts.model):
            assert isinstance(linear, FakeQuantLinear)
            name = {"R1": "r1", "R2": "r2"}.get(site.reads or "")
            if name is not None and rotations.all[name] is not None:
                place = linear.path, linear in scored
                if place not in rotated:
                    rotated[place] = self._rotated(name, site, *place, local)
                linear.path = rotated[place]
            if site.writes == "R2" and rotations.r2 is not None:
                linear.register_forward_hook(_rotate_heads(rotations, site.layer, local))
        norm = norm_at(parts.model, map_of(parts.model).final_norm)
        norm.register_forward_hook(self._after_norms)
        for module in parts.model.modules():
            if isinstance(module, Scored):
                module.register_forward_pre_hook(self._before_scores)
        learn_heads(parts.model, rotations)

    def _rotated(
        self, name: str, site: Site, path: InputPath, scored: bool, local: LocalTerms
    ) -> InputPath:
        if name == "r2":
            return OutputPath(path, self.rotations, site.layer)
        whole = self.watched[site.key] == site.path
        see = local.watch("r1", site.layer) if whole else None
        return StreamPath(path, self.rotations, site.layer, see, normed=not scored)

    def _after_norms(self, module: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
        return self._read(read_normed, out)

    def _before_scores(self, module: nn.Module, args: tuple) -> tuple:
        x, *rest = args
        return self._read(read_normed, x), *rest

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """Return the residual stream (..., hidden) as it is: it stayed the original's."""
        return self._read(read_stream, x)

    def _read(self, way: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Account for a reading of the stream that nothing rounds, where that is asked for."""
        sink = self.rotations.sink("r1", 0)
        return x if sink.add_half is None else way(x, self.rotations.anchor("r1"), sink)


class StreamPath(InputPath):
    """Quantize what reads the residual stream in the basis of R1: x ↦ Q(x R1) R1ᵀ.

    normed: it comes from a norm as it is, and not times the scores of an expert.
    """

    def __init__(
        self,
        path: InputPath,
        rotations: LearnedRotations,
        layer: int,
        see: See | None,
        normed: bool = True,
    ) -> None:
        assert path.rotation is None, "R1 leaves no room for an online transform"
        super().__init__(None, path.quantizer, path.readers)
        self.rotations, self.layer, self.see, self.normed = rotations, layer, see, normed

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        r1 = self.rotations.at("r1", self.layer)
        anchor, sink = self.rotations.anchor("r1"), self.rotations.sink("r1", self.layer)
        if self.quantizer is None:
            if self.see is not None:  # routers may read what they multiply in float32
                self.see(x.detach().to(r1.dtype) @ r1)
            known = sink.add_half is None or not self.normed
            return x if known else read_normed(x, anchor, sink)
        return round_rotated(x, r1, anchor, sink, self.quantizer, self.see, self.normed)


class OutputPath(InputPath):
    """Quantize what attention gives as it comes, in the basis of R2, and leave that: Q(x) R2ᵀ."""

    def __init__(self, path: InputPath, rotations: LearnedRotations, layer: int) -> None:
        super().__init__(path.rotation, path.quantizer, path.readers)
        self.rotations, self.layer = rotations, layer

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        rotations, layer = self.rotations, self.layer
        return rotate_back(
            super()._round(x),
            rotations.at("r2", layer),
            rotations.anchor("r2"),
            rotations.sink("r2", layer),
        )


def _read_scored(model: PreTrainedModel) -> set[nn.Module]:
    """Return the linears of experts whose tokens come times their scores."""
    experts = [m for m in model.modules() if any(isinstance(x, Scored) for x in m.children())]
    return {linear for expert in experts for linear in expert.children()}


def _rotate_heads(rotations: LearnedRotations, layer: int, local: LocalTerms):
    """Return a hook that rotates the values of every head by R2."""
    sink, see = rotations.sink("r2", layer), local.watch("r2", layer)

    def hook(module: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
        out = rotate(out, rotations.at("r2", layer), rotations.anchor("r2"), sink)
        if see is not None:
            see(out)
        return out

    return hook
