"""Chunks of spread sequences: fetched here before they are recalled, moved to other nodes once written.

Runs in its own threads, so that copies of other sequences do not wait for other nodes.
"""

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from forecache.workers.errors import ChunkLostError
from forecache.workers.memory.client.protocol import ColdMemory
from forecache.workers.memory.format.hold_id import reader_of
from forecache.workers.memory.format.spread_quota import SpreadQuota
from forecache.workers.memory.hot.completions import Completion, Recalled, RecallItem, WrittenBack
from forecache.workers.memory.hot.copies import Copied
from forecache.workers.memory.hot.prefix_search import try_release

if TYPE_CHECKING:  # it imports Ray, which an engine in one process does without
    from forecache.workers.memory.client.memory import RemoteSpread

TRIES = 2
"""Times that a chunk is fetched, if it is lost or damaged before it was copied into the pool."""

PAUSE_S = 0.05

Copy = Callable[[tuple[RecallItem, ...]], Copied]
"""Has the copy thread copy from the arena into the pool, and waits for it."""


@dataclass
class _Sequence:
    """``here``: number of chunks that stay in the arena. While some are ``moving`` out, later jobs wait in
    ``deferred``."""

    quota: SpreadQuota
    here: int
    moving: bool = False
    deferred: list[Callable[[], None]] = field(default_factory=list)


class RemoteTransfers:
    """``settle`` gets the results of recalls and write-backs, ``failed`` an unexpected error. ``progress`` is called
    after each group of chunks and each try: both may wait for other nodes.

    :meth:`begin` is called by the threads of the prefix search, :meth:`recall` by the engine's, the rest by the copy
    thread.
    """

    def __init__(
        self,
        memory: ColdMemory,
        spread: "RemoteSpread",
        settle: Callable[[Completion], None],
        failed: Callable[[BaseException], None],
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._memory = memory
        self._spread = spread
        self._settle = settle
        self._failed = failed
        self._progress = progress
        self._sequences: dict[str, _Sequence] = {}
        self._readers = itertools.count()
        self._lock = threading.Lock()
        self._fetching = ThreadPoolExecutor(1, thread_name_prefix="forecache-fetch")
        self._moving = ThreadPoolExecutor(1, thread_name_prefix="forecache-move-out")

    def begin(self, holder: str, quota: SpreadQuota, here: int) -> None:
        """``holder`` is spread, and ``here`` of its chunks were found in the arena."""
        with self._lock:
            self._sequences[holder] = _Sequence(quota, here)

    def end(self, holder: str) -> None:
        """``holder`` is released."""
        with self._lock:
            self._sequences.pop(holder, None)

    def most_at_once(self, holder: str, chunks: int) -> int:
        """How many of ``chunks`` may be written in one batch."""
        with self._lock:
            seq = self._sequences.get(holder)
            return chunks if seq is None else min(chunks, seq.quota.max_in_flight)

    def defer(self, holder: str, job: Callable[[], None]) -> bool:
        """Whether chunks of ``holder`` are moving out; ``job`` then runs after that."""
        with self._lock:
            seq = self._sequences.get(holder)
            if seq is None or not seq.moving:
                return False
            seq.deferred.append(job)
            return True

    def pause(self, holder: str, job: Callable[[], None]) -> bool:
        """Whether ``holder`` is spread; ``job`` then runs a little later, and its later jobs after that."""
        with self._lock:
            seq = self._sequences.get(holder)
            if seq is None:
                return False
            seq.moving = True
            seq.deferred.append(job)
        self._moving.submit(self._run, lambda: self._resume(seq, PAUSE_S))
        return True

    def keep(self, holder: str, news: list[WrittenBack]) -> list[WrittenBack]:
        """Returns the written chunks that stay here; moves the others out, and settles them then."""
        with self._lock:
            seq = self._sequences.get(holder)
            if seq is None:
                return news
            written = [done for done in news if done.ref is not None]
            staying = written[: max(seq.quota.local_chunks - seq.here, 0)]
            seq.here += len(staying)
            leaving = written[len(staying) :]
            seq.moving = bool(leaving)
        if leaving:
            self._moving.submit(self._run, lambda: self._move_out(holder, seq, leaving))
        return [done for done in news if done not in leaving]

    def recall(self, ticket: int, holder: str, items: tuple[RecallItem, ...], copy: Copy, chunk_bytes: int) -> None:
        """Fetch remote chunks, most wanted first, and have ``copy`` copy all ``items`` into the pool."""
        self._fetching.submit(self._run, lambda: self._recall(ticket, holder, items, copy, chunk_bytes))

    def flush(self) -> None:
        """Wait until all transfers are done, and deferred jobs are posted again."""
        self._fetching.submit(lambda: None).result()
        self._moving.submit(lambda: None).result()

    def close(self) -> None:
        """Finish all transfers and end the threads."""
        self._fetching.shutdown()
        self._moving.shutdown()

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001 - handed to the engine's thread, which raises it
            self._failed(error)

    def _recall(self, ticket: int, holder: str, items: tuple[RecallItem, ...], copy: Copy, chunk_bytes: int) -> None:
        start_s = time.perf_counter()
        near = tuple(item for item in items if not item.ref.remote)
        lost = list(copy(near).lost) if near else []
        self._progress()
        far = [item for item in items if item.ref.remote]
        with self._lock:
            seq = self._sequences.get(holder)
        size = 1 if seq is None else seq.quota.max_in_flight
        for number in range(0, len(far), size):
            lost += self._bring(holder, far[number : number + size], copy)
        chunks = len(items) - len(lost)
        duration_s = time.perf_counter() - start_s
        self._settle(Recalled(ticket, tuple(lost), chunks * chunk_bytes, duration_s, chunks))

    def _bring(self, holder: str, items: Sequence[RecallItem], copy: Copy) -> list[RecallItem]:
        """Fetch and copy ``items``; returns those that are lost."""
        left = {item.slot: item for item in items}
        for _ in range(TRIES):
            name = reader_of(holder, next(self._readers))
            try:
                refs = self._spread.fetch(holder, name, [item.key for item in left.values()])
                here = tuple(replace(i, ref=ref) for i, ref in zip(left.values(), refs, strict=True) if ref is not None)
                copied = copy(here) if here else Copied((), 0.0)
                for item in copied.lost:
                    self._memory.drop(item.key, item.ref)
                for item in here:
                    if item not in copied.lost:
                        del left[item.slot]
            except ChunkLostError:
                continue  # this node's tier is away, and what it fetched with it
            finally:
                self._progress()
                try_release(self._memory, name)
            if not left:
                break
        return list(left.values())

    def _move_out(self, holder: str, seq: _Sequence, news: Sequence[WrittenBack]) -> None:
        try:
            refs = self._spread.move_out(holder, [done.key for done in news])
            failure = "a chunk could not be stored: no node has room for it"
        except ChunkLostError as error:
            refs, failure = [None] * len(news), f"a chunk could not be stored: {error}"
        self._progress()
        for done, ref in zip(news, refs, strict=True):
            if ref is None:
                done = replace(done, failure=failure, overloaded=True)
            self._settle(replace(done, ref=ref))
        self._resume(seq)

    def _resume(self, seq: _Sequence, after_s: float = 0.0) -> None:
        time.sleep(after_s)
        with self._lock:
            seq.moving = False
            deferred, seq.deferred = seq.deferred, []
        for job in deferred:
            job()
