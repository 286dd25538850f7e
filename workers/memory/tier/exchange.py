"""A tier's work with the other tiers and its disk: fetch chunks, replicate them, and move them to free room."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from random import uniform

from forecache.workers.errors import CatalogUnavailableError, ChunkLostError
from forecache.workers.memory.arena.records import RecordSlots
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.client.peers import RemotePeers
from forecache.workers.memory.config import MemoryConfig
from forecache.workers.memory.format.keys import ChunkKey, batches
from forecache.workers.memory.format.slots import SlotRef
from forecache.workers.memory.tier.catalog import Catalog, TierRecord
from forecache.workers.memory.tier.fetch import ChunkFetcher, rendezvous
from forecache.workers.memory.tier.spread import SpreadSequences
from forecache.workers.memory.tier.transfer import read, store_batch

logger = logging.getLogger(__name__)

FETCHES = 3
"""Attempts that may bring nothing before a prefix ends, since its chunks may move between tiers meanwhile."""
FREE_SHARE = 16
"""A tier moves chunks away while less than this part of its slots (a sixteenth) is available without loss, and then
takes none in: full tiers would send their chunks in circles."""
VERIFY_CHUNKS = 4096
RECHECKED_CHUNKS = 128
"""Copied chunks, first in the order of eviction, whose other copies are looked up in each round."""
MAX_PENDING = 100_000


class ChunkExchange:
    """One tier's work with its peers: :meth:`fetch_prefix` for callers, the rest in its own thread.

    The tier that received a chunk last answers for it; the copy where it came from is evicted first. So a chunk that is
    fetched into a full arena trades places with a cold one, and nothing is lost while any tier has room.
    """

    def __init__(
        self,
        tier_id: str,
        store: ArenaStore,
        catalog: Catalog,
        peers: RemotePeers,
        config: MemoryConfig,
        publish: Callable[[Sequence[ChunkKey]], None],
        disk: ArenaStore | None = None,
    ) -> None:
        """``publish`` tells the catalog of chunks at once; ``disk`` stores chunks that no tier has room for."""
        self.records = RecordSlots(store.arena)
        self._tier_id = tier_id
        self._store = store
        self._disk = disk
        self._catalog = catalog
        self._peers = peers
        self._config = config
        self.fetcher = ChunkFetcher(store, peers, publish, self._make_room_for)
        self._wanted_room = wanted_room(store.arena.slots)
        self._uncopied: deque[ChunkKey] = deque(maxlen=MAX_PENDING)
        self._living: frozenset[str] = frozenset()
        self.counters = self.fetcher.counters
        self._wake = threading.Event()
        self.spread = SpreadSequences(
            tier_id, store, self.records, catalog, peers, self.fetcher, config, self._wake.set
        )
        self._hosting = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chunk-exchange", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def changed(self, key: ChunkKey, stored: bool) -> None:
        """The store's listener."""
        if stored:
            if self._config.replicas > 1:
                self._uncopied.append(key)
            self._wake.set()

    def disk_changed(self, key: ChunkKey, stored: bool) -> None:
        """The disk's listener: a chunk that is gone from there is not copied any more."""
        if not stored:
            self._store.set_copied([key], False)

    def fetch_prefix(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef]:
        """As :meth:`ArenaStore.hold_prefix`, after copying missing chunks here from disk and from other tiers. Chunks
        of a spread sequence stay where they are.

        A prefix may alternate between disk and other tiers any number of times. The search goes on while it gets longer
        and until ``fetch_deadline_s``."""
        if holder in self.spread:
            return self.spread.hold_in_place(holder, keys)
        refs = self._store.hold_prefix(holder, keys)
        deadline_s = time.monotonic() + self._config.fetch_deadline_s
        attempts = 0
        while len(refs) < len(keys) and attempts < FETCHES:
            found = len(refs)
            from_disk = self.from_disk(holder, keys[len(refs) :])
            if from_disk:
                refs = self._store.hold_prefix(holder, keys)
            if not self._fetch(holder, keys[len(refs) :], deadline_s) and not from_disk:
                break
            refs = self._store.hold_prefix(holder, keys)
            attempts = 0 if len(refs) > found else attempts + 1
            if time.monotonic() > deadline_s:
                break
        return refs

    def hold_local_prefix(self, holder: str, keys: Sequence[ChunkKey]) -> tuple[list[SlotRef], bool]:
        """As :meth:`ArenaStore.hold_prefix`, and whether the next chunk lies on disk or at another tier."""
        refs = self._store.hold_prefix(holder, keys)
        following = keys[len(refs) : len(refs) + 1]
        if not following:
            return refs, False
        if self._disk is not None and any(self._disk.stored(following)):
            return refs, True
        try:
            places = self._catalog.locate(following)
        except CatalogUnavailableError:
            return refs, False  # as if no other tier had it
        return refs, bool(places[0] - {self._tier_id})

    def from_disk(self, holder: str, keys: Sequence[ChunkKey]) -> int:
        """Copy the longest run of ``keys`` that lies on this node's disk, and hold it; returns how many chunks came."""
        return self._from_disk(holder, keys, self._make_room_for)

    def from_disk_alone(self, holder: str, keys: Sequence[ChunkKey]) -> int:
        """As :meth:`from_disk`, without calling another tier: for calls of other tiers. Makes room by spilling to the
        disk.

        Two tiers that called each other while they answer such calls could block all their threads and wait in a
        circle.
        """
        # one at a time: a second call would take the room that the first one made
        with self._hosting:
            return self._from_disk(holder, keys, self._spill_for)

    def _from_disk(self, holder: str, keys: Sequence[ChunkKey], make_room: Callable[[int], None]) -> int:
        if self._disk is None:
            return 0
        here, on_disk = self._store.stored(keys), self._disk.stored(keys)
        run = next((i for i, known in enumerate(zip(here, on_disk, strict=True)) if not any(known)), len(keys))
        wanted = [key for key, is_here in zip(keys[:run], here, strict=False) if not is_here]
        count = 0
        for part in batches(wanted, self.fetcher.batch_chunks):
            make_room(len(part))
            batch = read(self._disk, part)
            taken = store_batch(self._store, batch, holder)
            self._disk.set_copied(taken, True, batch.mark)
            count += len(taken)
            if len(taken) < len(part):
                break
        self.counters.disk_recalled_chunks += count
        return count

    def _make_room_for(self, chunks: int) -> None:
        missing = chunks - self._store.room
        if missing > 0:
            self._move_away(self._store.coldest(missing), self._living)
            self._spill_for(chunks)

    def _spill_for(self, chunks: int) -> None:
        """Make so many slots available without loss, as far as the disk has room."""
        self._spill(self._store.coldest(chunks - self._store.room))

    def _fetch(self, holder: str, keys: Sequence[ChunkKey], deadline_s: float) -> bool:
        """Copy the longest run of ``keys`` that any tier has, and hold what came. Returns whether to try again, since
        chunks move while they are looked for."""
        try:
            places = self._catalog.locate(keys)
        except CatalogUnavailableError:
            return False  # as if no other tier had them
        here = self._store.stored(keys)
        wanted = []
        for key, tier_ids, is_here in zip(keys, places, here, strict=True):
            others = tier_ids - {self._tier_id}
            if not is_here and not others:
                break
            if not is_here:
                wanted.append((key, others))
        came = self.fetcher.bring(holder, wanted, deadline_s)
        return bool(wanted) and time.monotonic() < deadline_s and (bool(came) or self._store.room > 0)

    def _run(self) -> None:
        backoff_s = 0.0
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                self._round()
                backoff_s = 0.0
            except CatalogUnavailableError:
                # the publisher logs it; without the catalog no other tier is known
                backoff_s = min(10.0, max(0.2, 2 * backoff_s))
                self._stopping.wait(backoff_s * uniform(0.5, 1))
                continue
            # a short pause, since changes come in bursts
            self._stopping.wait(min(0.2, self._config.heartbeat_s))
            self._wake.wait(self._config.heartbeat_s)

    def _round(self) -> None:
        tiers = {tier.tier_id: tier for tier in self._catalog.tiers() if tier.tier_id != self._tier_id}
        if self._living - tiers.keys():
            self._lost_tiers()
        self._living = frozenset(tiers)
        self._recheck(self._store, self._store.coldest(RECHECKED_CHUNKS, copied=True), self._disk)
        if self._disk is not None:
            self._recheck(self._disk, self._disk.coldest(RECHECKED_CHUNKS, copied=True), self._store)
        self.spread.tick(tiers)
        self._replicate(tiers)
        self._make_room(tiers)

    def _lost_tiers(self) -> None:
        """Tiers are gone, and their copies with them."""
        for keys in batches(self._store.copied(), VERIFY_CHUNKS):
            self._recheck(self._store, keys, self._disk)
        if self._config.replicas > 1:
            self._uncopied.extend(self._store.keys())

    def _recheck(self, store: ArenaStore, keys: Sequence[ChunkKey], other: ArenaStore | None) -> None:
        """Unmark those of ``keys`` that have no other copy, at another tier or in ``other``, so that they are not
        evicted first. Copies vanish silently."""
        if not keys:
            return
        here = other.stored(keys) if other is not None else [False] * len(keys)
        places = zip(keys, self._catalog.locate(keys), here, strict=True)
        store.set_copied([key for key, tiers, is_here in places if not is_here and not tiers - {self._tier_id}], False)

    def _replicate(self, tiers: Mapping[str, TierRecord]) -> None:
        """Copy chunks that have too few copies to the next tiers in their rendezvous order."""
        while self._uncopied and tiers and not self._stopping.is_set():
            keys = [self._uncopied.popleft() for _ in range(min(len(self._uncopied), VERIFY_CHUNKS))]
            try:
                places = self._catalog.locate(keys)
            except CatalogUnavailableError:
                self._uncopied.extend(keys)
                raise
            targets: list[tuple[ChunkKey, set[str]]] = []
            for key, holders in zip(keys, places, strict=True):
                holding = holders | {self._tier_id}
                missing = self._config.replicas - len(holding)
                if missing > 0 and rendezvous(key, holding)[0] == self._tier_id:
                    targets += [(key, {other}) for other in rendezvous(key, tiers.keys() - holding)[:missing]]
            unsent: dict[ChunkKey, None] = {}
            refusing: set[str] = set()
            for tier_id, batch in self._by_tier(targets):
                sent = set() if tier_id in refusing else set(self._send(tier_id, batch, copied_only=False))
                self.counters.replicated_chunks += len(sent)
                if len(sent) < len(batch):
                    refusing.add(tier_id)
                    unsent |= dict.fromkeys(key for key in batch if key not in sent)
            if unsent:
                self._uncopied.extend(unsent)
                return  # no room, or no answer: try again later

    def _make_room(self, tiers: Mapping[str, TierRecord]) -> None:
        """Move the coldest chunks to tiers with room before they would be evicted for good."""
        coldest = self._store.coldest(self._wanted_room - self._store.room)
        if coldest:
            # also tiers that have copies already: only they know whether they will keep them
            self._move_away(coldest, {tier_id for tier_id, tier in tiers.items() if has_room(tier)})
            self._spill(self._store.coldest(self._wanted_room - self._store.room))

    def _move_away(self, keys: Sequence[ChunkKey], tier_ids: Collection[str]) -> None:
        """Have tiers of ``tier_ids`` answer for ``keys``, as far as they have room."""
        untried = {key: rendezvous(key, tier_ids) for key in keys}
        while any(untried.values()) and not self._stopping.is_set():
            targets = [(key, {order.pop(0)}) for key, order in untried.items() if order]
            for tier_id, batch in self._by_tier(targets):
                since = self._store.mark
                sent = self._send(tier_id, batch, copied_only=True)
                self._store.set_copied(sent, True, since)
                self.counters.moved_chunks += len(sent)
                for key in sent:
                    del untried[key]

    def _spill(self, keys: Sequence[ChunkKey]) -> None:
        """Have the disk answer for ``keys``; it evicts its oldest chunks."""
        if self._disk is None:
            return
        for part in batches(keys, self.fetcher.batch_chunks):
            batch = read(self._store, part)
            taken = store_batch(self._disk, batch)
            self._store.set_copied(taken, True, batch.mark)
            # a chunk that the disk evicted meanwhile was reported before it was marked
            still = self._disk.stored(taken)
            self._store.set_copied([key for key, is_there in zip(taken, still, strict=True) if not is_there], False)
            self.counters.spilled_chunks += len(taken)

    def _by_tier(self, targets: list[tuple[ChunkKey, set[str]]]) -> Iterator[tuple[str, list[ChunkKey]]]:
        return self.fetcher.calls(sorted(targets, key=lambda target: min(target[1])))

    def _send(self, tier_id: str, keys: list[ChunkKey], *, copied_only: bool) -> list[ChunkKey]:
        """Returns the keys that ``tier_id`` stores now, and those that are not stored here any more."""
        batch = read(self._store, keys)
        gone = set(keys) - set(batch.keys)
        try:
            taken = self._peers.store_batch(tier_id, batch, copied_only=copied_only) if len(batch) else []
            return [*gone, *taken]
        except ChunkLostError as error:
            logger.warning("%d chunks were not sent: %s", len(keys), error)
            return list(gone)


def wanted_room(slots: int) -> int:
    """Slots that a tier of so many wants to have available without loss."""
    return -(-slots // FREE_SHARE)


def has_room(tier: TierRecord) -> bool:
    return tier.slots - tier.used_slots > wanted_room(tier.slots)
