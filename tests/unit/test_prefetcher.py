"""The copy thread: order of jobs, batches, and errors when cold memory refuses, forgets or fails."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pytest
import torch

from forecache.workers.errors import ChunkLostError, ForecacheError, OverloadedError
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.layout import ChunkLayout, attention_layout, cold_layout
from forecache.workers.memory.format.slots import Reservation, SlotRef
from forecache.workers.memory.format.spread_quota import SpreadQuota
from forecache.workers.memory.hot import prefetcher as prefetcher_module
from forecache.workers.memory.hot import prefix_search as locator
from forecache.workers.memory.hot import remote_chunks as far_chunks
from forecache.workers.memory.hot.completions import Completion, PrefixHeld, Recalled, RecallItem, Released, WrittenBack
from forecache.workers.memory.hot.copies import BATCH_CHUNKS, Copied, Mark
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.memory.hot.prefetcher import LOSSES, Prefetcher
from forecache.workers.memory.hot.snapshot_store import SnapshotStore

HOT = attention_layout("m", layers=1, kv_heads=2, head_dim=8, chunk_tokens=16, dtype=torch.float32)
WAIT_S = 30.0
GATE = "gate"


def key_of(number: int) -> ChunkKey:
    return number.to_bytes(16, "little")


class RoomElsewhere:
    """Other nodes that reserve room but never use it: all chunks of spread sequences are in this arena."""

    def begin(self, holder: str, chunks: int) -> None:
        pass

    def reserve_remote_quota(self, holder: str) -> SpreadQuota:
        return SpreadQuota(local_chunks=1000, max_in_flight=4)

    def move_out(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        raise AssertionError("nothing is too much for the arena")

    def fetch(self, holder: str, reader: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        raise AssertionError("nothing lies elsewhere")

    def read_layer(self, holder: str, keys: Sequence[ChunkKey], layer: int) -> object:
        raise AssertionError("nothing lies elsewhere")


class WatchedStore(ArenaStore):
    """A store that records its calls, refuses chosen ones, and can block the copy thread until GATE is released."""

    def __init__(self, arena: Arena) -> None:
        super().__init__(arena)
        self.reserved: list[tuple[str, int]] = []
        self.committed: list[int] = []
        self.entered, self.gate = threading.Event(), threading.Event()
        self.refusals: list[ForecacheError] = []
        self.nodes: RoomElsewhere | None = None

    @property
    def spread(self) -> Any:  # type: ignore[override]
        return self.nodes

    def release(self, holder: str) -> None:
        if holder == GATE:
            self.entered.set()
            assert self.gate.wait(WAIT_S)
        super().release(holder)

    def reserve_slots(self, holder: str, keys: Sequence[ChunkKey]) -> list[Reservation]:
        self.reserved.append((holder, len(keys)))
        if self.refusals:
            raise self.refusals.pop(0)
        return super().reserve_slots(holder, keys)

    def commit(self, holder: str, refs: Sequence[tuple[ChunkKey, SlotRef]]) -> None:
        self.committed.append(len(refs))
        super().commit(holder, refs)


class Bench:
    """A pool whose slot n is filled with n + 1, a store of ``places`` slots, and a prefetcher between them."""

    def __init__(self, directory: str, places: int, slots: int, cold: ChunkLayout, *, spread: bool = False) -> None:
        arena = Arena.create(
            Path(directory),
            "prefetcher",
            layout=cold,
            index_nbytes=8,
            index_fingerprint="index",
            capacity_bytes=(2 << 20) + places * cold.nbytes,
        )
        assert arena.slots == places
        self.pool = HotPool(HOT, slots, torch.device("cpu"))
        for slot in range(slots):
            self.pool.memory[slot] = slot + 1
        self.store = WatchedStore(arena)
        self.store.nodes = RoomElsewhere() if spread else None
        self.prefetcher = Prefetcher(self.pool, self.store, lambda slot: self.pool.memory[slot, :8], cold)
        self.seen: list[Completion] = []
        self.released: list[str] = []

    @contextmanager
    def held_up(self) -> Iterator[None]:
        """Jobs that are posted inside the block wait in the queue."""
        self.store.entered.clear()
        self.store.gate.clear()
        self.prefetcher.release_holder(GATE)
        assert self.store.entered.wait(WAIT_S)
        yield
        self.store.gate.set()

    def write_back(self, holder: str, numbers: Sequence[int]) -> None:
        """Write chunks back; chunk n is in slot n."""
        for number in numbers:
            self.prefetcher.write_back(holder, key_of(number), number)

    def done(self) -> list[Completion]:
        """All completions after everything posted so far is done; releases go to ``released``."""
        self.prefetcher.flush()
        self.prefetcher.flush()  # what was put back for want of room is behind the first one
        news = self.prefetcher.drain()
        self.released += [done.holder for done in news if isinstance(done, Released)]
        news = [done for done in news if not isinstance(done, Released)]
        self.seen += news
        return news

    def ref(self, number: int) -> SlotRef:
        ref = next(
            done.ref for done in reversed(self.seen) if isinstance(done, WrittenBack) and done.key == key_of(number)
        )
        assert ref is not None
        return ref

    def stored(self, number: int) -> bool:
        return key_of(number) in set(self.store.keys())

    def close(self) -> None:
        self.store.gate.set()
        self.prefetcher.close()
        self.store.arena.close()


@contextmanager
def open_bench(
    places: int = 40, slots: int = 40, cold_dtype: Literal["auto", "fp8"] = "auto", *, spread: bool = False
) -> Iterator[Bench]:
    with TemporaryDirectory(prefix="prefetcher-test-", dir="/dev/shm") as directory:
        bench = Bench(directory, places, slots, cold_layout(HOT, cold_dtype), spread=spread)
        yield bench
        bench.close()


def numbers_of(news: Sequence[Completion]) -> list[int]:
    """The numbers of the chunks that reached cold memory."""
    written = [done for done in news if isinstance(done, WrittenBack) and done.ref is not None]
    return [int.from_bytes(done.key, "little") for done in written]


def test_waiting_write_backs_are_reserved_and_committed_together() -> None:
    with open_bench() as bench:
        with bench.held_up():
            bench.write_back("a", range(BATCH_CHUNKS + 4))
        assert numbers_of(bench.done()) == list(range(BATCH_CHUNKS + 4))
        assert bench.store.reserved == [("a", BATCH_CHUNKS), ("a", 4)]
        assert bench.store.committed == [BATCH_CHUNKS, 4]
        for number in range(BATCH_CHUNKS + 4):
            assert (bench.store.arena.chunks[bench.ref(number).slot] == number + 1).all()
            assert (bench.store.arena.index[bench.ref(number).slot] == number + 1).all()


def test_a_batch_is_of_one_holder_and_ends_at_other_jobs() -> None:
    with open_bench() as bench:
        with bench.held_up():
            bench.write_back("a", [0, 1])
            bench.write_back("b", [2])
            bench.write_back("a", [3, 4])
            bench.prefetcher.release_holder("a")
            bench.write_back("a", [5, 6])
        assert numbers_of(bench.done()) == list(range(7))
        assert bench.store.reserved == [("a", 2), ("b", 1), ("a", 2), ("a", 2)]
        assert "a" in bench.released, "a holder that left gets a completion when its room is free"
        assert bench.store.stats().held_slots == 3, "what was written after the release is held"


def test_batches_are_bounded_in_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetcher_module, "BATCH_BYTES", 3 * HOT.nbytes + 1)
    with open_bench() as bench:
        with bench.held_up():
            bench.write_back("a", range(7))
        assert numbers_of(bench.done()) == list(range(7))
        assert [count for _, count in bench.store.reserved] == [3, 3, 1]


def test_of_a_refused_batch_is_stored_what_fits() -> None:
    with open_bench(places=5) as bench:
        bench.write_back("other", [20, 21, 22])
        bench.done()
        bench.store.reserved.clear()
        with bench.held_up():
            bench.write_back("a", [0, 1, 21, 2, 3])
        news = bench.done()
        assert bench.store.reserved == [("a", 5), *[("a", 1)] * 5]
        assert numbers_of(news) == [0, 1, 21]  # of 21 an equal chunk is there already
        refused = [done for done in news if isinstance(done, WrittenBack) and done.ref is None]
        assert [done.slot for done in refused] == [2, 3]
        assert all("no room" in done.failure and done.written_bytes == 0 for done in refused)


def test_a_recall_waits_for_one_batch_at_most() -> None:
    with open_bench() as bench:
        bench.write_back("a", [0])
        bench.done()
        entered, go = threading.Event(), threading.Event()
        reserve = bench.store.reserve_slots

        def hold_up(holder: str, keys: Sequence[ChunkKey]) -> list[Reservation]:
            entered.set()
            assert go.wait(WAIT_S)
            return reserve(holder, keys)

        bench.store.reserve_slots = hold_up  # type: ignore[method-assign]
        with bench.held_up():
            bench.write_back("b", range(1, 2 * BATCH_CHUNKS + 1))
        assert entered.wait(WAIT_S)
        ticket = bench.prefetcher.recall([RecallItem(key_of(0), bench.ref(0), 39)])
        go.set()
        kinds = [type(done) for done in bench.done()]
        assert kinds == [WrittenBack] * BATCH_CHUNKS + [Recalled] + [WrittenBack] * BATCH_CHUNKS
        assert [done.ticket for done in bench.seen if isinstance(done, Recalled)] == [ticket]


def test_a_refused_batch_lets_recalls_through() -> None:
    with open_bench(places=3) as bench:
        bench.write_back("a", [0, 1])
        bench.done()
        reserve, first = bench.store.reserve_slots, []

        def recall_after_the_first(holder: str, keys: Sequence[ChunkKey]) -> list[Reservation]:
            if not first:
                first.append(bench.prefetcher.recall([RecallItem(key_of(0), bench.ref(0), 39)]))
            return reserve(holder, keys)

        bench.store.reserve_slots = recall_after_the_first  # type: ignore[method-assign]
        with bench.held_up():
            bench.write_back("b", [2, 3])
        kinds = [type(done) for done in bench.done()]
        assert kinds == [Recalled, WrittenBack, WrittenBack]


def test_bytes_and_seconds_are_told() -> None:
    cold = cold_layout(HOT, "fp8")
    with open_bench(cold_dtype="fp8") as bench:
        with bench.held_up():
            bench.write_back("a", [0, 1, 2])
            bench.write_back("b", [1])
        written = [done for done in bench.done() if isinstance(done, WrittenBack)]
        assert [done.written_bytes for done in written] == [cold.nbytes] * 3 + [0]
        assert all(done.duration_s > 0 for done in written[:3]) and written[3].duration_s == 0
        bench.store.arena.chunks[bench.ref(2).slot, 0] ^= 1
        bench.prefetcher.recall([RecallItem(key_of(number), bench.ref(number), 30 + number) for number in range(3)])
        [recalled] = bench.done()
        assert isinstance(recalled, Recalled)
        assert (recalled.recalled_bytes, recalled.recalled_chunks) == (2 * cold.nbytes, 2)
        assert [item.slot for item in recalled.lost] == [32] and recalled.duration_s > 0
        assert not bench.stored(2), "a damaged chunk is forgotten"


def test_a_damaged_prefix_ends_before_the_damage() -> None:
    with open_bench() as bench:
        bench.write_back("a", range(5))
        bench.done()
        bench.store.arena.chunks[bench.ref(3).slot, 7] ^= 1
        bench.prefetcher.find_prefix("b", [key_of(number) for number in range(5)])
        assert bench.done() == [PrefixHeld("b", tuple(bench.ref(number) for number in range(3)))]
        assert not bench.stored(3)


def test_what_is_dropped_is_not_held_afterwards() -> None:
    with open_bench() as bench:
        bench.write_back("a", range(3))
        bench.done()
        bench.prefetcher.drop(key_of(1), bench.ref(1))
        bench.prefetcher.find_prefix("b", [key_of(number) for number in range(3)])
        assert bench.done() == [PrefixHeld("b", (bench.ref(0),))]


def test_a_place_given_away_while_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tier was restarted: the chunk is written to another slot, the rest of the batch stays where it was."""
    with open_bench() as bench:
        put, renewed = Arena.put, []

        def renew_first(arena: Arena, ref: SlotRef, key: ChunkKey, *rest: Any) -> None:
            if key == key_of(1) and not renewed:
                renewed.append(arena.renew(ref.slot))
            put(arena, ref, key, *rest)

        monkeypatch.setattr(Arena, "put", renew_first)
        with bench.held_up():
            bench.write_back("a", range(3))
        news = bench.done()
        assert sorted(numbers_of(news)) == [0, 1, 2] and len(news) == 3 and renewed
        assert [done.failure for done in news if isinstance(done, WrittenBack)] == [""] * 3
        assert bench.store.committed == [2, 1]
        assert bench.ref(1).slot not in (bench.ref(0).slot, bench.ref(2).slot)


