"""Cold memory as a worker sees it: the memory tier of its own node through Ray, and the bytes in the mapped arena."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from random import uniform
from typing import Any, cast

from ray.actor import ActorHandle

from forecache.workers.errors import ArenaError, ArenaMissingError, ChunkLostError, OverloadedError, ReleasedError
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.stats import TierStats
from forecache.workers.memory.arena.writers import OpenWrites
from forecache.workers.memory.client.peers import PendingRows, RemotePeers, TierAwayError, get_answer
from forecache.workers.memory.format.hold_id import Released, worker_of
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.slots import Reservation, SlotRef
from forecache.workers.memory.format.spread_quota import SpreadQuota

logger = logging.getLogger(__name__)

RETRY_S = 0.2
SWEEP_PERIOD_S = 2.0


class RemoteMemory:
    """`ColdMemory` over a `MemoryTier` actor of the same node.

    Name holders like :class:`.hold_id.HoldId` does, since the tier reclaims the holds of a dead worker by its id. When
    the tier dies, calls wait for its restart, ``restart_deadline_s`` at most, and repeat the holds of its former life.
    Raises :class:`ChunkLostError` if the tier does not answer in ``deadline_s`` (it may execute the call later), and
    :class:`ArenaError` when it does not come back, or comes back with another arena than the one mapped here.

    Every hold of this worker at the tier ends when its holder does: the tier refuses calls that come after a release,
    and :meth:`sweep`, which a thread calls every ``SWEEP_PERIOD_S``, repeats releases that got lost.
    """

    def __init__(
        self,
        find_tier: "Callable[[], ActorHandle[Any]]",
        deadline_s: float,
        *,
        fetch_deadline_s: float = 30.0,
        start_deadline_s: float = 120.0,
        restart_deadline_s: float = 30.0,
        peers: RemotePeers | None = None,
    ) -> None:
        """Waits ``start_deadline_s`` for a tier that is just starting: reserving a large arena takes a while.

        ``fetch_deadline_s``: time for the tier to fetch a prefix from other nodes; ``peers``: the tiers of these.
        Raises :class:`ArenaError` when the tier could not create its arena.
        """
        self._find_tier = find_tier
        self._tier = find_tier()
        self._deadline_s = deadline_s
        self._fetch_deadline_s = fetch_deadline_s
        self._restart_deadline_s = restart_deadline_s
        # in the order of the chunks; holds and releases may come from different threads
        self._held: dict[str, dict[ChunkKey, None]] = {}
        self._quotas: dict[str, int] = {}
        self._living: dict[str, None] = {}  # all holders that have asked for something
        self._released = Released()
        self._worker_ids: set[str] = set()
        self._orphans: set[str] = set()
        self._lock = threading.Lock()
        self._arena = self._attach(time.monotonic() + start_deadline_s)
        self._writes = OpenWrites(self._arena)
        self._life = self._arena.life
        self._spread = RemoteSpread(self, peers) if peers is not None and self._arena.record_slots else None
        self._closing = threading.Event()
        threading.Thread(target=self._sweep_again, name="forecache-holds", daemon=True).start()

    @property
    def arena(self) -> Arena:
        """The node's arena, mapped into this process."""
        return self._arena

    @property
    def spread(self) -> "RemoteSpread | None":
        """Sequences that keep chunks on other nodes; ``None``: every sequence must fit this node."""
        return self._spread

    def hold_prefix(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef]:
        """Hold the longest run of ``keys``, from the first, that any node stores; return its slots here."""
        self._begin(holder)
        deadline_s = self._deadline_s + self._fetch_deadline_s
        refs = cast(list[SlotRef], self._call("hold_prefix", holder, keys, deadline_s=deadline_s))
        held = dict(zip(keys, refs, strict=False))
        self._note(holder, [key for key, ref in held.items() if not ref.remote])
        if self._spread is not None:
            self._spread.note_places(holder, [key for key, ref in held.items() if ref.remote])
        return refs

    def hold_local_prefix(self, holder: str, keys: Sequence[ChunkKey]) -> tuple[list[SlotRef], bool]:
        """As :meth:`hold_prefix`, limited to this node's memory; also returns whether the run continues elsewhere."""
        self._begin(holder)
        refs, elsewhere = cast(tuple[list[SlotRef], bool], self._call("hold_local_prefix", holder, keys))
        self._note(holder, keys[: len(refs)])
        return refs, elsewhere

    def hold(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        """Hold the stored ones of ``keys``; ``None`` for each that is not stored."""
        self._begin(holder)
        refs = cast(list[SlotRef | None], self._call("hold", holder, keys))
        self._note(holder, [key for key, ref in zip(keys, refs, strict=True) if ref is not None])
        return refs

    def reserve_slots(self, holder: str, keys: Sequence[ChunkKey]) -> list[Reservation]:
        """Reserve slots to write ``keys`` into, see :meth:`ArenaStore.reserve_slots`."""
        self._begin(holder)
        number, places = self._writes.begin(), list[Reservation]()
        try:
            places = cast(list[Reservation], self._call("reserve_slots", holder, keys, reports_writes=True))
        finally:
            # a late answer is ignored
            self._writes.answered(number, holder, [place.ref for place in places if not place.stored])
        self._note(holder, [place.key for place in places if place.stored])
        return places

    def commit(self, holder: str, refs: Sequence[tuple[ChunkKey, SlotRef]]) -> None:
        """These reserved slots are written and sealed: from now on others find their chunks."""
        self._writes.ended([ref for _, ref in refs])
        self._call("commit", holder, refs, reports_writes=True)
        self._note(holder, [key for key, _ in refs])

    def drop(self, key: ChunkKey, ref: SlotRef) -> None:
        """The chunk read from ``ref`` was wrong: forget it everywhere."""
        self._writes.ended([ref])
        self._call("drop", key, ref)

    def reserve_quota(self, holder: str, chunks: int) -> None:
        """Reserve a quota of ``chunks`` slots in all, see :meth:`ArenaStore.reserve_quota`."""
        self._begin(holder)
        self._call("reserve_quota", holder, chunks)
        with self._lock:
            if holder in self._living:
                self._quotas[holder] = chunks

    def start_over(self, holder: str) -> None:
        """Release the slots and the quota of ``holder``, which stays alive."""
        self._begin(holder, again=True)
        self._writes.released(holder)
        self._call("start_over", holder)

    def release(self, holder: str) -> None:
        """Release all that ``holder`` holds, for good; unknown holders are fine."""
        with self._lock:
            self._released.add(holder)
            self._living.pop(holder, None)
            self._held.pop(holder, None)
            self._quotas.pop(holder, None)
        was_spread = self._spread is not None and self._spread.forget(holder)
        self._writes.released(holder)
        self._call("release", holder, was_spread, reports_writes=True)

    def record_session(self, session_id: str, keys: Sequence[ChunkKey], state_keys: Sequence[ChunkKey] = ()) -> None:
        """A request of the session has ended with the chunks ``keys``; ``state_keys``: the pieces of its snapshot."""
        self._call("record_session", session_id, list(keys), list(state_keys))

    def stats(self) -> TierStats:
        """Asks once: raises :class:`ChunkLostError` while the tier is away. Also reports this worker's writes, so that
        even an idle worker frees slots that were taken back from it."""
        return cast(
            TierStats,
            get_answer(
                self._tier.stats.remote(self._writes.news()), "the memory tier, asked for stats,", self._deadline_s
            ),
        )

    def holders(self) -> list[str]:
        """Names of all that may hold something at the tier."""
        with self._lock:
            return list(self._living)

    def sweep(self) -> None:
        """Release what the tier holds for holders of this worker that are released here.

        Only after two sweeps have found a holder, since its release may be on the way. Raises :class:`ChunkLostError`
        when the tier does not answer.
        """
        with self._lock:
            floors = {worker_id: self._released.floor(worker_id) for worker_id in self._worker_ids}
        orphans: set[str] = set()
        for worker_id, floor in floors.items():
            self._hold_again()
            # with this life: a tier that has been restarted since does not know all holds yet
            asked: Any = self._tier.holders_of.remote(worker_id, floor, self._life)
            known = cast(list[str], get_answer(asked, "the memory tier, asked for its holders,", self._deadline_s))
            with self._lock:
                orphans.update(holder for holder in known if holder not in self._living)
        for holder in sorted(orphans & self._orphans):
            logger.warning("the memory tier still held chunks for %s, which has ended: released", holder)
            get_answer(self._tier.release.remote(holder, True), "the memory tier, asked to release,", self._deadline_s)
        self._orphans = orphans

    def close(self) -> None:
        """Close the arena's file; the mapping ends with the last tensor over it."""
        self._closing.set()
        self._arena.close()

    def _sweep_again(self) -> None:
        while not self._closing.wait(SWEEP_PERIOD_S):
            try:
                self.sweep()
            except (ChunkLostError, ArenaError) as error:
                logger.debug("the sweep of holds at the memory tier is retried later: %s", error)

    def _begin(self, holder: str, *, again: bool = False) -> None:
        """Note ``holder`` before a call for it. ``again``: it starts again, without holds. Raises
        :class:`ReleasedError`."""
        with self._lock:
            self._released.check(holder)
            self._living[holder] = None
            self._worker_ids.add(worker_of(holder))
            if again:
                self._held.pop(holder, None)
                self._quotas.pop(holder, None)

    def _attach(self, end_s: float) -> Arena:
        while True:
            try:
                path = get_answer(self._tier.arena_path.remote(), "the memory tier", max(0.0, end_s - time.monotonic()))
                return Arena.attach(cast(str, path))
            except (ChunkLostError, ArenaMissingError):
                # the tier is restarting, or about to restart since its file was changed
                if time.monotonic() > end_s:
                    raise
            time.sleep(RETRY_S)
            self._tier = self._find_tier()

    def _note(self, holder: str, keys: Sequence[ChunkKey]) -> None:
        with self._lock:
            if holder in self._living:  # else it was released meanwhile
                self._held.setdefault(holder, {}).update(dict.fromkeys(keys))

    def _forget_held(self, holder: str, keys: Sequence[ChunkKey]) -> None:
        with self._lock:
            for key in keys:
                self._held.get(holder, {}).pop(key, None)

    def _call(
        self,
        method: str,
        *args: object,
        deadline_s: float | None = None,
        waits: bool = False,
        reports_writes: bool = False,
    ) -> object:
        """The answer of `MemoryTier.<method>`, in `tier/actor.py`; repeated while the tier is being restarted.

        ``waits``: the call waits for other tiers, so its deadline is longer. ``reports_writes``: pass the current
        :class:`WriterNews` as the last argument, made anew for each try.
        """
        deadline_s = self._deadline_s if deadline_s is None else deadline_s
        deadline_s += self._deadline_s if waits else 0.0
        whom = f"the memory tier, asked to {method},"
        end_s = time.monotonic() + self._restart_deadline_s
        while True:
            try:
                self._hold_again()
                report = (self._writes.news(),) if reports_writes else ()
                # Process boundary: the tier is a Ray actor, and a restart may need a new handle.
                return get_answer(getattr(self._tier, method).remote(*args, *report), whom, deadline_s)
            except TierAwayError as error:
                if time.monotonic() > end_s:
                    raise ArenaError(f"the memory tier of this node does not come back: {error}") from error
            time.sleep(RETRY_S * uniform(0.5, 1))
            self._tier = self._find_tier()

    def _hold_again(self) -> None:
        """After a restart the tier knows no holds: repeat them."""
        if not self._arena.is_intact():
            raise ArenaError(
                f"the arena {self._arena.path} was replaced or truncated since it was mapped: restart the worker"
            )
        life = self._arena.life
        if life == self._life:
            return
        with self._lock:
            held = {holder: list(keys) for holder, keys in self._held.items()}
            quotas = dict(self._quotas)
        spread = {} if self._spread is None else self._spread.held()
        whom = "the memory tier, restarted,"
        for holder, (chunks, places) in spread.items():
            tier: Any = self._tier
            again = tier.spread_hold_again.remote(holder, chunks, held.pop(holder, []), places)
            with suppress(ReleasedError):
                get_answer(again, whom, self._deadline_s)
            if self._spread is not None and holder not in self._spread.held():
                self._tier.release.remote(holder, True)
        for holder in {**held, **quotas}:
            with suppress(OverloadedError, ReleasedError):  # new work may have come first; running sequences continue
                get_answer(self._tier.hold.remote(holder, held.get(holder, [])), whom, self._deadline_s)
                if holder in quotas:
                    get_answer(self._tier.reserve_quota.remote(holder, quotas[holder]), whom, self._deadline_s)
            with self._lock:
                released = holder not in self._held and holder not in self._quotas
            if released:
                self._tier.release.remote(holder)
        self._life = life


class RemoteSpread:
    """A worker's *spread* sequences: those whose chunks do not fit into this node's arena.

    The first chunks of a spread sequence stay here, other nodes hold the rest for it, and only the index records of
    these lie here. The node's tier decides where chunks go (`SpreadSequences`); a layer is read straight from the tier
    that holds it. Every method but :meth:`read_layer` blocks like those of :class:`RemoteMemory`, and raises the same.
    """

    def __init__(self, memory: RemoteMemory, peers: RemotePeers) -> None:
        self._memory = memory
        self._peers = peers
        self._held: dict[str, tuple[int, dict[ChunkKey, str]]] = {}  # holder -> chunks, tiers of the remote ones
        self._lock = threading.Lock()

    def begin(self, holder: str, chunks: int) -> None:
        """Make ``holder`` a spread sequence of at most ``chunks`` chunks, and reserve its quota on this node.

        Prefixes that are found for it from now on stay on their nodes.
        """
        self._memory._begin(holder, again=True)
        with self._lock:
            self._held[holder] = chunks, {}
        try:
            self._memory._call("spread_begin", holder, chunks)
        except OverloadedError:
            self.forget(holder)
            raise

    def reserve_remote_quota(self, holder: str) -> SpreadQuota:
        """Reserve quotas on other nodes for all that may follow the held prefix, and here if they have too little.
        Returns the quota of ``holder`` on this node."""
        return cast(SpreadQuota, self._memory._call("spread_reserve_remote_quota", holder, waits=True))

    def move_out(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        """Move these chunks, stored and held here, to other nodes, and release them here.

        Returns the slots of their index records; ``None`` for a chunk that no node took, which is released too.
        """
        refs = cast(list[SlotRef | None], self._memory._call("spread_move_out", holder, list(keys), waits=True))
        self._memory._forget_held(holder, keys)
        self.note_places(holder, [key for key, ref in zip(keys, refs, strict=True) if ref is not None])
        return refs

    def fetch(self, holder: str, reader: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        """Copy remote chunks of ``holder`` into this arena, and hold them for ``reader``; ``None`` for a lost one.

        At most :attr:`SpreadQuota.max_in_flight` chunks; release ``reader`` before asking for others.
        """
        self._memory._begin(reader)
        return cast(list[SlotRef | None], self._memory._call("spread_fetch", holder, reader, list(keys), waits=True))

    def read_layer(self, holder: str, keys: Sequence[ChunkKey], layer: int) -> PendingRows:
        """Ask the nodes that hold remote chunks of ``holder`` for one layer of them; does not wait. Any thread may
        call."""
        with self._lock:
            _, places = self._held[holder]
            by_tier: dict[str, list[ChunkKey]] = {}
            for key in keys:
                by_tier.setdefault(places[key], []).append(key)
        asked = [(tier_id, self._peers.read_layer(tier_id, holder, part, layer)) for tier_id, part in by_tier.items()]
        return PendingRows(self._peers, list(keys), asked)

    def note_places(self, holder: str, keys: Sequence[ChunkKey]) -> None:
        """Other nodes hold ``keys`` for ``holder`` now: ask the tier which."""
        if keys:
            places = cast(list[str], self._memory._call("spread_places", holder, list(keys)))
            with self._lock:
                if holder in self._held:
                    self._held[holder][1].update(zip(keys, places, strict=True))

    def forget(self, holder: str) -> bool:
        """``holder`` is released. Returns whether it was spread."""
        with self._lock:
            return self._held.pop(holder, None) is not None

    def held(self) -> dict[str, tuple[int, dict[ChunkKey, str]]]:
        """For each holder, the most chunks it may have, and the tier of each remote one."""
        with self._lock:
            return {holder: (chunks, dict(places)) for holder, (chunks, places) in self._held.items()}
