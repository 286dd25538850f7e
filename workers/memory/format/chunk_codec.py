"""Converts chunks between the hot pool's layout and the arena's, where the two differ: plain K/V to fp8 with scales."""

import torch

from forecache.kernels.chunks import ops
from forecache.workers.memory.format.layout import ChunkLayout


class ChunkCodec:
    """Converts between slots of ``hot_memory`` and rows of ``cold_memory``, both uint8 ``[slots, nbytes]`` on one
    device.

    Leaves padding between the fields of a row as it is.
    """

    def __init__(
        self, hot: ChunkLayout, hot_memory: torch.Tensor, cold: ChunkLayout, cold_memory: torch.Tensor
    ) -> None:
        self._hot_kv = hot.view(hot_memory, "kv")
        self._cold_kv = cold.view(cold_memory, "kv")
        self._cold_scale = cold.view(cold_memory, "scale")

    def encode(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """``slots`` of the hot memory to ``rows`` of the cold one, both int64 ``[n]``."""
        ops.quantize_chunks(self._hot_kv, slots, self._cold_kv, self._cold_scale, rows)

    def decode(self, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """``rows`` of the cold memory to ``slots`` of the hot one, both int64 ``[n]``."""
        ops.dequantize_chunks(self._cold_kv, self._cold_scale, rows, self._hot_kv, slots)