def test_a_place_that_is_always_lost_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_bench() as bench:

        def refuse(arena: Arena, ref: SlotRef, *rest: Any) -> None:
            tried.append(ref.slot)
            raise ChunkLostError("not what was written")

        tried: list[int] = []
        monkeypatch.setattr(Arena, "put", refuse)
        bench.write_back("a", [1])
        [done] = bench.done()
        assert isinstance(done, WrittenBack) and done.ref is None and "did not hold what was written" in done.failure
        assert len(tried) == LOSSES + 1 == len(set(tried)), "a slot was tried twice"


def test_a_memory_out_of_reach_answers_every_job_of_the_batch() -> None:
    with open_bench() as bench:

        def away(holder: str, keys: Sequence[ChunkKey]) -> list[Reservation]:
            raise ChunkLostError("no answer")

        bench.store.reserve_slots = away  # type: ignore[method-assign]
        with bench.held_up():
            bench.write_back("a", range(4))
        news = bench.done()
        assert [(done.slot, done.ref, done.failure) for done in news if isinstance(done, WrittenBack)] == [
            (slot, None, "a chunk could not be stored: no answer") for slot in range(4)
        ]


def test_a_chunk_that_has_waited_for_room_is_written_again_when_its_place_is_lost() -> None:
    with open_bench(spread=True) as bench:
        bench.prefetcher.find_prefix("a", [], chunks=bench.store.arena.slots + 1)
        [held] = bench.done()
        assert isinstance(held, PrefixHeld) and held.quota is not None
        bench.store.refusals = [*[OverloadedError("others are leaving")] * 5, *[ChunkLostError("no answer")] * 3]
        bench.write_back("a", [0])
        news: list[Completion] = []
        while not news:
            assert bench.prefetcher.wait(WAIT_S)
            news = bench.prefetcher.drain()
        assert numbers_of(news) == [0] and bench.store.refusals == []


