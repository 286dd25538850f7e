"""Checksums of single layers of stored chunks: they verify a layer that is read alone, for another node.

A header has one checksum for the whole chunk. Comparing that one would read all layers for each layer.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.layout import ChunkLayout
from forecache.workers.memory.format.slots import SlotRef

BATCH_BYTES = 16 << 20
"""Most bytes of whole chunks copied at a time, unless one chunk is larger."""


class LayerDigests:
    """Checksums of the layers of chunks in ``arena``, whose layout is ``layout``. Any thread may call.

    They are computed when a chunk is first asked for, once its bytes have the checksum of the whole. Takes 8 bytes for
    each layer of each slot.
    """

    def __init__(self, arena: Arena, layout: ChunkLayout) -> None:
        self._arena = arena
        self._layout = layout
        self._known: dict[int, tuple[int, tuple[int, ...]]] = {}  # slot -> (generation, a digest for each layer)

    def sound(
        self, keys: Sequence[ChunkKey], refs: Sequence[SlotRef], layer: int, rows: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.bool_]:
        """Which of ``rows``, uint8 ``[n, ChunkLayout.layer_nbytes]``, equal ``layer`` of the chunks ``keys`` as stored
        at ``refs``: bool ``[n]``."""
        unknown = [number for number, ref in enumerate(refs) if self._digests(ref) is None]
        size = max(1, BATCH_BYTES // self._layout.nbytes)
        for start in range(0, len(unknown), size):
            some = unknown[start : start + size]
            self._learn([keys[number] for number in some], [refs[number] for number in some])
        expected = [self._digests(ref) for ref in refs]
        found = [
            digests is not None and digests[layer] == xxhash.xxh3_64_intdigest(row)
            for digests, row in zip(expected, rows, strict=True)
        ]
        return np.array(found, np.bool_)

    def _digests(self, ref: SlotRef) -> tuple[int, ...] | None:
        generation, digests = self._known.get(ref.slot, (-1, ()))
        return digests if generation == ref.generation else None

    def _learn(self, keys: Sequence[ChunkKey], refs: Sequence[SlotRef]) -> None:
        batch = self._arena.read(refs, keys)  # verified; leaves out damaged ones
        places = dict(zip(keys, refs, strict=True))
        for key, chunk in zip(batch.keys, batch.chunks, strict=True):
            digests = []
            for layer in range(self._layout.fields[0].shape[0]):
                parts = [chunk[part] for part in self._layout.layer_parts(layer)]
                digests.append(xxhash.xxh3_64_intdigest(np.concatenate(parts).tobytes()))
            self._known[places[key].slot] = (places[key].generation, tuple(digests))
