"""The memory tier: a Ray actor that owns its node's arena, publishes it in the catalog, and talks to other tiers."""

import atexit
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from forecache.indexer.serving.telemetry import SILENCE, MetricsTarget, Telemetry
from forecache.workers.errors import ArenaError
from forecache.workers.memory.arena.arena import (
    FILE_PREFIX,
    Arena,
    ArenaDescription,
    describe,
    remove_abandoned,
)
from forecache.workers.memory.arena.cold_size import CPU_SHARE, auto_cold_bytes
from forecache.workers.memory.arena.headers import HEADER
from forecache.workers.memory.arena.ledger import PinShare, tenant_of
from forecache.workers.memory.arena.stats import TierStats
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.arena.writers import WriterNews
from forecache.workers.memory.client.peers import RemotePeers
from forecache.workers.memory.config import RECORDS_SHARE, MemoryConfig
from forecache.workers.memory.format.chunk_batch import ChunkBatch, LayerBatch, RecordBatch
from forecache.workers.memory.format.hold_id import request_of, worker_of
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.layout import ChunkLayout
from forecache.workers.memory.format.slots import Reservation, SlotRef
from forecache.workers.memory.format.spread_quota import SpreadQuota
from forecache.workers.memory.tier.catalog import Catalog, SessionRecord
from forecache.workers.memory.tier.exchange import ChunkExchange, wanted_room
from forecache.workers.memory.tier.publisher import CatalogPublisher
from forecache.workers.memory.tier.session_pins import SessionPins
from forecache.workers.memory.tier.spread import HostedSequences, SpreadSequences
from forecache.workers.memory.tier.transfer import read, store_batch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TierSettings:
    """Settings that all tiers of a cluster share. ``index_nbytes``: bytes of a chunk's index record. ``cold_share`` and
    ``claimed_bytes`` are for ``cold_bytes: auto``, see :func:`.cold_size.cold_bytes_within`.

    Tiers find each other through the catalog at ``redis_url`` and as actors of ``namespace``, named by their ids.
    Without either, each tier is alone.
    """

    config: MemoryConfig
    layout: ChunkLayout
    index_nbytes: int
    index_fingerprint: str
    namespace: str | None = None
    redis_url: str | None = field(default=None, repr=False)
    telemetry: Telemetry = SILENCE
    cold_share: float = CPU_SHARE
    claimed_bytes: int = 0


LANES = {"catalog": 16, "lookups": 16, "remote": 16, "peers": 8, "peers_at_once": 4}
"""Thread pools (Ray concurrency groups) by what their calls may wait for. `catalog`: Redis. `lookups`: Redis, the disk
and other tiers. `remote`: other tiers. `peers`: calls of other tiers, which may wait for the disk and Redis.
`peers_at_once`: calls of other tiers that wait for nothing. The actor's default threads serve calls of workers that
wait for nothing, so that reserve, commit and release stay fast."""