def break_the_thread(bench: Bench) -> None:
    def broken(holder: str, keys: Sequence[ChunkKey]) -> list[Reservation]:
        raise RuntimeError("a bug")

    bench.store.reserve_slots = broken  # type: ignore[method-assign]
    bench.write_back("a", [0])


def test_what_breaks_the_thread_is_raised_where_it_is_drained() -> None:
    with open_bench() as bench:
        break_the_thread(bench)
        with pytest.raises(RuntimeError, match="a bug"):
            bench.prefetcher.flush()
        with pytest.raises(RuntimeError, match="a bug"):
            bench.prefetcher.drain()


def test_closing_finishes_what_was_posted() -> None:
    with open_bench() as bench:
        with bench.held_up():
            bench.write_back("a", range(20))
            bench.prefetcher.release_holder("a")
            threading.Timer(0, bench.store.gate.set).start()
            bench.prefetcher.close()
        assert len(numbers_of(bench.prefetcher.drain())) == 20
        assert bench.store.stats().held_slots == 0


def test_closing_searches_for_those_that_wait_for_what_is_stored_before_them() -> None:
    """A sequence restarts during write-backs, and has left when they are done."""
    with open_bench() as bench:
        bench.store.reserve_quota("leaving", 3)
        with bench.held_up():
            bench.write_back("leaving", range(20))
            bench.prefetcher.find_prefix("starts over", [key_of(0), key_of(1)], chunks=2, after_stores=True)
            bench.prefetcher.release_holder("starts over")
            bench.prefetcher.release_holder("leaving")
            threading.Timer(0, bench.store.gate.set).start()
            bench.prefetcher.close()
        news = bench.prefetcher.drain()
        assert [len(done.refs) for done in news if isinstance(done, PrefixHeld)] == [2]
        assert bench.store.holders() == []


