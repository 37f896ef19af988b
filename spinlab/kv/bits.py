"""What a cache takes: codes, scales, zero points, norms, indices, and all that stays in 16 bits."""

from spinlab.kv.bias import POSITION_BITS
from spinlab.kv.path import KVPath
from spinlab.model.map import Dimensions

CONTEXT = 4096  # tokens of a sequence, where none are named
_FLOAT_BYTES = 2


def cache_bytes(path: KVPath, sizes: Dimensions, tokens: int) -> int:
    """Return the bytes of one sequence of so many tokens, in all layers.

    What is not coded counts 16 bits a number: layers, sinks, the window, unfinished runs. Where
    biases of keys are apart, the positions that they come back by count once for all layers.
    """
    numbers = 0
    for layer in range(sizes.layers):
        done = path.history(layer).coded(tokens)
        for codec in path.sides(layer):
            coded = 0 if codec is None else done
            numbers += _FLOAT_BYTES * sizes.head_dim * (tokens - coded)
            numbers += 0 if codec is None else coded // codec.run * codec.row_bytes
    shared = tokens * POSITION_BITS // 8 if path.biases else 0
    return sizes.kv_heads * numbers + shared


def cache_bits(path: KVPath, sizes: Dimensions, tokens: int = CONTEXT) -> float:
    """Return the bits per number of a key or value, of a sequence of so many tokens."""
    numbers = 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * tokens
    return 8 * cache_bytes(path, sizes, tokens) / numbers
