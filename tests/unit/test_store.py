import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forecache.workers.errors import ChunkLostError, OverloadedError
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.eviction import Idle
from forecache.workers.memory.arena.ledger import TENANT_MARK, PinLimits
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.client.protocol import ColdMemory
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.layout import attention_layout
from forecache.workers.memory.format.slots import SlotRef
from forecache.workers.memory.tier.transfer import read

LAYOUT = attention_layout("m", layers=1, kv_heads=1, head_dim=8, chunk_tokens=16, dtype=torch.float32)
SLOTS = 5
KEYS = [bytes([i]) * 16 for i in range(1, 10)]
HOLDERS = ["a/0", "a/1", "b/0"]
NO_LIMITS = PinLimits(1.0, 1.0)
TENANT = "x"
NAMES = [f"{TENANT}{TENANT_MARK}{session}" for session in "st"]


def small_arena(directory: Path, slots: int = SLOTS) -> Arena:
    return Arena.create(
        directory,
        "store",
        layout=LAYOUT,
        index_nbytes=8,
        index_fingerprint="index",
        capacity_bytes=(2 << 20) + slots * LAYOUT.nbytes,
    )


def write(arena: Arena, key: ChunkKey, ref: SlotRef) -> None:
    arena.chunks[ref.slot] = key[0]
    arena.index[ref.slot] = key[0]
    arena.seal(ref, key, arena.digests(ref.slot))


def store_chunks(store: ColdMemory, holder: str, keys: list[ChunkKey]) -> list[SlotRef]:
    """Reserve, write and commit; the chunks stay held."""
    reservations = store.reserve_slots(holder, keys)
    fresh = [(r.key, r.ref) for r in reservations if not r.stored]
    for key, ref in fresh:
        write(store.arena, key, ref)
    store.commit(holder, fresh)
    return [r.ref for r in reservations]


@pytest.fixture
def store(tmp_path: Path) -> ArenaStore:
    return ArenaStore(small_arena(tmp_path), pin_limits=NO_LIMITS)


