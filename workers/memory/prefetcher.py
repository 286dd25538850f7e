"""Moves chunks between the hot pool and cold memory, in a thread of its own.

The engine's thread posts jobs and, at each step's edge, drains what has completed. Jobs only touch slots that the
engine keeps referenced or dirty until the completion is drained, so the pool itself needs no lock.
"""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from forecache.workers.errors import ChunkLostError, OverloadedError
from forecache.workers.memory.hot_pool import HotPool
from forecache.workers.memory.keys import ChunkKey
from forecache.workers.memory.protocol import ColdMemory, SlotRef

_RECALL, _STORE, _STOP = 0, 1, 2
FLUSH_CHECK_S = 0.5


@dataclass(frozen=True)
class RecallItem:
    """Copy the chunk ``key`` at ``ref`` of the arena into slot ``slot`` of the pool."""

    key: ChunkKey
    ref: SlotRef
    slot: int


@dataclass(frozen=True)
class PrefixHeld:
    """The longest stored run of the asked keys is held for ``holder``; ``refs`` are its places."""

    holder: str
    refs: tuple[SlotRef, ...]


@dataclass(frozen=True)
class Recalled:
    """A recall is done. ``lost`` names the items whose chunk was gone or damaged; their slots hold nothing."""

    ticket: int
    lost: tuple[RecallItem, ...]
    recalled_bytes: int
    duration_s: float


@dataclass(frozen=True)
class WrittenBack:
    """Cold memory has the chunk ``key`` of ``slot`` at ``ref``; ``None``: it had no room, or was out of reach."""

    holder: str
    key: ChunkKey
    slot: int
    ref: SlotRef | None
    reason: str = ""


Completion = PrefixHeld | Recalled | WrittenBack


class Prefetcher:
    """The copy thread of one pool.

    ``index_record(slot)`` gives the uint8 index keys to store beside the chunk of a slot (``None``: none are kept).
    """

    def __init__(
        self,
        pool: HotPool,
        memory: ColdMemory,
        index_record: Callable[[int], torch.Tensor] | None,
    ) -> None:
        self._pool = pool
        self._memory = memory
        self._index_record = index_record
        self._order = itertools.count()
        self._tickets = itertools.count()
        self._jobs: queue.PriorityQueue[tuple[int, int, Callable[[], None]]] = queue.PriorityQueue()
        self._completions: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._news = threading.Event()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._work, name="forecache-prefetcher", daemon=True)
        # torch keeps a number of threads for each thread, and one more that threads started later begin with
        threads = torch.get_num_threads()
        self._thread.start()
        self._started.wait()
        torch.set_num_threads(threads)

    def hold_prefix(self, holder: str, keys: Sequence[ChunkKey]) -> None:
        """Ask for the longest stored run of ``keys``; answered by :class:`PrefixHeld`."""
        self._post(_RECALL, lambda: self._hold_prefix(holder, tuple(keys)))

    def recall(self, items: Sequence[RecallItem]) -> int:
        """Copy held cold chunks into referenced slots, first item first; answered by :class:`Recalled`."""
        ticket = next(self._tickets)
        self._post(_RECALL, lambda: self._recall(ticket, tuple(items)))
        return ticket

    def write_back(self, holder: str, key: ChunkKey, slot: int) -> None:
        """Copy a completed slot to cold memory, held there for ``holder``; answered by :class:`WrittenBack`."""
        self._post(_STORE, lambda: self._write_back(holder, key, slot))

    def release(self, holder: str) -> None:
        """Let go of all that ``holder`` holds, after what was asked for it before."""
        self._post(_STORE, lambda: self._release(holder))

    def drain(self) -> list[Completion]:
        """What has completed since the last call. Raises what broke the copy thread, if something did."""
        if self._failure is not None:
            raise self._failure
        self._news.clear()
        done = []
        while True:
            try:
                done.append(self._completions.get_nowait())
            except queue.Empty:
                return done

    def wait(self, timeout_s: float) -> bool:
        """Sleep until something completes, at most ``timeout_s``."""
        return self._news.wait(timeout_s)

    def wake(self) -> None:
        """End a :meth:`wait` early."""
        self._news.set()

    def flush(self) -> None:
        """Wait until the jobs posted so far are done."""
        done = threading.Event()
        self._post(_STORE, done.set)
        while not done.wait(FLUSH_CHECK_S):
            if self._failure is not None:
                raise self._failure

    def close(self) -> None:
        """Finish the jobs posted so far and end the thread."""
        self._jobs.put((_STOP, next(self._order), lambda: None))
        self._thread.join()

    def _post(self, priority: int, job: Callable[[], None]) -> None:
        self._jobs.put((priority, next(self._order), job))

    def _work(self) -> None:
        # copies gain nothing from a second team of threads beside the model's, and once there are more threads than
        # cores OpenMP puts all of them to sleep after every operator
        torch.get_num_threads()  # torch sets a thread's number at its first use, over what was set before
        torch.set_num_threads(1)
        self._started.set()
        try:
            while True:
                priority, _, job = self._jobs.get()
                if priority == _STOP:
                    return
                job()
                self._news.set()
        except BaseException as error:  # noqa: BLE001 - handed to the engine's thread, which raises it in drain()
            self._failure = error
            self._news.set()

    def _hold_prefix(self, holder: str, keys: tuple[ChunkKey, ...]) -> None:
        try:
            refs = self._memory.hold_prefix(holder, keys)
        except ChunkLostError:
            refs = []  # a memory tier that is gone has no prefix; the prompt is prefilled
        sound = 0
        for key, ref in zip(keys, refs, strict=False):
            if not self._memory.arena.check(ref, key):
                self._drop(key, ref)
                break
            sound += 1
        self._completions.put(PrefixHeld(holder, tuple(refs[:sound])))

    def _recall(self, ticket: int, items: tuple[RecallItem, ...]) -> None:
        start = time.perf_counter()
        lost = []
        for item in items:
            # checked after the copy: before it, the slot could still be given away
            self._pool.memory[item.slot].copy_(self._memory.arena.chunks[item.ref.slot])
            if not self._memory.arena.check(item.ref, item.key):
                lost.append(item)
        for item in lost:
            self._drop(item.key, item.ref)
        nbytes = (len(items) - len(lost)) * self._pool.layout.nbytes
        self._completions.put(Recalled(ticket, tuple(lost), nbytes, time.perf_counter() - start))

    def _drop(self, key: ChunkKey, ref: SlotRef) -> None:
        try:
            self._memory.drop(key, ref)
        except ChunkLostError:
            return  # the owner is gone, and with it what was to be forgotten

    def _write_back(self, holder: str, key: ChunkKey, slot: int) -> None:
        try:
            (place,) = self._memory.reserve(holder, [key])
            if not place.stored:
                arena = self._memory.arena
                if self._index_record is not None:
                    arena.index[place.ref.slot].copy_(self._index_record(slot))
                arena.chunks[place.ref.slot].copy_(self._pool.memory[slot])
                arena.seal(place.ref, key)
                self._memory.commit(holder, [(key, place.ref)])
        except (OverloadedError, ChunkLostError) as error:
            self._completions.put(WrittenBack(holder, key, slot, None, str(error)))
            return
        self._completions.put(WrittenBack(holder, key, slot, place.ref))

    def _release(self, holder: str) -> None:
        try:
            self._memory.release(holder)
        except ChunkLostError:
            return  # the owner is gone, and its holds with it
