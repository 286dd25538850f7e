"""Moves chunks between the hot pool and cold memory, in its own thread.

The engine's thread posts jobs, and drains completions between steps. A job only touches slots that the engine keeps
referenced or dirty until it has drained the completion, so the pool needs no lock. On a GPU a job carries a mark of the
engine's stream: steps launched before it may still read or write its slots.

Other threads search for stored prefixes (:class:`PrefixSearch`) and move chunks between nodes
(:class:`RemoteTransfers`), since both may wait for other nodes.
"""

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace

import torch

from forecache.workers.errors import ChunkLostError, ForecacheError, OverloadedError
from forecache.workers.memory.arena.reserving import reserve_sound
from forecache.workers.memory.client.protocol import ColdMemory
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.layout import ChunkLayout
from forecache.workers.memory.format.slots import Reservation, SlotRef
from forecache.workers.memory.hot.completions import Completion, PrefixHeld, Recalled, RecallItem, Released, WrittenBack
from forecache.workers.memory.hot.copies import BATCH_CHUNKS, Copied, Copies, CopyItem, CpuCopies, IndexRecord, Mark
from forecache.workers.memory.hot.cuda_copies import CudaCopies
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.memory.hot.prefix_search import (
    PrefixSearch,
    SessionKeys,
    try_drop,
    try_record_session,
    try_release,
)
from forecache.workers.memory.hot.remote_chunks import RemoteTransfers
from forecache.workers.memory.hot.snapshot_store import SnapshotStore

BATCH_BYTES = 64 << 20
"""Most bytes of write-backs in one batch, unless one chunk is larger: a recall may have to wait for a batch."""
FLUSH_CHECK_S = 0.5
QUOTA_WAITS = 40
"""Times that a chunk waits for room within its sequence's quota."""
LOSSES = 3
"""Times that a chunk is written again after its slot was lost."""


@dataclass(frozen=True)
class _WriteBack:
    """A posted write-back. ``waits``: times it has waited for room; ``losses``: times its slot was lost; ``alone``: it
    failed in a batch, and is tried by itself."""

    holder: str
    key: ChunkKey
    slot: int
    after: Mark
    alone: bool = False
    waits: int = 0
    losses: int = 0


_Job = Callable[[], None]


