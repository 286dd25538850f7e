import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forecache.cluster.launch.redis_server import EmbeddedRedis
from forecache.workers.errors import CatalogUnavailableError, ChunkLostError
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.config import MemoryConfig
from forecache.workers.memory.format.chunk_batch import ChunkBatch
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.layout import attention_layout
from forecache.workers.memory.tier import publisher as tier_module
from forecache.workers.memory.tier.catalog import (
    BATCH_KEYS,
    CHUNK_EXPIRY_S,
    CHUNK_PREFIX,
    RECORD_EXPIRY_S,
    SESSION_KEYS,
    SESSION_PREFIX,
    Catalog,
    SessionRecord,
    StoredRun,
    TierRecord,
)
from forecache.workers.memory.tier.exchange import ChunkExchange
from forecache.workers.memory.tier.fetch import rendezvous
from forecache.workers.memory.tier.publisher import CatalogPublisher
from forecache.workers.memory.tier.session_pins import SessionPins
from forecache.workers.memory.tier.transfer import store_batch

LAYOUT = attention_layout("m", layers=1, kv_heads=1, head_dim=8, chunk_tokens=16, dtype=torch.float32)
KEYS = [bytes([i]) * 16 for i in range(8)]


def record(tier_id: str, incarnation: str = "1") -> TierRecord:
    return TierRecord(tier_id, incarnation, node_id="node", slots=10, used_slots=3)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come about in 30 s"
        time.sleep(0.01)


@pytest.fixture
def catalog(redis_server: Any) -> Iterator[Catalog]:
    catalog = Catalog(redis_server.url)
    yield catalog
    catalog.close()


def put(store: ArenaStore, keys: list[bytes]) -> None:
    reservations = store.reserve_slots("writer", keys)
    for reservation in reservations:
        store.arena.seal(reservation.ref, reservation.key, store.arena.digests(reservation.ref.slot))
    store.commit("writer", [(r.key, r.ref) for r in reservations])
    store.release("writer")


def test_a_stored_run_goes_on_from_tier_to_tier(catalog: Catalog) -> None:
    for tier_id in ("a", "b", "c"):
        assert not catalog.heartbeat(record(tier_id), expiry_s=60)
    catalog.publish("a", "1", KEYS[0:3])
    catalog.publish("b", "1", [*KEYS[0:2], *KEYS[3:6]])
    catalog.publish("c", "1", KEYS[1:6])
    assert catalog.stored_run(KEYS) == StoredRun(6, {"a": 3, "b": 5, "c": 5})
    assert catalog.stored_run(KEYS[0:2]) == StoredRun(2, {"a": 2, "b": 2, "c": 1})
    assert catalog.stored_run(KEYS[1:]) == StoredRun(5, {"a": 2, "b": 4, "c": 5})
    assert catalog.stored_run(KEYS[6:]) == StoredRun(0, {})
    assert catalog.stored_run([]) == StoredRun(0, {})
    catalog.withdraw("a", KEYS[2:3])
    assert catalog.stored_run(KEYS) == StoredRun(6, {"a": 2, "b": 5, "c": 5})
    catalog.withdraw("c", KEYS[2:3])
    assert catalog.stored_run(KEYS) == StoredRun(2, {"a": 2, "b": 2, "c": 1})


def test_stale_incarnations_do_not_count(catalog: Catalog) -> None:
    catalog.publish("a", "1", KEYS)
    assert catalog.stored_run(KEYS) == StoredRun(0, {})  # the tier has not said that it lives
    assert not catalog.heartbeat(record("a", "1"), expiry_s=60)
    assert not catalog.heartbeat(record("a", "1"), expiry_s=60)  # the first answer may have got lost
    catalog.set_published("a", "0")
    assert not catalog.heartbeat(record("a", "1"), expiry_s=60)
    catalog.set_published("a", "1")
    assert catalog.heartbeat(record("a", "1"), expiry_s=60)
    assert catalog.stored_run(KEYS) == StoredRun(len(KEYS), {"a": len(KEYS)})
    assert not catalog.heartbeat(record("a", "2"), expiry_s=60)
    assert catalog.stored_run(KEYS) == StoredRun(0, {})
    catalog.publish("a", "2", KEYS[:2])
    assert catalog.stored_run(KEYS) == StoredRun(2, {"a": 2})