def test_closing_finishes_what_waits_for_promised_room() -> None:
    with open_bench(spread=True) as bench:
        bench.prefetcher.find_prefix("a", [], chunks=bench.store.arena.slots + 1)
        bench.done()
        with bench.held_up():
            bench.store.refusals = [OverloadedError("others are leaving") for _ in range(5)]
            bench.write_back("a", range(3))
            bench.prefetcher.release_holder("a")
            threading.Timer(0, bench.store.gate.set).start()
            bench.prefetcher.close()
        assert sorted(numbers_of(bench.prefetcher.drain())) == [0, 1, 2]
        assert bench.store.holders() == [] and bench.store.refusals == []


def test_closing_raises_what_nobody_has_heard_of() -> None:
    with open_bench() as bench:
        break_the_thread(bench)
        with pytest.raises(RuntimeError, match="a bug"):
            bench.prefetcher.close()
        bench.prefetcher.close()


def news_of(bench: Bench, kind: type[Completion], count: int = 1) -> list[Completion]:
    """Wait for ``count`` completions of ``kind``, without :meth:`Prefetcher.flush`."""
    found: list[Completion] = []
    while len(found) < count:
        assert bench.prefetcher.wait(WAIT_S)
        found += [done for done in bench.prefetcher.drain() if isinstance(done, kind)]
    return found


