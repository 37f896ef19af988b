"""What a cache takes: codes, scales, zero points, norms, indices, and all that stays in 16 bits."""

from spinlab.kv.bias import POSITION_BITS
from spinlab.kv.path import KVPath
from spinlab.model.layer import Dimensions

CONTEXT = 4096  # tokens of a sequence, where none are named
_FLOAT_BYTES = 2


def cache_bytes(path: KVPath, sizes: Dimensions, tokens: int) -> int:
    """Return the bytes of one sequence of so many tokens, in all layers.

    What is not coded counts 16 bits a number: layers, sinks, the window, unfinished runs. Where
    biases of keys are apart, the positions that they come back by count once for all layers.
    """
    numbers, cached = 0, sizes.cached
    for layer in range(sizes.layers):
        done = path.history(layer).coded(tokens)
        for codec, width in zip(path.sides(layer), cached[1:], strict=True):
            coded = 0 if codec is None else done
            numbers += _FLOAT_BYTES * width * (tokens - coded)
            numbers += 0 if codec is None else coded // codec.run * codec.row_bytes
    shared = tokens * POSITION_BITS // 8 if path.biases else 0
    return cached.heads * numbers + shared


def coded_share(path: KVPath, tokens: int) -> float:
    """Return which share of what the tokens of a sequence see of the cache is coded.

    Each of so many tokens sees keys and values of itself and of all before it, in every layer.
    """
    layers = range(max(len(path.layers), 1))
    found = 0
    for layer in layers:
        coded = sum(path.history(layer).coded(n) for n in range(1, tokens + 1))
        found += coded * sum(codec is not None for codec in path.sides(layer))
    return found / (len(layers) * tokens * (tokens + 1))


def cache_bits(path: KVPath, sizes: Dimensions, tokens: int = CONTEXT) -> float:
    """Return the bits per number of what is cached, of a sequence of so many tokens."""
    return 8 * cache_bytes(path, sizes, tokens) / cached_numbers(sizes, tokens)


def cached_numbers(sizes: Dimensions, tokens: int) -> int:
    """Return how many numbers the cache holds of so many tokens, in all layers."""
    heads, *widths = sizes.cached
    return sizes.layers * heads * sum(widths) * tokens
