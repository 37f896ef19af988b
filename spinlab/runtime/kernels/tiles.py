"""In which order programs take the tiles of a product."""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def tile_of(index, rows, columns, GROUP: tl.constexpr):
    """Return the row and the column of the index-th of rows x columns tiles.

    GROUP columns are walked through together, so that operands meet in the cache.
    """
    group = index // (GROUP * rows)
    first = group * GROUP
    width = min(columns - first, GROUP)
    rest = index % (GROUP * rows)
    return rest // width, first + rest % width