def test_silent_and_removed_tiers_are_gone(catalog: Catalog) -> None:
    catalog.heartbeat(record("silent"), expiry_s=0.05)
    catalog.heartbeat(record("removed"), expiry_s=60)
    catalog.heartbeat(record("living"), expiry_s=60)
    for tier_id in ("silent", "removed", "living"):
        catalog.publish(tier_id, "1", KEYS)
    catalog.remove_tier("removed")
    wait_until(lambda: [tier.tier_id for tier in catalog.tiers()] == ["living"])
    assert catalog.stored_run(KEYS) == StoredRun(len(KEYS), {"living": len(KEYS)})
    [tier] = catalog.tiers()
    assert (tier.incarnation, tier.node_id, tier.slots, tier.used_slots) == ("1", "node", 10, 3)
    assert abs(time.time() - tier.heartbeat_unix_s) < 600


def test_keys_are_bytes_of_any_kind_and_batches_have_no_seams(catalog: Catalog) -> None:
    keys = [i.to_bytes(2, "big") + b"\r\n\0\xff :*" + bytes(6) for i in range(2 * BATCH_KEYS + 1)]
    catalog.heartbeat(record("a"), expiry_s=60)
    catalog.publish("a", "1", iter(keys))
    assert catalog.stored_run(keys) == StoredRun(len(keys), {"a": len(keys)})
    catalog.withdraw("a", keys[BATCH_KEYS:])
    assert catalog.stored_run(keys) == StoredRun(BATCH_KEYS, {"a": BATCH_KEYS})


def test_entries_expire_and_empty_ones_vanish(catalog: Catalog, redis_server: Any) -> None:
    catalog.publish("a", "1", KEYS[:1])
    with redis.Redis.from_url(redis_server.url) as client:
        assert 0 < client.ttl(CHUNK_PREFIX + KEYS[0]) <= CHUNK_EXPIRY_S
        catalog.withdraw("a", KEYS[:1])
        assert client.keys(CHUNK_PREFIX + b"*") == []