class StoreMachine(RuleBasedStateMachine):
    """Several holders, against a model of stored chunks, holds, and reserved slots."""

    def __init__(self) -> None:
        super().__init__()
        self.stored: dict[ChunkKey, SlotRef] = {}
        self.held: dict[str, set[SlotRef]] = {}
        self.unwritten: dict[str, list[tuple[ChunkKey, SlotRef]]] = {holder: [] for holder in HOLDERS}
        self.good: dict[SlotRef, ChunkKey] = {}  # sealed, and not found wrong
        self.given: set[SlotRef] = set()
        self.heard: dict[ChunkKey, int] = {}
        self.pinned: dict[str, set[ChunkKey]] = {}
        self.promised: dict[str, int] = {}

    @initialize(limits=st.sampled_from([NO_LIMITS, PinLimits(0.4, 0.2), PinLimits(0.6, 1.0), PinLimits(0.0, 1.0)]))
    def open(self, limits: PinLimits) -> None:
        self.limit = limits.of(TENANT, SLOTS)
        self.directory = tempfile.TemporaryDirectory()
        self.arena = small_arena(Path(self.directory.name))
        assert self.arena.slots == SLOTS
        self.store = ArenaStore(self.arena, self.hear, limits)

    def teardown(self) -> None:
        self.arena.close()
        self.directory.cleanup()

    def hear(self, key: ChunkKey, stored: bool) -> None:
        self.heard[key] = self.heard.get(key, 0) + (1 if stored else -1)

    def all_held(self) -> set[SlotRef]:
        return set().union(*self.held.values())

    def see(self, holder: str, key: ChunkKey, ref: SlotRef) -> None:
        assert self.stored[key] == ref
        assert self.arena.check(ref, key)
        self.held.setdefault(holder, set()).add(ref)

    @rule(holder=st.sampled_from(HOLDERS), keys=st.lists(st.sampled_from(KEYS), max_size=6))
    def reserve_slots(self, holder: str, keys: list[ChunkKey]) -> None:
        needed = sum(key not in self.stored for key in keys)
        kept = {self.stored[key].slot for key in keys if key in self.stored}
        held_slots = {ref.slot for ref in self.all_held()}
        pins = set().union(*self.pinned.values()) - set(self.store.copied())
        pinned = {ref.slot for key, ref in self.stored.items() if key in pins} - set(self.store._idle.of(Idle.YIELDING))
        if needed > SLOTS - len(held_slots | kept | pinned):
            after = {name: {ref.slot for ref in self.held.get(name, ())} for name in {*self.held, holder}}
            after[holder] |= kept
            within = all(len(after[name]) <= self.promised.get(name, 0) for name in after if name != holder)
            assert not (within and len(after[holder]) + needed <= self.promised.get(holder, 0)), "a promise is not kept"
            before = self.store.stats()
            with pytest.raises(OverloadedError, match="--cold-bytes"):
                self.store.reserve_slots(holder, keys)
            assert self.store.stats() == before
            return
        reservations = self.store.reserve_slots(holder, keys)
        assert [r.key for r in reservations] == keys
        assert [r.stored for r in reservations] == [key in self.stored for key in keys]
        for reservation in reservations:
            if reservation.stored:
                self.see(holder, reservation.key, reservation.ref)
        for reservation in reservations:
            ref = reservation.ref
            if reservation.stored:
                continue
            assert ref.slot not in held_slots | kept, "a held slot was given away"
            assert ref not in self.given, "a generation was given twice"
            held_slots.add(ref.slot)
            self.given.add(ref)
            self.held.setdefault(holder, set()).add(ref)
            self.unwritten[holder].append((reservation.key, ref))
            for key, victim in list(self.stored.items()):
                if victim.slot == ref.slot:
                    assert victim.slot not in pinned, "a pinned chunk was evicted"
                    del self.stored[key]

    @rule(holder=st.sampled_from(HOLDERS), count=st.integers(1, 4))
    def write_and_commit(self, holder: str, count: int) -> None:
        ready, self.unwritten[holder] = self.unwritten[holder][:count], self.unwritten[holder][count:]
        for key, ref in ready:
            write(self.arena, key, ref)
            self.good[ref] = key
        self.store.commit(holder, ready)
        for key, ref in ready:
            self.stored.setdefault(key, ref)

    @precondition(lambda self: any(self.unwritten.values()))
    @rule(data=st.data())
    def commit_what_is_not_mine_or_not_written(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from([h for h in HOLDERS if self.unwritten[h]]))
        with pytest.raises(ChunkLostError):
            self.store.commit(data.draw(st.sampled_from(HOLDERS)), [self.unwritten[holder][0]])

    @rule(holder=st.sampled_from(HOLDERS), keys=st.lists(st.sampled_from(KEYS), max_size=5))
    def hold(self, holder: str, keys: list[ChunkKey]) -> None:
        for key, ref in zip(keys, self.store.hold(holder, keys), strict=True):
            assert (ref is not None) == (key in self.stored)
            if ref is not None:
                self.see(holder, key, ref)

    @rule(holder=st.sampled_from(HOLDERS), keys=st.lists(st.sampled_from(KEYS), max_size=5))
    def hold_prefix(self, holder: str, keys: list[ChunkKey]) -> None:
        refs = self.store.hold_prefix(holder, keys)
        assert len(refs) == next((i for i, key in enumerate(keys) if key not in self.stored), len(keys))
        for key, ref in zip(keys, refs, strict=False):
            self.see(holder, key, ref)

    @rule(holder=st.sampled_from(HOLDERS))
    def release(self, holder: str) -> None:
        self.store.release(holder)
        self.held.pop(holder, None)
        self.promised.pop(holder, None)
        self.unwritten[holder] = []

    @rule(worker=st.sampled_from(["a/", "b/"]))
    def release_worker(self, worker: str) -> None:
        expected = [holder for holder in {**self.held, **self.promised} if holder.startswith(worker)]
        assert self.store.release_prefix(worker) == len(expected)
        for holder in expected:
            self.held.pop(holder, None)
            self.promised.pop(holder, None)
            self.unwritten[holder] = []

    @rule(holder=st.sampled_from(HOLDERS), chunks=st.integers(1, SLOTS))
    def reserve_quota(self, holder: str, chunks: int) -> None:
        others = sum(self.promised.values()) - self.promised.get(holder, 0)
        if chunks + others + self.store.stats().pinned_slots > SLOTS:
            with pytest.raises(OverloadedError, match=f"{others} are reserved for others"):
                self.store.reserve_quota(holder, chunks)
        else:
            self.store.reserve_quota(holder, chunks)
            self.promised[holder] = chunks

    @rule(holder=st.sampled_from(HOLDERS), chunks=st.integers(1, SLOTS))
    def reserve_quota_up_to(self, holder: str, chunks: int) -> None:
        before = self.promised.get(holder, 0)
        room = SLOTS - sum(self.promised.values()) + before - self.store.stats().pinned_slots
        self.promised[holder] = max(before, min(chunks, room))
        assert self.store.reserve_quota_up_to(holder, chunks) == self.promised[holder]

    @rule(name=st.sampled_from(NAMES), keys=st.lists(st.sampled_from(KEYS), max_size=3))
    def pin(self, name: str, keys: list[ChunkKey]) -> None:
        yielding = self.store.pin(name, keys)
        self.pinned[name] = set(keys)
        slots = {self.stored[key].slot for key in keys if key in self.stored}
        copied = set(self.store.copied())
        claimed = {key for kept in self.pinned.values() for key in kept if key in self.stored and key not in copied}
        over = max(len(claimed) - self.limit, 0)
        waiting = len(slots & set(self.store._idle.of(Idle.YIELDING)))
        assert yielding == max(waiting, min(over, len(claimed & set(keys))))
        pinned = self.store.stats().pinned_slots
        full = sum(self.promised.values()) + pinned == SLOTS or pinned == self.limit
        assert not waiting or full, "there is room for more"

    @rule(name=st.sampled_from(NAMES))
    def unpin(self, name: str) -> None:
        self.store.unpin(name)
        self.pinned.pop(name, None)

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=3), copied=st.booleans())
    def set_copied(self, keys: list[ChunkKey], copied: bool) -> None:
        self.store.set_copied(keys, copied)

    @precondition(lambda self: self.stored)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.stored)))
        ref = self.stored.pop(key)
        dropped = self.store.stats().dropped_chunks
        self.store.drop(key, ref)
        self.store.drop(key, ref)  # the second reader that finds it wrong
        assert self.store.stats().dropped_chunks == dropped + 1
        del self.good[ref]
        assert not self.arena.check(ref, key)

    @precondition(lambda self: self.stored)
    @rule(data=st.data())
    def drop_of_an_older_generation_changes_nothing(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.stored)))
        ref = self.stored[key]
        self.store.drop(key, SlotRef(ref.slot, ref.generation - 1))
        assert self.arena.check(ref, key)

    @invariant()
    def integrity(self) -> None:
        self.store.check_integrity()

    @invariant()
    def held_slots_are_as_they_were_handed_out(self) -> None:
        for ref in self.all_held():
            assert self.arena.generation(np.array([ref.slot]))[0] == ref.generation
            if ref in self.good:
                assert self.arena.check(ref, self.good[ref])

    @invariant()
    def store_and_listener_agree_with_the_model(self) -> None:
        assert set(self.store.keys()) == set(self.stored)
        assert {key for key, count in self.heard.items() if count} == set(self.stored)
        assert set(self.heard.values()) <= {0, 1}
        held_slots = {ref.slot for ref in self.all_held()}
        stored_slots = {ref.slot for ref in self.stored.values()}
        stats = self.store.stats()
        assert sum(self.promised.values()) + stats.pinned_slots <= SLOTS
        assert stats.slots == SLOTS
        assert stats.held_slots == len(held_slots)
        assert stats.quota_slots == sum(self.promised.values())
        assert stats.used_slots == len(held_slots | stored_slots)
        assert stats.stored_chunks == len(self.stored)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_no_more_is_promised_than_there_is(store: ArenaStore) -> None:
    store_chunks(store, "past", KEYS[:2])
    store.release("past")
    store.pin("session", KEYS[:1])
    store.reserve_quota("a/0", 3)
    with pytest.raises(OverloadedError, match="3 are reserved for others and 1 are pinned"):
        store.reserve_quota("b/0", 2)
    store.reserve_quota("b/0", 1)
    store.reserve_quota("a/0", 2)  # changes its mind
    store.release("b/0")
    store.reserve_quota("b/1", 2)
    # what is pinned and held is a part of what its holder was promised
    store.hold("b/1", KEYS[:1])
    store.reserve_quota("b/2", 1)
    assert store.release_prefix("b/") == 2
    store.reserve_quota("b/3", 2)
    store.release("b/3")
    store.release("a/0")
    store.check_integrity()