class Prefetcher:
    """The copy thread of one pool.

    ``index_record(slot)`` returns the uint8 index keys to store with the chunk of a slot (``None``: none are stored).
    ``cold``: the layout of the arena's chunks if it differs from the pool's. ``states``: stores snapshots, without
    which a prefix is useless to models with a state. ``progress`` is called, in any thread, after each wait for other
    nodes. Raises :class:`forecache.workers.errors.ArenaError` when the arena has another layout.
    """

    def __init__(
        self,
        pool: HotPool,
        memory: ColdMemory,
        index_record: IndexRecord | None,
        cold: ChunkLayout | None = None,
        states: SnapshotStore | None = None,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._pool = pool
        self._states = states
        self._memory = memory
        self._cold = cold or pool.layout
        make = CudaCopies if pool.memory.is_cuda else CpuCopies
        self._copies: Copies = make(pool, self._cold, memory.arena, index_record)
        self._batch_chunks = max(1, min(BATCH_CHUNKS, BATCH_BYTES // self._cold.nbytes))
        self._tickets = itertools.count()
        # recalls, for which sequences wait, come before stores, which can wait; each in the order of posting
        self._urgent: deque[_Job] = deque()
        self._stores: deque[_Job | _WriteBack] = deque()
        self._posted_stores = 0
        self._closing = False
        self._posted = threading.Condition()
        self._completions: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._heard: BaseException | None = None
        self._news = threading.Event()
        self._prefix_search = PrefixSearch(memory, self._copies, self._located, self._fail, states, progress)
        spread = memory.spread
        self._remote = None if spread is None else RemoteTransfers(memory, spread, self._settle, self._fail, progress)
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._work, name="forecache-prefetcher", daemon=True)
        # torch has a thread count per thread, and one that new threads start with: keep the latter
        threads = torch.get_num_threads()
        self._thread.start()
        self._started.wait()
        torch.set_num_threads(threads)

    def find_prefix(
        self,
        holder: str,
        keys: Sequence[ChunkKey],
        session_keys: SessionKeys | None = None,
        chunks: int = 0,
        *,
        after_stores: bool = False,
    ) -> None:
        """Search for the longest stored prefix, and reserve a quota of ``chunks`` in all; see :class:`PrefixHeld`.

        Args:
            keys: chunks that any request may use.
            session_keys: returns the keys of the session's chunks that follow so many chunks of ``keys``.
            after_stores: start after all earlier write-backs and releases.
        """
        self._prefix_search.start(holder, tuple(keys), session_keys, chunks, self._post_store if after_stores else None)

    def recall(self, items: Sequence[RecallItem], holder: str = "") -> int:
        """Copy held cold chunks into referenced slots, first item first; answered by :class:`Recalled`. ``holder`` is
        needed if some lie on other nodes."""
        ticket, mark = next(self._tickets), self._copies.mark()
        if self._remote is not None and any(item.ref.remote for item in items):
            self._remote.recall(ticket, holder, tuple(items), lambda here: self._copied(here, mark), self._cold.nbytes)
        else:
            self._post_urgent(lambda: self._recall(ticket, tuple(items), mark))
        return ticket

    def drop(self, key: ChunkKey, ref: SlotRef) -> None:
        """The chunk read from ``ref`` was wrong: no later :meth:`find_prefix` shall find it."""
        self._prefix_search.drop(key, ref)

    def write_back(self, holder: str, key: ChunkKey, slot: int) -> None:
        """Copy a completed slot to cold memory, held there for ``holder``; answered by :class:`WrittenBack`."""
        self._post_store(_WriteBack(holder, key, slot, self._copies.mark()))

    def store_state(self, layout: SnapshotStore, holder: str, chunk: ChunkKey, snapshot: torch.Tensor) -> None:
        """Store ``snapshot``, uint8 [n], of the state behind ``chunk``, held for ``holder``, if there is room."""
        mark = self._copies.mark()
        self._post_store(lambda: layout.store(self._memory, holder, chunk, snapshot, mark))

    def release_holder(self, holder: str) -> None:
        """Release all that ``holder`` holds, after its earlier jobs; answered by :class:`Released`."""
        self._post_store(lambda: self._release(holder))

    def record_session(self, session_id: str, keys: Sequence[ChunkKey], state_keys: Sequence[ChunkKey] = ()) -> None:
        """A request of the session has ended with the chunks ``keys`` and the snapshot behind them; recorded once they
        are stored."""
        self._post_store(lambda: try_record_session(self._memory, session_id, keys, state_keys))

    def drain(self) -> list[Completion]:
        """Completions since the last call. Raises the error that broke a thread, if there is one."""
        self._raise_failure()
        self._news.clear()
        done = []
        while True:
            try:
                done.append(self._completions.get_nowait())
            except queue.Empty:
                return done

    def wait(self, timeout_s: float) -> bool:
        """Sleep until a job completes, at most ``timeout_s``."""
        return self._news.wait(timeout_s)

    def wake(self) -> None:
        """End a :meth:`wait` early."""
        self._news.set()

    def flush(self) -> None:
        """Wait until the jobs posted so far are done."""
        for search in self._prefix_search.unfinished():
            while not wait([search], FLUSH_CHECK_S).done:
                self._raise_failure()
        done = threading.Event()
        self._post_store(done.set)
        while not done.wait(FLUSH_CHECK_S):
            self._raise_failure()
        if self._remote is not None:
            self._remote.flush()

    def check_idle(self) -> None:
        """Raise ``AssertionError`` when a job or a completion is left. For use after :meth:`flush` and
        :meth:`drain`."""
        with self._posted:
            assert not self._urgent and not self._stores, "jobs are left"
        assert self._completions.empty(), "news of jobs is left"
        self._prefix_search.check_idle()

    def close(self) -> None:
        """Finish the jobs posted so far and end the threads. Raises the error that broke one, unless it was raised
        before."""
        if self._closing:
            return
        self._prefix_search.hurry()
        try:
            # stores may start searches, and stores that waited for chunks to move out are posted again
            posted = -1
            while self._failure is None and posted != self._posted_stores:
                posted = self._posted_stores + 1  # flush posts one itself
                self.flush()
        finally:
            self._prefix_search.close()
            if self._remote is not None:
                self._remote.close()
            with self._posted:
                self._closing = True  # the copy thread ends once it has no jobs
                self._posted.notify()
            self._thread.join()
        if self._failure is not self._heard:
            self._raise_failure()

    def _raise_failure(self) -> None:
        self._heard = self._failure
        if self._heard is not None:
            raise self._heard

    def _located(self, held: PrefixHeld) -> None:
        if held.quota is not None and self._remote is not None:
            self._remote.begin(held.holder, held.quota, sum(not ref.remote for ref in held.refs))
        self._settle(held)

    def _settle(self, done: Completion) -> None:
        self._completions.put(done)
        self._news.set()

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        self._news.set()

    def _post_urgent(self, job: _Job) -> None:
        with self._posted:
            self._urgent.append(job)
            self._posted.notify()

    def _post_store(self, job: _Job | _WriteBack) -> None:
        with self._posted:
            self._stores.append(job)
            self._posted_stores += 1
            self._posted.notify()

    def _next_job(self) -> _Job | None:
        """The next job; ``None`` to end the thread."""
        with self._posted:
            self._posted.wait_for(lambda: self._urgent or self._stores or self._closing)
            if self._urgent:
                return self._urgent.popleft()
            if not self._stores:
                return None
            first = self._stores.popleft()
            if not isinstance(first, _WriteBack):
                return first
            batch, most = [first], 1 if first.alone else self._batch_chunks
            if self._remote is not None:
                most = self._remote.most_at_once(first.holder, most)
            while self._stores and len(batch) < most:
                following = self._stores[0]
                if not isinstance(following, _WriteBack) or following.alone or following.holder != first.holder:
                    break
                batch.append(following)
                self._stores.popleft()
            return lambda: self._write_back(batch)

    def _work(self) -> None:
        # copies gain nothing from OpenMP threads in addition to the model's, and with more threads than cores OpenMP
        # puts all of them to sleep after every operator
        torch.get_num_threads()  # the first call in a thread sets its count, so it must come before set_num_threads
        torch.set_num_threads(1)
        self._started.set()
        try:
            while (job := self._next_job()) is not None:
                job()
                self._news.set()
        except BaseException as error:  # noqa: BLE001 - handed to the engine's thread, which raises it in drain()
            self._fail(error)

    def _copied(self, items: tuple[RecallItem, ...], after: Mark) -> Copied:
        """Have the copy thread recall ``items``, and wait for it. For other threads."""
        done: Future[Copied] = Future()
        self._post_urgent(lambda: done.set_result(self._copies.recall(items, [after])))
        while True:
            try:
                return done.result(FLUSH_CHECK_S)
            except TimeoutError:
                if self._failure is not None:
                    raise self._failure from None

    def _recall(self, ticket: int, items: tuple[RecallItem, ...], after: Mark) -> None:
        copied = self._copies.recall(items, [after])
        for item in copied.lost:
            try_drop(self._memory, item.key, item.ref)
        chunks = len(items) - len(copied.lost)
        self._completions.put(Recalled(ticket, copied.lost, chunks * self._cold.nbytes, copied.duration_s, chunks))

    def _write_back(self, jobs: list[_WriteBack]) -> None:
        holder = jobs[0].holder
        if self._remote is not None and self._remote.defer(holder, lambda: self._post_first(jobs)):
            return  # earlier chunks are still moving to other nodes
        try:
            keys = [job.key for job in jobs]
            places = reserve_sound(self._memory, lambda keys: self._memory.reserve_slots(holder, keys), keys)
            news = self._store(jobs, places)
        except OverloadedError as error:
            self._no_room(jobs, error)
        except ChunkLostError as error:
            self._places_lost(jobs, error)
        else:
            for done in news if self._remote is None else self._remote.keep(holder, news):
                self._completions.put(done)

    def _no_room(self, jobs: list[_WriteBack], error: OverloadedError) -> None:
        if self._remote is not None and jobs[0].waits < QUOTA_WAITS:
            later = [replace(job, alone=True, waits=job.waits + 1) for job in jobs]
            if self._remote.pause(jobs[0].holder, lambda: self._post_first(later)):
                return  # the quota guarantees the room: chunks of others will leave it
        if len(jobs) > 1:  # a few of them may fit
            self._post_first([replace(job, alone=True) for job in jobs])
        else:
            self._give_up(jobs, error)

    def _places_lost(self, jobs: list[_WriteBack], error: ChunkLostError) -> None:
        if jobs[0].losses < LOSSES:  # a restarted tier has forgotten its reservations
            self._post_first([replace(job, alone=True, losses=job.losses + 1) for job in jobs])
        else:
            self._give_up(jobs, error)

    def _give_up(self, jobs: list[_WriteBack], error: ForecacheError) -> None:
        failure, overloaded = f"a chunk could not be stored: {error}", isinstance(error, OverloadedError)
        for job in jobs:
            self._completions.put(WrittenBack(job.holder, job.key, job.slot, None, failure, overloaded))

    def _post_first(self, jobs: Sequence[_WriteBack]) -> None:
        with self._posted:
            self._stores.extendleft(reversed(jobs))
            self._posted_stores += len(jobs)
            self._posted.notify()

    def _store(self, jobs: list[_WriteBack], places: list[Reservation]) -> list[WrittenBack]:
        """Fill the reserved slots; returns what became of each job."""
        items = [
            CopyItem(job.key, place.ref, job.slot) for job, place in zip(jobs, places, strict=True) if not place.stored
        ]
        copied = self._copies.store(items, [job.after for job in jobs])
        for item in copied.lost:
            try_drop(self._memory, item.key, item.ref)  # so that the tier reuses the slot last, if at all
        written = {item.ref for item in items if item not in copied.lost}
        if written:
            self._memory.commit(jobs[0].holder, [(item.key, item.ref) for item in items if item.ref in written])
        news, lost = [], []
        for job, place in zip(jobs, places, strict=True):
            done = WrittenBack(job.holder, job.key, job.slot, place.ref)
            if place.ref in written:
                done = replace(done, written_bytes=self._cold.nbytes, duration_s=copied.duration_s / len(items))
            elif not place.stored:
                lost.append(job)
                continue
            news.append(done)
        if lost:
            self._places_lost(lost, ChunkLostError("its slot was given away, or did not hold what was written to it"))
        return news

    def _release(self, holder: str) -> None:
        if self._prefix_search.release_after_search(holder):
            return  # its search has to end first
        if self._remote is not None and self._remote.defer(holder, lambda: self.release_holder(holder)):
            return
        try_release(self._memory, holder)
        if self._remote is not None:
            self._remote.end(holder)
        self._settle(Released(holder))
