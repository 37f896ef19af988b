"""Fuse rotations into a stock transformers model: W ← W R for readers, W ← Rᵀ W for writers.

Everything offline is computed in float64 and cast back to the dtype of the weights. The same two
products, on float32 weights, serve the learning loop, together with their exact gradient
(`rotation_gradients`).
"""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from spinlab.model.seams import Seam, family_of, layers_of, linear_at, linears_of
from spinlab.rotation.rotations import RotationSet
from spinlab.rotation.statistics import input_key


def rotate_input(weight: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Return W (I ⊗ R): (out, in) with R (n, n), n dividing in."""
    return (weight.unflatten(-1, (-1, rotation.shape[0])) @ rotation).flatten(-2)


def rotate_output(weight: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Return (I ⊗ R)ᵀ W: (out, in) with R (n, n), n dividing out."""
    return (rotation.mT @ weight.unflatten(0, (-1, rotation.shape[0]))).flatten(0, 1)


def rotated_weight(
    weight: torch.Tensor, reads: torch.Tensor | None, writes: torch.Tensor | None
) -> torch.Tensor:
    """Return the weight of a linear between rotated spaces; None leaves a side alone."""
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
    seam: Seam, layer: int, r1: torch.Tensor | None, r2: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return (reads, writes) of a seam among R1 and R2. What runs online is not among them."""
    at = {None: None, "R1": r1, "R2": None if r2 is None else r2[layer], "R4": None}
    return at[seam.reads], at[seam.writes]


def fold_norms(model: PreTrainedModel) -> None:
    """Move every RMSNorm gain into the linears that read it, in float64; gains become 1.

    Without gains RMSNorm commutes with rotations. Nothing is mean-centred: that would change the
    function of an RMSNorm model. Ties between embedding and head are cut first, because the final
    gain belongs to the head alone.
    """
    family = family_of(model.config.model_type)
    untie(model)
    for layer in layers_of(model):
        for norm, group in family.norms.items():
            readers = [linear_at(layer, s.name) for s in family.seams if s.group == group]
            _fold(linear_at(layer, norm), readers)
    _fold(linear_at(model, family.final_norm), [linear_at(model, family.head)])


def _fold(norm: nn.Linear, readers: list[nn.Linear]) -> None:
    for linear in readers:
        linear.weight.data = _cast(linear.weight.data.double() * norm.weight.data.double(), linear)
    norm.weight.data = torch.ones_like(norm.weight.data)


def untie(model: PreTrainedModel) -> None:
    """Give the head its own copy of the embedding matrix where the two were shared."""
    family = family_of(model.config.model_type)
    head, embedding = linear_at(model, family.head), linear_at(model, family.embedding)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone())
    model.config.tie_word_embeddings = False


def fuse(model: PreTrainedModel, rotations: RotationSet) -> None:
    """Rotate every weight of a model whose norms are folded, in place and in float64.

    Afterwards the model computes the same function once its online transforms run. What they turn
    is already rotated, so R1 and R2 enter first: as in a checkpoint that is saved in between.
    """
    fuse_stream(model, rotations)
    fuse_inputs(model, rotations)


def fuse_stream(model: PreTrainedModel, rotations: RotationSet) -> None:
    """Rotate the residual stream (R1) and the heads (R2): nothing of it is left to run online."""
    device = model.device
    r1, r2 = (None if r is None else r.to(device) for r in (rotations.r1, rotations.r2))
    family = family_of(model.config.model_type)
    for _, layer, seam, linear in linears_of(model):
        reads, writes = rotations_at(seam, layer, r1, r2)
        _rotate(linear, reads, writes)
    if r1 is not None:
        _rotate(linear_at(model, family.embedding), r1, None)
        _rotate(linear_at(model, family.head), r1, None)


def fuse_inputs(model: PreTrainedModel, rotations: RotationSet) -> None:
    """Give every weight the inverse of its input's transform: R4, cross-head, scales, DuQuant's.

    Scales that are folded leave through what produces the input: a norm, v_proj or up_proj.
    """
    for _, layer, seam, linear in linears_of(model):
        own = rotations.inputs.get(input_key(layer, seam.group))
        online = rotations.online(layer, seam)
        for transform in {id(t): t for t in (own, online) if t is not None}.values():
            linear.weight.data = _cast(transform.of_weight(linear.weight.data.double()), linear)
    for layer, name, scale in folded_scales(model, rotations):
        carrier = linear_at(layers_of(model)[layer], name)
        weight = carrier.weight.data
        divisor = scale.to(weight.device).view(-1, *[1] * (weight.dim() - 1))
        carrier.weight.data = _cast(weight.double() / divisor, carrier)
        if getattr(carrier, "bias", None) is not None:
            carrier.bias.data = _cast(carrier.bias.data.double() / divisor.flatten(), carrier)


def folded_scales(
    model: PreTrainedModel, rotations: RotationSet
) -> Iterator[tuple[int, str, torch.Tensor]]:
    """Yield (layer, name of the norm or linear that carries it, scale) of every folded scale."""
    family = family_of(model.config.model_type)
    carriers = {group: norm for norm, group in family.norms.items()} | family.scale_carriers
    for key, transform in rotations.inputs.items():
        if transform.scale is not None and transform.folded:
            layer, _, group = key.partition(".")
            yield int(layer), carriers[group], transform.scale


def _rotate(module: nn.Linear, reads: torch.Tensor | None, writes: torch.Tensor | None) -> None:
    module.weight.data = _cast(rotated_weight(module.weight.data.double(), reads, writes), module)
    bias = getattr(module, "bias", None)
    if bias is not None and writes is not None:
        bias.data = _cast(rotate_input(bias.data.double()[None], writes)[0], module)


def _cast(matrix: torch.Tensor, module: nn.Linear) -> torch.Tensor:
    return matrix.to(module.weight.dtype)
