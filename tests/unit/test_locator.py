"""Searches for stored prefixes: their order, how many run at once, and which wait for which."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from forecache.workers.core.requests import GenerateRequest, SamplingParams
from forecache.workers.llm import LLM
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.layout import attention_layout
from forecache.workers.memory.format.slots import Reservation, SlotRef
from forecache.workers.memory.hot import prefix_search as locator_module
from forecache.workers.memory.hot.completions import PrefixHeld
from forecache.workers.memory.hot.copies import CpuCopies
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.memory.hot.prefix_search import FETCHING_SEARCHES, PrefixSearch

LAYOUT = attention_layout("m", layers=1, kv_heads=2, head_dim=8, chunk_tokens=16, dtype=torch.float32)
WAIT_S = 30.0
PLACES = 16


def key_of(number: int) -> ChunkKey:
    return number.to_bytes(16, "little")


class TwoNodes(ArenaStore):
    """One node's memory, and another node that has the chunks of ``far`` holders. Its answers wait for ``arrive``."""

    def __init__(self, arena: Arena) -> None:
        super().__init__(arena)
        self.arrive = threading.Event()
        self.fetching = threading.Semaphore(0)
        self.fetched: list[str] = []
        self.at_once = self.most_at_once = 0
        self._counting = threading.Lock()

    def hold_local_prefix(self, holder: str, keys: Sequence[ChunkKey]) -> tuple[list[SlotRef], bool]:
        return super().hold_prefix(holder, keys), holder.startswith("far")

    def hold_prefix(self, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef]:
        with self._counting:
            self.fetched.append(holder)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        self.fetching.release()
        assert self.arrive.wait(WAIT_S)
        with self._counting:
            self.at_once -= 1
        return super().hold_prefix(holder, keys)


class Bench:
    """A prefix search over :class:`TwoNodes`; ``next`` returns its completions."""

    def __init__(self, directory: Path) -> None:
        arena = Arena.create(
            directory,
            "locator",
            layout=LAYOUT,
            index_nbytes=8,
            index_fingerprint="index",
            capacity_bytes=(2 << 20) + PLACES * LAYOUT.nbytes,
        )
        self.store = TwoNodes(arena)
        pool = HotPool(LAYOUT, 2, torch.device("cpu"))
        copies = CpuCopies(pool, LAYOUT, arena, None)
        self.failures: list[BaseException] = []
        self._told: list[PrefixHeld] = []
        self._news = threading.Semaphore(0)
        self.locator = PrefixSearch(self.store, copies, self._settle, self.failures.append)

    def _settle(self, held: PrefixHeld) -> None:
        self._told.append(held)
        self._news.release()

    def search(self, holder: str, keys: Sequence[ChunkKey] = (), chunks: int = 0) -> None:
        self.locator.start(holder, tuple(keys), None, chunks)

    def next(self) -> PrefixHeld:
        """The next completion."""
        assert self._news.acquire(timeout=WAIT_S), self.failures
        return self._told.pop(0)

    def store_chunk(self, number: int) -> SlotRef:
        [place] = self.store.reserve_slots("writer", [key_of(number)])
        assert isinstance(place, Reservation)
        self.store.arena.chunks[place.ref.slot].fill_(number)
        self.store.arena.seal(place.ref, key_of(number), self.store.arena.digests(place.ref.slot))
        self.store.commit("writer", [(key_of(number), place.ref)])
        return place.ref

    def finish(self) -> None:
        self.store.arrive.set()
        self.locator.close()
        assert not self.failures
        assert not self.locator.unfinished()


@pytest.fixture
def bench(arena_dir: Path) -> Iterator[Bench]:
    bench = Bench(arena_dir)
    yield bench
    bench.finish()
    bench.store.arena.unlink()


def test_a_prefix_that_is_here_waits_for_none_that_has_to_come(bench: Bench) -> None:
    ref = bench.store_chunk(1)
    for number in range(4 * FETCHING_SEARCHES):
        bench.search(f"far {number}", [key_of(7)])
    for _ in range(FETCHING_SEARCHES):
        assert bench.store.fetching.acquire(timeout=WAIT_S)
    for number in range(20):
        bench.search(f"near {number}", [key_of(1)], chunks=1 if number < 3 else 0)
    told = [bench.next() for _ in range(20)]
    assert {held.holder for held in told} == {f"near {number}" for number in range(20)}
    assert all(held.refs == (ref,) and not held.failure for held in told)
    assert bench.store.most_at_once == FETCHING_SEARCHES, "the rest waits for its turn, in no other's way"


