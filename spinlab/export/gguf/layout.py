"""Which tensors a file holds, under llama.cpp's names, and the rows that each is made of."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import gguf
import numpy as np
import torch
from gguf import MODEL_TENSOR as T
from transformers import PreTrainedModel

from spinlab.export.gguf.architecture import Architecture, rope_factors
from spinlab.export.gguf.blocks import BLOCK, half, packed, type_of
from spinlab.export.gguf.writer import FileTensor
from spinlab.finite import check_finite
from spinlab.model.layer import Layer
from spinlab.model.map import ModelMap
from spinlab.model.modules import linear_at, map_of, norm_at
from spinlab.weights.quantized import QuantizedWeight

_FLOAT = gguf.GGMLQuantizationType.F32
_HALF = gguf.GGMLQuantizationType.F16


@dataclass(frozen=True)
class Stack:
    """Name a tensor of a layer and the linears whose rows it is made of, one below the other.

    heads: how many heads' rows change places, so that neighbours are turned together.
    """

    tensor: T
    paths: tuple[str, ...]
    heads: int = 0


def stacks_of(architecture: Architecture, layer: Layer) -> list[Stack]:
    """Return what the linears of a layer become."""
    attention, mlp = layer.attention, layer.mlp
    assert mlp is not None
    last = [Stack(T.ATTN_OUT, (attention.out,)), Stack(T.FFN_DOWN, (mlp.down,))]
    if architecture.joined:
        inputs = attention.queries, attention.keys, attention.values
        return [Stack(T.ATTN_QKV, inputs), Stack(T.FFN_UP, (mlp.gate, mlp.up)), *last]
    turned = architecture.neighbours
    return [
        Stack(T.ATTN_Q, (attention.queries,), attention.heads if turned else 0),
        Stack(T.ATTN_K, (attention.keys,), attention.kv_heads if turned else 0),
        Stack(T.ATTN_V, (attention.values,)),
        Stack(T.FFN_GATE, (mlp.gate,)),
        Stack(T.FFN_UP, (mlp.up,)),
        *last,
    ]


def tensors_of(
    architecture: Architecture,
    model: PreTrainedModel,
    weights: Mapping[str, QuantizedWeight],
) -> list[FileTensor]:
    """Return all tensors of a rotated model; rounded weights take the place of its own."""
    model_map = map_of(model)
    ends = {T.TOKEN_EMBD: model_map.embedding, T.OUTPUT: model_map.head}
    found = [_matrix(_name(end), [path], 0, model, weights) for end, path in ends.items()]
    for index, layer in enumerate(model_map.layers):
        for stack in stacks_of(architecture, layer):
            name, paths = _name(stack.tensor, index), list(stack.paths)
            found.append(_matrix(name, paths, stack.heads, model, weights))
            biases = [linear_at(model, path).bias for path in paths]
            if biases[0] is not None:
                bias = _ordered(torch.cat(list[torch.Tensor](biases)), stack.heads)
                found.append(_vector(f"{name}.bias", bias))
    found += [_vector(f"{name}.weight", norm_at(model, p).weight) for name, p in _norms(model_map)]
    factors = rope_factors(architecture, model)
    return found if factors is None else [*found, _vector("rope_freqs.weight", factors)]


def _name(tensor: T, layer: int | None = None) -> str:
    return gguf.TENSOR_NAMES[tensor].format(bid=layer)


def _norms(model_map: ModelMap) -> Iterator[tuple[str, str]]:
    """Yield the name and path of every norm."""
    for norm in model_map.norms:
        if norm.layer is None:
            yield _name(T.OUTPUT_NORM), norm.path
            continue
        attention = model_map.layers[norm.layer].attention
        heads = {attention.query_norm: T.ATTN_Q_NORM, attention.key_norm: T.ATTN_K_NORM}
        of_stream = T.ATTN_NORM if attention.queries in norm.readers else T.FFN_NORM
        yield _name(heads.get(norm.path, of_stream), norm.layer), norm.path


def _matrix(
    name: str,
    paths: list[str],
    heads: int,
    model: PreTrainedModel,
    weights: Mapping[str, QuantizedWeight],
) -> FileTensor:
    """Return the stacked weights of modules: blocks where they are rounded, else float16."""
    rounded = [weights[path] for path in paths if path in weights]
    if rounded:
        assert len(rounded) == len(paths) and len({w.format for w in rounded}) == 1
        rows, width = sum(w.levels.shape[0] for w in rounded), rounded[0].levels.shape[1]
        kind = type_of(name, rounded[0])
        row = width // BLOCK * gguf.GGML_QUANT_SIZES[kind][1]
        make = partial(_blocks, name, rounded, heads)
        return FileTensor(f"{name}.weight", (rows, row), np.uint8, kind, make)
    own = [model.get_parameter(f"{path}.weight") for path in paths]
    shape = sum(weight.shape[0] for weight in own), own[0].shape[1]
    make = partial(_halves, name, own, heads)
    return FileTensor(f"{name}.weight", shape, np.float16, _HALF, make)


def _halves(name: str, weights: Sequence[torch.Tensor], heads: int) -> np.ndarray:
    return half(name, _ordered(torch.cat(list(weights)), heads))


def _blocks(name: str, weights: list[QuantizedWeight], heads: int) -> np.ndarray:
    parts = zip(*((w.levels, w.scale, w.zero) for w in weights), strict=True)
    stacked = (_ordered(torch.cat(part), heads) for part in parts)
    return packed(name, QuantizedWeight(*stacked, format=weights[0].format))


def _vector(name: str, numbers: torch.Tensor) -> FileTensor:
    """Return a norm's gains, a bias or factors: GGUF holds them in float32."""
    return FileTensor(
        name, tuple(numbers.shape), np.float32, _FLOAT, partial(_floats, name, numbers)
    )


def _floats(name: str, numbers: torch.Tensor) -> np.ndarray:
    floats = numbers.detach().float().cpu()
    check_finite({name: floats}, "numbers do not fit into float32")
    return floats.numpy()


def _ordered(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Move rows i and i + width/2 of each head, which RoPE turns together, beside each other."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) if heads else rows
