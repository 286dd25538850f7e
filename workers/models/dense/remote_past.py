"""Reads a stream's past from other nodes: one layer of many chunks at a time, requested ahead.

Fetching whole chunks would mean to transfer each chunk once per layer, or to store all of them here at once.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from forecache.kernels.attention import reference
from forecache.workers.core.sequence import TokenSequence
from forecache.workers.errors import ChunkLostError
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.layout import ChunkLayout
from forecache.workers.models.step.runner import PastLostError

if TYPE_CHECKING:  # they import Ray, which an engine in one process does without
    from forecache.workers.memory.client.memory import RemoteSpread
    from forecache.workers.memory.client.peers import PendingRows

READS_AHEAD = 3
"""Pieces that are on their way while one is attended to."""


@dataclass(frozen=True)
class RemoteChunks:
    """Chunks of one sequence on other nodes, in order. ``layout``: that of cold memory."""

    request_id: str
    holder: str
    keys: tuple[ChunkKey, ...]
    layout: ChunkLayout
    others: "RemoteSpread"

    def ask(self, part: slice, layer: int) -> "PendingRows":
        """For one layer of some of them."""
        return self.others.read_layer(self.holder, self.keys[part], layer)


class RemotePast:
    """Pasts on ``others``, in the layout of cold memory."""

    def __init__(self, others: "RemoteSpread", layout: ChunkLayout) -> None:
        self._others = others
        self._layout = layout

    def chunks(self, seq: TokenSequence, keys: tuple[ChunkKey, ...]) -> RemoteChunks:
        """Those chunks of ``seq``."""
        return RemoteChunks(seq.request_id, seq.holder, keys, self._layout, self._others)


class RemoteReads:
    """Pieces of remote pasts, (chunks, part of them, layer) each, in the order in which they will be taken."""

    def __init__(self, order: Iterable[tuple[RemoteChunks, slice, int]]) -> None:
        self._order = iter(order)
        self._under_way: deque[tuple[RemoteChunks, PendingRows]] = deque()
        self._ask()

    def take(self, dtype: torch.dtype, out: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Keys and values of the next piece, ``[kv_heads, n * chunk_tokens, head_dim]`` each, in ``out`` if given.

        Raises :class:`PastLostError`.
        """
        chunks, pending = self._under_way.popleft()
        self._ask()
        try:
            rows = torch.from_numpy(pending.result()).to(device)
        except ChunkLostError as error:
            raise PastLostError(str(error), chunks.request_id) from error
        names = {field.name for field in chunks.layout.fields}
        scale = chunks.layout.layer_view(rows, "scale") if "scale" in names else None
        all_rows = torch.arange(len(rows), device=device)
        kv = chunks.layout.layer_view(rows, "kv")
        return reference.gather_layer(kv, 0, all_rows, scale=scale, out=out, dtype=dtype)

    def _ask(self) -> None:
        while len(self._under_way) < READS_AHEAD and (piece := next(self._order, None)) is not None:
            chunks, part, layer = piece
            self._under_way.append((chunks, chunks.ask(part, layer)))