def test_what_is_promised_goes_before_pins(store: ArenaStore) -> None:
    store_chunks(store, "past", KEYS[:SLOTS])
    store.release("past")
    store.reserve_quota("a/0", 3)
    assert store.pin("session", KEYS[:SLOTS]) == 3
    assert store.stats().pinned_slots == SLOTS - 3
    with pytest.raises(OverloadedError, match="3 are reserved for others and 2 are pinned"):
        store.reserve_quota("b/0", 1)
    store_chunks(store, "a/0", KEYS[5:8])
    with pytest.raises(OverloadedError, match="0 can be evicted, 2 are pinned"):
        store.reserve_slots("a/0", KEYS[8:9])
    store.check_integrity()


def test_pins_that_had_to_yield_are_kept_once_there_is_room(store: ArenaStore) -> None:
    store_chunks(store, "past", KEYS[:4])
    store.release("past")
    store.reserve_quota("a/0", 4)
    assert store.pin("session", KEYS[:4]) == 3
    assert store.coldest(9) == store.coldest(3) != []
    store.reserve_quota("a/0", 2)
    assert store.stats().pinned_slots == 3
    store.release("a/0")
    assert store.stats().pinned_slots == 4
    assert store.pin("session", KEYS[:4]) == 0
    # held by who is promised too little for them, they may be promised to another meanwhile
    store.hold("b/0", KEYS[:4])
    store.reserve_quota("c/0", 3)
    store.release("b/0")
    assert store.stats().pinned_slots == 2
    store_chunks(store, "c/0", KEYS[5:8])
    store.release("c/0")
    assert sum(store.stored(KEYS[:4])) == store.stats().pinned_slots == 2
    store.check_integrity()


