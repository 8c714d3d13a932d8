"""How many rows a chunk has.

It follows from the sizes alone, so that results do not depend on the number of threads.
"""

import torch

from .._dtypes import HALVES

# Fewer rows than this make matrix products slow, and each chunk reads and writes the head's gradient once more.
_ROWS = 512
_MOST_CHUNKS = 8
BUFFER_BYTES = 2**26
PRODUCT_COLUMNS = 2**14
# A block of the head's gradient, in classes times features: what a chunk adds to a float32 sum.
BLOCK_ELEMENTS = 2**21


def rule(rows: int, columns: int, dtype: torch.dtype) -> int:
    """The rows of a chunk for logits of ``rows`` x ``columns``.

    As many as fit in half precision, whose sums over chunks cost more.
    """
    most = max(1, BUFFER_BYTES // (columns * dtype.itemsize))
    wanted = most if dtype in HALVES else min(most, max(_ROWS, -(-rows // _MOST_CHUNKS)))
    return max(1, -(-rows // count(rows, wanted)))


def count(rows: int, chunk_rows: int) -> int:
    return max(1, -(-rows // chunk_rows))


def bounds(rows: int, chunk_rows: int) -> list[tuple[int, int]]:
    """Where the chunks begin and end: of equal size, to a row."""
    chunks = count(rows, chunk_rows)
    ends = [rows * i // chunks for i in range(chunks + 1)]
    return [pair for pair in zip(ends, ends[1:], strict=False) if pair[0] < pair[1]]
