"""Searches for stored prefixes and reserves quotas, in its own threads: both may wait for other nodes.

A search passes through lanes, each with its own threads and in order of arrival. ``near`` looks at this node's memory
and never waits for another node; ``fetch`` copies chunks from elsewhere; ``room`` reserves the quota; ``spread`` is for
sequences that do not fit into this node. So a prefix on this node never waits for one that has to be fetched.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from forecache.workers.errors import ChunkLostError, InvalidRequestError, OverloadedError
from forecache.workers.memory.client.protocol import ColdMemory, HoldsChunks
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.slots import SlotRef
from forecache.workers.memory.format.spread_quota import SpreadQuota
from forecache.workers.memory.hot.completions import PrefixHeld
from forecache.workers.memory.hot.copies import Copies
from forecache.workers.memory.hot.snapshot_store import SnapshotStore

logger = logging.getLogger(__name__)

QUOTA_WAIT_S, QUOTA_POLL_S, SPREAD_POLL_S = 1.5, 0.02, 0.2
NEAR_SEARCHES, FETCHING_SEARCHES = 4, 2
"""Concurrent searches of one worker. A fetching one occupies a thread of the memory tier meanwhile."""
T = TypeVar("T")

SessionKeys = Callable[[int], Sequence[ChunkKey]]
"""Length of a stored run of keys -> other keys for the chunks that follow it."""


class _MoreElsewhereError(Exception):
    """The search can't end in this node's memory: the prefix continues on disk or on other nodes."""


class _LocalMemory:
    """This node's memory. Raises :class:`_MoreElsewhereError` where a prefix continues elsewhere."""

    def __init__(self, memory: ColdMemory) -> None:
        self._memory = memory

    def hold_prefix(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef]:
        refs, elsewhere = self._memory.hold_local_prefix(holder, keys)
        if elsewhere:
            raise _MoreElsewhereError
        return refs

    def hold(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        return self._memory.hold(holder, keys)


@dataclass(frozen=True)
class _Found:
    """A prefix: its slots, the last of which belong to ``session_keys``, and the pieces of the snapshot at its end."""

    refs: Sequence[SlotRef] = ()
    session_keys: tuple[ChunkKey, ...] = ()
    state: Sequence[SlotRef] = ()


@dataclass(frozen=True, eq=False)
class _Search:
    """One sequence's search; ``done`` once its result is settled."""

    holder: str
    keys: tuple[ChunkKey, ...]
    session_keys: SessionKeys | None
    chunks: int
    done: "Future[None]" = field(default_factory=Future)


class PrefixSearch:
    """``settle`` gets the result of each search, ``failed`` an unexpected error. ``states``: stores snapshots, without
    which a prefix is useless to models with a state. ``progress`` is called after each part of a search that may wait
    for other nodes.

    Searches run concurrently. A search that starts after a drop does not find the dropped chunk.
    """

    def __init__(
        self,
        memory: ColdMemory,
        copies: Copies,
        settle: Callable[[PrefixHeld], None],
        failed: Callable[[BaseException], None],
        states: SnapshotStore | None = None,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._memory = memory
        self._local = _LocalMemory(memory)
        self._copies = copies
        self._settle = settle
        self._failed = failed
        self._states = states
        self._progress = progress
        # a model with a state can't be spread: its snapshots stay on one node
        self._nodes = memory.spread if states is None else None
        self._near = ThreadPoolExecutor(NEAR_SEARCHES, thread_name_prefix="forecache-near")
        self._fetch = ThreadPoolExecutor(FETCHING_SEARCHES, thread_name_prefix="forecache-fetch")
        # one at a time: several would split the room that becomes free, and none would get enough
        self._room = ThreadPoolExecutor(1, thread_name_prefix="forecache-room")
        self._spread = ThreadPoolExecutor(1, thread_name_prefix="forecache-spread")
        self._drops = ThreadPoolExecutor(1, thread_name_prefix="forecache-drop")
        self._lock = threading.Lock()
        self._unfinished: set[Future[None]] = set()
        self._last_drop: Future[None] | None = None
        self._locating: set[str] = set()
        self._released: set[str] = set()  # holders to release when their search ends
        self._closing = False

    def unfinished(self) -> "list[Future[None]]":
        """Searches and drops that are not done. Excludes a search whose ``when`` has not started it yet."""
        with self._lock:
            return list(self._unfinished)

    def check_idle(self) -> None:
        """Raise ``AssertionError`` when a search, or a release that waits for one, is left."""
        with self._lock:
            assert not self._locating, f"searches are left: {self._locating}"
            assert not self._released, f"releases wait for searches: {self._released}"

    def start(
        self,
        holder: str,
        keys: tuple[ChunkKey, ...],
        session_keys: SessionKeys | None,
        chunks: int,
        when: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        """Start a search. ``when``: posts the function that starts it, for a search that must not start at once."""
        search = _Search(holder, keys, session_keys, chunks)
        with self._lock:
            self._locating.add(holder)

        def begin() -> None:
            with self._lock:
                dropped = self._last_drop
                self._unfinished.add(search.done)
            self._post(self._near, search, lambda: self._search_here(search, dropped))

        if when is None:
            begin()
        else:
            when(begin)

    def drop(self, key: ChunkKey, ref: SlotRef) -> None:
        """Drop the chunk that was read from ``ref``: later searches do not find it."""
        done: Future[None] = Future()
        with self._lock:
            self._unfinished.add(done)
            self._last_drop = done

        def run() -> None:
            try:
                try_drop(self._memory, key, ref)
            except BaseException as error:  # noqa: BLE001 - handed to the engine's thread, which raises it
                self._failed(error)
            finally:
                self._finish(done)

        self._drops.submit(run)

    def release_after_search(self, holder: str) -> bool:
        """Whether a search for ``holder`` is running; it then ends with a release."""
        with self._lock:
            if holder in self._locating:
                self._released.add(holder)
            return holder in self._locating

    def hurry(self) -> None:
        """Stop waiting for room."""
        self._closing = True

    def close(self) -> None:
        """Finish all searches and end the threads. Start no search from now on."""
        self.hurry()
        for lane in (self._near, self._fetch, self._room, self._spread, self._drops):  # each posts to later ones
            lane.shutdown()

    def _post(self, lane: ThreadPoolExecutor, search: _Search, job: Callable[[], None]) -> None:
        """Run ``job`` in ``lane``; an error ends the search."""

        def run() -> None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001 - handed to the engine's thread, which raises it
                self._failed(error)
                self._finish(search.done)

        lane.submit(run)

    def _finish(self, done: "Future[None]") -> None:
        with self._lock:
            self._unfinished.discard(done)
        done.set_result(None)

    def _search_here(self, search: _Search, dropped: "Future[None] | None") -> None:
        if dropped is not None:
            dropped.result()
        if self._nodes is not None and search.chunks > self._memory.arena.slots:
            self._post(self._spread, search, lambda: self._search_spread(search))
            return
        try:
            found = self._find_all(self._local, search)
        except _MoreElsewhereError:
            self._post(self._fetch, search, lambda: self._ask_for_room(search, self._find_all(self._memory, search)))
        else:
            self._ask_for_room(search, found)

    def _ask_for_room(self, search: _Search, found: _Found) -> None:
        if search.chunks:
            end_s = time.monotonic() + QUOTA_WAIT_S  # from now on: time in the queue counts
            self._post(self._room, search, lambda: self._reserve_quota(search, found, end_s))
        else:
            self._tell(search, found)

    def _reserve_quota(self, search: _Search, found: _Found, end_s: float) -> None:
        failure = ""
        try:
            self._wait_for_room(lambda: self._memory.reserve_quota(search.holder, search.chunks), QUOTA_POLL_S, end_s)
        except ChunkLostError:
            pass  # the memory tier is gone; the next write to it reports that
        except OverloadedError as error:
            failure = str(error)
            if self._nodes is not None and not self._closing:
                try:
                    self._memory.start_over(search.holder)
                except ChunkLostError as lost:
                    failure = f"the memory tier of this node is away: {lost}"
                else:
                    self._post(self._spread, search, lambda: self._search_spread(search))
                    return
        self._tell(search, found, failure)

    def _search_spread(self, search: _Search) -> None:
        """The sequence does not fit into this node: find its prefix on all nodes, and reserve quotas on them."""
        nodes, found, quota, failure, too_large = self._nodes, _Found(), None, "", False
        assert nodes is not None
        try:
            end_s = time.monotonic() + QUOTA_WAIT_S
            self._wait_for_room(lambda: nodes.begin(search.holder, search.chunks), SPREAD_POLL_S, end_s)
            found = self._find_all(self._memory, search)
            end_s = time.monotonic() + QUOTA_WAIT_S
            quota = self._wait_for_room(lambda: nodes.reserve_remote_quota(search.holder), SPREAD_POLL_S, end_s)
        except OverloadedError as error:
            failure = str(error)
        except InvalidRequestError as error:
            failure, too_large = str(error), True
        except ChunkLostError as error:
            failure = f"the memory tier of this node is away: {error}"
        self._tell(search, found, failure, quota, too_large=too_large)

    def _tell(
        self,
        search: _Search,
        found: _Found,
        failure: str = "",
        quota: SpreadQuota | None = None,
        *,
        too_large: bool = False,
    ) -> None:
        holder = search.holder
        with self._lock:
            self._locating.discard(holder)
            released = holder in self._released
            self._released.discard(holder)
        if released or failure:
            try_release(self._memory, holder)
            quota = None
        if failure:
            found = _Found()
        self._settle(
            PrefixHeld(
                holder,
                tuple(found.refs),
                found.session_keys,
                failure,
                not too_large,
                too_large,
                quota,
                tuple(found.state),
            )
        )
        self._finish(search.done)

    def _find_all(self, places: HoldsChunks, search: _Search) -> _Found:
        refs = self._find(places, search.holder, search.keys)
        session_keys: tuple[ChunkKey, ...] = ()
        if search.session_keys is not None and len(refs) < len(search.keys):
            session_keys = tuple(search.session_keys(len(refs)))
            more = self._find(places, search.holder, session_keys)
            refs, session_keys = [*refs, *more], session_keys[: len(more)]
        if self._states is None:
            return _Found(refs, session_keys)
        return _Found(*self._states.cut_prefix(places, search.holder, search.keys, refs, session_keys))

    def _wait_for_room(self, ask: Callable[[], T], poll_s: float, end_s: float) -> T:
        """Call ``ask``, and repeat it for a while when there is no room: other sequences may end."""
        while True:
            try:
                return ask()
            except OverloadedError:
                if time.monotonic() > end_s or self._closing:
                    raise
            finally:
                self._progress()
            time.sleep(poll_s)

    def _find(self, places: HoldsChunks, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef]:
        try:
            refs = places.hold_prefix(holder, keys)
        except ChunkLostError:
            return []  # the memory tier is gone: prefill the prompt
        finally:
            self._progress()
        sound = damaged = self._copies.sound_prefix(keys, refs)
        while damaged < len(refs):
            # drop all damaged chunks, not only the first: the others would displace what is computed in their place
            try_drop(self._memory, keys[damaged], refs[damaged])
            damaged += 1
            damaged += self._copies.sound_prefix(keys[damaged:], refs[damaged:])
        return refs[:sound]


def try_drop(memory: ColdMemory, key: ChunkKey, ref: SlotRef) -> None:
    """Drop a chunk whose bytes are wrong, unless its owner is gone."""
    try:
        memory.drop(key, ref)
    except ChunkLostError:
        return  # the owner is gone, and its chunks with it


def try_release(memory: ColdMemory, holder: str) -> None:
    """Release all that ``holder`` holds, unless the memory's owner is gone."""
    try:
        memory.release(holder)
    except ChunkLostError:
        return  # the owner is gone, and its holds with it


def try_record_session(
    memory: ColdMemory, session_id: str, keys: Sequence[ChunkKey], state_keys: Sequence[ChunkKey]
) -> None:
    """Record that a request of the session has ended with these chunks and pieces of a snapshot; log a failure."""
    try:
        memory.record_session(session_id, keys, state_keys)
    except ChunkLostError as error:
        logger.warning("session %s is not recorded: %s", session_id, error)