def test_those_that_have_to_come_are_fetched_in_order_and_few_at_once(bench: Bench) -> None:
    asked = [f"far {number}" for number in range(10)]
    for count, holder in enumerate(asked, 1):
        bench.search(holder, [key_of(count)])
        if count <= FETCHING_SEARCHES:
            assert bench.store.fetching.acquire(timeout=WAIT_S)
    bench.store.arrive.set()
    told = {bench.next().holder for _ in asked}
    assert told == set(asked)
    assert bench.store.most_at_once == FETCHING_SEARCHES
    assert bench.store.fetched[:FETCHING_SEARCHES] == asked[:FETCHING_SEARCHES]
    assert sorted(bench.store.fetched) == sorted(asked)


def test_what_was_dropped_is_not_found_by_any_later_search(bench: Bench) -> None:
    refs = [bench.store_chunk(number) for number in range(3)]
    go, drop = threading.Event(), bench.store.drop

    def slow_drop(key: ChunkKey, ref: SlotRef) -> None:
        assert go.wait(WAIT_S)
        drop(key, ref)

    bench.store.drop = slow_drop  # type: ignore[method-assign]
    bench.locator.drop(key_of(1), refs[1])
    for number in range(3):
        bench.search(f"near {number}", [key_of(n) for n in range(3)])
    assert len(bench.locator.unfinished()) == 4
    go.set()
    assert [bench.next().refs for _ in range(3)] == [(refs[0],)] * 3


def test_a_long_line_for_room_waits_no_longer_than_a_short_one(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline of every waiting search starts when it is queued, not when those before it gave up."""
    monkeypatch.setattr(locator_module, "QUOTA_WAIT_S", 0.0)
    for number in range(3):
        bench.search(f"near {number}", chunks=PLACES + 1)
    told = [bench.next() for _ in range(3)]
    assert {held.holder for held in told} == {f"near {number}" for number in range(3)}
    assert all(held.failure and not held.refs for held in told)
    assert bench.store.stats().quota_slots == 0


def test_who_leaves_while_it_is_fetched_for_holds_nothing_afterwards(bench: Bench) -> None:
    bench.store_chunk(1)
    bench.store.release("writer")
    bench.search("far", [key_of(1)], chunks=2)
    assert bench.store.fetching.acquire(timeout=WAIT_S)
    assert bench.locator.release_after_search("far")
    bench.store.arrive.set()
    assert bench.next().holder == "far"
    assert not bench.locator.release_after_search("far")
    assert bench.store.stats().held_slots == bench.store.stats().quota_slots == 0


def test_what_breaks_a_search_is_told_and_ends_it(bench: Bench) -> None:
    def broken(holder: str, keys: Sequence[ChunkKey]) -> tuple[list[SlotRef], bool]:
        raise RuntimeError("broken")

    bench.store.hold_local_prefix = broken  # type: ignore[method-assign]
    bench.search("near", [key_of(1)])
    for search in bench.locator.unfinished():
        search.result(WAIT_S)
    assert [str(error) for error in bench.failures] == ["broken"]
    bench.failures.clear()


def test_an_engine_answers_what_is_here_while_others_are_fetched_for(
    tiny_model: Path, arena_dir: Path, monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]]
) -> None:
    hold_prefix: Callable[..., list[SlotRef]] = ArenaStore.hold_prefix
    arrive = threading.Event()

    def slow(store: ArenaStore, holder: str, keys: Sequence[ChunkKey]) -> list[SlotRef]:
        if "remote" in holder:
            assert arrive.wait(WAIT_S)
        return hold_prefix(store, holder, keys)

    monkeypatch.setattr(ArenaStore, "hold_prefix", slow)
    settings: dict[str, Any] = {"skip_tokenizer": True, "keep_ratio": 1.0, "chunk_tokens": 16, "cold_bytes": 8 << 20}
    with LLM(str(tiny_model), arena_dir=arena_dir, hot_bytes=400 * LAYOUT.nbytes * 6, **settings) as llm:
        for name in ("remote1", "remote2", "here"):
            sampling = SamplingParams(max_tokens=1, ignore_eos=True)
            llm.engine.add_request(GenerateRequest(name, tuple(prompts[0]), sampling))
        ended: list[str] = []
        while len(ended) < 3:
            ended += [event.request_id for event in llm.engine.step() if event.finish_reason]
            if ended:
                arrive.set()
        assert ended[0] == "here"
