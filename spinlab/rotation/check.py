"""The invariance gate: before anything is quantized, the rotated model must be the original.

Gates run their networks in turn: each is made, gives its logits and is gone before the next. One
that comes in parts is never there as a whole.
"""

import gc
import weakref
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from spinlab.errors import ResultError
from spinlab.model.hooks import temporary_hooks
from spinlab.model.map import Site
from spinlab.model.modules import linears_of, map_of
from spinlab.model.network import Network, network_of
from spinlab.rotation.fuse import folded_scales, rotate_input, rotations_at
from spinlab.rotation.rotations import RotationSet

GATE_TOKENS = 256  # that gates look at, and the outlier profile
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
Make = Callable[[], PreTrainedModel]


class BrokenSite(ResultError):
    """Tell which linear changed the function of the model."""


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of token ids (1, tokens), in the model's dtype."""
    return model(input_ids=ids).logits


def logits_of(made: Network | Make, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits (batch, tokens, vocabulary) of a network that lives for this call only."""
    model = network_of(made).last([ids])
    found, left = logits(model, ids), weakref.ref(model)
    del model
    if left() is not None:  # in a cycle, it would stand beside the next network
        gc.collect()
    return found


def logits_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return max|Δ| of two tensors of one shape, relative to the expected one's deviation."""
    found, expected = found.double(), expected.double()
    return ((found - expected).abs().max() / expected.std()).item()


def check_invariance(
    original: Network | Make,
    rotated: Network | Make,
    rotations: RotationSet,
    ids: torch.Tensor,
) -> float:
    """Return the logits error, or raise BrokenSite naming the first linear that is off.

    ids: (1, tokens). The limit is 1e-9 in float64 and 1e-3 in float32; 16-bit floats are too coarse
    to tell a broken linear from rounding.
    """
    expected = logits_of(original, ids)
    limit = TOLERANCE[expected.dtype]
    error = logits_error(logits_of(rotated, ids), expected)
    if not error <= limit:
        first = first_broken(original, rotated, rotations, ids, limit)
        raise BrokenSite(
            f"the rotated model is not the original: logits differ by {error:.1e} of their "
            f"spread (limit {limit:.0e}), first at {first}"
        )
    return error


def first_broken(
    original: Network | Make,
    rotated: Network | Make,
    rotations: RotationSet,
    ids: torch.Tensor,
    limit: float,
) -> str:
    """Return the name of the first linear whose output, rotated back, is not the original's.

    A linear that writes a rotated space must give the original's output times that rotation, one
    that carries a scale the original's divided by it. Experts without tokens give none.
    """
    expected: dict[str, torch.Tensor] = {}
    for part in network_of(original).parts([ids]):
        expected |= _outputs(part, ids)
        del part
    gc.collect()
    for part in network_of(rotated).parts([ids]):
        found = _outputs(part, ids)
        for site in (s for s in map_of(part).sites if s.path in expected):
            want = _rotated_output(site, expected[site.path].double(), rotations)
            scale = dict(folded_scales(map_of(part), rotations)).get(site.path)
            want = want if scale is None else want / scale.to(want)
            if site.path not in found or not _is_near(found[site.path], want, limit):
                return site.path
    return "the embedding, the final norm or the head"


def _rotated_output(site: Site, output: torch.Tensor, rotations: RotationSet) -> torch.Tensor:
    """Return what a linear of the original gives, (..., out), in the space that the site writes."""
    _, writes = rotations_at(site, rotations.r1, rotations.r2, rotations.latents)
    return output if writes is None else rotate_input(output, writes.to(output.device))


def _is_near(found: torch.Tensor, want: torch.Tensor, limit: float) -> bool:
    """Tell whether a linear gave what it should, to `limit` times the deviation of that."""
    if found.shape != want.shape:  # of an expert, for other tokens
        return False
    return bool((found.double() - want).abs().max() <= limit * want.std())


@torch.no_grad()
def _outputs(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run a model and return every rotated linear's output by path; keys' without their bias.

    The rotated model may keep that apart.
    """
    kept: dict[str, torch.Tensor] = {}
    keys = {layer.attention.keys for layer in map_of(model).layers}
    with temporary_hooks() as hooks:
        for site, linear in linears_of(model):

            def keep(
                module: nn.Module, args: tuple, out: torch.Tensor, at: str = site.path
            ) -> None:
                bias = module.bias if at in keys else None
                kept[at] = out if bias is None else out - bias  # type: ignore[operator]

            hooks.append(linear.register_forward_hook(keep))
        model(input_ids=ids, use_cache=False)
    return kept
