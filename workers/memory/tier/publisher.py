"""Publishes a tier's stored chunks in the catalog, in a background thread."""

import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from random import uniform

from forecache.workers.errors import CatalogUnavailableError
from forecache.workers.memory.arena.stats import TierStats
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.tier.catalog import CHUNK_EXPIRY_S, Catalog, TierRecord

logger = logging.getLogger(__name__)

MISSED_HEARTBEATS = 4
"""A tier leaves the catalog after this many missed heartbeats."""
MAX_BACKOFF_S = 10.0
MAX_PENDING = 100_000
"""Most changes that are kept while Redis is away; beyond it the tier takes a new incarnation and publishes all."""


class CatalogPublisher:
    """Publishes the contents of stores from its own thread, so that a store never waits for Redis.

    While Redis is away it retries with backoff. It publishes all chunks when Redis does not know the tier: at the
    start, or because Redis came back empty.
    """

    def __init__(
        self,
        catalog: Catalog,
        tier_id: str,
        node_id: str,
        heartbeat_s: float,
        unknown: Callable[[], None] = lambda: None,
    ) -> None:
        """``unknown`` is called in the publisher's thread when the catalog did not know the tier."""
        self._catalog = catalog
        self._tier_id = tier_id
        self._node_id = node_id
        self._heartbeat_s = heartbeat_s
        self._unknown = unknown
        self._incarnation = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._copies: Counter[ChunkKey] = Counter()  # copies of each chunk here: in memory, on disk
        self._pending: dict[ChunkKey, bool] = {}  # last state of each chunk: stored or gone
        self._overflowed = False
        self._away = False  # Redis did not answer the publisher's thread last time
        self._next_heartbeat_s = self._next_publish_all_s = 0.0  # of time.monotonic
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def changed(self, key: ChunkKey, stored: bool) -> None:
        """The listener of each store."""
        with self._lock:
            if stored:
                self._copies[key] += 1
            elif self._copies[key] > 1:
                self._copies[key] -= 1
                return
            else:
                del self._copies[key]
            if len(self._pending) < MAX_PENDING:
                self._pending[key] = stored
            else:
                self._overflowed = True
        self._wake.set()

    def publish_now(self, keys: Sequence[ChunkKey]) -> None:
        """Publish ``keys``, just stored, before anything that relies on other tiers knowing them.

        Does not wait for a Redis that is away: the changes are pending anyway.
        """
        if self._away:
            return
        incarnation = self._incarnation
        try:
            self._catalog.publish(self._tier_id, incarnation, keys)
        except CatalogUnavailableError:
            return
        finally:
            self._correct(keys, incarnation)

    def _correct(self, keys: Sequence[ChunkKey], incarnation: str) -> None:
        """Requeue ``keys`` that another thread has published, if the publisher's thread has since withdrawn one (the
        chunk was evicted), or changed the incarnation."""
        with self._lock:
            gone = {key: False for key in keys if not self._copies[key]}
            old = {key: True for key in keys if self._copies[key] and incarnation != self._incarnation}
            self._pending |= gone | old
        if gone or old:
            self._wake.set()

    def start(self, store: ArenaStore) -> None:
        self._thread = threading.Thread(target=self._run, args=(store,), name="catalog-publisher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and remove the tier from the catalog, if Redis answers."""
        if self._stopping.is_set() or self._thread is None:
            return
        self._stopping.set()
        self._wake.set()
        self._thread.join()
        try:
            self._catalog.remove_tier(self._tier_id)
        except CatalogUnavailableError as error:
            logger.warning("the tier's catalog entry stays until it expires: %s", error)
        self._catalog.close()

    def _run(self, store: ArenaStore) -> None:
        backoff_s = 0.0
        while not self._stopping.is_set():
            try:
                self._publish(store)
            except CatalogUnavailableError as error:
                if not backoff_s:
                    logger.warning("chunks of %s are not published until Redis is back: %s", self._tier_id, error)
                self._away = True
                backoff_s = min(MAX_BACKOFF_S, max(0.1, 2 * backoff_s))
                self._next_heartbeat_s = 0.0
                self._stopping.wait(backoff_s * uniform(0.5, 1))
                continue
            self._away, backoff_s = False, 0.0
            self._wake.wait(max(0.0, self._next_heartbeat_s - time.monotonic()))

    def _publish(self, store: ArenaStore) -> None:
        self._wake.clear()
        now_s = time.monotonic()
        if now_s >= self._next_heartbeat_s:
            self._heartbeat(store.stats())
            self._next_heartbeat_s = now_s + self._heartbeat_s
        with self._lock:
            changes, self._pending = self._pending, {}
        try:
            self._catalog.withdraw(self._tier_id, [key for key, stored in changes.items() if not stored])
            self._catalog.publish(self._tier_id, self._incarnation, [key for key, stored in changes.items() if stored])
        except CatalogUnavailableError:
            with self._lock:
                self._pending = {**changes, **self._pending}
            raise
        # After the changes: a change during this write stays pending and is written later.
        if now_s >= self._next_publish_all_s:
            with self._lock:
                keys = list(self._copies)
            self._catalog.publish(self._tier_id, self._incarnation, keys)
            self._catalog.set_published(self._tier_id, self._incarnation)
            self._next_publish_all_s = now_s + CHUNK_EXPIRY_S / 2

    def _heartbeat(self, stats: TierStats) -> None:
        with self._lock:
            if self._overflowed:
                # Withdrawals got lost: a new incarnation voids all that was published.
                self._overflowed, self._pending, self._incarnation = False, {}, uuid.uuid4().hex
        used_slots = stats.used_slots - stats.copied_slots
        record = TierRecord(self._tier_id, self._incarnation, self._node_id, stats.slots, used_slots)
        if not self._catalog.heartbeat(record, expiry_s=MISSED_HEARTBEATS * self._heartbeat_s):
            self._next_publish_all_s = 0.0
            self._unknown()
