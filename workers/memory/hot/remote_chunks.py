"""Chunks of sequences that are spread over nodes: fetched here before they are recalled, moved out once written.

In threads of their own: other sequences' copies do not wait for other nodes.
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
"""A chunk that was fetched and did not survive until it was copied, or not unharmed, is fetched once more."""

PAUSE_S = 0.05

Copy = Callable[[tuple[RecallItem, ...]], Copied]
"""Has the copy thread copy from the arena into the pool, and waits for it."""


@dataclass
class _Sequence:
    """``here``: chunks that stay in the arena. What comes while some are ``moving`` out waits in ``deferred``."""

    quota: SpreadQuota
    here: int
    moving: bool = False
    deferred: list[Callable[[], None]] = field(default_factory=list)


class RemoteTransfers:
    """``settle`` is told what became of recalls and write-backs, ``failed`` what went wrong that should not.
    ``progress`` is called after each group of chunks and each try, which may wait for other nodes: the next one is
    another wait.

    :meth:`begin` comes from the locator's thread, :meth:`recall` from the engine's, the rest from the copy thread.
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
        """Of ``chunks``, how many may be written at once."""
        with self._lock:
            seq = self._sequences.get(holder)
            return chunks if seq is None else min(chunks, seq.quota.max_in_flight)

    def defer(self, holder: str, job: Callable[[], None]) -> bool:
        """Whether chunks of ``holder`` are moving out: then ``job`` is done after that."""
        with self._lock:
            seq = self._sequences.get(holder)
            if seq is None or not seq.moving:
                return False
            seq.deferred.append(job)
            return True

    def pause(self, holder: str, job: Callable[[], None]) -> bool:
        """Whether ``holder`` is spread: then ``job`` is done a little later, and what comes meanwhile after it."""
        with self._lock:
            seq = self._sequences.get(holder)
            if seq is None:
                return False
            seq.moving = True
            seq.deferred.append(job)
        self._moving.submit(self._run, lambda: self._resume(seq, PAUSE_S))
        return True

    def keep(self, holder: str, news: list[WrittenBack]) -> list[WrittenBack]:
        """Those of the written chunks that stay; the others are moved out, and told of then."""
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
        """Bring what is far, most wanted first, and have ``copy`` bring all of it into the pool."""
        self._fetching.submit(self._run, lambda: self._recall(ticket, holder, items, copy, chunk_bytes))

    def flush(self) -> None:
        """Wait until what is on its way has arrived, and what was deferred until then is posted again."""
        self._fetching.submit(lambda: None).result()
        self._moving.submit(lambda: None).result()

    def close(self) -> None:
        """Finish what is on its way."""
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
                continue  # this node's tier is away, and all it had found
            finally:
                self._progress()
                try_release(self._memory, name)
            if not left:
                break
        return list(left.values())

    def _move_out(self, holder: str, seq: _Sequence, news: Sequence[WrittenBack]) -> None:
        try:
            refs = self._spread.move_out(holder, [done.key for done in news])
            said = "a chunk could not be stored: no node has room for it"
        except ChunkLostError as error:
            refs, said = [None] * len(news), f"a chunk could not be stored: {error}"
        self._progress()
        for done, ref in zip(news, refs, strict=True):
            if ref is None:
                done = replace(done, failure=said, overloaded=True)
            self._settle(replace(done, ref=ref))
        self._resume(seq)

    def _resume(self, seq: _Sequence, after_s: float = 0.0) -> None:
        time.sleep(after_s)
        with self._lock:
            seq.moving = False
            deferred, seq.deferred = seq.deferred, []
        for job in deferred:
            job()
