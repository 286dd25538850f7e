"""Copies chunks of other tiers into this one: in batches, several at a time, verified on arrival."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import xxhash

from forecache.workers.errors import ChunkLostError
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.client.peers import PendingRead, RemotePeers
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.tier.transfer import store_batch

logger = logging.getLogger(__name__)

BATCH_BYTES = 16 << 20
"""Most bytes of one call between tiers, unless one chunk is larger; several calls run at once."""
READS_AT_ONCE = 3

Places = tuple[ChunkKey, set[str]]
"""A chunk, and the tiers that store it."""


def rendezvous(key: ChunkKey, tier_ids: Iterable[str]) -> list[str]:
    """``tier_ids`` in the order in which they should hold ``key``: highest random weight first. All tiers agree on it
    without talking, and few chunks move when tiers come and go.

    Thaler and Ravishankar, "A Name-Based Mapping Scheme for Rendezvous", 1996.
    """
    return sorted(tier_ids, key=lambda tier_id: xxhash.xxh3_64_intdigest(tier_id.encode() + key), reverse=True)


@dataclass
class ExchangeCounters:
    """Since start; the names are those of :class:`TierStats`."""

    fetched_chunks: int = 0
    fetched_bytes: int = 0
    fetch_s: float = 0.0
    replicated_chunks: int = 0
    moved_chunks: int = 0
    spilled_chunks: int = 0
    disk_recalled_chunks: int = 0


class ChunkFetcher:
    """Copies chunks into ``store``. ``make_room`` makes so many slots available without loss."""

    def __init__(
        self,
        store: ArenaStore,
        peers: RemotePeers,
        publish: Callable[[Sequence[ChunkKey]], None],
        make_room: Callable[[int], None],
    ) -> None:
        self._store = store
        self._peers = peers
        self._publish = publish
        self._make_room = make_room
        description = store.arena.description
        self.batch_chunks = max(1, BATCH_BYTES // (description.nbytes + description.index_nbytes))
        self.counters = ExchangeCounters()

    def bring(self, holder: str, wanted: Sequence[Places], deadline_s: float, *, cached: bool = False) -> set[ChunkKey]:
        """Copy ``wanted`` here, held for ``holder``; returns the chunks that came.

        By default this tier then answers for them, the other tier may evict its copy first, and the run ends at the
        first chunk that does not come. ``cached``: the other tiers keep answering for them, the copies here are evicted
        first, and a missing chunk does not end the run.
        """
        start_s = time.monotonic()
        others = dict(wanted)
        calls = self.calls(sorted(wanted, key=lambda place: min(place[1])) if cached else wanted)
        under_way: deque[tuple[str, list[ChunkKey], PendingRead]] = deque()

        def ask() -> None:
            for tier_id, keys in islice(calls, READS_AT_ONCE - len(under_way)):
                under_way.append((tier_id, keys, self._peers.read(tier_id, keys)))

        came: set[ChunkKey] = set()
        ask()
        while under_way:
            tier_id, keys, pending = under_way.popleft()
            taken = self._take(holder, tier_id, keys, pending, deadline_s, cached=cached)
            # ask the replicas for what is missing
            missing = [key for key in keys if key not in taken]
            for other in rendezvous(missing[0], others[missing[0]] - {tier_id}) if missing else []:
                taken |= self._take(holder, other, missing, self._peers.read(other, missing), deadline_s, cached=cached)
                missing = [key for key in missing if key not in taken]
                if not missing:
                    break
            came |= taken
            if (missing and not cached) or time.monotonic() > deadline_s:
                break  # the run ends here
            ask()
        self.counters.fetch_s += time.monotonic() - start_s
        return came

    def _take(
        self,
        holder: str,
        tier_id: str,
        keys: Sequence[ChunkKey],
        pending: PendingRead,
        deadline_s: float,
        *,
        cached: bool,
    ) -> set[ChunkKey]:
        try:
            batch = pending.result(max(0.0, deadline_s - time.monotonic()))
        except ChunkLostError as error:
            logger.warning("%d chunks were not fetched: %s", len(keys), error)
            return set()
        self._make_room(len(batch))
        taken = store_batch(self._store, batch, holder, cached=cached)
        if not cached:
            self._publish(taken)
            self._peers.set_copied(tier_id, taken, batch.mark)
        self.counters.fetched_chunks += len(taken)
        self.counters.fetched_bytes += batch.nbytes
        return set(taken)

    def calls(self, wanted: Sequence[Places]) -> Iterator[tuple[str, list[ChunkKey]]]:
        """Split ``wanted``, in order, into runs of at most one batch from one tier."""
        tier_id, keys = "", list[ChunkKey]()
        for key, tier_ids in wanted:
            if tier_id not in tier_ids or len(keys) == self.batch_chunks:
                if keys:
                    yield tier_id, keys
                tier_id, keys = (tier_id if tier_id in tier_ids else rendezvous(key, tier_ids)[0]), []
            keys.append(key)
        if keys:
            yield tier_id, keys