def spread(bench: Bench, holder: str, numbers: Sequence[int] = ()) -> None:
    """Give ``holder`` a quota on other nodes, and the stored chunks ``numbers``."""
    bench.prefetcher.find_prefix(holder, [key_of(n) for n in numbers], chunks=bench.store.arena.slots + 1)
    [held] = bench.done()
    assert isinstance(held, PrefixHeld) and held.quota is not None and len(held.refs) == len(numbers)


class OtherNode(RoomElsewhere):
    """Another node, which stores chunks, and returns those of ``found`` once ``gate`` is open."""

    def __init__(self, stays: int) -> None:
        self.local_chunks = stays
        self.moved: list[ChunkKey] = []
        self.found: dict[ChunkKey, SlotRef] = {}
        self.entered, self.gate = threading.Event(), threading.Event()

    def reserve_remote_quota(self, holder: str) -> SpreadQuota:
        return SpreadQuota(local_chunks=self.local_chunks, max_in_flight=4)

    def move_out(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        self.entered.set()
        assert self.gate.wait(WAIT_S)
        self.moved += keys
        return [SlotRef(number, 1, remote=True) for number in range(len(keys))]

    def fetch(self, holder: str, reader: str, keys: Sequence[ChunkKey]) -> list[SlotRef | None]:
        self.entered.set()
        assert self.gate.wait(WAIT_S)
        return [self.found.get(key) for key in keys]


@contextmanager
def open_spread_bench(stays: int) -> Iterator[tuple[Bench, OtherNode]]:
    with open_bench(spread=True) as bench:
        bench.store.nodes = node = OtherNode(stays)
        # the prefetcher asks for the other nodes once, when it is made
        bench.prefetcher.close()
        bench.prefetcher = Prefetcher(bench.pool, bench.store, lambda slot: bench.pool.memory[slot, :8])
        yield bench, node
        node.gate.set()


def test_the_copy_thread_and_no_other_has_one_thread_for_its_operators() -> None:
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        with open_bench() as bench:
            reserve = bench.store.reserve_slots

            def look(holder: str, keys: Sequence[ChunkKey]) -> list[Reservation]:
                seen.append(torch.get_num_threads())
                return reserve(holder, keys)

            bench.store.reserve_slots = look  # type: ignore[method-assign]
            bench.write_back("a", [0])
            bench.done()
            later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            later.start()
            later.join()
            assert (torch.get_num_threads(), seen) == (3, [1, 3])
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_is_set_back_after_the_copy_thread_has_set_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the opposite order, threads that start later would get one thread for their operators."""
    order: list[str] = []
    set_back = threading.Event()
    set_num_threads, work = torch.set_num_threads, Prefetcher._work

    def note(number: int) -> None:
        set_num_threads(number)
        order.append(threading.current_thread().name)
        set_back.set()

    def late(prefetcher: Prefetcher) -> None:
        set_back.wait(0.2)  # nothing sets it before, unless the order is wrong
        work(prefetcher)

    monkeypatch.setattr(torch, "set_num_threads", note)
    monkeypatch.setattr(Prefetcher, "_work", late)
    with open_bench():
        assert order == ["forecache-prefetcher", threading.current_thread().name]


def test_a_prefix_waits_for_stores_only_where_it_is_asked_to() -> None:
    with open_bench() as bench:
        bench.write_back("a", [0])
        bench.done()
        with bench.held_up():
            bench.prefetcher.find_prefix("later", [key_of(0)], after_stores=True)
            bench.prefetcher.find_prefix("now", [key_of(0)])
            assert news_of(bench, PrefixHeld) == [PrefixHeld("now", (bench.ref(0),))]
            assert bench.store.stats().quota_slots == 0, "no room was asked for"
            assert bench.store.holders() == ["a", "now"]
        assert bench.done() == [PrefixHeld("later", (bench.ref(0),))]


def test_waiting_ends_with_news_alone() -> None:
    with open_bench() as bench:
        with bench.held_up():  # the copy thread does nothing
            bench.prefetcher.drain()
            assert bench.prefetcher.wait(0) is False
            bench.prefetcher.wake()
            assert bench.prefetcher.wait(0) is True
            assert bench.prefetcher.drain() == [] and bench.prefetcher.wait(0) is False
        assert news_of(bench, Released) == [Released(GATE)]
        bench.write_back("a", [0])
        assert numbers_of(news_of(bench, WrittenBack)) == [0]
        bench.prefetcher.drain()
        break_the_thread(bench)
        with pytest.raises(RuntimeError, match="a bug"):
            news_of(bench, WrittenBack)
        assert bench.prefetcher.wait(WAIT_S), "what broke the thread is news"


def test_a_chunk_that_is_larger_than_a_batch_may_be_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetcher_module, "BATCH_BYTES", 1)
    with open_bench() as bench:
        with bench.held_up():
            bench.write_back("a", range(3))
        assert numbers_of(bench.done()) == [0, 1, 2]
        assert bench.store.reserved == [("a", 1)] * 3


def test_chunks_whose_place_is_lost_are_written_three_times_more_each() -> None:
    with open_bench() as bench:
        with bench.held_up():
            bench.store.refusals = [ChunkLostError("no answer") for _ in range(7)]
            bench.write_back("a", [0, 1, 2])
        news = bench.done()
        assert bench.store.reserved == [("a", 3), *[("a", 1)] * 7]
        failed = [(done.slot, done.ref, done.overloaded) for done in news if isinstance(done, WrittenBack)]
        assert failed[:2] == [(0, None, False), (1, None, False)] and numbers_of(news) == [2]


def test_room_that_is_promised_is_asked_for_forty_times_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far_chunks, "PAUSE_S", 0.0)
    with open_bench(spread=True) as bench:
        spread(bench, "a")
        with bench.held_up():
            bench.store.refusals = [OverloadedError("others are leaving")]
            bench.write_back("a", [0, 1])
        assert numbers_of(news_of(bench, WrittenBack, 2)) == [0, 1]
        assert bench.store.reserved == [("a", 2), ("a", 1), ("a", 1)]
        bench.store.reserved.clear()
        bench.store.refusals = [OverloadedError("others never leave") for _ in range(41)]
        bench.write_back("a", [2])
        [done] = news_of(bench, WrittenBack)
        assert isinstance(done, WrittenBack) and (done.slot, done.ref, done.overloaded) == (2, None, True)
        assert done.failure == "a chunk could not be stored: others never leave"
        assert bench.store.reserved == [("a", 1)] * 41


def test_the_seconds_of_a_batch_are_shared_by_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_bench() as bench:
        store = bench.prefetcher._copies.store

        def in_eight_seconds(items: Sequence[RecallItem], after: Sequence[Mark]) -> Copied:
            return replace(store(items, after), duration_s=8.0)

        monkeypatch.setattr(bench.prefetcher._copies, "store", in_eight_seconds)
        with bench.held_up():
            bench.write_back("a", range(4))
        assert [done.duration_s for done in bench.done() if isinstance(done, WrittenBack)] == [2.0] * 4


def test_sessions_and_states_are_stored_after_what_was_asked_for_before() -> None:
    with open_bench() as bench:
        recorded: list[tuple[str, Sequence[ChunkKey], Sequence[ChunkKey]]] = []
        bench.store.record_session = lambda *given: recorded.append(given)  # type: ignore[method-assign]
        layout = SnapshotStore(pieces=1, every_chunks=1)
        snapshot = torch.arange(HOT.nbytes // 4, dtype=torch.int32).view(torch.uint8)
        with bench.held_up():
            bench.write_back("a", [0])
            bench.prefetcher.store_state(layout, "a", key_of(0), snapshot)
            bench.prefetcher.record_session("s", [key_of(0)], [key_of(9)])
            assert recorded == []
        assert numbers_of(bench.done()) == [0]
        assert recorded == [("s", [key_of(0)], [key_of(9)])]
        held = bench.store.hold("b", layout.keys(key_of(0)))
        refs = [ref for ref in held if ref is not None]
        loaded = layout.load(bench.store.arena, key_of(0), refs)
        assert loaded is not None and torch.equal(loaded[: len(snapshot)], snapshot)


def test_nothing_is_left_once_everything_is_done() -> None:
    with open_bench() as bench:
        go, entered = threading.Event(), threading.Event()
        hold_local_prefix = bench.store.hold_local_prefix

        def hold_up(holder: str, keys: Sequence[ChunkKey]) -> tuple[list[SlotRef], bool]:
            entered.set()
            assert go.wait(WAIT_S)
            return hold_local_prefix(holder, keys)

        bench.store.hold_local_prefix = hold_up  # type: ignore[method-assign]
        bench.prefetcher.find_prefix("a", [key_of(0)])
        assert entered.wait(WAIT_S)
        with pytest.raises(AssertionError, match="searches are left"):
            bench.prefetcher.check_idle()
        go.set()
        bench.prefetcher.flush()
        with pytest.raises(AssertionError, match="news of jobs is left"):
            bench.prefetcher.check_idle()
        assert bench.done() == [PrefixHeld("a", ())]
        bench.prefetcher.check_idle()


def test_a_broken_thread_is_told_though_a_search_goes_on() -> None:
    with open_bench() as bench:
        go, entered = threading.Event(), threading.Event()

        def hold_up(holder: str, keys: Sequence[ChunkKey]) -> tuple[list[SlotRef], bool]:
            entered.set()
            assert go.wait(WAIT_S)
            return [], False

        bench.store.hold_local_prefix = hold_up  # type: ignore[method-assign]
        bench.prefetcher.find_prefix("a", [key_of(0)])
        assert entered.wait(WAIT_S)
        break_the_thread(bench)
        with pytest.raises(RuntimeError, match="a bug"):
            bench.prefetcher.flush()
        go.set()


def test_closing_waits_for_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locator, "QUOTA_WAIT_S", 10 * WAIT_S)
    with open_bench() as bench:
        bench.store.reserve_quota("other", bench.store.arena.slots)
        bench.prefetcher.find_prefix("a", [], chunks=1)
        bench.prefetcher.close()
        [held] = bench.prefetcher.drain()
        assert isinstance(held, PrefixHeld) and "no room" in held.failure


@pytest.mark.parametrize("is_spread", [False, True])
def test_threads_end_with_the_prefetcher_or_with_the_process(is_spread: bool) -> None:
    before = set(threading.enumerate())
    with open_bench(spread=is_spread) as bench:
        bench.prefetcher.find_prefix("a", [])
        bench.done()
        threads = set(threading.enumerate()) - before
        [copying] = [thread for thread in threads if thread.name == "forecache-prefetcher"]
        assert copying.daemon and len(threads) > 1 and all(thread.name.startswith("forecache-") for thread in threads)
        bench.prefetcher.close()
        assert not [thread for thread in threads if thread.is_alive()]


def test_local_recalls_do_not_wait_for_other_nodes() -> None:
    with open_spread_bench(stays=10) as (bench, node):
        bench.write_back("b", [0, 1])
        bench.done()
        node.found = {key_of(1): bench.ref(1)}
        far = bench.prefetcher.recall([RecallItem(key_of(1), SlotRef(0, 1, remote=True), 31)], "a")
        assert node.entered.wait(WAIT_S)
        near = bench.prefetcher.recall([RecallItem(key_of(0), bench.ref(0), 30)], "a")
        [done] = news_of(bench, Recalled)
        assert isinstance(done, Recalled) and done.ticket == near != far
        node.gate.set()
        [done] = news_of(bench, Recalled)
        assert isinstance(done, Recalled) and (done.ticket, done.lost, done.recalled_chunks) == (far, (), 1)
        assert done.recalled_bytes == HOT.nbytes
        assert (bench.pool.memory[30] == 1).all() and (bench.pool.memory[31] == 2).all()
        # of a recall that is partly far, what is near counts too
        items = [RecallItem(key_of(0), bench.ref(0), 32), RecallItem(key_of(1), SlotRef(0, 1, remote=True), 33)]
        bench.prefetcher.recall(items, "a")
        [done] = bench.done()
        assert isinstance(done, Recalled) and (done.lost, done.recalled_chunks) == ((), 2)
        assert (bench.pool.memory[32] == 1).all() and (bench.pool.memory[33] == 2).all()


def test_a_fetch_does_not_wait_for_a_copy_thread_that_broke() -> None:
    with open_spread_bench(stays=10) as (bench, node):
        bench.write_back("b", [0])
        bench.done()
        node.found = {key_of(0): bench.ref(0)}
        node.gate.set()
        entered, go = threading.Event(), threading.Event()

        def broken(holder: str, keys: Sequence[ChunkKey]) -> list[Reservation]:
            entered.set()
            assert go.wait(WAIT_S)
            raise RuntimeError("a bug")

        bench.store.reserve_slots = broken  # type: ignore[method-assign]
        bench.write_back("b", [1])
        assert entered.wait(WAIT_S)
        bench.prefetcher.recall([RecallItem(key_of(0), SlotRef(0, 1, remote=True), 31)], "a")
        assert node.entered.wait(WAIT_S)
        go.set()
        with pytest.raises(RuntimeError, match="a bug"):
            bench.prefetcher.close()


def test_what_does_not_stay_moves_out_before_what_comes_after_it() -> None:
    with open_spread_bench(stays=3) as (bench, node):
        bench.write_back("b", [0, 1])
        bench.done()
        spread(bench, "a", [0, 1])
        with bench.held_up():
            bench.write_back("a", [2, 3])  # the third stays
        assert node.entered.wait(WAIT_S)
        bench.write_back("a", [4])
        bench.prefetcher.release_holder("a")
        bench.write_back("c", [5])
        assert numbers_of(news_of(bench, WrittenBack, 2)) == [2, 5], "others go on"
        node.gate.set()
        news: list[Completion] = []
        while Released("a") not in news:
            assert bench.prefetcher.wait(WAIT_S)
            news += bench.prefetcher.drain()
        left = [done for done in news if isinstance(done, WrittenBack)]
        assert [(done.slot, done.ref is not None and done.ref.remote) for done in left] == [(3, True), (4, True)]
        assert node.moved == [key_of(3), key_of(4)]
        assert news[-1] == Released("a") and "a" not in bench.store.holders()
        bench.write_back("a", range(6, 10))
        assert numbers_of(bench.done()) == [6, 7, 8, 9] and len(node.moved) == 2, "the share ended with the release"


def test_of_a_spread_sequence_few_chunks_are_written_at_once() -> None:
    with open_spread_bench(stays=30) as (bench, _):
        spread(bench, "a")
        with bench.held_up():
            bench.write_back("a", range(9))
            bench.write_back("b", range(10, 15))
        assert numbers_of(bench.done()) == [*range(9), *range(10, 15)]
        assert bench.store.reserved == [("a", 4), ("a", 4), ("a", 1), ("b", 5)]


def test_flushing_waits_for_what_moves_out() -> None:
    with open_spread_bench(stays=0) as (bench, node):
        spread(bench, "a")
        bench.write_back("a", [0])
        threading.Timer(0.1, node.gate.set).start()
        bench.prefetcher.flush()
        assert node.moved == [key_of(0)]
        assert numbers_of(bench.prefetcher.drain()) == [0]
