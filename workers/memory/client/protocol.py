"""What the engine needs of cold memory. `store.py` serves it in-process, `remote.py` through Ray."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.stats import TierStats
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.slots import Reservation, SlotRef
from forecache.workers.memory.format.spread_quota import Share


class OtherNodes(Protocol):
    """Where a sequence keeps the chunks that the arena of its node has no room for: it is *spread*.

    Its first chunks stay here, the others are held for it on other nodes, and only their index records lie here. Every
    method but :meth:`read_layer` may block as those of :class:`ColdMemory`, and raises what they raise.
    """

    def spread(self, holder: str, chunks: int) -> None:
        """``holder`` may need so many slots in all, most of them on other nodes: begin with a share of this node's.

        What is found for it from now on stays where it lies.
        """
        ...

    def promise_rest(self, holder: str) -> Share:
        """The stored prefix of ``holder`` is held: have other nodes promise room for all that may follow, and this one
        where they have too little. Returns what ``holder`` has here."""
        ...

    def move_out(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        """Other nodes hold these chunks from now on, stored and held here, which are let go of here.

        Returns where their records are; ``None`` for those that nobody took, which are let go of too.
        """
        ...

    def fetch(self, holder: str, reader: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        """Bring remote chunks of ``holder`` here, and hold them for ``reader``; ``None`` for each that is lost.

        At most :attr:`Share.at_once`, and released before others are asked for.
        """
        ...

    def read_layer(self, holder: str, keys: Sequence[ChunkKey], layer: int) -> "PendingLayer":
        """One layer of remote chunks of ``holder``, to be read where they lie; does not wait. Any thread may call."""
        ...


class PendingLayer(Protocol):
    """One layer of chunks, on its way from other nodes."""

    def result(self) -> npt.NDArray[np.uint8]:
        """uint8 ``[chunks, ChunkLayout.layer_nbytes]``. Raises :class:`ChunkLostError` when a chunk does not come."""
        ...


class HoldsChunks(Protocol):
    """Where stored chunks are looked for: all of cold memory, or a part of it."""

    def hold_prefix(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef]:
        """Hold the longest run of ``keys``, from the first, that is stored; return its places."""
        ...

    def hold(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        """Hold those of ``keys`` that are stored; ``None`` for each that is not."""
        ...


class ColdMemory(HoldsChunks, Protocol):
    """Chunks in CPU memory. Calls may block for a network deadline: only the prefetcher's threads make them.

    A *holder* is a sequence's name. What it holds is neither evicted nor moved until it is released. Every method
    raises :class:`forecache.workers.errors.ChunkLostError` when the owner of the memory can't be reached.
    """

    @property
    def arena(self) -> Arena:
        """The node's arena, mapped into this process."""
        ...

    @property
    def others(self) -> OtherNodes | None:
        """``None`` where there is but this arena."""
        ...

    def hold_here(self, holder: str, keys: Sequence[ChunkKey]) -> tuple[list[SlotRef], bool]:
        """As :meth:`hold_prefix`, of what is in this node's memory; never waits for another node. Also returns whether
        more of the run is stored elsewhere: on disk, or at other nodes."""
        ...

    def reserve(self, holder: str, keys: Sequence[ChunkKey]) -> list[Reservation]:
        """Places to write ``keys`` into, held for ``holder`` at once; evicts unheld chunks to make room.

        Raises :class:`forecache.workers.errors.OverloadedError`, and reserves nothing, when all else is held.
        """
        ...

    def commit(self, holder: str, refs: Sequence[tuple[ChunkKey, SlotRef]]) -> None:
        """The bytes of these reserved slots are in place, their headers written: from now on others find them."""
        ...

    def drop(self, key: ChunkKey, ref: SlotRef) -> None:
        """The chunk read from ``ref`` was wrong: forget it everywhere. Holders keep the slot until they release."""
        ...

    def promise(self, holder: str, chunks: int) -> None:
        """``holder`` may need so many slots in all: no more is promised than there is, until it is released.

        Raises :class:`forecache.workers.errors.OverloadedError`, and promises nothing, when there is too little.
        """
        ...

    def start_over(self, holder: str) -> None:
        """Let go of all that ``holder`` holds and was promised; it goes on."""
        ...

    def release(self, holder: str) -> None:
        """Let go of all that ``holder`` holds, for good: what is asked for it from now on comes too late, and raises
        :class:`forecache.workers.errors.ReleasedError`. Unknown holders are fine."""
        ...

    def record_session(self, session_id: str, keys: Sequence[ChunkKey], state_keys: Sequence[ChunkKey] = ()) -> None:
        """A request of the session has ended with the chunks ``keys``; ``state_keys``: the pieces of the state behind
        them."""
        ...

    def stats(self) -> TierStats: ...
