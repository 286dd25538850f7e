"""The memory tier: a Ray actor that owns its node's arena and tells the catalog what is in it."""

import atexit
import logging
import threading
import time
import uuid
from collections.abc import Sequence
from random import uniform

import ray

from forecache.workers.errors import ArenaError, CatalogUnavailableError
from forecache.workers.memory.arena import FILE_PREFIX, Arena, describe, remove_abandoned
from forecache.workers.memory.catalog import CHUNK_EXPIRY_S, Catalog, TierRecord
from forecache.workers.memory.config import MemoryConfig
from forecache.workers.memory.keys import ChunkKey
from forecache.workers.memory.layout import ChunkLayout
from forecache.workers.memory.protocol import Reservation, SlotRef, TierStats
from forecache.workers.memory.store import ArenaStore

logger = logging.getLogger(__name__)

MISSED_HEARTBEATS = 4
"""A tier that is silent for so many heartbeats is no longer in the catalog."""
MAX_BACKOFF_S = 10.0
MAX_PENDING = 100_000
"""Changes kept for a Redis that is away; after more the tier takes a new incarnation and publishes all."""


# Ray's annotations do not know max_concurrency.
@ray.remote(num_cpus=0, max_concurrency=8)  # type: ignore[call-overload]
class MemoryTier:
    """`ColdMemory` of a node for its workers, which reach it through `RemoteMemory`. Runs on that node.

    Restarted under the same ``tier_id`` it adopts the file of its former life, if that fits, with all sealed
    chunks; what was held then is held no more. Arena files of others that are gone are deleted first.
    """

    def __init__(
        self,
        config: MemoryConfig,
        layout: ChunkLayout,
        *,
        tier_id: str,
        index_nbytes: int,
        index_fingerprint: str,
        redis_url: str | None = None,
    ) -> None:
        """``index_nbytes``: bytes of a chunk's index record. Raises :class:`ArenaError`."""
        self._arena = _open_arena(config, layout, tier_id, index_nbytes, index_fingerprint)
        self._publisher: CatalogPublisher | None = None
        if redis_url is None:
            self._store = ArenaStore(self._arena)
        else:
            catalog = Catalog(redis_url, timeout_s=config.heartbeat_s)
            node_id = ray.get_runtime_context().get_node_id()
            self._publisher = CatalogPublisher(catalog, tier_id, node_id, config.heartbeat_s)
            self._store = ArenaStore(self._arena, listener=self._publisher.changed)
            self._publisher.start(self._store)
        # Ray runs it when the actor ends by itself; ray.kill and ray.shutdown leave the file to the next tier.
        atexit.register(self.shutdown)

    def arena_path(self) -> str:
        """Where the workers of this node find the arena."""
        return str(self._arena.path)

    def hold_prefix(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef]:
        return self._store.hold_prefix(holder, keys)

    def hold(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        return self._store.hold(holder, keys)

    def reserve(self, holder: str, keys: Sequence[ChunkKey]) -> list[Reservation]:
        return self._store.reserve(holder, keys)

    def commit(self, holder: str, refs: Sequence[tuple[ChunkKey, SlotRef]]) -> None:
        self._store.commit(holder, refs)

    def drop(self, key: ChunkKey, ref: SlotRef) -> None:
        self._store.drop(key, ref)

    def release(self, holder: str) -> None:
        self._store.release(holder)

    def release_worker(self, worker_id: str) -> int:
        """Reclaim what a dead worker held: all holders ``<worker id>/…``. Returns how many there were."""
        return self._store.release_prefix(f"{worker_id}/")

    def stats(self) -> TierStats:
        return self._store.stats()

    def check_integrity(self) -> None:
        self._store.check_integrity()

    def shutdown(self) -> None:
        """Leave the catalog and free the arena's file; workers keep what they have mapped."""
        if self._publisher is not None:
            self._publisher.stop()
        self._arena.unlink()
        self._arena.close()


def _open_arena(
    config: MemoryConfig, layout: ChunkLayout, tier_id: str, index_nbytes: int, index_fingerprint: str
) -> Arena:
    wanted = describe(layout, index_nbytes, index_fingerprint, config.cold_bytes)
    path = config.arena_dir / f"{FILE_PREFIX}{tier_id}"
    if path.exists():
        try:
            arena = Arena.adopt(path)
        except ArenaError as error:
            # Unfinished or damaged: deleted below. Alive: create says so.
            logger.warning("%s is not adopted: %s", path, error)
        else:
            if arena.description == wanted:
                remove_abandoned(config.arena_dir)
                return arena
            arena.close()
    remove_abandoned(config.arena_dir)
    return Arena.create(
        config.arena_dir,
        tier_id,
        layout=layout,
        index_nbytes=index_nbytes,
        index_fingerprint=index_fingerprint,
        capacity_bytes=config.cold_bytes,
    )


class CatalogPublisher:
    """Tells the catalog what a store holds, from a thread of its own: the store never waits for Redis.

    With Redis away it tries again, less and less often. When Redis does not know the tier (the first time, or
    because it came back empty), all chunks are published.
    """

    def __init__(self, catalog: Catalog, tier_id: str, node_id: str, heartbeat_s: float) -> None:
        self._catalog = catalog
        self._tier_id = tier_id
        self._node_id = node_id
        self._heartbeat_s = heartbeat_s
        self._incarnation = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._pending: dict[ChunkKey, bool] = {}  # the last word on each chunk: stored or gone
        self._overflowed = False
        self._next_heartbeat_s = self._next_publish_all_s = 0.0  # of time.monotonic
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def changed(self, key: ChunkKey, stored: bool) -> None:
        """The store's listener."""
        with self._lock:
            if len(self._pending) < MAX_PENDING:
                self._pending[key] = stored
            else:
                self._overflowed = True
        self._wake.set()

    def start(self, store: ArenaStore) -> None:
        self._thread = threading.Thread(target=self._run, args=(store,), name="catalog-publisher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and take the tier out of the catalog, if Redis is there."""
        if self._stopping.is_set() or self._thread is None:
            return
        self._stopping.set()
        self._wake.set()
        self._thread.join()
        try:
            self._catalog.remove_tier(self._tier_id)
        except CatalogUnavailableError as error:
            logger.warning("the tier's catalog entry is left to expire: %s", error)
        self._catalog.close()

    def _run(self, store: ArenaStore) -> None:
        backoff_s = 0.0
        while not self._stopping.is_set():
            try:
                self._publish(store)
            except CatalogUnavailableError as error:
                if not backoff_s:
                    logger.warning("chunks of %s are not published until it is back: %s", self._tier_id, error)
                backoff_s = min(MAX_BACKOFF_S, max(0.1, 2 * backoff_s))
                self._next_heartbeat_s = 0.0
                self._stopping.wait(backoff_s * uniform(0.5, 1))
                continue
            backoff_s = 0.0
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
        # After the changes: one that comes while these keys are written is pending, and written later.
        if now_s >= self._next_publish_all_s:
            self._catalog.publish(self._tier_id, self._incarnation, store.keys())
            self._next_publish_all_s = now_s + CHUNK_EXPIRY_S / 2

    def _heartbeat(self, stats: TierStats) -> None:
        with self._lock:
            if self._overflowed:
                # Withdrawals were forgotten: a new incarnation voids all that was published.
                self._overflowed, self._pending, self._incarnation = False, {}, uuid.uuid4().hex
        record = TierRecord(self._tier_id, self._incarnation, self._node_id, stats.slots, stats.used_slots)
        if not self._catalog.heartbeat(record, expiry_s=MISSED_HEARTBEATS * self._heartbeat_s):
            self._next_publish_all_s = 0.0
