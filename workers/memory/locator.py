"""Finds stored prefixes and asks for room, in a thread of its own: both may wait for other nodes."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from forecache.workers.errors import ChunkLostError, OverloadedError
from forecache.workers.memory.completions import PrefixHeld
from forecache.workers.memory.copies import Copies
from forecache.workers.memory.keys import ChunkKey
from forecache.workers.memory.protocol import ColdMemory, SlotRef
from forecache.workers.memory.share import Share
from forecache.workers.memory.states import StateLayout

logger = logging.getLogger(__name__)

PROMISE_WAIT_S, PROMISE_POLL_S, SPREAD_POLL_S = 1.5, 0.02, 0.2
T = TypeVar("T")

Behind = Callable[[int], Sequence[ChunkKey]]
"""Length of a run of keys → other keys for the chunks that follow it."""


class Locator:
    """``settle`` is told what was found, ``failed`` what went wrong that should not. ``states``: a prefix is of use
    only with a snapshot behind it.

    One search at a time, in order: a chunk that was dropped is not found by a search that was asked for later.
    """

    def __init__(
        self,
        memory: ColdMemory,
        copies: Copies,
        settle: Callable[[PrefixHeld], None],
        failed: Callable[[BaseException], None],
        states: StateLayout | None = None,
    ) -> None:
        self._memory = memory
        self._copies = copies
        self._settle = settle
        self._failed = failed
        self._states = states
        # what goes on elsewhere needs its state there too
        self._nodes = memory.others if states is None else None
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="forecache-locator")
        self._lock = threading.Lock()
        self._locating: set[str] = set()
        self._released: set[str] = set()  # of those that are being located
        self._closing = False

    def post(self, job: Callable[[], None]) -> None:
        """Have ``job`` done after what was asked for before."""

        def run() -> None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001 - handed to the engine's thread, which raises it
                self._failed(error)

        self._threads.submit(run)

    def hold_prefix(
        self,
        holder: str,
        keys: tuple[ChunkKey, ...],
        behind: Behind | None,
        chunks: int,
        when: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        """Search, and then tell; ``when``: posts what begins the search, where it must not begin at once."""
        with self._lock:
            self._locating.add(holder)

        def search() -> None:
            self.post(lambda: self._hold_prefix(holder, keys, behind, chunks))

        if when is None:
            search()
        else:
            when(search)

    def drop(self, key: ChunkKey, ref: SlotRef) -> None:
        """Have nobody find the chunk that was read from ``ref``, from the next search on."""
        self.post(lambda: drop(self._memory, key, ref))

    def release_later(self, holder: str) -> bool:
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
        self._threads.shutdown()

    def _hold_prefix(self, holder: str, keys: tuple[ChunkKey, ...], behind: Behind | None, chunks: int) -> None:
        share: Share | None = None
        state: Sequence[SlotRef] = ()
        try:
            if self._nodes is not None and chunks > self._memory.arena.slots:
                raise OverloadedError("more than this node holds")
            refs, others = self._find_all(holder, keys, behind)
            if self._states is not None:
                refs, others, state = self._states.cut(self._memory, holder, keys, refs, others)
            failure = self._promise(holder, chunks) if chunks else ""
            if failure and self._nodes is not None and not self._closing:
                release(self._memory, holder)
                raise OverloadedError(failure)
        except OverloadedError:
            refs, others, failure = [], (), ""
            try:
                refs, others, share = self._spread(holder, keys, behind, chunks)
            except OverloadedError as error:
                failure = str(error)
            except ChunkLostError as error:
                failure = f"the memory tier of this node is away: {error}"
        with self._lock:
            self._locating.discard(holder)
            released = holder in self._released
            self._released.discard(holder)
        if released or failure:
            release(self._memory, holder)
        if failure:
            refs, others, state = [], (), ()
        if failure or released:
            share = None
        self._settle(PrefixHeld(holder, tuple(refs), others, failure, share=share, state=tuple(state)))

    def _find_all(
        self, holder: str, keys: tuple[ChunkKey, ...], behind: Behind | None
    ) -> tuple[list[SlotRef], tuple[ChunkKey, ...]]:
        refs = self._find(holder, keys)
        if behind is None or len(refs) == len(keys):
            return refs, ()
        others = tuple(behind(len(refs)))
        more = self._find(holder, others)
        return [*refs, *more], others[: len(more)]

    def _spread(
        self, holder: str, keys: tuple[ChunkKey, ...], behind: Behind | None, chunks: int
    ) -> tuple[list[SlotRef], tuple[ChunkKey, ...], Share]:
        """The sequence does not fit this node: find its prefix wherever it is, and have all nodes promise room."""
        nodes = self._nodes
        assert nodes is not None
        self._wait_for_room(lambda: nodes.spread(holder, chunks), SPREAD_POLL_S)
        refs, others = self._find_all(holder, keys, behind)
        return refs, others, self._wait_for_room(lambda: nodes.promise_rest(holder), SPREAD_POLL_S)

    def _promise(self, holder: str, chunks: int) -> str:
        """Why there is no room for so many chunks; empty if there is."""
        try:
            self._wait_for_room(lambda: self._memory.promise(holder, chunks), PROMISE_POLL_S)
        except ChunkLostError:
            return ""  # a memory tier that is gone promises nothing; it will be seen when it is written to
        except OverloadedError as error:
            return str(error)
        return ""

    def _wait_for_room(self, ask: Callable[[], T], poll_s: float) -> T:
        """``ask``, again for a little while if there is no room: somebody may be leaving."""
        end_s = time.monotonic() + PROMISE_WAIT_S
        while True:
            try:
                return ask()
            except OverloadedError:
                if time.monotonic() > end_s or self._closing:
                    raise
            time.sleep(poll_s)

    def _find(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef]:
        try:
            refs = self._memory.hold_prefix(holder, keys)
        except ChunkLostError:
            return []  # a memory tier that is gone has no prefix; the prompt is prefilled
        sound = self._copies.sound_prefix(keys, refs)
        if sound < len(refs):
            drop(self._memory, keys[sound], refs[sound])
        return refs[:sound]


def drop(memory: ColdMemory, key: ChunkKey, ref: SlotRef) -> None:
    """Forget a chunk whose bytes are wrong."""
    try:
        memory.drop(key, ref)
    except ChunkLostError:
        return  # the owner is gone, and with it what was to be forgotten


def release(memory: ColdMemory, holder: str) -> None:
    """Let go of all that ``holder`` holds."""
    try:
        memory.release(holder)
    except ChunkLostError:
        return  # the owner is gone, and its holds with it


def record_session(
    memory: ColdMemory, session_id: str, keys: Sequence[ChunkKey], state_keys: Sequence[ChunkKey]
) -> None:
    """A request of the session has ended with these chunks and pieces of a state."""
    try:
        memory.record_session(session_id, keys, state_keys)
    except ChunkLostError as error:
        logger.warning("session %s is not recorded: %s", session_id, error)
