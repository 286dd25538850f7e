"""Copies chunks between a hot pool on a GPU and the arena, and verifies them there.

Each direction has two streams: one copies, at link speed if the arena is registered with CUDA; the other computes
checksums and converts, so that the two overlap. They wait for the engine's stream only up to the marks of a job, and
the prefetcher's thread sleeps until its streams are done.
"""

import logging
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from forecache.kernels.chunks import ops
from forecache.workers.errors import ChunkLostError
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.format.chunk_codec import ChunkCodec
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.layout import ChunkLayout
from forecache.workers.memory.format.slots import SlotRef
from forecache.workers.memory.hot.copies import (
    BATCH_CHUNKS,
    Copied,
    CopyItem,
    IndexRecord,
    Mark,
    check_layout,
    pieces,
)
from forecache.workers.memory.hot.pool import HotPool

logger = logging.getLogger(__name__)

PIECE_BYTES = 32 << 20
"""Cold bytes that one stream hands to the other at a time, and the size of a staging buffer."""
PIECE_CHUNKS = 64
BUFFERS = 2


class CudaCopies:
    """:class:`.copies.Copies` of a pool on a GPU. Construct it in the engine's thread, before it serves.

    A chunk is sealed with both checksums once the GPU has read back from the arena what it copied there. A recalled
    chunk is verified by its device checksum, or by xxh3 on the CPU if it has none. :meth:`sound_prefix` reads headers
    only: bytes are verified when they are read.
    """

    def __init__(self, pool: HotPool, cold: ChunkLayout, arena: Arena, index_record: IndexRecord | None) -> None:
        check_layout(arena, cold)
        self._pool = pool
        self._arena = arena
        self._index_record = index_record
        self._device = pool.memory.device
        # even, so that the slots of every piece are aligned to 16 bytes: Triton would recompile for other addresses
        self._piece = max(2, min(PIECE_CHUNKS, PIECE_BYTES // cold.nbytes) // 2 * 2)
        self._rows = torch.arange(self._piece, device=self._device)
        self._inbound = _Lane(pool.num_slots, self._device)
        self._outbound = _Lane(BATCH_CHUNKS, self._device)
        # private memory; zeros if no records are stored
        self._records = torch.zeros(BATCH_CHUNKS, arena.index.shape[1], dtype=torch.uint8, pin_memory=True)
        if cold != pool.layout:
            for lane in (self._inbound, self._outbound):
                lane.staging = [_Staging(pool, cold, self._piece) for _ in range(BUFFERS)]
        self._warm_up(cold)

    def mark(self) -> Mark:
        event = _event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def sound_prefix(self, keys: Sequence[ChunkKey], refs: Sequence[SlotRef]) -> int:
        sealed = self._arena.sealed(refs, keys[: len(refs)])
        return len(refs) if sealed.all() else int(sealed.argmin())

    def recall(self, items: Sequence[CopyItem], after: Sequence[Mark]) -> Copied:
        if not items:
            return Copied((), 0.0)
        lane, chunks = self._inbound, self._arena.chunks
        lane.begin([item.slot for item in items], after, lane.copying)
        sums: list[torch.Tensor] = []
        for number, part in enumerate(pieces(items, self._piece)):
            buffer = number % BUFFERS
            slots, rows = lane.slots(number * self._piece, len(part)), self._rows[: len(part)]
            staging = lane.staging[buffer] if lane.staging else None
            with torch.cuda.stream(lane.copying):
                lane.copying.wait_event(lane.emptied[buffer])
                targets = self._pool_rows(part) if staging is None else list(staging.memory[: len(part)])
                _copy_all(targets, [chunks[item.ref.slot] for item in part])
                lane.filled[buffer].record(lane.copying)
            with torch.cuda.stream(lane.computing):
                lane.computing.wait_event(lane.filled[buffer])
                if staging is None:
                    sums.append(ops.slot_checksums(self._pool.memory, slots))
                else:
                    sums.append(ops.slot_checksums(staging.memory, rows))
                    staging.codec.decode(rows, slots)
                lane.emptied[buffer].record(lane.computing)
        copied, duration_s = lane.finish(sums)
        start = time.perf_counter()
        lost = self._wrong(items, copied)
        return Copied(lost, duration_s + time.perf_counter() - start)

    def store(self, items: Sequence[CopyItem], after: Sequence[Mark]) -> Copied:
        if not items:
            return Copied((), 0.0)
        lane, chunks = self._outbound, self._arena.chunks
        lane.begin([item.slot for item in items], after, lane.computing)
        sums: list[torch.Tensor] = []
        for number, part in enumerate(pieces(items, self._piece)):
            buffer = number % BUFFERS
            slots, rows = lane.slots(number * self._piece, len(part)), self._rows[: len(part)]
            staging = lane.staging[buffer] if lane.staging else None
            with torch.cuda.stream(lane.computing):
                lane.computing.wait_event(lane.emptied[buffer])
                if staging is None:
                    sums.append(ops.slot_checksums(self._pool.memory, slots))
                else:
                    staging.codec.encode(slots, rows)
                    sums.append(ops.slot_checksums(staging.memory, rows))
                lane.filled[buffer].record(lane.computing)
            with torch.cuda.stream(lane.copying):
                lane.copying.wait_event(lane.filled[buffer])
                sources = self._pool_rows(part) if staging is None else list(staging.memory[: len(part)])
                _copy_all([chunks[item.ref.slot] for item in part], sources)
                lane.emptied[buffer].record(lane.copying)
        if self._index_record is not None:
            with torch.cuda.stream(lane.computing):
                records = torch.stack([self._index_record(item.slot) for item in items])
                self._records[: len(items)].copy_(records, non_blocking=True)
        stored, duration_s = lane.finish(sums)
        start = time.perf_counter()
        lost = self._seal(items, stored)
        return Copied(lost, duration_s + time.perf_counter() - start)

    def _seal(self, items: Sequence[CopyItem], stored: npt.NDArray[np.uint64]) -> tuple[CopyItem, ...]:
        """Seal those of ``items`` whose slots hold what was copied to them; returns the others. ``stored``: the device
        checksums of what was copied, taken on the GPU, uint64 ``[n]``.

        xxh3 reads a slot first, then the GPU reads it. If the GPU finds its source's checksum, the slot held the same
        bytes when xxh3 read it: bytes that another process writes over it never become right again.
        """
        arena, records = self._arena, self._records.numpy()
        for row, item in enumerate(items):
            arena.index[item.ref.slot].copy_(self._records[row])
        digests = [arena.digests(item.ref.slot) for item in items]
        there = self._checksums_in_arena([item.ref.slot for item in items])
        lost: list[CopyItem] = []
        for row, (item, (chunk, index)) in enumerate(zip(items, digests, strict=True)):
            right = there[row] == stored[row] and index == xxhash.xxh3_64_intdigest(records[row].data)
            try:
                if not right:
                    raise ChunkLostError(f"slot {item.ref.slot} does not hold what was just written to it")
                arena.seal_verified(item.ref, item.key, (chunk, index), int(stored[row]))
            except ChunkLostError as error:
                logger.warning("chunk %s was not stored: %s", item.key.hex(), error)
                lost.append(item)
        return tuple(lost)

    def _checksums_in_arena(self, slots: list[int]) -> npt.NDArray[np.uint64]:
        """Current device checksums of ``slots`` of the arena: uint64 ``[n]``."""
        chunks = self._arena.chunks
        if chunks.is_pinned():
            return self._outbound.checksums(chunks, slots)
        # the arena is not registered with CUDA: compute on one core, a hundred times slower
        return ops.slot_checksums(chunks, torch.tensor(slots)).numpy().view(np.uint64)

    def _pool_rows(self, items: Sequence[CopyItem]) -> list[torch.Tensor]:
        return [self._pool.memory[item.slot] for item in items]

    def _wrong(self, items: Sequence[CopyItem], sums: npt.NDArray[np.uint64]) -> tuple[CopyItem, ...]:
        """Those of ``items`` whose copies, of checksums ``sums``, differ from what the arena has sealed. Call it after
        the copies: before, a slot could still be given away."""
        keys, refs = [item.key for item in items], [item.ref for item in items]
        sealed, expected = self._arena.sealed_device_checksums(refs, keys)
        sound = sealed & (expected == sums)
        for number in np.flatnonzero(sealed & (expected == 0)).tolist():
            sound[number] = self._arena.check(refs[number], keys[number])
        return tuple(items[number] for number in np.flatnonzero(~sound).tolist())

    def _warm_up(self, cold: ChunkLayout) -> None:
        """Compile the kernels now, not while a request waits."""
        slots = self._inbound.slots(0, 1)
        ops.slot_checksums(self._pool.memory, slots)
        if self._inbound.staging:
            staging = self._inbound.staging[0]
            scratch = torch.zeros(1, self._pool.layout.nbytes, dtype=torch.uint8, device=self._device)
            codec = ChunkCodec(self._pool.layout, scratch, cold, staging.memory)
            codec.encode(slots, self._rows[:1])
            ops.slot_checksums(staging.memory, self._rows[:1])
            codec.decode(self._rows[:1], slots)
        # other streams use what was allocated and zeroed here
        torch.cuda.current_stream(self._device).synchronize()


class _Staging:
    """Cold chunks in transit on the GPU. Padding of rows stays zero."""

    def __init__(self, pool: HotPool, cold: ChunkLayout, rows: int) -> None:
        self.memory = torch.zeros(rows, cold.nbytes, dtype=torch.uint8, device=pool.memory.device)
        self.codec = ChunkCodec(pool.layout, pool.memory, cold, self.memory)


class _Lane:
    """One direction: its two streams, and the buffers of its only job.

    One stream fills a buffer and the other empties it, in turns.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.copying: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.computing: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.filled = [_event() for _ in range(BUFFERS)]
        self.emptied = [_event() for _ in range(BUFFERS)]
        self.staging: list[_Staging] = []
        self._begun = _event(enable_timing=True)
        self._done = _event(enable_timing=True, blocking=True)  # waiting sleeps instead of spinning
        self._slots = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._host_slots = torch.zeros(capacity, dtype=torch.int64, pin_memory=True)
        self._host_sums = torch.zeros(capacity, dtype=torch.int64, pin_memory=True)

    def begin(self, slots: list[int], after: Sequence[Mark], first: torch.cuda.Stream) -> None:
        """Begin a job on these ``slots`` of the pool once ``after`` is reached; ``first`` is the stream that starts
        it."""
        for stream in (self.copying, self.computing):
            for mark in after:
                if mark is not None:
                    stream.wait_event(mark)
        self._host_slots[: len(slots)] = torch.tensor(slots)
        with torch.cuda.stream(self.computing):
            self._slots[: len(slots)].copy_(self._host_slots[: len(slots)], non_blocking=True)
        self._begun.record(first)

    def slots(self, start: int, count: int) -> torch.Tensor:
        """The job's slots from ``start``: int64 ``[count]`` on the GPU, for the computing stream."""
        return self._slots[start : start + count]

    def checksums(self, memory: torch.Tensor, slots: list[int]) -> npt.NDArray[np.uint64]:
        """Current checksums of ``slots`` of ``memory``, which the GPU can read: uint64 ``[n]``. No job may be in the
        lane."""
        with torch.cuda.stream(self.computing):
            self._host_slots[: len(slots)] = torch.tensor(slots)
            self._slots[: len(slots)].copy_(self._host_slots[: len(slots)], non_blocking=True)
            host = self._host_sums[: len(slots)]
            host.copy_(ops.slot_checksums(memory, self.slots(0, len(slots))), non_blocking=True)
            self._done.record(self.computing)
        self._done.synchronize()
        return host.numpy().view(np.uint64).copy()

    def finish(self, sums: list[torch.Tensor]) -> tuple[npt.NDArray[np.uint64], float]:
        """Sleep until the job is done. Returns its checksums, ``[n]``, and the seconds that it ran."""
        with torch.cuda.stream(self.computing):
            joined = torch.cat(sums)
            host = self._host_sums[: len(joined)]
            host.copy_(joined, non_blocking=True)
        self.copying.wait_stream(self.computing)
        self._done.record(self.copying)
        self._done.synchronize()
        return host.numpy().view(np.uint64).copy(), self._begun.elapsed_time(self._done) / 1e3


def _event(*, enable_timing: bool = False, blocking: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=enable_timing, blocking=blocking)  # type: ignore[no-untyped-call]


def _copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each source to its target in the current stream.

    One call for all: between two calls the engine's thread would take the interpreter, and keep it for long.
    """
    torch._foreach_copy_(targets, sources, non_blocking=True)