def test_a_stored_run_is_one_round_trip(catalog: Catalog, redis_server: Any) -> None:
    catalog.stored_run(KEYS)  # loads the script
    with redis.Redis.from_url(redis_server.url) as client:
        client.config_resetstat()
        catalog.stored_run(KEYS)
        calls = {name: stats["calls"] for name, stats in client.info("commandstats").items()}
    assert calls.pop("cmdstat_evalsha") == 1
    within = {"cmdstat_time", "cmdstat_hgetall", "cmdstat_hmget"}
    assert set(calls) <= within | {"cmdstat_config|resetstat", "cmdstat_config"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(st.dictionaries(st.sampled_from("abc"), st.sets(st.integers(0, 7)), max_size=3))
def test_a_stored_run_against_a_naive_one(catalog: Catalog, redis_server: Any, holdings: dict[str, set[int]]) -> None:
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushdb()
    for tier_id, chunks in holdings.items():
        catalog.heartbeat(record(tier_id), expiry_s=60)
        catalog.publish(tier_id, "1", [KEYS[i] for i in chunks])
    stored = set[int]().union(*holdings.values())
    run = next(i for i in range(9) if i not in stored)
    shares = {tier_id: len(chunks & set(range(run))) for tier_id, chunks in holdings.items()}
    assert catalog.stored_run(KEYS) == StoredRun(run, {tier_id: share for tier_id, share in shares.items() if share})


def test_errors_are_typed_and_the_client_recovers(catalog: Catalog, redis_server: Any) -> None:
    with pytest.raises(CatalogUnavailableError, match="no Redis URL"):
        Catalog("http://localhost")
    catalog.publish("a", "1", KEYS)
    redis_server.kill()
    for call in (
        lambda: catalog.publish("a", "1", KEYS),
        lambda: catalog.withdraw("a", KEYS),
        lambda: catalog.heartbeat(record("a"), expiry_s=1),
        lambda: catalog.stored_run(KEYS),
        lambda: catalog.remove_tier("a"),
        catalog.tiers,
    ):
        with pytest.raises(CatalogUnavailableError, match=redis_server.url):
            call()
    redis_server.start()
    assert catalog.tiers() == []
    assert catalog.stored_run(KEYS) == StoredRun(0, {})


def test_each_chunk_has_places_of_its_own(catalog: Catalog) -> None:
    for tier_id, keys in (("a", KEYS[:2]), ("b", KEYS), ("c", KEYS[1:])):
        catalog.heartbeat(record(tier_id), expiry_s=60)
        catalog.publish(tier_id, record(tier_id).incarnation, keys)
    catalog.publish("d", "of the past", KEYS)
    assert catalog.stored_run(KEYS) == StoredRun(len(KEYS), {"a": 2, "b": len(KEYS), "c": len(KEYS) - 1})
    assert catalog.locate([KEYS[0], KEYS[2], b"x" * 16]) == [{"a", "b"}, {"b", "c"}, set()]
    assert dict(catalog.entries()) == dict(zip(KEYS, catalog.locate(KEYS), strict=True))


@pytest.fixture
def publisher(redis_server: Any) -> Iterator[CatalogPublisher]:
    publisher = CatalogPublisher(Catalog(redis_server.url), "a", "node", heartbeat_s=0.05)
    yield publisher
    publisher.stop()


def small_arena(directory: Path, name: str = "store", slots: int = 4) -> Arena:
    return Arena.create(
        directory,
        name,
        layout=LAYOUT,
        index_nbytes=8,
        index_fingerprint="index",
        capacity_bytes=(2 << 20) + slots * LAYOUT.nbytes,
    )


@pytest.fixture
def store(tmp_path: Path, publisher: CatalogPublisher) -> ArenaStore:
    return ArenaStore(small_arena(tmp_path), publisher.changed)


def test_publisher_tells_of_commits_and_evictions(
    catalog: Catalog, publisher: CatalogPublisher, store: ArenaStore
) -> None:
    put(store, KEYS[:2])
    publisher.start(store)
    wait_until(lambda: catalog.stored_run(KEYS) == StoredRun(2, {"a": 2}))
    put(store, KEYS[2:4])
    wait_until(lambda: catalog.stored_run(KEYS) == StoredRun(4, {"a": 4}))
    put(store, KEYS[4:5])  # evicts the end of the first
    wait_until(lambda: catalog.stored_run(KEYS) == StoredRun(1, {"a": 1}))
    wait_until(lambda: catalog.tiers()[0].used_slots == 4)
    publisher.stop()
    assert catalog.tiers() == []
    assert not any(thread.name == "catalog-publisher" for thread in threading.enumerate())


def test_publisher_outlives_redis_and_publishes_all_again(
    catalog: Catalog, publisher: CatalogPublisher, store: ArenaStore, redis_server: Any
) -> None:
    publisher.start(store)
    put(store, KEYS[:2])
    wait_until(lambda: catalog.stored_run(KEYS) == StoredRun(2, {"a": 2}))
    redis_server.kill()
    put(store, KEYS[2:3])
    redis_server.start()
    wait_until(lambda: catalog.stored_run(KEYS) == StoredRun(3, {"a": 3}))


def test_all_is_published_though_the_answer_to_a_heartbeat_got_lost(
    catalog: Catalog, publisher: CatalogPublisher, store: ArenaStore, redis_server: Any
) -> None:
    """Redis was restarted empty and got a heartbeat, but its reply, that the tier is unknown, was lost."""
    publisher.start(store)
    put(store, KEYS[:3])
    wait_until(lambda: catalog.stored_run(KEYS) == StoredRun(3, {"a": 3}))
    heartbeat, lost = publisher._catalog._heartbeat, list[object]()

    def lose_one(**arguments: Any) -> object:
        answer = heartbeat(**arguments)
        if answer is None and not lost:
            lost.append(answer)
            answer = heartbeat(**arguments)  # as a client that tries again after its connection broke
        return answer

    publisher._catalog._heartbeat = lose_one  # type: ignore[assignment]
    redis_server.kill()
    redis_server.start()
    wait_until(lambda: catalog.stored_run(KEYS) == StoredRun(3, {"a": 3}))
    assert lost


def test_publisher_that_forgot_withdrawals_begins_anew(
    catalog: Catalog,
    publisher: CatalogPublisher,
    store: ArenaStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tier_module, "MAX_PENDING", 2)
    catalog.heartbeat(record("a", publisher._incarnation), expiry_s=60)
    catalog.publish("a", publisher._incarnation, KEYS)
    for key in KEYS:
        publisher.changed(key, False)
    put(store, KEYS[:1])
    publisher.start(store)
    wait_until(lambda: catalog.stored_run(KEYS) == StoredRun(1, {"a": 1}))
    assert catalog.stored_run(KEYS[3:]) == StoredRun(0, {})


def test_of_two_records_of_a_session_the_newer_one_stays(catalog: Catalog, tmp_path: Path, redis_server: Any) -> None:
    now_s = time.time()
    old = SessionRecord("s", tuple(KEYS[:2]), now_s + 600, changed_unix_s=now_s - 20)
    new = SessionRecord("s", tuple(KEYS[2:4]), changed_unix_s=now_s - 10)
    tiers = [SessionPins(ArenaStore(small_arena(tmp_path, name)), catalog, 1 << 20) for name in ("one", "two")]
    for sessions, record in zip(tiers, (new, old), strict=True):
        sessions.set(record)
    redis_server.kill()
    redis_server.start()
    for sessions in tiers:  # it came back empty, and who has the older record is the last to say so
        sessions.publish()
    assert catalog.session("s") == new
    catalog.set_session(replace(new, keys=(), state_keys=tuple(KEYS[:1])))
    assert catalog.session("s") == replace(new, keys=(), state_keys=tuple(KEYS[:1]))
    # so it is at a tier
    stores = [ArenaStore(small_arena(tmp_path, name)) for name in ("three", "four")]
    for store, records in zip(stores, ((old, new), (new, old)), strict=True):
        put(store, KEYS[:4])
        sessions = SessionPins(store, catalog, 1 << 20)
        for record in records:
            sessions.set(record)
        assert store.stats().pinned_slots == 0


def test_a_request_s_record_is_the_newest_though_a_clock_is_ahead(catalog: Catalog, store: ArenaStore) -> None:
    until = time.time() + 6000
    ahead = SessionRecord("s", tuple(KEYS[:1]), until, changed_unix_s=time.time() + 300)
    catalog.set_session(ahead)
    SessionPins(store, catalog, 1 << 20).record("s", KEYS[:3])
    newer = math.nextafter(ahead.changed_unix_s, math.inf)
    assert catalog.session("s") == SessionRecord("s", tuple(KEYS[:3]), until, changed_unix_s=newer)


def test_records_that_nobody_can_ask_for_are_dropped(catalog: Catalog, store: ArenaStore, redis_server: Any) -> None:
    put(store, KEYS[:3])
    sessions, now_s = SessionPins(store, catalog, 1 << 20), time.time()
    long_ago_s = now_s - RECORD_EXPIRY_S - 1
    for record in (
        SessionRecord("over", tuple(KEYS[:1]), changed_unix_s=long_ago_s),
        SessionRecord("was pinned", tuple(KEYS[:1]), now_s - 1, changed_unix_s=long_ago_s),
        SessionRecord("pinned", tuple(KEYS[1:2]), now_s + 600, changed_unix_s=long_ago_s),
        SessionRecord("late", tuple(KEYS[2:3]), changed_unix_s=now_s - RECORD_EXPIRY_S + 600),
    ):
        sessions.set(record)
    sessions.publish()
    assert [record.session_id for record in catalog.sessions()] == ["late", "pinned"]
    assert 0 < next(record.expiry_s for record in catalog.sessions() if record.session_id == "late") <= 600
    sessions.tick()
    sessions.check_integrity()
    assert sorted(sessions._records) == ["late", "pinned"]
    assert store.stats().pinned_slots == 1


def session_keys(number: int, chunks: int = 100) -> tuple[ChunkKey, ...]:
    return tuple(bytes([number, chunk]) * 8 for chunk in range(chunks))


def sum_of_sizes(url: str) -> tuple[int, int]:
    """The bytes of sessions by the catalog's count, and by Redis'."""
    with redis.Redis.from_url(url) as client:
        total = int(client.get(SESSION_KEYS[2]) or 0)
        assert total == sum(map(int, client.hvals(SESSION_KEYS[1])))
        assert sorted(client.hkeys(SESSION_KEYS[1])) == sorted(client.zrange(SESSION_KEYS[0], 0, -1))
        names = [*client.keys(SESSION_PREFIX + b"*"), *SESSION_KEYS[:2]]
        return total, sum(client.memory_usage(name) or 0 for name in names)


def test_sessions_take_no_more_than_they_may_and_pinned_ones_stay(
    catalog: Catalog, store: ArenaStore, redis_server: Any
) -> None:
    now_s = time.time()
    one = SessionRecord("0", session_keys(0)).nbytes
    sessions = SessionPins(store, catalog, 4 * one)
    for number in range(10):
        pinned_until_s = now_s + 600 if number in (0, 3) else 0.0
        record = SessionRecord(str(number), session_keys(number), pinned_until_s, changed_unix_s=now_s - 100 + number)
        sessions.set(record)
        sessions.publish([record.session_id])
        sessions.check_integrity()
        assert sum_of_sizes(redis_server.url)[0] <= 4 * one
    assert sorted(sessions._records) == ["0", "3", "8", "9"]
    assert [record.session_id for record in catalog.sessions()] == ["0", "3", "8", "9"]
    assert catalog.session("4") is None
    # one that grows makes room for itself; a pin makes none, and takes none
    sessions.set(SessionRecord("9", session_keys(9, 180), changed_unix_s=now_s - 50))
    sessions.publish()
    assert [record.session_id for record in catalog.sessions()] == ["0", "3", "9"] == sorted(sessions._records)
    for number in range(20, 26):
        catalog.set_session(SessionRecord(str(number), session_keys(number), now_s + 600, changed_unix_s=now_s))
    pinned = ["0", "20", "21", "22", "23", "24", "25", "3"]
    catalog.set_session(SessionRecord("late", session_keys(9), changed_unix_s=now_s - 1), 4 * one)
    assert [record.session_id for record in catalog.sessions()] == pinned  # there is room for the pinned ones only
    for name in pinned:
        catalog.remove_session(name)
    assert sum_of_sizes(redis_server.url)[0] == 0


def test_what_a_session_takes_is_what_is_counted(catalog: Catalog, redis_server: Any) -> None:
    for number in range(200):
        catalog.set_session(SessionRecord(f"tenant/session-{number}", session_keys(number % 250, number)))
    counted, taken = sum_of_sizes(redis_server.url)
    assert 0.8 * counted < taken < 1.2 * counted


def test_a_full_redis_forgets_entries_of_chunks_and_no_tier_or_session(tmp_path: Path) -> None:
    with EmbeddedRedis(max_bytes=8 << 20) as server, Catalog(server.url) as catalog:
        catalog.heartbeat(record("a"), expiry_s=600)
        for number in range(10):
            catalog.set_session(SessionRecord(str(number), session_keys(number), time.time() + 600))
        keys = [number.to_bytes(4, "big") * 4 for number in range(60_000)]
        for start in range(0, len(keys), 10_000):
            catalog.publish("a", "1", keys[start : start + 10_000])
        with redis.Redis.from_url(server.url) as client:
            assert client.info("stats")["evicted_keys"] > 1000
            assert client.info("memory")["used_memory"] < 9 << 20
        assert [tier.tier_id for tier in catalog.tiers()] == ["a"]
        assert all(found is not None and found.is_pinned for found in map(catalog.session, map(str, range(10))))
        assert sum(bool(tiers) for tiers in catalog.locate(keys)) > 1000


class OtherTiers:
    """In-process stores that stand for tiers on other nodes; those in ``away`` don't answer."""

    def __init__(self, catalog: Catalog, stores: dict[str, ArenaStore]) -> None:
        self.catalog = catalog
        self.stores = stores
        self.away: set[str] = set()

    def store_batch(self, tier_id: str, batch: ChunkBatch, *, copied_only: bool) -> list[ChunkKey]:
        if tier_id in self.away:
            raise ChunkLostError(f"{tier_id} is away")
        taken = store_batch(self.stores[tier_id], batch, copied_only=copied_only)
        self.catalog.publish(tier_id, "1", taken)
        return taken


@pytest.fixture
def others(catalog: Catalog, tmp_path: Path) -> OtherTiers:
    others = OtherTiers(catalog, {name: ArenaStore(small_arena(tmp_path, name, slots=80)) for name in "abc"})
    for name in ("self", *others.stores):
        catalog.heartbeat(record(name), expiry_s=600)
    return others


def exchange_of(
    catalog: Catalog, others: Any, directory: Path, disk: ArenaStore | None = None, **options: Any
) -> tuple[ArenaStore, ChunkExchange]:
    """The exchange of the tier "self"; the test runs its rounds."""
    store = ArenaStore(small_arena(directory, "self", slots=80), lambda key, stored: exchange.changed(key, stored))
    exchange = ChunkExchange("self", store, catalog, others, MemoryConfig(**options), lambda keys: None, disk)
    return store, exchange


def test_a_tier_that_is_away_keeps_no_replica_from_the_others(
    catalog: Catalog, others: OtherTiers, tmp_path: Path
) -> None:
    store, exchange = exchange_of(catalog, others, tmp_path, replicas=2)
    keys = [bytes([i]) * 16 for i in range(60)]
    first = {key: rendezvous(key, list(others.stores))[0] for key in keys}
    assert set(first.values()) == set(others.stores)
    put(store, keys)
    catalog.publish("self", "1", keys)
    others.away = {"a"}
    exchange._round()
    assert {name: set(one.keys()) for name, one in others.stores.items()} == {
        name: {key for key in keys if first[key] == name and name != "a"} for name in others.stores
    }
    others.away.clear()
    exchange._round()
    assert all(len(tiers) == 2 for tiers in catalog.locate(keys))
    assert exchange.counters.replicated_chunks == len(keys)


def test_replicas_are_made_after_redis_was_away(
    catalog: Catalog, others: OtherTiers, tmp_path: Path, redis_server: Any
) -> None:
    store, exchange = exchange_of(catalog, others, tmp_path, replicas=2)
    keys = [bytes([i]) * 16 for i in range(20)]
    put(store, keys)
    tiers = {tier.tier_id: tier for tier in catalog.tiers() if tier.tier_id != "self"}
    redis_server.kill()
    with pytest.raises(CatalogUnavailableError):
        exchange._replicate(tiers)  # it went between two questions of a round
    redis_server.start()
    for name in ("self", *others.stores):
        catalog.heartbeat(record(name), expiry_s=600)
    catalog.publish("self", "1", keys)
    exchange._round()
    assert all(len(tiers) == 2 for tiers in catalog.locate(keys))


def test_a_chunk_whose_copy_another_tier_has_evicted_goes_first_no_longer(
    catalog: Catalog, others: OtherTiers, tmp_path: Path
) -> None:
    store, exchange = exchange_of(catalog, others, tmp_path)
    put(store, KEYS)
    catalog.publish("self", "1", KEYS)
    catalog.publish("a", "1", KEYS)
    store.set_copied(KEYS, True)
    exchange._round()
    assert set(store.copied()) == set(KEYS)
    catalog.withdraw("a", KEYS[:3])
    exchange._round()
    assert set(store.copied()) == set(KEYS[3:])
    assert set(store.coldest(9)) == set(KEYS[:3])


def test_a_chunk_that_has_gone_from_the_disk_goes_first_no_longer(
    catalog: Catalog, others: OtherTiers, tmp_path: Path
) -> None:
    arena = small_arena(tmp_path, "disk")
    disk = ArenaStore(arena, lambda key, stored: exchange.disk_changed(key, stored))
    store, exchange = exchange_of(catalog, others, tmp_path, disk)
    put(store, KEYS[:3])
    exchange._spill(KEYS[:3])
    assert set(store.copied()) == set(KEYS[:3])
    while disk.stored(KEYS[:1]) == [True]:
        put(disk, [bytes([100 + disk.stats().evicted_chunks + disk.stats().stored_chunks]) * 16])
    assert set(store.copied()) == {key for key in KEYS[:3] if disk.stored([key]) == [True]} != set(KEYS[:3])
    # and the other way round: what was brought from the disk and is here no longer
    [last] = exchange._store.keys()[:1]
    exchange._spill([last])
    disk.set_copied([last], True)
    store.drop(last, next(ref for ref in store.hold("reader", [last]) if ref is not None))
    exchange._round()
    assert disk.copied() == []


def test_a_pin_that_comes_after_the_session_was_changed_or_deleted_pins_nothing(
    catalog: Catalog, store: ArenaStore
) -> None:
    """The caller gave the call up, but the call still arrives later."""
    put(store, KEYS[:2])
    sessions = SessionPins(store, catalog, 1 << 20)
    pinned = SessionRecord("s", tuple(KEYS[:2]), time.time() + 6000)
    catalog.set_session(pinned)
    assert sessions.told(pinned) == 0 and store.stats().pinned_slots == 2
    unpinned = replace(pinned, pinned_until_unix_s=0.0).after(pinned)
    catalog.set_session(unpinned)
    sessions.told(unpinned)
    sessions.forget("s")
    sessions.told(pinned)
    assert store.stats().pinned_slots == 0
    catalog.remove_session("s")
    sessions.told(pinned)
    assert store.stats().pinned_slots == 0