# Ray's annotations do not know max_concurrency and the groups.
@ray.remote(num_cpus=0, max_concurrency=8, concurrency_groups=LANES)  # type: ignore[call-overload]
class MemoryTier:
    """A node's cold memory for its workers, which call it through `RemoteMemory`. Runs on that node.

    A tier that is restarted under the same ``tier_id`` adopts the file of its former life, if that fits, with all
    sealed chunks but without holds. Before that it deletes the arena files of owners that are gone.

    Calls of other tiers run in separate threads and never call a tier, so that tiers can't deadlock by waiting for each
    other. See :data:`LANES`.
    """

    def __init__(self, settings: TierSettings, tier_id: str) -> None:
        """Raises :class:`ArenaError`."""
        config = settings.config
        self._settings = settings
        node_id = ray.get_runtime_context().get_node_id()
        spreads = settings.redis_url is not None and settings.namespace is not None
        self._arena = _open_arena(
            settings,
            tier_id,
            config.arena_dir,
            lambda: _arena_size(settings, spreads=spreads),
            any_size=config.cold_bytes == "auto",
        )
        logger.info("cold memory: %d bytes for %d chunks", self._arena.description.file_bytes, self._arena.slots)
        self._disk: ArenaStore | None = None
        self._publisher: CatalogPublisher | None = None
        self._exchange: ChunkExchange | None = None
        self._sessions: SessionPins | None = None
        self._hosted: HostedSequences | None = None
        if settings.redis_url is None:
            self._store = ArenaStore(self._arena, pin_limits=config.pin_limits)
        else:
            catalog = Catalog(settings.redis_url, timeout_s=config.heartbeat_s)
            self._publisher = CatalogPublisher(catalog, tier_id, node_id, config.heartbeat_s, self._publish_sessions)
            self._store = ArenaStore(self._arena, self._changed, config.pin_limits)
            self._sessions = SessionPins(self._store, catalog, config.session_bytes)
            if config.disk_bytes:
                on_disk = _open_arena(settings, f"{tier_id}-disk", config.disk_dir, lambda: (config.disk_bytes, 0))
                self._disk = ArenaStore(on_disk, listener=self._disk_changed)
            if settings.namespace is not None:
                peers = RemotePeers(settings.namespace, config.call_deadline_s)
                self._exchange = ChunkExchange(
                    tier_id, self._store, catalog, peers, config, self._publisher.publish_now, self._disk
                )
                self._hosted = HostedSequences(self._store, settings.layout, self._exchange.from_disk_alone)
                self._exchange.start()
            self._publisher.start(self._store)
        self._telemetry = settings.telemetry.start("tier", tier_id, node_id, self.stats)
        self._ended = threading.Event()
        threading.Thread(target=self._watch, args=(config.heartbeat_s,), name="tier-watch", daemon=True).start()
        # Runs when the actor exits by itself. After ray.kill and ray.shutdown the next tier adopts the file.
        atexit.register(self.shutdown)

    def settings(self) -> TierSettings:
        """Settings for the tier of another node of this cluster."""
        return self._settings

    def arena_path(self) -> str:
        """Path of the arena, for the workers of this node."""
        return str(self._arena.path)

    @ray.method(concurrency_group="lookups")
    def hold_prefix(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef]:
        """Hold the longest run of ``keys`` that any node stores."""
        request_id, traceparent = request_of(holder)
        with self._telemetry.span("tier.hold_prefix", traceparent, request_id=request_id, asked=len(keys)) as span:
            found = (
                self._store.hold_prefix(holder, keys)
                if self._exchange is None
                else self._exchange.fetch_prefix(holder, keys)
            )
            span.set(held=len(found))
        _log_found(request_id, keys, found)
        return found

    @ray.method(concurrency_group="catalog")
    def hold_local_prefix(self, holder: str, keys: Sequence[ChunkKey]) -> tuple[list[SlotRef], bool]:
        """Hold the longest run of ``keys`` that is stored here; also returns whether :meth:`hold_prefix` would bring
        more."""
        request_id, traceparent = request_of(holder)
        with self._telemetry.span("tier.hold_prefix", traceparent, request_id=request_id, asked=len(keys)) as span:
            found, elsewhere = (self._exchange or self._store).hold_local_prefix(holder, keys)
            span.set(held=len(found), elsewhere=elsewhere)
        if not elsewhere:
            _log_found(request_id, keys, found)
        return found, elsewhere

    def hold(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        return self._store.hold(holder, keys)

    def reserve_slots(self, holder: str, keys: Sequence[ChunkKey], news: WriterNews | None = None) -> list[Reservation]:
        """``news``: the report of the worker that will write there."""
        if news is None:
            return self._store.reserve_slots(holder, keys)
        self._store.apply_report(news)
        return self._store.reserve_slots(holder, keys, writer=news.writer, begun=news.begun)

    def commit(self, holder: str, refs: Sequence[tuple[ChunkKey, SlotRef]], news: WriterNews | None = None) -> None:
        if news is not None:
            self._store.apply_report(news)
        self._store.commit(holder, refs)

    def drop(self, key: ChunkKey, ref: SlotRef) -> None:
        self._store.drop(key, ref)

    def reserve_quota(self, holder: str, chunks: int) -> None:
        self._store.reserve_quota(holder, chunks)

    def start_over(self, holder: str) -> None:
        self._store.start_over(holder)

    def release(self, holder: str, was_spread: bool = False, news: WriterNews | None = None) -> None:
        if news is not None:
            self._store.apply_report(news)
        if self._exchange is not None:
            self._exchange.spread.end(holder, was_spread=was_spread)
        self._store.release(holder)

    # Sequences of this node's workers that are spread over several nodes: called by `client/memory.py:RemoteSpread`.

    def spread_begin(self, holder: str, chunks: int) -> None:
        self._spread.begin(holder, chunks)

    def spread_places(self, holder: str, keys: Sequence[ChunkKey]) -> list[str]:
        return self._spread.places(holder, keys)

    def spread_hold_again(
        self, holder: str, chunks: int, own: Sequence[ChunkKey], places: Mapping[ChunkKey, str]
    ) -> list[ChunkKey]:
        return self._spread.hold_again(holder, chunks, own, places)

    @ray.method(concurrency_group="remote")
    def spread_reserve_remote_quota(self, holder: str) -> SpreadQuota:
        return self._spread.reserve_remote_quota(holder)

    @ray.method(concurrency_group="remote")
    def spread_move_out(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        return self._spread.move_out(holder, keys)

    @ray.method(concurrency_group="remote")
    def spread_fetch(self, holder: str, reader: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        return self._spread.fetch(holder, reader, keys)

    # Sequences of other nodes: called by `client/peers.py:RemotePeers` of their tiers, and for layers of their workers.

    @ray.method(concurrency_group="peers_at_once")
    def reserve_hosted_quota(self, holder: str, chunks: int) -> int:
        return self._host.reserve_quota(holder, chunks)

    @ray.method(concurrency_group="peers")
    def hold_hosted(self, holder: str, keys: Sequence[ChunkKey]) -> RecordBatch:
        """In the lane `peers`, since it may wait for the disk."""
        return self._host.hold(holder, keys)

    @ray.method(concurrency_group="peers_at_once")
    def store_hosted(self, holder: str, batch: ChunkBatch) -> list[ChunkKey]:
        return self._host.store_batch(holder, batch)

    @ray.method(concurrency_group="peers_at_once")
    def read_hosted_layer(self, holder: str, keys: Sequence[ChunkKey], layer: int) -> LayerBatch:
        return self._host.read_layer(holder, keys, layer)

    @ray.method(concurrency_group="peers_at_once")
    def hosted_holders(self, floors: Mapping[str, int]) -> list[str]:
        return self._host.holders(floors)

    @ray.method(concurrency_group="peers_at_once")
    def release_hosted(self, holders: Sequence[str]) -> None:
        self._host.release_all(holders)

    @ray.method(concurrency_group="catalog")
    def record_session(self, session_id: str, keys: Sequence[ChunkKey], state_keys: Sequence[ChunkKey] = ()) -> None:
        """A request of the session has ended with these chunks, and a snapshot of its state in these pieces."""
        if self._sessions is not None:
            self._sessions.record(session_id, keys, state_keys)

    @ray.method(concurrency_group="catalog")
    def set_session(self, record: SessionRecord) -> int:
        """Take over ``record`` of a session, with its pin. Returns how many of its chunks here can't be kept now, since
        their slots are reserved for running requests."""
        return self._sessions.told(record) if self._sessions is not None else 0

    @ray.method(concurrency_group="peers_at_once")
    def pin_share(self, session_id: str) -> PinShare:
        """What the tenant of the session has pinned here, and its limits."""
        return self._store.pin_share(tenant_of(session_id))

    @ray.method(concurrency_group="peers_at_once")
    def forget_session(self, session_id: str) -> None:
        if self._sessions is not None:
            self._sessions.forget(session_id)

    def holders(self) -> list[str]:
        """Names of all that hold something here, and of this node's sequences that hold something on other nodes."""
        holders = self._store.holders()
        if self._exchange is not None:
            holders += [*self._exchange.records.holders(), *self._exchange.spread.holders()]
        return list(dict.fromkeys(holders))

    def holders_of(self, worker_id: str, floor: int, life: int) -> list[str]:
        """:meth:`holders` of a worker of this node, which has told this ``life`` of the tier all that it holds. All
        serials of its holders below ``floor`` are released."""
        self._store.forget_released(worker_id, floor)
        if self._exchange is not None and life == self._arena.life:
            self._exchange.spread.vouch(worker_id, floor)
        return [holder for holder in self.holders() if worker_of(holder) == worker_id]

    def holding_workers(self) -> list[str]:
        """Ids of the workers that hold something: the part of their holders' names before the slash."""
        return sorted({worker_of(holder) for holder in self.holders()})

    def release_worker(self, worker_id: str) -> int:
        """Reclaim what a dead worker held: all holders ``<worker id>/…``. Returns how many there were. Its process may
        still be writing to reserved slots: see :meth:`ArenaStore.release_prefix`."""
        if self._exchange is not None:
            self._exchange.spread.release_prefix(f"{worker_id}/")
        return self._store.release_prefix(f"{worker_id}/")

    def stats(self, news: WriterNews | None = None) -> TierStats:
        """``news``: the report of the worker that asks."""
        if news is not None:
            self._store.apply_report(news)
        stats = self._store.stats()
        if self._disk is not None:
            disk = self._disk.stats()
            stats = replace(
                stats, disk_slots=disk.slots, disk_used_slots=disk.used_slots, disk_bad_slots=disk.bad_slots
            )
        if self._exchange is None:
            return stats
        return replace(stats, remote_records=self._exchange.records.held, **asdict(self._exchange.counters))

    def metrics_target(self) -> MetricsTarget | None:
        return self._telemetry.target

    def integrity(self) -> str:
        """The error of an integrity check of all books; empty if there is none."""
        try:
            self._store.check_integrity()
            if self._exchange is not None:
                self._exchange.records.check_integrity()
                self._exchange.spread.check_integrity()
            if self._disk is not None:
                self._disk.check_integrity()
            if self._sessions is not None:
                self._sessions.check_integrity()
        except AssertionError as error:
            return str(error)
        return ""

    def stored_keys(self) -> list[ChunkKey]:
        on_disk = self._disk.keys() if self._disk is not None else []
        return list(dict.fromkeys([*self._store.keys(), *on_disk]))

    @ray.method(concurrency_group="peers")
    def read_chunks(self, keys: Sequence[ChunkKey]) -> ChunkBatch:
        """Copies of those of ``keys`` that are stored here and sound."""
        batch = read(self._store, keys)
        if self._disk is not None and len(batch) < len(keys):
            batch += read(self._disk, [key for key in keys if key not in set(batch.keys)])
        return batch

    @ray.method(concurrency_group="peers")
    def store_batch(self, batch: ChunkBatch, copied_only: bool) -> list[ChunkKey]:
        """Store ``batch`` as far as there is room; returns the keys that are stored now."""
        keep = wanted_room(self._arena.slots)
        taken = store_batch(self._store, batch, copied_only=copied_only, keep_room=keep)
        if self._publisher is not None:
            self._publisher.publish_now(taken)  # the sender may evict them from now on
        return taken

    @ray.method(concurrency_group="peers_at_once")
    def set_copied(self, keys: Sequence[ChunkKey], since: int) -> None:
        """Another tier, which read ``keys`` here at the mark ``since``, answers for them now: they may be evicted
        first."""
        self._store.set_copied(keys, True, since)

    def shutdown(self) -> None:
        """Leave the catalog and delete the arena's file; workers keep their mapping."""
        self._ended.set()
        if self._exchange is not None:
            self._exchange.stop()
        if self._publisher is not None:
            self._publisher.stop()
        for arena in (self._arena, *([self._disk.arena] if self._disk is not None else [])):
            arena.unlink()
            arena.close()

    @property
    def _spread(self) -> SpreadSequences:
        assert self._exchange is not None, "only tiers with a catalog and a namespace spread sequences"
        return self._exchange.spread

    @property
    def _host(self) -> HostedSequences:
        assert self._hosted is not None, "only tiers with a catalog and a namespace spread sequences"
        return self._hosted

    def _publish_sessions(self) -> None:
        """The catalog did not know this tier: the tier is new, or the catalog is."""
        if self._sessions is not None:
            self._sessions.load()
            self._sessions.publish()

    def _watch(self, period_s: float) -> None:
        """End when another process truncates or replaces the file: Ray restarts the tier with a new one."""
        while not self._ended.wait(period_s):
            if self._sessions is not None:
                self._sessions.tick()
            if not self._arena.is_intact():
                logger.error("another process changed the arena %s: the memory tier restarts", self._arena.path)
                os._exit(1)

    def _changed(self, key: ChunkKey, stored: bool) -> None:
        assert self._publisher is not None
        self._publisher.changed(key, stored)
        if self._exchange is not None:
            self._exchange.changed(key, stored)

    def _disk_changed(self, key: ChunkKey, stored: bool) -> None:
        assert self._publisher is not None
        self._publisher.changed(key, stored)
        if self._exchange is not None:
            self._exchange.disk_changed(key, stored)


def _log_found(request_id: str, asked: Sequence[ChunkKey], held: Sequence[SlotRef]) -> None:
    logger.info(
        "prefix looked up", extra={"request_id": request_id, "asked_chunks": len(asked), "held_chunks": len(held)}
    )


def gives_memory(node: Mapping[str, Any], config: MemoryConfig) -> bool:
    """Whether ``node``, an entry of ``ray.nodes()``, lives and gets a memory tier."""
    return bool(node["Alive"]) and (config.tier_resource is None or node["Resources"].get(config.tier_resource, 0) > 0)


def start_tier(settings: TierSettings, tier_id: str, node_id: str) -> "ActorHandle[Any]":
    """Get the tier ``tier_id`` of a node, or start it. It outlives its starter, and Ray restarts it."""
    tier: ActorHandle[Any] = MemoryTier.options(  # type: ignore[attr-defined]
        name=tier_id,
        namespace=settings.namespace,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
    ).remote(settings, tier_id)
    return tier


def _open_arena(
    settings: TierSettings, name: str, directory: Path, size: Callable[[], tuple[int, int]], *, any_size: bool = False
) -> Arena:
    """The arena of a former life of this tier, if it fits, or a new one.

    ``size``: its bytes for chunks and for records of other nodes' chunks, asked for once dead arenas are removed.
    ``any_size``: an arena of a former life fits whatever its size.
    """

    def describe_with(sizes: tuple[int, int]) -> ArenaDescription:
        return describe(settings.layout, settings.index_nbytes, settings.index_fingerprint, *sizes)

    path = directory / f"{FILE_PREFIX}{name}"
    if path.exists():
        try:
            arena = Arena.adopt(path)
        except ArenaError as error:
            # An unfinished or damaged file is deleted below. If its owner lives, create raises.
            logger.warning("%s is not adopted: %s", path, error)
        else:
            found = arena.description
            chunk_bytes = replace(found, record_slots=0).file_bytes
            same = chunk_bytes, found.record_slots * (settings.index_nbytes + HEADER.itemsize)
            if found == describe_with(same if any_size else size()):
                remove_abandoned(directory)
                return arena
            arena.close()
    remove_abandoned(directory)
    capacity_bytes, record_bytes = size()
    return Arena.create(
        directory,
        name,
        layout=settings.layout,
        index_nbytes=settings.index_nbytes,
        index_fingerprint=settings.index_fingerprint,
        capacity_bytes=capacity_bytes,
        record_bytes=record_bytes,
    )


def _arena_size(settings: TierSettings, *, spreads: bool) -> tuple[int, int]:
    """Bytes of this node's arena for chunks, and for records of other nodes' chunks.

    Raises :class:`MemorySizeError` if both are left open and the node has too little memory.
    """
    config = settings.config
    if config.cold_bytes != "auto":
        return config.cold_bytes, config.record_bytes if spreads else 0
    given = (config.remote_index_bytes or 0) if spreads else 0
    size = auto_cold_bytes(
        config.arena_dir,
        share=settings.cold_share,
        claimed_bytes=settings.claimed_bytes + given,
        claimed_room=given,
    )
    if not spreads or config.remote_index_bytes is not None:
        return size, given
    records = size // (RECORDS_SHARE + 1)
    return size - records, records
