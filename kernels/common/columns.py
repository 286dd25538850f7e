"""Output columns of `score_chunks`, for CUDA graphs: what it reads and writes is decided on the device."""

from dataclasses import dataclass

from torch import Tensor

TILE_ELEMENTS = 16384
"""Elements of one KV head of a chunk that `score_chunks` processes at once."""


@dataclass(frozen=True)
class Columns:
    """An existing result to write into, and which of the slots to read.

    ``lse``: float32 ``[query_heads, n]``, contiguous; ``columns``: int64 ``[n]``, the column of each slot's result;
    ``span``: int64 ``[2]``, first and last (exclusive) slot to read. Other columns keep their values.
    """

    lse: Tensor
    columns: Tensor
    span: Tensor


def fits_columns(chunk_tokens: int, head_dim: int) -> bool:
    """Whether `score_chunks` supports `Columns` for such chunks: padded to powers of two they must fit one tile."""
    return 1 << (chunk_tokens - 1).bit_length() + (head_dim - 1).bit_length() <= TILE_ELEMENTS