def test_chunks_with_a_copy_elsewhere_go_first(store: ArenaStore) -> None:
    store_chunks(store, "first", KEYS[:5])
    store.release("first")
    store.set_copied([KEYS[0]], True)
    store.pin("session", [KEYS[0], KEYS[2], KEYS[4]])
    assert store.coldest(9) == [KEYS[3], KEYS[1]]
    gone = []
    for new in KEYS[5:8]:
        before = set(store.keys())
        store_chunks(store, "next", [new])
        gone += before - set(store.keys())
    assert gone == [KEYS[0], KEYS[3], KEYS[1]]
    with pytest.raises(OverloadedError, match="2 are pinned"):
        store.reserve_slots("next", KEYS[8:9])
    store.unpin("session")
    store_chunks(store, "next", KEYS[8:9])
    assert store.stored([KEYS[2]]) == [False]


def test_least_recently_used_goes_first_and_a_sequence_loses_its_end_first(store: ArenaStore) -> None:
    store_chunks(store, "first", KEYS[0:3])
    store_chunks(store, "second", KEYS[3:5])
    store.release("first")
    store.release("second")
    assert store.hold("reader", KEYS[1:2]) != [None]
    store.release("reader")
    gone = []
    for new in (KEYS[5], KEYS[6], KEYS[7]):
        before = set(store.keys())
        store_chunks(store, "third", [new])
        gone += sorted(before - set(store.keys()))
    assert gone == [KEYS[2], KEYS[0], KEYS[4]]
    assert store.stats().evicted_chunks == 3
    store.check_integrity()


def test_chunks_that_are_copied_elsewhere_count_as_used_no_more_recently(store: ArenaStore) -> None:
    for number in range(4):
        store_chunks(store, f"{number}", KEYS[number : number + 1])
        store.release(f"{number}")
    assert read(store, [KEYS[1], KEYS[8], KEYS[0]]).keys == (KEYS[1], KEYS[0])
    assert store.coldest(9) == KEYS[:4]
    assert store.stats().dropped_chunks == 0


def test_chunks_of_a_call_do_not_evict_each_other(store: ArenaStore) -> None:
    store_chunks(store, "writer", KEYS[:SLOTS])
    store.release("writer")
    reservations = store.reserve_slots("reader", [KEYS[5], *KEYS[: SLOTS - 1]])
    assert [r.stored for r in reservations] == [False] + [True] * (SLOTS - 1)
    assert set(store.keys()) == set(KEYS[: SLOTS - 1])
    with pytest.raises(OverloadedError, match="of 5 slots 0 are free, 0 can be evicted"):
        store.reserve_slots("late", [KEYS[6]])


def test_refused_reservation_changes_nothing(store: ArenaStore) -> None:
    store_chunks(store, "writer", KEYS[:SLOTS])
    store.release("writer")
    with pytest.raises(OverloadedError, match="0 can be evicted"):
        store.reserve_slots("reader", KEYS[: SLOTS + 1])
    assert store.stats().held_slots == 0
    assert set(store.keys()) == set(KEYS[:SLOTS])


def test_commit_of_what_another_holds_is_refused(store: ArenaStore) -> None:
    [reservation] = store.reserve_slots("a", KEYS[:1])
    write(store.arena, KEYS[0], reservation.ref)
    with pytest.raises(ChunkLostError, match="not reserved by b"):
        store.commit("b", [(KEYS[0], reservation.ref)])
    assert store.keys() == []


