"""Concurrent operations of several tiers: no deadlocks, and one owner for each chunk's copies."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest
import torch

from forecache.workers.errors import ChunkLostError
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.config import MemoryConfig
from forecache.workers.memory.format.chunk_batch import ChunkBatch, RecordBatch
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.layout import attention_layout
from forecache.workers.memory.tier.catalog import Catalog, TierRecord
from forecache.workers.memory.tier.exchange import ChunkExchange
from forecache.workers.memory.tier.publisher import CatalogPublisher
from forecache.workers.memory.tier.spread import HostedSequences
from forecache.workers.memory.tier.transfer import read, store_batch

LAYOUT = attention_layout("m", layers=1, kv_heads=1, head_dim=8, chunk_tokens=16, dtype=torch.float32)
KEY = b"k" * 16


def keys_of(letter: str, count: int) -> list[ChunkKey]:
    return [letter.encode() + bytes([number]) * 15 for number in range(count)]


def arena(directory: Path, name: str, slots: int = 8) -> Arena:
    return Arena.create(
        directory,
        name,
        layout=LAYOUT,
        index_nbytes=8,
        index_fingerprint="index",
        capacity_bytes=(2 << 20) + slots * LAYOUT.nbytes,
    )


def put(store: ArenaStore, keys: Sequence[ChunkKey]) -> None:
    for key in keys:
        [place] = store.reserve_slots("writer", [key])
        store.arena.seal(place.ref, key, store.arena.digests(place.ref.slot))
        store.commit("writer", [(key, place.ref)])
        store.release("writer")


@pytest.fixture
def catalog(redis_server: Any) -> Iterator[Catalog]:
    with Catalog(redis_server.url) as catalog:
        yield catalog


class Nodes:
    """In-process tiers, each with threads for the calls of others, as in the actors: `RemotePeers`.

    Each call of `store_batch` passes ``gate`` before it is queued at the other tier, and ``within`` after it was done
    there.
    """

    deadline_s = 3.0

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.exchanges: dict[str, ChunkExchange] = {}
        self.stores: dict[str, ArenaStore] = {}
        self.hosted: dict[str, HostedSequences] = {}
        self.lanes: dict[str, ThreadPoolExecutor] = {}
        self.gate: Callable[[], object] = lambda: None
        self.within: Callable[[], object] = lambda: None
        self.refused: list[str] = []

    def add(self, name: str, store: ArenaStore, exchange: ChunkExchange) -> None:
        self.stores[name], self.exchanges[name] = store, exchange
        self.hosted[name] = HostedSequences(store, LAYOUT, exchange.from_disk_alone)
        self.lanes[name] = ThreadPoolExecutor(self.threads, thread_name_prefix=f"peers-of-{name}")

    def hold_hosted(self, tier_id: str, holder: str, keys: Sequence[ChunkKey]) -> "Future[RecordBatch]":
        return self.lanes[tier_id].submit(self.hosted[tier_id].hold, holder, keys)

    def store_batch(self, tier_id: str, batch: ChunkBatch, *, copied_only: bool) -> list[ChunkKey]:
        self.gate()
        store = self.stores[tier_id]
        try:
            call = self.lanes[tier_id].submit(store_batch, store, batch, copied_only=copied_only)
            taken = call.result(self.deadline_s)
        except TimeoutError as error:
            self.refused.append(tier_id)
            raise ChunkLostError(f"{tier_id} did not answer within {self.deadline_s:g} s") from error
        self.within()
        return taken

    def read(self, tier_id: str, keys: Sequence[ChunkKey]) -> "Future[ChunkBatch]":
        return self.lanes[tier_id].submit(read, self.stores[tier_id], keys)

    def set_copied(self, tier_id: str, keys: Sequence[ChunkKey], since: int) -> None:
        self.stores[tier_id].set_copied(keys, True, since)

    def close(self) -> None:
        for lane in self.lanes.values():
            lane.shutdown()


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    nodes = Nodes(threads=2)
    yield nodes
    nodes.close()


def node(nodes: Nodes, name: str, catalog: Catalog, directory: Path, disk: ArenaStore | None = None) -> ArenaStore:
    peers: Any = nodes
    store = ArenaStore(arena(directory, name))
    exchange = ChunkExchange(name, store, catalog, peers, MemoryConfig(), lambda keys: None, disk)
    nodes.add(name, store, exchange)
    return store


def test_tiers_that_hold_chunks_of_their_disks_for_each_other_do_not_wait_in_a_circle(
    nodes: Nodes, catalog: Catalog, tmp_path: Path
) -> None:
    for name in "ab":
        catalog.heartbeat(TierRecord(name, "1", "node", slots=80, used_slots=0), expiry_s=600)
        disk = ArenaStore(arena(tmp_path, f"{name}-disk", slots=80))
        store = node(nodes, name, catalog, tmp_path, disk)
        put(store, keys_of(f"{name}", store.arena.slots))  # its memory is full of what it alone has
        put(disk, keys_of(name.upper(), 2 * nodes.threads))
    for exchange in nodes.exchanges.values():
        exchange._living = frozenset("ab") - {exchange._tier_id}
    # each asks the other for as much at once as it has threads for, and none goes on before all are within
    everyone = threading.Barrier(2 * nodes.threads)
    nodes.gate = lambda: everyone.wait(30)
    wanted = {
        (name, number): keys_of(name.upper(), 2 * nodes.threads)[2 * number : 2 * number + 2]
        for name in "ab"
        for number in range(nodes.threads)
    }
    calls = {place: nodes.hold_hosted(place[0], f"w/{place}", keys) for place, keys in wanted.items()}
    for place, call in calls.items():
        assert list(call.result(60).keys) == wanted[place]
    assert nodes.refused == []
    for store in nodes.stores.values():
        store.check_integrity()
        assert store.stats().evicted_chunks == 2 * nodes.threads
    for name in "ab":  # what made room for them lies on the disk
        assert all(nodes.exchanges[name]._disk.stored(keys_of(name, 2 * nodes.threads)))  # type: ignore[union-attr]


def test_a_prefix_that_alternates_between_disk_and_another_tier_is_found_whole(
    nodes: Nodes, catalog: Catalog, tmp_path: Path
) -> None:
    disk = ArenaStore(arena(tmp_path, "a-disk"))
    here, there = (node(nodes, name, catalog, tmp_path, own) for name, own in (("a", disk), ("b", None)))
    keys = keys_of("k", here.arena.slots)
    put(disk, keys[1::2])
    put(there, keys[::2])
    for name in "ab":
        catalog.heartbeat(TierRecord(name, "1", "node", slots=8, used_slots=0), expiry_s=600)
    catalog.publish("b", "1", keys[::2])
    assert len(nodes.exchanges["a"].fetch_prefix("w/0", keys)) == len(keys)
    assert nodes.exchanges["a"].counters.fetched_chunks == len(keys) // 2
    for store in (here, there, disk):
        store.check_integrity()


def test_of_two_tiers_that_send_each_other_a_chunk_at_once_one_answers_for_it(
    nodes: Nodes, catalog: Catalog, tmp_path: Path
) -> None:
    for name in "ab":
        put(node(nodes, name, catalog, tmp_path), [KEY])
    both = threading.Barrier(2)
    nodes.within = lambda: both.wait(30)  # each has the other's answer before either acts on it
    with ThreadPoolExecutor(2) as pool:
        moves = [
            pool.submit(exchange._move_away, [KEY], {other})
            for exchange, other in zip(nodes.exchanges.values(), "ba", strict=True)
        ]
        for move in moves:
            move.result(60)
    assert [store.copied() for store in nodes.stores.values()].count([KEY]) < 2
    nodes.within = lambda: None
    nodes.exchanges["a"]._move_away([KEY], {"b"})  # one after the other they agree
    assert [store.copied() for store in nodes.stores.values()] == [[KEY], []]


Step = Callable[[], None]


def sending(source: ArenaStore, target: ArenaStore) -> list[Step]:
    """The steps of `ChunkExchange._move_away` of the chunk."""
    passed: dict[str, Any] = {}

    def note() -> None:
        passed["since"] = source.mark
        passed["batch"] = read(source, [KEY])

    return [
        note,
        lambda: passed.update(taken=store_batch(target, passed["batch"])),
        lambda: source.set_copied(passed["taken"], True, passed["since"]),
    ]


def fetching(source: ArenaStore, target: ArenaStore) -> list[Step]:
    """The steps of `ChunkFetcher.bring` of the chunk; it does not wait for the last one, which may come late."""
    passed: dict[str, Any] = {}
    return [
        lambda: passed.update(batch=read(source, [KEY])),
        lambda: passed.update(taken=store_batch(target, passed["batch"])),
        lambda: source.set_copied(passed["taken"], True, passed["batch"].mark),
    ]


def caching(source: ArenaStore, target: ArenaStore) -> list[Step]:
    """As :func:`fetching`, for a spread sequence: the source stays the owner."""
    passed: dict[str, Any] = {}
    return [
        lambda: passed.update(batch=read(source, [KEY])),
        lambda: passed.update(taken=store_batch(target, passed["batch"], cached=True)),
    ]


def interleavings(lengths: Sequence[int]) -> Iterator[list[int]]:
    """All orders of the steps of several operations, as the numbers of those whose step is next."""
    if not any(lengths):
        yield []
    for number, left in enumerate(lengths):
        if left:
            rest = [length - (other == number) for other, length in enumerate(lengths)]
            for order in interleavings(rest):
                yield [number, *order]


def test_in_every_order_of_three_exchanges_somebody_answers_for_the_chunk(tmp_path: Path) -> None:
    """Three tiers, two of which have the chunk: any two transfers, and some of three, in all orders."""
    stores = [ArenaStore(arena(tmp_path, name)) for name in "abc"]
    a, b, c = stores
    pairs = [(a, b), (b, a), (b, c), (c, a)]
    kinds = [(make, pair) for make in (sending, fetching) for pair in pairs] + [(caching, (a, b)), (caching, (b, a))]
    threes = [
        ((sending, (a, b)), (sending, (b, c)), (sending, (c, a))),
        ((fetching, (a, b)), (fetching, (b, c)), (fetching, (c, a))),
        ((sending, (a, b)), (fetching, (a, b)), (sending, (b, a))),
        ((fetching, (a, b)), (sending, (b, a)), (fetching, (b, a))),
        ((sending, (a, b)), (sending, (b, a)), (caching, (a, b))),
    ]
    tried = 0
    for chosen in [*combinations_with_replacement(kinds, 2), *threes]:
        for order in interleavings([2 if make is caching else 3 for make, _ in chosen]):
            for store in stores:
                for ref in store.find([KEY]):
                    if ref is not None:
                        store.drop(KEY, ref)
                put(store, [KEY] if store is not c else [])
            steps = [iter(make(*pair)) for make, pair in chosen]
            for turn in order:
                next(steps[turn])()
            holding = [store for store in stores if store.stored([KEY]) == [True]]
            assert any(KEY not in store.copied() for store in holding), (chosen, order)
            tried += 1
    assert tried == 8178
    for store in stores:
        store.check_integrity()


def test_a_chunk_that_goes_to_disk_while_it_comes_from_there_is_answered_for_once(tmp_path: Path) -> None:
    """`_spill` and `from_disk` of one tier are sendings between its memory and its disk."""
    memory, disk = (ArenaStore(arena(tmp_path, name)) for name in ("memory", "disk"))
    for order in interleavings([3, 3]):
        for store in (memory, disk):
            for ref in store.find([KEY]):
                if ref is not None:
                    store.drop(KEY, ref)
            put(store, [KEY])
        steps = [iter(fetching(memory, disk)), iter(fetching(disk, memory))]
        for turn in order:
            next(steps[turn])()
        assert [store.copied() for store in (memory, disk)].count([KEY]) < 2, order


def publisher_of(catalog: Catalog, store_dir: Path) -> tuple[CatalogPublisher, ArenaStore]:
    publisher = CatalogPublisher(catalog, "a", "node", heartbeat_s=600)
    return publisher, ArenaStore(arena(store_dir, "store", slots=4), publisher.changed)


def test_a_chunk_that_is_evicted_before_it_is_published_has_no_entry(catalog: Catalog, tmp_path: Path) -> None:
    publisher, store = publisher_of(catalog, tmp_path)
    put(store, [KEY])
    publisher._publish(store)
    assert catalog.locate([KEY]) == [{"a"}]
    put(store, keys_of("x", store.arena.slots))  # it is gone, between store_batch's release and publish_now
    publisher._publish(store)
    assert catalog.locate([KEY]) == [set()]
    publisher.publish_now([KEY])
    publisher._publish(store)
    assert catalog.locate([KEY]) == [set()]
    assert catalog.locate(keys_of("x", store.arena.slots)) == [{"a"}] * store.arena.slots


def test_a_chunk_that_is_evicted_while_it_is_published_has_no_entry(catalog: Catalog, tmp_path: Path) -> None:
    publisher, store = publisher_of(catalog, tmp_path)
    publish = catalog.publish
    put(store, [KEY])
    publisher._publish(store)

    def evict_and_publish(tier_id: str, incarnation: str, keys: Any) -> None:
        catalog.publish = publish  # type: ignore[method-assign]
        put(store, keys_of("x", store.arena.slots))
        publisher._publish(store)  # its thread withdraws what this one is about to write
        publish(tier_id, incarnation, keys)

    catalog.publish = evict_and_publish  # type: ignore[method-assign]
    publisher.publish_now([KEY])
    publisher._publish(store)
    assert catalog.locate([KEY]) == [set()]


def test_an_entry_of_an_incarnation_that_has_ended_meanwhile_is_written_again(catalog: Catalog, tmp_path: Path) -> None:
    publisher, store = publisher_of(catalog, tmp_path)
    publish = catalog.publish
    put(store, [KEY])
    publisher._publish(store)

    def begin_anew_and_publish(tier_id: str, incarnation: str, keys: Any) -> None:
        catalog.publish = publish  # type: ignore[method-assign]
        publisher._overflowed, publisher._next_heartbeat_s = True, 0.0
        publisher._publish(store)
        publish(tier_id, incarnation, keys)

    catalog.publish = begin_anew_and_publish  # type: ignore[method-assign]
    publisher.publish_now([KEY])
    assert catalog.locate([KEY]) == [set()]
    publisher._publish(store)
    assert catalog.locate([KEY]) == [{"a"}]


def test_nobody_who_sends_chunks_waits_for_a_redis_that_is_away(
    catalog: Catalog, tmp_path: Path, redis_server: Any
) -> None:
    asked = []
    publish = catalog.publish

    def count(tier_id: str, incarnation: str, keys: Any) -> None:
        asked.append(keys)
        publish(tier_id, incarnation, keys)

    catalog.publish = count  # type: ignore[method-assign]
    publisher, store = publisher_of(catalog, tmp_path)
    publisher.start(store)
    redis_server.kill()
    away = threading.Event()
    publisher._heartbeat_s, publisher._next_heartbeat_s = 0.02, 0.0
    publisher._wake.set()
    while not publisher._away:
        away.wait(0.01)
    asked.clear()
    publisher.publish_now([KEY])
    assert asked == []
    redis_server.start()
    while publisher._away:
        away.wait(0.01)
    put(store, [KEY])
    publisher.publish_now([KEY])
    assert catalog.locate([KEY]) == [{"a"}]
    publisher.stop()
