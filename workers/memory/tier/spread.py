"""Sequences that do not fit into their node's arena, and so keep chunks on several nodes.

:class:`SpreadSequences` is the side of a sequence's own node; :class:`HostedSequences` is the side of a node that holds
chunks for sequences of others.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from forecache.workers.errors import (
    CatalogUnavailableError,
    ChunkLostError,
    InvalidRequestError,
    OverloadedError,
    ReleasedError,
)
from forecache.workers.memory.arena.layer_digests import LayerDigests
from forecache.workers.memory.arena.records import RecordSlots
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.client.peers import RemotePeers
from forecache.workers.memory.config import MemoryConfig
from forecache.workers.memory.format.chunk_batch import ChunkBatch, LayerBatch, RecordBatch
from forecache.workers.memory.format.hold_id import Released, worker_of
from forecache.workers.memory.format.keys import ChunkKey, batches
from forecache.workers.memory.format.layout import ChunkLayout
from forecache.workers.memory.format.slots import SlotRef
from forecache.workers.memory.format.spread_quota import SpreadQuota, spread_quota
from forecache.workers.memory.tier.catalog import Catalog, TierRecord
from forecache.workers.memory.tier.fetch import ChunkFetcher, rendezvous
from forecache.workers.memory.tier.transfer import read, store_batch

logger = logging.getLogger(__name__)

RETRY_S = 0.5


@dataclass
class _Spread:
    """One spread sequence of at most ``chunks`` chunks. ``own``: chunks that stay here. ``places``: the tier of each
    other one. ``quotas``: the slots that each tier has reserved for it. ``asked``: all tiers that may hold something
    for it; a tier that did not answer may still do later what it was asked. ``ended``: it was released."""

    chunks: int
    quota: SpreadQuota
    own: set[ChunkKey] = field(default_factory=set)
    places: dict[ChunkKey, str] = field(default_factory=dict)
    quotas: dict[str, int] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    ended: bool = False

    def room_at(self, tier_id: str) -> int:
        """Chunks that the tier still has a quota for."""
        return self.quotas.get(tier_id, 0) - sum(place == tier_id for place in self.places.values())


class SpreadSequences:
    """Keeps chunks of this node's sequences on other tiers, which hold them under the sequences' names.

    A tier that was restarted is asked to hold them again.

    Every hold on another tier ends when its sequence does. A release goes to each tier that was asked for something,
    and once more when a call returns after the release. A tier refuses calls for released holders. Some releases still
    get lost: the tier is out of reach, or this one restarts between a release and its :meth:`tick`. :meth:`sweep` finds
    those: it asks other tiers which of this node's holders they know. It covers only workers that have reported all
    their holders to this life of the tier (:meth:`vouch`): without that, a restarted tier would take every holder for a
    released one.
    """

    def __init__(
        self,
        tier_id: str,
        store: ArenaStore,
        records: RecordSlots,
        catalog: Catalog,
        peers: RemotePeers,
        fetcher: ChunkFetcher,
        config: MemoryConfig,
        wake: Callable[[], None],
    ) -> None:
        """``wake`` makes the exchange's thread call :meth:`tick` soon."""
        self._tier_id = tier_id
        self._store = store
        self._records = records
        self._catalog = catalog
        self._peers = peers
        self._fetcher = fetcher
        self._config = config
        self._wake = wake
        self._lock = threading.Lock()
        self._spread: dict[str, _Spread] = {}
        self._released = Released()
        self._incarnations: dict[str, str] = {}
        self._slots_of: dict[str, int] = {}  # of all tiers seen in this life
        self._to_release: dict[str, set[str]] = {}  # tier id -> holders
        self._ended: set[str] = set()  # holders to be released at all tiers
        self._vouched: set[str] = set()  # worker ids
        self._unclean: set[str] = set()  # tiers that may hold something for vouched workers
        self._sweep_again_s = 0.0

    def __contains__(self, holder: str) -> bool:
        return holder in self._spread

    def begin(self, holder: str, chunks: int) -> None:
        """See :meth:`.memory.RemoteSpread.begin`."""
        quota = spread_quota(self._store.arena.slots)
        spread = _Spread(chunks, quota)
        with self._lock:
            self._released.check(holder)
            if holder in self._spread:  # asked twice: the first answer got lost
                spread.asked |= self._spread[holder].asked
            self._spread[holder] = spread
        try:
            self._store.start_over(holder)  # a search on this node alone may have held something
            self._store.reserve_quota(holder, quota.slots)
            self._records.reserve_quota(holder, max(chunks - quota.local_chunks, 0))
        except (OverloadedError, ReleasedError):
            with self._lock:
                if self._spread.get(holder) is spread:
                    del self._spread[holder]
            self._store.start_over(holder)
            self._records.start_over(holder)
            raise

    def reserve_remote_quota(self, holder: str) -> SpreadQuota:
        """See :meth:`.memory.RemoteSpread.reserve_remote_quota`."""
        spread = self._of(holder)
        missing = spread.chunks - spread.quota.local_chunks - sum(spread.quotas.values())
        for tier in sorted(self._other_tiers(), key=lambda tier: tier.used_slots - tier.slots):
            if missing <= 0:
                break
            missing -= self._reserve_quota_at(tier.tier_id, holder, spread, missing)
        if missing > 0:
            granted = self._store.reserve_quota_up_to(holder, spread.quota.slots + missing) - spread.quota.slots
            spread.quota = replace(spread.quota, local_chunks=spread.quota.local_chunks + granted)
            missing -= granted
        if missing > 0:
            self._refuse_too_large(spread)
            raise OverloadedError(
                f"no room for the {spread.chunks} chunks that the request may need: this node has {spread.quota.slots} "
                f"slots for it, and even with other nodes {missing} are missing. Try again later, lower "
                "max_tokens, or raise --cold-bytes."
            )
        return spread.quota

    def _refuse_too_large(self, spread: _Spread) -> None:
        """Raise :class:`InvalidRequestError` for a sequence that would not fit into all tiers together, were they
        empty. Tiers that are away count, since they may be restarting. Does nothing where more nodes may be added."""
        if self._config.node_resource is not None and self._config.max_memory_nodes:
            return
        try:
            tiers = self._catalog.tiers()
        except CatalogUnavailableError:
            return  # the size of the cluster is unknown
        self._slots_of.update({tier.tier_id: tier.slots for tier in tiers if tier.tier_id != self._tier_id})
        here = self._store.arena.slots
        most = here - 2 * spread_quota(here).max_in_flight + sum(self._slots_of.values())
        if spread.chunks > most:
            raise InvalidRequestError(
                f"prompt and answer may need {spread.chunks} chunks, but the memory of all nodes holds {most} of one "
                "request, were it free. Shorten the prompt, lower max_tokens, raise --cold-bytes or add nodes.",
                param="messages",
            )

    def hold_in_place(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef]:
        """Hold the longest run of ``keys`` that is stored in memory anywhere, each chunk where it lies."""
        spread = self._of(holder)
        try:
            places = self._catalog.locate(keys)
        except CatalogUnavailableError:
            places = [set[str]() for _ in keys]  # as if no other tier had them
        here = self._store.stored(keys)
        run: list[tuple[ChunkKey, str]] = []
        own = len(spread.own)
        for key, tier_ids, is_here in zip(keys, places, here, strict=True):
            others = tier_ids - {self._tier_id}
            if is_here and (own < spread.quota.local_chunks or not others):
                own += 1
                run.append((key, ""))
            elif others:
                last = run[-1][1] if run else ""
                run.append((key, last if last in others else rendezvous(key, others)[0]))
            else:
                break
        refs: list[SlotRef] = []
        for tier_id, part in _runs(run):
            held = self._hold_here(holder, spread, part) if not tier_id else self._hold_at(holder, tier_id, part)
            refs += held
            if len(held) < len(part):
                break
        return refs

    def fetch(self, holder: str, reader: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        """See :meth:`.memory.RemoteSpread.fetch`. Waits for a tier that does not answer, as long as for any call: it
        may be restarting."""
        deadline_s = time.monotonic() + self._config.call_deadline_s
        refs = self._store.hold(reader, keys)
        places = self._of(holder).places
        while missing := [key for key, ref in zip(keys, refs, strict=True) if ref is None]:
            wanted = [(key, {places[key]}) for key in missing if key in places]
            came = self._fetcher.bring(reader, wanted, deadline_s, cached=True)
            if len(came) < len(missing):
                left = [key for key in missing if key not in came]
                came |= self._fetcher.bring(reader, self._replicas(left), deadline_s, cached=True)
            refs = self._store.hold(reader, keys)
            if len(came) < len(missing):
                if time.monotonic() + RETRY_S > deadline_s:
                    break
                time.sleep(RETRY_S)
        return refs

    def places(self, holder: str, keys: Sequence[ChunkKey]) -> list[str]:
        """Ids of the tiers that hold ``keys`` for ``holder``; empty for a chunk that none holds."""
        spread = self._spread.get(holder)
        return ["" if spread is None else spread.places.get(key, "") for key in keys]

    def move_out(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        """See :meth:`.memory.RemoteSpread.move_out`. Takes as long as a call may: a tier may be restarting."""
        spread = self._of(holder)
        deadline_s = time.monotonic() + self._config.call_deadline_s
        refs: dict[ChunkKey, SlotRef | None] = {}
        try:
            for part in batches(keys, self._fetcher.batch_chunks):
                refs |= self._move(holder, spread, read(self._store, part), deadline_s)
        except ReleasedError as error:
            logger.debug("the sequence ended while its chunks moved out: %s", error)
        self._store.release_chunks(holder, keys)
        return [refs.get(key) for key in keys]

    def _move(
        self, holder: str, spread: _Spread, batch: ChunkBatch, deadline_s: float
    ) -> dict[ChunkKey, SlotRef | None]:
        """Have other tiers hold ``batch``, until ``deadline_s`` at the latest. Returns the record slots of the chunks
        that they took. Raises :class:`ReleasedError` when ``holder`` is released meanwhile."""
        refs: dict[ChunkKey, SlotRef | None] = {}
        while len(batch):
            for tier_id in self._takers(holder, spread):
                taken = self._give(tier_id, holder, spread, batch)
                refs |= taken
                batch = batch.only(np.array([key not in taken for key in batch.keys], np.bool_))
                if not len(batch):
                    break
            if len(batch) and time.monotonic() + RETRY_S > deadline_s:
                break
            if len(batch):
                time.sleep(RETRY_S)
        return refs

    def _give(self, tier_id: str, holder: str, spread: _Spread, batch: ChunkBatch) -> dict[ChunkKey, SlotRef | None]:
        """Have a tier hold as much of ``batch`` as its quota allows; returns the record slots of what it took."""
        room = spread.room_at(tier_id)
        if room <= 0:
            return {}
        try:
            with self._asking(tier_id, holder, spread):
                taken = set(self._peers.store_hosted(tier_id, holder, batch.only(np.arange(len(batch)) < room)))
        except ChunkLostError as error:
            self._raise_if_ended(holder, spread)
            logger.warning("%d chunks were not taken: %s", min(room, len(batch)), error)
            return {}
        self._raise_if_ended(holder, spread)
        records = RecordBatch.of(batch.only(np.array([key in taken for key in batch.keys], np.bool_)))
        spread.places |= dict.fromkeys(records.keys, tier_id)
        self._store.set_copied(records.keys, True, batch.mark)
        return dict(zip(records.keys, self._records.put(holder, records), strict=True))

    def hold_again(
        self, holder: str, chunks: int, own: Sequence[ChunkKey], places: Mapping[ChunkKey, str]
    ) -> list[ChunkKey]:
        """This tier was restarted: hold what ``holder`` held in its former life. Returns the lost chunks."""
        with self._lock:
            self._released.check(holder)
            spread = self._spread.setdefault(holder, _Spread(chunks, spread_quota(self._store.arena.slots)))
        # as far as there is room: new work may have come first, and running sequences must continue
        self._store.reserve_quota_up_to(holder, max(spread.quota.slots, len(own) + 2 * spread.quota.max_in_flight))
        held = self._store.hold(holder, own)
        records = self._records.hold(holder, list(places))
        with self._lock:
            spread.own.update(own)
            spread.places.update(places)
            spread.asked.update(places.values())
        for tier_id in set(places.values()):
            spread.quotas[tier_id] = sum(place == tier_id for place in places.values())
        lost = [key for key, ref in zip([*own, *places], [*held, *records], strict=True) if ref is None]
        if lost:
            logger.warning("%d chunks of %s are gone", len(lost), holder)
        return lost

    def end(self, holder: str, *, was_spread: bool = False) -> None:
        """Release what ``holder`` holds on other tiers, and its records, for good. Unknown holders are fine.
        ``was_spread``: it was, though this tier may have forgotten it in a restart."""
        self._records.release(holder)
        with self._lock:
            self._released.add(holder)
            ended = self._end(holder, was_spread=was_spread)
        if ended:
            self._wake()

    def release_prefix(self, prefix: str) -> None:
        """Release all holders of a dead worker: their names start with ``prefix``."""
        with self._lock:
            for holder in {*self._spread, *self._records.holders()}:
                if holder.startswith(prefix):
                    self._records.start_over(holder)
                    self._end(holder)
            self._vouched.discard(worker_of(prefix))
            self._released.forget(worker_of(prefix))
        self._wake()

    def holders(self) -> list[str]:
        """Names of all spread sequences."""
        with self._lock:
            return list(self._spread)

    def vouch(self, worker_id: str, floor: int) -> None:
        """The worker has reported all that it holds. All serials of its holders below ``floor`` are released."""
        self._records.forget_released(worker_id, floor)
        with self._lock:
            self._released.raise_floor(worker_id, floor)
            if worker_id not in self._vouched:
                self._vouched.add(worker_id)
                self._unclean.update(self._incarnations)

    def tick(self, tiers: Mapping[str, TierRecord]) -> None:
        """Called regularly with the other living ``tiers``: send them pending releases, and have restarted ones hold
        again."""
        with self._lock:
            for tier_id in tiers if self._ended else ():
                self._to_release.setdefault(tier_id, set()).update(self._ended)
            self._ended.clear()
            due, self._to_release = self._to_release, {}
            # absent tiers, and new ones, which missed the releases while they were away
            self._unclean |= due.keys() - tiers.keys() | tiers.keys() - self._incarnations.keys()
        for tier_id, holders in due.items():
            if tier_id not in tiers:
                continue  # a sweep finds what it still holds when it is back
            try:
                self._peers.release_hosted(tier_id, sorted(holders))
            except ChunkLostError as error:
                logger.debug("%s gets the releases again later: %s", tier_id, error)
                with self._lock:
                    self._to_release.setdefault(tier_id, set()).update(holders)
        for tier_id, tier in tiers.items():
            self._slots_of[tier_id] = tier.slots
            # also a tier seen for the first time: it may have been restarted since a call
            if self._incarnations.get(tier_id) != tier.incarnation and self._renew_holds(tier_id):
                self._incarnations[tier_id] = tier.incarnation
        if time.monotonic() >= self._sweep_again_s:
            self._sweep_again_s = time.monotonic() + self._config.heartbeat_s
            self.sweep(tiers.keys())

    def sweep(self, tier_ids: Collection[str]) -> None:
        """Ask those tiers that may hold something for this node's workers for their holders, and release the holders
        that are no sequence here. A tier that holds nothing is asked again only after another call to it."""
        with self._lock:
            due, workers = self._unclean & set(tier_ids), list(self._vouched)
        floors = {worker_id: self._store.released_below(worker_id) for worker_id in workers}
        for tier_id in sorted(due) if floors else ():
            with self._lock:
                self._unclean.discard(tier_id)
            try:
                held = self._peers.hosted_holders(tier_id, floors)
            except ChunkLostError as error:
                logger.debug("%s did not return its holders: %s", tier_id, error)
                held = None
            with self._lock:
                if held != []:
                    self._unclean.add(tier_id)
                orphans = {holder for holder in held or () if holder not in self._spread}
                if orphans:
                    logger.info("%s holds chunks for %d sequences that have ended", tier_id, len(orphans))
                    self._to_release.setdefault(tier_id, set()).update(orphans)

    def check_integrity(self) -> None:
        """Raise :class:`AssertionError` when records are held for an unknown sequence."""
        # read first: a holder of records was a sequence before it got them
        holders = set(self._records.holders())
        with self._lock:
            unknown = holders - self._spread.keys()
        assert not unknown, f"records are held for {sorted(unknown)}, which are not spread"

    def _end(self, holder: str, *, was_spread: bool = False) -> bool:
        """Call with the lock held. Returns whether other tiers have to be told."""
        spread = self._spread.pop(holder, None)
        if was_spread:
            self._ended.add(holder)
        if spread is not None:
            spread.ended = True
            for tier_id in spread.asked:
                self._to_release.setdefault(tier_id, set()).add(holder)
        return was_spread or spread is not None

    @contextmanager
    def _asking(self, tier_id: str, holder: str, spread: _Spread) -> Iterator[None]:
        """Wrap each call after which the tier may hold something or reserve a quota, so that it gets the release of
        ``holder``, even one during the call. Raises :class:`ReleasedError` if the release came before."""
        with self._lock:
            if not spread.ended:
                spread.asked.add(tier_id)
                self._unclean.add(tier_id)
        self._raise_if_ended(holder, spread)
        try:
            yield
        finally:
            with self._lock:
                self._unclean.add(tier_id)
                if spread.ended:
                    self._to_release.setdefault(tier_id, set()).add(holder)
            if spread.ended:
                self._wake()

    def _raise_if_ended(self, holder: str, spread: _Spread) -> None:
        if spread.ended:
            raise ReleasedError(f"{holder} was released meanwhile")

    def _renew_holds(self, tier_id: str) -> bool:
        for holder, spread in list(self._spread.items()):
            keys = [key for key, place in list(spread.places.items()) if place == tier_id]
            quota = spread.quotas.get(tier_id, 0)
            try:
                if quota or keys:
                    with self._asking(tier_id, holder, spread):
                        self._peers.reserve_hosted_quota(tier_id, holder, max(quota, len(keys)))
                        self._peers.hold_hosted(tier_id, holder, keys)
            except ReleasedError:
                continue
            except ChunkLostError as error:
                logger.warning("%s does not hold %d chunks again yet: %s", tier_id, len(keys), error)
                return False
        return True

    def _of(self, holder: str) -> _Spread:
        spread = self._spread.get(holder)
        if spread is None:
            raise ChunkLostError(f"{holder} is no spread sequence: it was released")
        return spread

    def _hold_here(self, holder: str, spread: _Spread, keys: Sequence[ChunkKey]) -> list[SlotRef]:
        more = len(spread.own) + len(keys) - spread.quota.local_chunks
        if more > 0:
            # chunks beyond the quota that lie only here stay, if there is room
            granted = self._store.reserve_quota_up_to(holder, spread.quota.slots + more)
            keys = keys[: len(keys) - max(spread.quota.slots + more - granted, 0)]
        refs = self._store.hold_prefix(holder, keys)
        spread.own.update(keys[: len(refs)])
        return refs

    def _hold_at(self, holder: str, tier_id: str, keys: Sequence[ChunkKey]) -> list[SlotRef]:
        spread = self._of(holder)
        held = sum(place == tier_id for place in spread.places.values())
        refs: list[SlotRef] = []
        try:
            with self._asking(tier_id, holder, spread):
                spread.quotas[tier_id] = self._peers.reserve_hosted_quota(tier_id, holder, held + len(keys))
                batch = self._peers.hold_hosted(tier_id, holder, keys[: spread.quotas[tier_id] - held]).sound()
        except ChunkLostError as error:
            self._raise_if_ended(holder, spread)
            logger.warning("%d chunks are not held: %s", len(keys), error)
            return []
        found = dict(zip(batch.keys, self._records.put(holder, batch), strict=True))
        for key in keys:
            ref = found.get(key)
            if ref is None:
                break
            spread.places[key] = tier_id
            refs.append(ref)
        return refs

    def _reserve_quota_at(self, tier_id: str, holder: str, spread: _Spread, more: int) -> int:
        """Have a tier reserve ``more`` slots than it has; returns how many it adds."""
        before = spread.quotas.get(tier_id, 0)
        try:
            with self._asking(tier_id, holder, spread):
                spread.quotas[tier_id] = self._peers.reserve_hosted_quota(tier_id, holder, before + more)
        except ChunkLostError as error:
            self._raise_if_ended(holder, spread)
            logger.warning("%s reserves no quota: %s", tier_id, error)
        return spread.quotas.get(tier_id, 0) - before

    def _takers(self, holder: str, spread: _Spread) -> Iterator[str]:
        """First the tiers with an unused quota, then all others after they were asked for a larger one."""
        yield from [tier_id for tier_id in spread.quotas if spread.room_at(tier_id) > 0]
        for tier in self._other_tiers():
            if spread.room_at(tier.tier_id) <= 0:
                self._reserve_quota_at(tier.tier_id, holder, spread, spread.quota.max_in_flight)
                yield tier.tier_id

    def _other_tiers(self) -> list[TierRecord]:
        try:
            return [tier for tier in self._catalog.tiers() if tier.tier_id != self._tier_id]
        except CatalogUnavailableError:
            return []

    def _replicas(self, keys: Sequence[ChunkKey]) -> list[tuple[ChunkKey, set[str]]]:
        try:
            found = zip(keys, self._catalog.locate(keys), strict=True)
        except CatalogUnavailableError:
            return []
        return [(key, others) for key, tier_ids in found if (others := tier_ids - {self._tier_id})]


def _runs(places: Sequence[tuple[ChunkKey, str]]) -> Iterator[tuple[str, list[ChunkKey]]]:
    """Consecutive chunks of the same tier."""
    run: list[ChunkKey] = []
    for number, (key, tier_id) in enumerate(places):
        run.append(key)
        if number + 1 == len(places) or places[number + 1][1] != tier_id:
            yield tier_id, run
            run = []


class HostedSequences:
    """Holds chunks in the ``store`` of one tier for sequences of other nodes, under the names that these have there.

    A call for a released holder raises :class:`ReleasedError`: the release has overtaken the call, and no later release
    would free what it gets.
    """

    def __init__(
        self, store: ArenaStore, layout: ChunkLayout, from_disk: Callable[[str, Sequence[ChunkKey]], int]
    ) -> None:
        """``from_disk`` copies the first of some chunks, those that lie on disk, into the store, and holds them."""
        self._store = store
        self._layout = layout
        self._from_disk = from_disk
        self._digests = LayerDigests(store.arena, layout)

    def reserve_quota(self, holder: str, chunks: int) -> int:
        """Reserve as much of a quota of ``chunks`` in all as there is room for; returns the quota."""
        return self._store.reserve_quota_up_to(holder, chunks)

    def hold(self, holder: str, keys: Sequence[ChunkKey]) -> RecordBatch:
        """Hold those of ``keys`` that are here and sound; returns their records, in order."""
        self._from_disk(holder, keys)
        held = [(key, ref) for key, ref in zip(keys, self._store.hold(holder, keys), strict=True) if ref is not None]
        batch = self._store.arena.read([ref for _, ref in held], [key for key, _ in held])
        sound = set(batch.keys)
        for key, ref in held:
            if key not in sound:
                self._store.drop(key, ref)
        return RecordBatch.of(batch)

    def store_batch(self, holder: str, batch: ChunkBatch) -> list[ChunkKey]:
        """Store and hold ``batch`` as far as there is room; returns the keys that are held now."""
        return store_batch(self._store, batch, holder)

    def read_layer(self, holder: str, keys: Sequence[ChunkKey], layer: int) -> LayerBatch:
        """One layer of those of ``keys`` that are here and sound. ``holder`` holds them, unless it was released
        meanwhile; this call holds nothing."""
        found = [(key, ref) for key, ref in zip(keys, self._store.find(keys), strict=True) if ref is not None]
        arena, slots = self._store.arena, np.array([ref.slot for _, ref in found], np.int64)
        chunks = arena.chunks.numpy()
        rows = np.concatenate([chunks[slots, part] for part in self._layout.layer_parts(layer)], axis=1)
        sound = self._digests.sound([key for key, _ in found], [ref for _, ref in found], layer, rows)
        # a slot that was given away during the read holds another chunk
        same = arena.generation(slots) == np.array([ref.generation for _, ref in found], np.uint64)
        for number in np.flatnonzero(~sound).tolist():
            self._store.drop(*found[number])
        kept = np.flatnonzero(sound & same)
        return LayerBatch.sealed(tuple(found[number][0] for number in kept.tolist()), rows[kept])

    def holders(self, floors: Mapping[str, int]) -> list[str]:
        """Names of all holders of these workers of another node that hold something here. All serials of a worker below
        its floor are released."""
        for worker_id, floor in floors.items():
            self._store.forget_released(worker_id, floor)
        return [holder for holder in self._store.holders() if worker_of(holder) in floors]

    def release_all(self, holders: Sequence[str]) -> None:
        """Release all that these hold."""
        for holder in holders:
            self._store.release(holder)
