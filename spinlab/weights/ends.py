"""Embedding and head, rounded to nearest: each by itself, or as the one matrix that they share.

A tied matrix (`quant.tied`) is rounded in the original, before its norms are folded and anything is
rotated. What embedding and head then hold differs, by the gain of the final norm, but comes of one
set of levels: a file needs no second one.
"""

from collections.abc import Callable, Mapping

from transformers import PreTrainedModel

from spinlab.config import ClipSearch, QuantConfig, TensorQuant
from spinlab.errors import InputError
from spinlab.formats import format_of
from spinlab.formats.quantizer import check_group
from spinlab.model.modules import embedding_of, ends_of, head_of, map_of
from spinlab.weights.quantized import QuantizedWeight, set_dequantized
from spinlab.weights.rtn import rtn


def check_ends(model: PreTrainedModel, quant: QuantConfig) -> None:
    """Raise InputError where formats of embedding and head do not fit a model.

    model: the original, its names and widths.
    """
    model_map = map_of(model)
    paths = {"embedding": model_map.embedding, "head": model_map.head, "tied": "the tied matrix"}
    for name, path in paths.items():
        format: TensorQuant = getattr(quant, name)
        if format.quantizes:
            format_of(format, f"quant.{name}")
            check_group(f"quant.{name}.group_size", format.group_size, model_map.hidden, path)
    if quant.tied.quantizes and not model.config.tie_word_embeddings:
        raise InputError(
            f"quant.tied.bits={quant.tied.bits}: this model has a head of its own: use "
            "quant.embedding and quant.head"
        )


def quantize_ends(
    model: PreTrainedModel, quant: QuantConfig, clip: ClipSearch
) -> dict[str, QuantizedWeight]:
    """Return embedding and head, if they have a format, rounded to nearest; set the embedding.

    What reads the embedding then sees the quantized one, as layers see those before them. Of a part
    of a model without them there is none.
    """
    if not map_of(model).has_ends:
        return {}
    paths = map_of(model).embedding, map_of(model).head
    ends = zip(paths, ends_of(model), (quant.embedding, quant.head), strict=True)
    rounded = ((path, end.weight, format) for path, end, format in ends if format.quantizes)
    found = {path: rtn(weight, format, clip).cpu() for path, weight, format in rounded}
    if paths[0] in found:
        set_dequantized(embedding_of(model), found[paths[0]])
    return found


def quantize_tied(
    original: Callable[[], PreTrainedModel], quant: QuantConfig, clip: ClipSearch
) -> dict[str, QuantizedWeight]:
    """Return what an original ties, if that has a format, rounded to nearest, as the embedding."""
    if not quant.tied.quantizes:
        return {}
    model = original()
    weight = embedding_of(model).weight.detach()
    return {map_of(model).embedding: rtn(weight, quant.tied, clip).cpu()}


def with_tied(
    original: Callable[[], PreTrainedModel],
    weights: Mapping[str, QuantizedWeight],
    quant: QuantConfig,
) -> Callable[[], PreTrainedModel]:
    """Return what makes an original with its rounded matrix, as floats, in place of what it ties.

    Where nothing tied is rounded that is the original.
    """

    def make() -> PreTrainedModel:
        model = original()
        if not map_of(model).has_ends:
            return model
        embedding = embedding_of(model)
        set_dequantized(embedding, weights[map_of(model).embedding])
        head_of(model).weight = embedding.weight
        return model

    return make if weights and quant.tied.quantizes else original


def write_ends(
    model: PreTrainedModel, weights: Mapping[str, QuantizedWeight], quant: QuantConfig
) -> None:
    """Write head and embedding, where they are quantized, as the floats they stand for.

    Their inputs are 16-bit or indices, so there are no integers to multiply. A tied matrix is in
    the model already, rotated.
    """
    paths = map_of(model).embedding, map_of(model).head
    for path, end in zip(paths, ends_of(model), strict=True):
        if map_of(model).has_ends and path in weights and not quant.tied.quantizes:
            set_dequantized(end, weights[path])
