"""How many rows a chunk has.

It follows from the sizes and the device alone, so that results do not depend on the number of threads.
"""

import torch

from .._dtypes import HALVES

# Fewer rows than this make matrix products slow, and each chunk reads and writes the head's gradient once more.
_ROWS = 512
_MOST_CHUNKS = 8
_PRODUCT_COLUMNS = 2**14
# A float32 product that is rounded next, 16 MB, stays in a GPU's second-level cache.
PRODUCT_ELEMENTS = 2**22
# The rows and the columns of a GPU's products are cut into tiles of this many.
_TILE = 128


def buffer_bytes(dtype: torch.dtype, device: str) -> int:
    """Of a chunk's logits: 134 MB, and half of that where a sum over chunks costs little."""
    return 2**27 if device == "cuda" or dtype in HALVES else 2**26


def sum_elements(device: str) -> int:
    """Of the head's gradient that is summed in float32 as one block: 8 MB, and 64 MB on CUDA."""
    return 2**24 if device == "cuda" else 2**21


def rule(rows: int, columns: int, sum_features: int, dtype: torch.dtype, device: str) -> int:
    """The rows of a chunk for logits of ``rows`` x ``columns``.

    As many as fit on CUDA, and in half precision, whose sums over chunks cost more. ``sum_features``: those of a head
    whose gradient is summed so, otherwise 0. Where all logits are no more than a chunk and that sum, all are one chunk.
    """
    row_bytes, buffer = columns * dtype.itemsize, buffer_bytes(dtype, device)
    if dtype in HALVES and rows * row_bytes <= buffer + columns * sum_features * torch.float32.itemsize:
        return max(1, rows)
    most = max(1, buffer // row_bytes)
    if device == "cuda":
        most = in_tiles(most)
        return min(most, _tiled(-(-rows // count(rows, most))))
    wanted = most if dtype in HALVES else min(most, max(_ROWS, -(-rows // _MOST_CHUNKS)))
    return max(1, -(-rows // count(rows, wanted)))


def row_length(columns: int, dtype: torch.dtype, device: str) -> int:
    """From one row of the logits to the next: on CUDA whole vectors of 16 bytes."""
    vector = 16 // dtype.itemsize
    return -(-columns // vector) * vector if device == "cuda" else columns


def product_parts(size: int, dtype: torch.dtype, device: str) -> list[slice]:
    """Of the columns of a product, or of what it sums over.

    Blocks on a CPU, where MKL copies a flat product whole. On CUDA whole vectors and the rest: of 50257 at once a
    product takes six times as long.
    """
    if device == "cuda":
        whole = size - size % (16 // dtype.itemsize)
        return [part for part in (slice(0, whole), slice(whole, size)) if part.start < part.stop]
    return [slice(i, min(i + _PRODUCT_COLUMNS, size)) for i in range(0, size, _PRODUCT_COLUMNS)]


def count(rows: int, chunk_rows: int) -> int:
    return max(1, -(-rows // chunk_rows))


def bounds(rows: int, chunk_rows: int) -> list[tuple[int, int]]:
    """Where the chunks begin and end: of about equal size, in whole tiles where ``chunk_rows`` are."""
    step = max(1, -(-rows // count(rows, chunk_rows)))
    if chunk_rows % _TILE == 0:
        step = _tiled(step)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def blocks(shape: tuple[int, ...], elements: int) -> list[slice]:
    """Of a matrix's rows."""
    rows, columns = shape
    step = in_tiles(elements // max(1, columns))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def in_tiles(size: int) -> int:
    """The size without what is left beside whole tiles."""
    return size - size % _TILE if size > _TILE else max(1, size)


def _tiled(size: int) -> int:
    """The next whole number of tiles."""
    return -(-size // _TILE) * _TILE
