"""Where `score_chunks` writes when what it reads is decided on the device, as within a CUDA graph."""

from dataclasses import dataclass

from torch import Tensor

TILE_ELEMENTS = 16384
"""Numbers of a KV head's chunk that `score_chunks` works on at once."""


@dataclass(frozen=True)
class Columns:
    """Columns of a result that stands already, and which of the slots are read.

    ``lse``: float32 ``[query_heads, n]``, contiguous; ``columns``: int64 ``[n]``, the column of each slot's result;
    ``span``: int64 ``[2]``, the first slot to read, and the first one after it not to read. Other columns stay.
    """

    lse: Tensor
    columns: Tensor
    span: Tensor


def fits_columns(chunk_tokens: int, head_dim: int) -> bool:
    """Whether results for such chunks can be written into `Columns`: they are one tile, padded to powers of two."""
    return 1 << (chunk_tokens - 1).bit_length() + (head_dim - 1).bit_length() <= TILE_ELEMENTS
