"""Copies chunks between the hot pool and the arena, and verifies them: on a CPU.

The prefetcher's thread makes all calls but :meth:`Copies.mark`, one after another. For a GPU: `cuda_copies.py`.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from forecache.workers.errors import ArenaError, ChunkLostError
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.format.chunk_codec import ChunkCodec
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.layout import ChunkLayout
from forecache.workers.memory.format.slots import SlotRef
from forecache.workers.memory.hot.pool import HotPool

logger = logging.getLogger(__name__)

Mark = torch.cuda.Event | None
"""A point in a GPU stream; ``None`` on a CPU, where everything asked for before is done."""
IndexRecord = Callable[[int], torch.Tensor]
"""Slot of the pool -> the uint8 index keys of the chunk in it, on the pool's device."""

BATCH_CHUNKS = 16
"""Most chunks of one :meth:`Copies.store`."""


@dataclass(frozen=True)
class CopyItem:
    """The chunk ``key``, at ``ref`` of the arena and in slot ``slot`` of the pool; one is the source, one the
    target."""

    key: ChunkKey
    ref: SlotRef
    slot: int


@dataclass(frozen=True)
class Copied:
    """``lost``: the items that failed. ``duration_s``: the time of the copies, without what they had to wait for."""

    lost: tuple[CopyItem, ...]
    duration_s: float


class Copies(Protocol):
    def mark(self) -> Mark:
        """The work that the calling thread has given to the device so far: a copy may have to come after it."""
        ...

    def sound_prefix(self, keys: Sequence[ChunkKey], refs: Sequence[SlotRef]) -> int:
        """How many of ``refs``, from the first, hold their keys' chunks."""
        ...

    def recall(self, items: Sequence[CopyItem], after: Sequence[Mark]) -> Copied:
        """Copy from the arena into the pool, first item first, once ``after`` is reached, and verify the copies.

        Lost are chunks that were gone or damaged; their slots hold nothing.
        """
        ...

    def store(self, items: Sequence[CopyItem], after: Sequence[Mark]) -> Copied:
        """Copy at most :data:`BATCH_CHUNKS` chunks from the pool into the arena once ``after`` is reached, with their
        index records, and seal them. Lost are those whose slot was given away meanwhile, or does not hold what was
        copied to it."""
        ...


class CpuCopies:
    """For a pool in CPU memory. ``cold`` is the arena's layout; without ``index_record``, records are zeros."""

    def __init__(self, pool: HotPool, cold: ChunkLayout, arena: Arena, index_record: IndexRecord | None) -> None:
        check_layout(arena, cold)
        self._pool = pool
        self._arena = arena
        self._index_record = index_record
        self._no_record = torch.zeros(arena.index.shape[1], dtype=torch.uint8)
        self._decoder: ChunkCodec | None = None
        self._encoder: ChunkCodec | None = None
        if cold != pool.layout:
            self._decoder = ChunkCodec(pool.layout, pool.memory, cold, arena.chunks)
            # private memory: bytes in the arena could change before their checksum is computed. Padding stays zero
            self._encoded = torch.zeros(BATCH_CHUNKS, cold.nbytes, dtype=torch.uint8)
            self._encoder = ChunkCodec(pool.layout, pool.memory, cold, self._encoded)

    def mark(self) -> Mark:
        return None

    def sound_prefix(self, keys: Sequence[ChunkKey], refs: Sequence[SlotRef]) -> int:
        for number, (key, ref) in enumerate(zip(keys, refs, strict=False)):
            if not self._arena.check(ref, key):
                return number
        return len(refs)

    def recall(self, items: Sequence[CopyItem], after: Sequence[Mark]) -> Copied:
        start = time.perf_counter()
        lost: list[CopyItem] = []
        for part in pieces(items, 1 if self._decoder is None else BATCH_CHUNKS):
            if self._decoder is None:
                self._pool.memory[part[0].slot].copy_(self._arena.chunks[part[0].ref.slot])
            else:
                slots, rows = _places(part)
                self._decoder.decode(rows, slots)
            # check after the copy: after an earlier check the slot could still be given away
            lost += [item for item in part if not self._arena.check(item.ref, item.key)]
        return Copied(tuple(lost), time.perf_counter() - start)

    def store(self, items: Sequence[CopyItem], after: Sequence[Mark]) -> Copied:
        start = time.perf_counter()
        if self._encoder is not None and items:
            slots, _ = _places(items)
            self._encoder.encode(slots, torch.arange(len(items)))
        lost = []
        for row, item in enumerate(items):
            chunk = self._pool.memory[item.slot] if self._encoder is None else self._encoded[row]
            record = self._no_record if self._index_record is None else self._index_record(item.slot)
            try:
                self._arena.put(item.ref, item.key, chunk.numpy(), record.numpy())
            except ChunkLostError as error:
                logger.warning("chunk %s was not stored: %s", item.key.hex(), error)
                lost.append(item)
        return Copied(tuple(lost), time.perf_counter() - start)


def check_layout(arena: Arena, cold: ChunkLayout) -> None:
    """Raise :class:`ArenaError` unless ``arena`` holds chunks of layout ``cold``."""
    if arena.layout_fingerprint != cold.fingerprint:
        raise ArenaError(
            f"the arena {arena.path} holds chunks of another model or format: start its memory tier with the same "
            "model, --chunk-tokens, --dtype and --cold-dtype as this worker"
        )


def pieces(items: Sequence[CopyItem], size: int) -> Iterator[Sequence[CopyItem]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _places(items: Sequence[CopyItem]) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of the pool and of the arena, int64 ``[n]`` each."""
    return torch.tensor([item.slot for item in items]), torch.tensor([item.ref.slot for item in items])
