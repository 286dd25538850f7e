"""What a tier does with the others: brings chunks here, copies them, and moves them where there is room."""

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
"""Times that a prefix is looked for while it is on the move."""
FREE_SHARE = 16
"""A tier moves chunks away while fewer than this part of its slots could be had without loss, and takes none in then:
full tiers would send their chunks round and round."""
VERIFY_CHUNKS = 4096
RECHECKED_CHUNKS = 128
"""Of the chunks that go first, since others answer for them: so many are asked for in each round."""
MAX_PENDING = 100_000


class ChunkExchange:
    """One tier's dealings with its peers: :meth:`fetch` for those who ask, the rest in a thread of its own.

    Whoever a chunk came to last answers for it; the copy that is left where it came from goes first when room is
    needed. So a chunk that is fetched into a full arena changes places with a cold one, and nothing is lost while any
    tier has room.
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
        """``publish`` tells the catalog of chunks at once; ``disk`` takes what no tier has room for."""
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
        """The disk's listener: what has gone there goes first here no longer."""
        if not stored:
            self._store.set_copied([key], False)

    def fetch_prefix(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef]:
        """As :meth:`ArenaStore.hold_prefix`, after what is missing was brought here from disk and from other tiers.

        Of a sequence that is spread it stays where it is.
        """
        if holder in self.spread:
            return self.spread.hold_in_place(holder, keys)
        refs = self._store.hold_prefix(holder, keys)
        deadline_s = time.monotonic() + self._config.fetch_deadline_s
        for _ in range(FETCHES):
            if len(refs) == len(keys):
                break
            from_disk = self.from_disk(holder, keys[len(refs) :])
            if from_disk:
                refs = self._store.hold_prefix(holder, keys)
            if not self._fetch(holder, keys[len(refs) :], deadline_s) and not from_disk:
                break
            refs = self._store.hold_prefix(holder, keys)
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
            return refs, False  # as if nobody had it
        return refs, bool(places[0] - {self._tier_id})

    def from_disk(self, holder: str, keys: Sequence[ChunkKey]) -> int:
        """Bring the longest run of ``keys`` that lies here on disk, and hold it; returns how many chunks came."""
        return self._from_disk(holder, keys, self._make_room_for)

    def from_disk_alone(self, holder: str, keys: Sequence[ChunkKey]) -> int:
        """As :meth:`from_disk`, asking no other tier: for calls of these. What must make room goes to the disk.

        A tier that asked another one while it answers such a call would wait in a circle once two do so with all their
        threads for each other's calls.
        """
        # one at a time: what one has made room for another would take
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
        """See to it that so many slots can be had without loss, as far as the disk can."""
        self._spill(self._store.coldest(chunks - self._store.room))

    def _fetch(self, holder: str, keys: Sequence[ChunkKey], deadline_s: float) -> bool:
        """Bring the longest run of ``keys`` that somebody has, and hold what came. Returns whether it is worth another
        try: chunks are moved while they are looked for."""
        try:
            places = self._catalog.locate(keys)
        except CatalogUnavailableError:
            return False  # as if nobody had them
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
                # the publisher says so; without the catalog nobody is known here
                backoff_s = min(10.0, max(0.2, 2 * backoff_s))
                self._stopping.wait(backoff_s * uniform(0.5, 1))
                continue
            # a little later: what is published and asked for comes in bursts
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
        """Tiers have gone, and copies with them."""
        for keys in batches(self._store.copied(), VERIFY_CHUNKS):
            self._recheck(self._store, keys, self._disk)
        if self._config.replicas > 1:
            self._uncopied.extend(self._store.keys())

    def _recheck(self, store: ArenaStore, keys: Sequence[ChunkKey], other: ArenaStore | None) -> None:
        """Copies are evicted without a word. Those of ``keys``, which go first in ``store``, that are neither at
        another tier nor ``other`` it go first no longer."""
        if not keys:
            return
        here = other.stored(keys) if other is not None else [False] * len(keys)
        places = zip(keys, self._catalog.locate(keys), here, strict=True)
        store.set_copied([key for key, tiers, is_here in places if not is_here and not tiers - {self._tier_id}], False)

    def _replicate(self, tiers: Mapping[str, TierRecord]) -> None:
        """Copy chunks that have too few copies to those next in their order."""
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
                return  # no room, or no answer: again later

    def _make_room(self, tiers: Mapping[str, TierRecord]) -> None:
        """Before chunks have to go for good, others may have room for the coldest."""
        coldest = self._store.coldest(self._wanted_room - self._store.room)
        if coldest:
            # also to those that have copies: whether they will keep them they alone know
            self._move_away(coldest, {tier_id for tier_id, tier in tiers.items() if has_room(tier)})
            self._spill(self._store.coldest(self._wanted_room - self._store.room))

    def _move_away(self, keys: Sequence[ChunkKey], tier_ids: Collection[str]) -> None:
        """Have others of ``tier_ids`` answer for ``keys``, as far as they have room."""
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
        """Have the disk answer for ``keys``; what is oldest there goes."""
        if self._disk is None:
            return
        for part in batches(keys, self.fetcher.batch_chunks):
            batch = read(self._store, part)
            taken = store_batch(self._disk, batch)
            self._store.set_copied(taken, True, batch.mark)
            # what has gone from the disk meanwhile was told of before it was marked
            still = self._disk.stored(taken)
            self._store.set_copied([key for key, is_there in zip(taken, still, strict=True) if not is_there], False)
            self.counters.spilled_chunks += len(taken)

    def _by_tier(self, targets: list[tuple[ChunkKey, set[str]]]) -> Iterator[tuple[str, list[ChunkKey]]]:
        return self.fetcher.calls(sorted(targets, key=lambda target: min(target[1])))

    def _send(self, tier_id: str, keys: list[ChunkKey], *, copied_only: bool) -> list[ChunkKey]:
        """Returns what ``tier_id`` has now, and what is stored here no longer."""
        batch = read(self._store, keys)
        gone = set(keys) - set(batch.keys)
        try:
            taken = self._peers.store_batch(tier_id, batch, copied_only=copied_only) if len(batch) else []
            return [*gone, *taken]
        except ChunkLostError as error:
            logger.warning("%d chunks were not sent: %s", len(keys), error)
            return list(gone)


def wanted_room(slots: int) -> int:
    """Slots that a tier of so many wants to have without loss."""
    return -(-slots // FREE_SHARE)


def has_room(tier: TierRecord) -> bool:
    return tier.slots - tier.used_slots > wanted_room(tier.slots)
