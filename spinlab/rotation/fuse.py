"""Fuse rotations into a stock transformers model: W ← W R for readers, W ← Rᵀ W for writers.

Everything offline is computed in float64 and cast back to the dtype of the weights. The same two
products, on float32 weights, serve the learning loop, together with their exact gradient
(`rotation_gradients`).
"""

from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spinlab.model.map import ModelMap, Norm, Site
from spinlab.model.modules import ends_of, linear_at, linears_of, map_of, norm_at
from spinlab.rotation.inputs import to_rows
from spinlab.rotation.rotations import RotationSet


def rotate_input(weight: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Return W (I ⊗ R): (out, in) with R (n, n), n dividing in."""
    return (weight.unflatten(-1, (-1, rotation.shape[0])) @ rotation).flatten(-2)


def rotate_output(weight: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Return (I ⊗ R)ᵀ W: (out, in) with R (n, n), n dividing out."""
    return (rotation.mT @ weight.unflatten(0, (-1, rotation.shape[0]))).flatten(0, 1)


def rotated_weight(
    weight: torch.Tensor, reads: torch.Tensor | None, writes: torch.Tensor | None
) -> torch.Tensor:
    """Return the weight (out, in) of a linear between rotated spaces; None leaves a side alone.

    reads: (n, n), n dividing in; writes: (n, n), n dividing out.
    """
    if writes is not None:
        weight = rotate_output(weight, writes)
    return weight if reads is None else rotate_input(weight, reads)


def rotation_gradients(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    reads: torch.Tensor | None,
    writes: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Pull the gradient of a rotated weight back to the rotations it was made with.

    With W' = Lᵀ W R and G = dloss/dW': dloss/dR = (Lᵀ W)ᵀ G and dloss/dL = (W R) Gᵀ, summed over
    the blocks of block-diagonal rotations. weight, gradient: (out, in). Unlike autograd through
    the product this keeps no second copy of the rotated weights.
    """
    of_reads = of_writes = None
    if reads is not None:
        left = weight if writes is None else rotate_output(weight, writes)
        of_reads = _blocks(left, reads).mT @ _blocks(gradient, reads)
    if writes is not None:
        right = weight if reads is None else rotate_input(weight, reads)
        of_writes = _blocks(right.mT, writes).mT @ _blocks(gradient.mT, writes)
    return of_reads, of_writes


def _blocks(matrix: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Cut rows into blocks as wide as the rotation: (rows, in) to (rows·in/n, n)."""
    return matrix.reshape(-1, rotation.shape[0])


def rotations_at(
    site: Site,
    r1: torch.Tensor | None,
    r2: torch.Tensor | None,
    latents: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return (reads, writes) of a site among R1, R2 and those of latents, by name.

    What runs online is not among them.
    """
    at = {"R1": r1, "R2": None if r2 is None else r2[site.layer], **latents}
    return at.get(site.reads or ""), at.get(site.writes or "")


def fold_norms(model: PreTrainedModel, replaced: Collection[str] = ()) -> None:
    """Move every RMSNorm gain into the linears that read it, in float64; gains become 1.

    A norm that no linear reads keeps its gain. Without gains RMSNorm commutes with rotations.
    Nothing is mean-centred: that would change the function of an RMSNorm model. Ties between
    embedding and head are cut first, because the final gain belongs to the head alone. Where a
    family has no R1 it stays with its norm, and both go on holding the same.
    replaced: linears that are about to take other weights, whose own are left as they are.
    """
    untie(model)
    left = {site.path for site, _ in linears_of(model) if site.path in replaced}
    for norm in map_of(model).norms:
        _fold(model, norm, left)


def _fold(model: PreTrainedModel, norm: Norm, replaced: Collection[str] = ()) -> None:
    if not norm.readers:
        return
    module = norm_at(model, norm.path)
    gain = module.weight.data.double() + norm.offset
    for path in norm.readers:
        if path in replaced:
            continue
        linear = linear_at(model, path)
        linear.weight.data = _cast(linear.weight.data.double() * gain, linear)
    module.weight.data = torch.full_like(module.weight.data, 1 - norm.offset)


def untie(model: PreTrainedModel) -> None:
    """Give the head its own copy of the embedding matrix where the two were shared."""
    embedding, head = ends_of(model)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone())
    model.config.tie_word_embeddings = False


def fuse(model: PreTrainedModel, rotations: RotationSet, replaced: Collection[str] = ()) -> None:
    """Rotate every weight of a model, in place and in float64, its norms folded if R1 is on.

    Afterwards the model computes the same function once its online transforms run. What they rotate
    is already rotated, so R1 and R2 enter first: as in a checkpoint that is saved in between.
    replaced: as in `fold_norms`.
    """
    fuse_stream(model, rotations, replaced)
    fuse_inputs(model, rotations, replaced)


def fuse_stream(
    model: PreTrainedModel, rotations: RotationSet, replaced: Collection[str] = ()
) -> None:
    """Rotate the residual stream (R1), the heads (R2) and latents: nothing is left to run online.

    replaced: as in `fold_norms`. Raises InputError where the family's function does not survive one
    of them.
    """
    for name in ("r1", "r2"):
        if getattr(rotations, name) is not None:
            map_of(model).check(name)
    device = model.device
    r1, r2 = (None if r is None else r.to(device) for r in (rotations.r1, rotations.r2))
    latents = {name: matrix.to(device) for name, matrix in rotations.latents.items()}
    for site, linear in linears_of(model):
        _rotate(linear, *rotations_at(site, r1, r2, latents), site.path in replaced)
    if r1 is not None:
        _rotate_ends(model, r1)


def fuse_latents(model: PreTrainedModel, rotations: RotationSet) -> None:
    """Rotate latents alone, which no learning moves."""
    fuse_stream(model, RotationSet(latents=rotations.latents))


def _rotate_ends(model: PreTrainedModel, r1: torch.Tensor) -> None:
    for end in ends_of(model):
        _rotate(end, r1, None)


def fuse_ends(model: PreTrainedModel, rotations: RotationSet) -> None:
    """Do to the ends of a model, in place, what `fold_norms` and `fuse` would.

    The layers between have been fused already; embedding and head hold what the original ties, and
    the final norm its gain.
    """
    if not rotations.keeps_gains:
        _fold(model, map_of(model).norm_at[map_of(model).final_norm])
    if rotations.r1 is not None:
        _rotate_ends(model, rotations.r1.to(model.device))


def fuse_inputs(
    model: PreTrainedModel, rotations: RotationSet, replaced: Collection[str] = ()
) -> None:
    """Give every weight the inverse of its input's transform: R4, cross-head, scales, DuQuant's.

    Scales that are folded leave through what produces the input: the gain of a norm, or the rows
    of a linear. replaced: as in `fold_norms`.
    """
    for site, linear in linears_of(model):
        if site.path in replaced:
            continue
        own, online = rotations.inputs.get(site.key), rotations.online(site)
        for transform in {id(t): t for t in (own, online) if t is not None}.values():
            linear.weight.data = _cast(transform.of_weight(linear.weight.data.double()), linear)
    norms = map_of(model).norm_at
    for path, scale in folded_scales(map_of(model), rotations):
        if path in norms:
            _scale_gain(model, norms[path], scale)
        else:
            _scale_rows(linear_at(model, path), scale, path in replaced)


def _scale_gain(model: PreTrainedModel, norm: Norm, scale: torch.Tensor) -> None:
    module = norm_at(model, norm.path)
    gain = module.weight.data.double() + norm.offset
    module.weight.data = _cast(gain / scale.to(gain.device) - norm.offset, module)


def _scale_rows(linear: nn.Linear, scale: torch.Tensor, bias_alone: bool) -> None:
    weight, divisor = linear.weight.data, scale.to(linear.weight.device)
    if not bias_alone:
        linear.weight.data = _cast(weight.double() / divisor[:, None], linear)
    if linear.bias is not None:
        linear.bias.data = _cast(linear.bias.data.double() / divisor, linear)


def folded_scales(
    model_map: ModelMap, rotations: RotationSet
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (path of the norm or linear that carries it, scale of its rows) of folded scales."""
    for key, transform in rotations.inputs.items():
        input = model_map.input_at[key]
        if input.layer in model_map.there and transform.scale is not None and transform.folded:
            assert input.producer is not None, f"no norm or linear carries a scale of input {key}"
            yield input.producer, to_rows(transform.scale, input)


def _rotate(
    module: nn.Linear | nn.Embedding,
    reads: torch.Tensor | None,
    writes: torch.Tensor | None,
    bias_alone: bool = False,
) -> None:
    if not bias_alone:
        weight = rotated_weight(module.weight.data.double(), reads, writes)
        module.weight.data = _cast(weight, module)
    bias = getattr(module, "bias", None)
    if bias is not None and writes is not None:
        bias.data = _cast(rotate_input(bias.data.double()[None], writes)[0], module)


def _cast(matrix: torch.Tensor, module: Any) -> torch.Tensor:
    """Bring a matrix to the dtype of a module's weight."""
    return matrix.to(module.weight.dtype)
