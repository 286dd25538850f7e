"""Finds stored prefixes and asks for room, in threads of its own: both may wait for other nodes.

A search passes lanes, each with its own threads and in order of arrival: ``near`` looks at this node's memory and
never waits for another node; ``fetch`` brings what lies elsewhere; ``room`` asks for room; ``spread`` is for sequences
that do not fit this node. So a prefix that is here never waits for one that has to come.
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
"""Searches of one worker at once. Those that fetch take a thread of the memory tier for as long as that lasts."""
T = TypeVar("T")

Behind = Callable[[int], Sequence[ChunkKey]]
"""Length of a run of keys → other keys for the chunks that follow it."""


class _MoreElsewhereError(Exception):
    """The search can't be ended here: another place has more of the prefix."""


class _LocalMemory:
    """This node's memory. Raises :class:`_MoreElsewhereError` where it has a part of what is stored."""

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
    """A prefix: its places, the last of them those of ``others``, and the pieces of the state behind it."""

    refs: Sequence[SlotRef] = ()
    others: tuple[ChunkKey, ...] = ()
    state: Sequence[SlotRef] = ()


@dataclass(frozen=True, eq=False)
class _Search:
    """One sequence's way through the lanes; ``done`` once it has been told."""

    holder: str
    keys: tuple[ChunkKey, ...]
    behind: Behind | None
    chunks: int
    done: "Future[None]" = field(default_factory=Future)


class PrefixSearch:
    """``settle`` is told what was found, ``failed`` what went wrong that should not. ``states``: a prefix is of use
    only with a snapshot behind it. ``progress`` is called after each part of a search that may wait for other nodes:
    the next one is another wait.

    Searches run beside each other. A chunk that was dropped is not found by a search that was asked for later.
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
        # what goes on elsewhere needs its state there too
        self._nodes = memory.spread if states is None else None
        self._near = ThreadPoolExecutor(NEAR_SEARCHES, thread_name_prefix="forecache-near")
        self._fetch = ThreadPoolExecutor(FETCHING_SEARCHES, thread_name_prefix="forecache-fetch")
        # one at a time: several would quota what room comes, and none would have enough
        self._room = ThreadPoolExecutor(1, thread_name_prefix="forecache-room")
        self._spread = ThreadPoolExecutor(1, thread_name_prefix="forecache-spread")
        self._drops = ThreadPoolExecutor(1, thread_name_prefix="forecache-drop")
        self._lock = threading.Lock()
        self._unfinished: set[Future[None]] = set()
        self._last_drop: Future[None] | None = None
        self._locating: set[str] = set()
        self._released: set[str] = set()  # of those that are being located
        self._closing = False

    def unfinished(self) -> "list[Future[None]]":
        """What was asked for and is not done yet: searches and drops. A search that ``when`` holds up is not begun."""
        with self._lock:
            return list(self._unfinished)

    def check_idle(self) -> None:
        """Raise ``AssertionError`` when a search is left, or that its sequence has left."""
        with self._lock:
            assert not self._locating, f"searches are left: {self._locating}"
            assert not self._released, f"releases wait for searches: {self._released}"

    def start(
        self,
        holder: str,
        keys: tuple[ChunkKey, ...],
        behind: Behind | None,
        chunks: int,
        when: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        """Search, and then tell; ``when``: posts what begins the search, where it must not begin at once."""
        search = _Search(holder, keys, behind, chunks)
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
        """Have nobody find the chunk that was read from ``ref``, from the next search on."""
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
        """Whether ``holder`` is being located: then it is released at once after that."""
        with self._lock:
            if holder in self._locating:
                self._released.add(holder)
            return holder in self._locating

    def hurry(self) -> None:
        """Wait for no room any more."""
        self._closing = True

    def close(self) -> None:
        """Search what was asked for, and end. Nothing may be asked for from now on."""
        self.hurry()
        for lane in (self._near, self._fetch, self._room, self._spread, self._drops):  # each posts to later ones
            lane.shutdown()

    def _post(self, lane: ThreadPoolExecutor, search: _Search, job: Callable[[], None]) -> None:
        """Have ``job`` done in ``lane``; what goes wrong in it ends the search."""

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
            end_s = time.monotonic() + QUOTA_WAIT_S  # from now on: who waits in line must not wait the longer for it
            self._post(self._room, search, lambda: self._reserve_quota(search, found, end_s))
        else:
            self._tell(search, found)

    def _reserve_quota(self, search: _Search, found: _Found, end_s: float) -> None:
        failure = ""
        try:
            self._wait_for_room(lambda: self._memory.reserve_quota(search.holder, search.chunks), QUOTA_POLL_S, end_s)
        except ChunkLostError:
            pass  # a memory tier that is gone promises nothing; it will be seen when it is written to
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
        """The sequence does not fit this node: find its prefix wherever it is, and have all nodes promise room."""
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
                holder, tuple(found.refs), found.others, failure, not too_large, too_large, quota, tuple(found.state)
            )
        )
        self._finish(search.done)

    def _find_all(self, places: HoldsChunks, search: _Search) -> _Found:
        refs = self._find(places, search.holder, search.keys)
        others: tuple[ChunkKey, ...] = ()
        if search.behind is not None and len(refs) < len(search.keys):
            others = tuple(search.behind(len(refs)))
            more = self._find(places, search.holder, others)
            refs, others = [*refs, *more], others[: len(more)]
        if self._states is None:
            return _Found(refs, others)
        return _Found(*self._states.cut_prefix(places, search.holder, search.keys, refs, others))

    def _wait_for_room(self, ask: Callable[[], T], poll_s: float, end_s: float) -> T:
        """``ask``, again for a little while if there is no room: somebody may be leaving."""
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
            return []  # a memory tier that is gone has no prefix; the prompt is prefilled
        finally:
            self._progress()
        sound = damaged = self._copies.sound_prefix(keys, refs)
        while damaged < len(refs):
            # all of them, not the first alone: what is computed instead of the others would give way to them
            try_drop(self._memory, keys[damaged], refs[damaged])
            damaged += 1
            damaged += self._copies.sound_prefix(keys[damaged:], refs[damaged:])
        return refs[:sound]


def try_drop(memory: ColdMemory, key: ChunkKey, ref: SlotRef) -> None:
    """Forget a chunk whose bytes are wrong."""
    try:
        memory.drop(key, ref)
    except ChunkLostError:
        return  # the owner is gone, and with it what was to be forgotten


def try_release(memory: ColdMemory, holder: str) -> None:
    """Let go of all that ``holder`` holds."""
    try:
        memory.release(holder)
    except ChunkLostError:
        return  # the owner is gone, and its holds with it


def try_record_session(
    memory: ColdMemory, session_id: str, keys: Sequence[ChunkKey], state_keys: Sequence[ChunkKey]
) -> None:
    """A request of the session has ended with these chunks and pieces of a state."""
    try:
        memory.record_session(session_id, keys, state_keys)
    except ChunkLostError as error:
        logger.warning("session %s is not recorded: %s", session_id, error)