def test_second_writer_of_a_chunk_keeps_a_private_slot(store: ArenaStore) -> None:
    [first], [second] = store.reserve_slots("a", KEYS[:1]), store.reserve_slots("b", KEYS[:1])
    assert first.ref.slot != second.ref.slot
    assert not (first.stored or second.stored)
    for reservation, holder in ((second, "b"), (first, "a")):
        write(store.arena, KEYS[0], reservation.ref)
        store.commit(holder, [(KEYS[0], reservation.ref)])
    assert store.hold("reader", KEYS[:1]) == [second.ref]
    assert store.arena.check(first.ref, KEYS[0])
    assert store.stats().used_slots == 2
    store.release("a")
    assert store.stats().used_slots == 1
    store.check_integrity()


def test_reserved_and_never_committed_is_freed(store: ArenaStore) -> None:
    [reservation] = store.reserve_slots("a", KEYS[:1])
    write(store.arena, KEYS[0], reservation.ref)
    store.release("a")
    assert store.stats().used_slots == 0
    assert store.hold("reader", KEYS[:1]) == [None]
    with pytest.raises(ChunkLostError, match="reserve again"):
        store.commit("a", [(KEYS[0], reservation.ref)])


def test_commit_is_of_all_or_nothing_and_wants_a_seal(store: ArenaStore) -> None:
    one, two = store.reserve_slots("a", KEYS[:2])
    write(store.arena, KEYS[0], one.ref)
    with pytest.raises(ChunkLostError, match="without a seal"):
        store.commit("a", [(KEYS[0], one.ref), (KEYS[1], two.ref)])
    assert store.keys() == []
    store.commit("a", [(KEYS[0], one.ref)])
    store.commit("a", [(KEYS[0], one.ref)])  # an answer was lost, and the writer says it again
    assert store.keys() == [KEYS[0]]


def test_dropped_chunk_stays_with_its_holders_and_can_be_written_anew(store: ArenaStore) -> None:
    [ref] = store_chunks(store, "a", KEYS[:1])
    assert store.hold("b", KEYS[:1]) == [ref]
    store.drop(KEYS[0], ref)
    [again] = store_chunks(store, "b", KEYS[:1])
    assert again.slot != ref.slot
    store.release("a")
    assert store.stats().used_slots == 2
    store.release("b")
    assert store.stats().used_slots == 1
    assert store.hold("c", KEYS[:1]) == [again]
    store.check_integrity()


def test_adopted_arena_keeps_its_sealed_chunks(store: ArenaStore) -> None:
    refs = store_chunks(store, "a", KEYS[:2])
    store.reserve_slots("b", KEYS[2:4])
    store.drop(KEYS[1], refs[1])
    store.arena.close()
    heard: list[tuple[ChunkKey, bool]] = []
    successor = ArenaStore(Arena.adopt(store.arena.path), lambda key, stored: heard.append((key, stored)))
    assert heard == [(KEYS[0], True)]
    assert successor.stats().used_slots == 1
    assert successor.hold("c", KEYS[:3]) == [refs[0], None, None]
    assert successor.arena.check(refs[0], KEYS[0])
    successor.check_integrity()


def test_integrity_check_finds_damage(store: ArenaStore) -> None:
    [ref] = store_chunks(store, "a", KEYS[:1])
    store.arena.clear(ref.slot)
    with pytest.raises(AssertionError, match="its header is not sealed so"):
        store.check_integrity()


def test_threads_that_compete_for_slots(tmp_path: Path) -> None:
    store = ArenaStore(small_arena(tmp_path, slots=8))
    errors: list[BaseException] = []

    def work(worker: int) -> None:
        generator = np.random.default_rng(worker)
        try:
            for step in range(200):
                holder = f"{worker}/{step}"
                keys = [KEYS[i] for i in generator.choice(len(KEYS), 2, replace=False)]
                refs = store_chunks(store, holder, keys)
                assert all(store.arena.check(ref, key) for key, ref in zip(keys, refs, strict=True))
                store.release(holder)
        except BaseException as error:  # noqa: BLE001 (handed to the test's thread)
            errors.append(error)

    def copy() -> None:
        try:
            for _ in range(200):
                batch = read(store, KEYS)
                assert all((chunk == key[0]).all() for key, chunk in zip(batch.keys, batch.chunks, strict=True))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    threads.append(threading.Thread(target=copy))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    store.check_integrity()
    assert store.stats().held_slots == 0
    assert store.stats().evicted_chunks > 0
    assert store.stats().dropped_chunks == 0
