"""The bookkeeping of `ArenaStore`, one call after another: counts, holds, eviction and errors."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from forecache.workers.errors import ChunkLostError, OverloadedError, ReleasedError
from forecache.workers.memory.arena import owned_file
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.headers import FIRST_WRITER, NO_WRITER, OWNER, RETIRED, UNKNOWN
from forecache.workers.memory.arena.ledger import TENANT_MARK, PinLimits
from forecache.workers.memory.arena.stats import TierStats
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.arena.writers import WriterNews
from forecache.workers.memory.format.hold_id import HoldId
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.layout import attention_layout
from forecache.workers.memory.format.slots import SlotRef

LAYOUT = attention_layout("m", layers=1, kv_heads=1, head_dim=8, chunk_tokens=16, dtype=torch.float32)
SLOTS = 6
KEYS = [bytes([number]) * 16 for number in range(1, 20)]
ALICE, BOB = f"alice{TENANT_MARK}s", f"bob{TENANT_MARK}s"


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    arena = Arena.create(
        tmp_path,
        "books",
        layout=LAYOUT,
        index_nbytes=8,
        index_fingerprint="index",
        capacity_bytes=(2 << 20) + SLOTS * LAYOUT.nbytes,
    )
    assert arena.slots == SLOTS
    return arena


@pytest.fixture
def store(arena: Arena) -> ArenaStore:
    return ArenaStore(arena, pin_limits=PinLimits(1.0, 1.0))


def seal(store: ArenaStore, key: ChunkKey, ref: SlotRef) -> None:
    store.arena.chunks[ref.slot] = key[0]
    store.arena.index[ref.slot] = key[0]
    store.arena.seal(ref, key, store.arena.digests(ref.slot))


def hold_new(store: ArenaStore, holder: str, keys: list[ChunkKey], *, copied: bool = False) -> list[SlotRef]:
    """Store and hold ``keys``."""
    places = store.reserve_slots(holder, keys, writer=OWNER)
    for place in places:
        seal(store, place.key, place.ref)
    store.commit(holder, [(place.key, place.ref) for place in places], copied=copied)
    return [place.ref for place in places]


def keep(store: ArenaStore, keys: list[ChunkKey], *, copied: bool = False) -> None:
    """Store ``keys`` one after another, so that the first is evicted first."""
    for key in keys:
        hold_new(store, "past", [key], copied=copied)
        store.release("past")


def adopted(store: ArenaStore, listener: Callable[[ChunkKey, bool], None] | None = None) -> ArenaStore:
    store.arena.close()
    successor = ArenaStore(Arena.adopt(store.arena.path), listener)
    successor.check_integrity()
    return successor


def quarantine(store: ArenaStore, worker: Arena, keys: list[ChunkKey], begun: int | None = 1) -> list[SlotRef]:
    """Take slots back from a worker that may still write to them."""
    places = store.reserve_slots("w/lost", keys, writer=worker.writer, begun=begun)
    store.release_prefix("w/")
    return [place.ref for place in places]


def make_bad(store: ArenaStore, key: ChunkKey) -> int:
    """Let a slot lose two chunks to wrong bytes, while all other slots are in use. Returns the slot."""
    others = store.reserve_slots("others", [bytes([200 + n]) * 16 for n in range(store.room - 1)], writer=OWNER)
    slots = set()
    for _ in range(2):
        [ref] = hold_new(store, "bad", [key])
        store.arena.chunks[ref.slot, 3] ^= 1
        store.drop(key, ref)
        store.release("bad")
        slots.add(ref.slot)
    assert len(others) == SLOTS - 1 and len(slots) == 1
    store.release("others")
    return slots.pop()


# what is counted


def test_every_count_of_the_statistics(store: ArenaStore, arena: Arena) -> None:
    worker = Arena.attach(arena.path)
    make_bad(store, KEYS[0])
    quarantine(store, worker, [KEYS[1]])
    keep(store, KEYS[2:5])
    hold_new(store, "w2/a", [KEYS[5]])
    store.hold("w2/b", [KEYS[5]])
    assert store.stats() == TierStats(
        slots=6, used_slots=6, held_slots=1, pinned_slots=0, quota_slots=0, copied_slots=0, stored_chunks=4,
        evicted_chunks=0, dropped_chunks=2, quarantined_slots=1, bad_slots=1,
    )  # fmt: skip
    store.reserve_quota("w2/a", 2)
    store.pin("session", [KEYS[2]])
    store.set_copied([KEYS[3]], True)
    store.reserve_slots("w2/a", [KEYS[6]], writer=OWNER)
    assert store.stats() == TierStats(
        slots=6, used_slots=6, held_slots=2, pinned_slots=1, quota_slots=2, copied_slots=0, stored_chunks=3,
        evicted_chunks=1, dropped_chunks=2, quarantined_slots=1, bad_slots=1,
    )  # fmt: skip
    store.release("w2/a")
    assert store.stats() == TierStats(
        slots=6, used_slots=5, held_slots=1, pinned_slots=1, quota_slots=0, copied_slots=0, stored_chunks=3,
        evicted_chunks=1, dropped_chunks=2, quarantined_slots=1, bad_slots=1,
    )  # fmt: skip
    del worker
    stats = store.stats()
    assert (stats.used_slots, stats.quarantined_slots, stats.held_slots) == (4, 0, 1), "its writer is gone"
    store.check_integrity()


def test_a_refusal_counts_where_the_slots_are(store: ArenaStore, arena: Arena) -> None:
    worker = Arena.attach(arena.path)
    make_bad(store, KEYS[0])
    quarantine(store, worker, [KEYS[1]])
    keep(store, KEYS[2:4])
    store.pin("session", [KEYS[2]])
    said = "no room for 3 chunks .* of 6 slots 2 are free, 0 can be evicted, 1 are pinned, 1 are in quarantine .* 1 "
    with pytest.raises(OverloadedError, match=said):
        store.reserve_slots("w2/a", [KEYS[3], *KEYS[5:8]], writer=OWNER)
    assert len(store.reserve_slots("w2/a", KEYS[5:8], writer=OWNER)) == 3
    assert store.stored([KEYS[3], KEYS[2]]) == [False, True]
    with pytest.raises(OverloadedError, match=r"of 6 slots .* 1 are pinned, 2 are out of use"):
        store.reserve_quota("w2/b", 4)
    store.reserve_quota("w2/b", 3)


def test_free_slots_and_idle_ones_make_room_together(store: ArenaStore) -> None:
    keep(store, KEYS[:2])
    assert store.room == 4
    store.set_copied([KEYS[0]], True)
    assert store.room == 5
    with pytest.raises(OverloadedError, match="4 are free, 2 can be evicted"):
        store.reserve_slots("a", KEYS[2:9])
    with pytest.raises(OverloadedError, match="4 are free, 1 can be evicted"):
        store.reserve_slots("a", KEYS[2:8], copied_only=True)
    assert len(store.reserve_slots("a", KEYS[2:7], copied_only=True)) == 5
    assert store.keys() == [KEYS[1]]
    assert len(store.reserve_slots("b", [KEYS[8]])) == 1
    assert store.keys() == [] and store.stats().evicted_chunks == 2 and store.room == 0


def test_holders_are_those_that_hold_or_were_promised_something(store: ArenaStore) -> None:
    store.reserve_quota("a", 1)
    store.reserve_quota("b", 2)
    hold_new(store, "b", [KEYS[0]])
    assert store.hold("c", [KEYS[1], KEYS[0]]) == [None, store.find([KEYS[0]])[0]]
    assert sorted(store.holders()) == ["a", "b", "c"]
    assert store.release_prefix("b") == 1 and store.release_prefix("b") == 0
    assert sorted(store.holders()) == ["a", "c"] and store.stats().quota_slots == 1
    assert store.reserve_quota_up_to("d", 9) == SLOTS - 1
    store.release_chunks("c", [KEYS[5], KEYS[0]])
    assert sorted(store.holders()) == ["a", "d"] and store.stats().held_slots == 0


# what is found


def test_what_is_found_and_held(store: ArenaStore) -> None:
    refs = hold_new(store, "a", KEYS[:3])
    store.release("a")
    assert store.find([KEYS[1], KEYS[5], KEYS[0]]) == [refs[1], None, refs[0]]
    assert store.stats().held_slots == 0
    assert store.hold_prefix("b", [KEYS[0], KEYS[1], KEYS[5], KEYS[2]]) == refs[:2]
    assert store.hold_local_prefix("c", KEYS[:5]) == (refs, False)
    assert store.hold_prefix("d", KEYS[4:]) == [] and store.hold("d", KEYS[4:6]) == [None, None]
    assert store.stored([KEYS[2], KEYS[3]]) == [True, False]
    assert sorted(store.holders()) == ["b", "c"] and sorted(store.keys()) == KEYS[:3]
    assert store.arena.path.exists() and store.spread is None


def test_the_coldest_are_listed_as_they_would_go(store: ArenaStore) -> None:
    keep(store, KEYS[:4])
    store.set_copied([KEYS[2]], True)
    store.hold("a", [KEYS[0]])
    store.release("a")
    assert store.coldest(9) == [KEYS[1], KEYS[3], KEYS[0]]
    assert store.coldest(2) == [KEYS[1], KEYS[3]]
    assert store.coldest(1) == [KEYS[1]]
    assert store.coldest(0) == store.coldest(-1) == []
    assert store.coldest(9, copied=True) == [KEYS[2]] == store.copied()


@pytest.mark.parametrize(
    "ask", ["hold_prefix", "hold_local_prefix", "hold", "reserve_slots", "reserve_quota", "reserve_quota_up_to"]
)
def test_what_is_asked_for_a_released_holder_comes_too_late(store: ArenaStore, ask: str) -> None:
    keep(store, KEYS[:1])
    name = HoldId("w", "req", 0).name
    asked = 1 if ask.startswith("reserve_quota") else KEYS[:1]
    getattr(store, ask)(name, asked)
    store.start_over(name)
    getattr(store, ask)(name, asked)
    store.release(name)
    with pytest.raises(ReleasedError):
        getattr(store, ask)(name, asked)
    assert store.holders() == [] and store.stats().quota_slots == 0
    assert store.released_below("w") == 1
    store.release_prefix("w/")
    assert store.released_below("w") == 0, "a worker that is gone is forgotten"
    getattr(store, ask)(name, asked)
    store.forget_released("w", 5)
    assert store.released_below("w") == 5
    with pytest.raises(ReleasedError):
        getattr(store, ask)(HoldId("w", "req", 4).name, asked)


# what is stored


def test_listeners_hear_of_what_comes_and_goes(arena: Arena) -> None:
    heard: list[tuple[ChunkKey, bool]] = []
    store = ArenaStore(arena, lambda key, is_stored: heard.append((key, is_stored)))
    [ref] = hold_new(store, "a", [KEYS[0]])
    store.drop(KEYS[0], ref)
    store.release("a")
    keep(store, KEYS[1 : SLOTS + 2])
    gone = (KEYS[1], False)
    assert heard == [
        (KEYS[0], True), (KEYS[0], False), *[(key, True) for key in KEYS[1 : SLOTS + 1]], gone, (KEYS[SLOTS + 1], True)
    ]  # fmt: skip


def test_a_slot_has_its_writer_until_it_is_committed_or_free(store: ArenaStore, arena: Arena) -> None:
    [first], [second] = store.reserve_slots("a", [KEYS[0]], writer=77), store.reserve_slots("a", [KEYS[1]])
    assert arena.writer_of(first.ref.slot) == 77 and arena.writer_of(second.ref.slot) == UNKNOWN
    assert (first.stored, second.stored, first.key) == (False, False, KEYS[0])
    seal(store, KEYS[0], first.ref)
    store.commit("a", [(KEYS[0], first.ref)])
    assert arena.writer_of(first.ref.slot) == NO_WRITER and store.copied() == []
    store.release("a")
    assert arena.writer_of(second.ref.slot) == NO_WRITER
    assert store.reserve_slots("b", [KEYS[0]])[0].stored


def test_what_was_sealed_and_never_committed_is_not_found_by_a_new_owner(store: ArenaStore) -> None:
    [place] = store.reserve_slots("a", [KEYS[0]], writer=OWNER)
    seal(store, KEYS[0], place.ref)
    store.release("a")
    assert store.arena.sealed_key(place.ref.slot) is None
    hold_new(store, "a", [KEYS[1]])
    store.release("a")
    assert adopted(store).keys() == [KEYS[1]]


def test_a_new_owner_keeps_one_of_two_equal_chunks(store: ArenaStore, arena: Arena) -> None:
    worker = Arena.attach(arena.path)
    for holder in ("a", "b"):
        [place] = store.reserve_slots(holder, [KEYS[0]], writer=worker.writer, begun=1)
        seal(store, KEYS[0], place.ref)
    heard: list[tuple[ChunkKey, bool]] = []
    successor = adopted(store, lambda key, is_stored: heard.append((key, is_stored)))
    assert successor.keys() == [KEYS[0]] and heard == [(KEYS[0], True)]
    stats = successor.stats()
    assert (stats.used_slots, stats.quarantined_slots) == (1, 0), "who seals has written"
    assert len(successor.reserve_slots("c", KEYS[1:SLOTS])) == SLOTS - 1
    assert (stats.evicted_chunks, stats.dropped_chunks) == (0, 0)


def test_a_new_owner_waits_for_the_writers_of_what_was_not_sealed(store: ArenaStore, arena: Arena) -> None:
    worker = Arena.attach(arena.path)
    store.reserve_slots("w/a", [KEYS[0]], writer=worker.writer, begun=1)
    store.reserve_slots("w/b", [KEYS[1]], writer=OWNER)
    store.reserve_slots("w/c", [KEYS[2]])
    hold_new(store, "w/d", [KEYS[3]])
    freed = store.reserve_slots("w/e", [KEYS[4]], writer=worker.writer, begun=2)
    store.release("w/e")
    successor = adopted(store)
    assert successor.stats().quarantined_slots == 2, "of the one, and of any that lives"
    assert successor.arena.writer_of(freed[0].ref.slot) == NO_WRITER
    writer = worker.writer
    assert successor.arena.life == 2
    successor.apply_report(WriterNews(writer, 2, begun=2, ended_before=3))
    assert successor.stats().quarantined_slots == 1
    del worker
    assert len(successor.reserve_slots("x", KEYS[4 : 4 + SLOTS], writer=OWNER)) == SLOTS, "no writer lives"


def test_a_call_of_another_holder_commits_nothing(store: ArenaStore) -> None:
    [place] = store.reserve_slots("a", [KEYS[0]])
    seal(store, KEYS[0], place.ref)
    for holder, key in [("b", KEYS[0]), ("a", KEYS[1])]:
        with pytest.raises(ChunkLostError, match=rf"slot {place.ref.slot} is not reserved by {holder} any more"):
            store.commit(holder, [(key, place.ref)])
    store.arena.clear(place.ref.slot)
    with pytest.raises(ChunkLostError, match=rf"a committed slot {place.ref.slot} without a seal"):
        store.commit("a", [(KEYS[0], place.ref)])
    assert store.keys() == []
    store.check_integrity()


# what was taken back from its writer


def test_only_what_a_living_process_may_write_waits(store: ArenaStore, arena: Arena) -> None:
    worker = Arena.attach(arena.path)
    for writer, waits in [(OWNER, 0), (worker.writer + 1, 0), (worker.writer, 1), (UNKNOWN, 2)]:
        store.reserve_slots("w/lost", [KEYS[0]], writer=writer, begun=1)
        store.release_prefix("w/")
        assert store.stats().quarantined_slots == waits
        store.check_integrity()
    hold_new(store, "w/stored", [KEYS[0]])
    store.release_prefix("w/")
    assert store.stats().quarantined_slots == 2, "what is stored is written"


def test_the_lowest_number_is_that_of_a_process_too(
    store: ArenaStore, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owned_file.secrets, "randbelow", lambda most: 0)
    worker = Arena.attach(arena.path)
    assert worker.writer == FIRST_WRITER
    quarantine(store, worker, [KEYS[0]])
    assert store.stats().quarantined_slots == 1


def test_room_that_a_dead_writer_leaves_is_given_at_once(store: ArenaStore, arena: Arena) -> None:
    worker = Arena.attach(arena.path)
    quarantine(store, worker, KEYS[:2])
    with pytest.raises(OverloadedError, match="2 are in quarantine until a worker ends"):
        store.reserve_slots("x", KEYS[2 : 2 + SLOTS], writer=OWNER)
    del worker
    assert len(store.reserve_slots("x", KEYS[2 : 2 + SLOTS], writer=OWNER)) == SLOTS


@pytest.mark.parametrize("how", ["commit", "drop", "release", "start over", "news"])
def test_a_writer_that_has_ended_frees_its_slot(store: ArenaStore, arena: Arena, how: str) -> None:
    worker = Arena.attach(arena.path)
    [first, second] = quarantine(store, worker, KEYS[:2])
    assert store.stats().quarantined_slots == 2
    stale = SlotRef(first.slot, first.generation - 1)
    with pytest.raises(ChunkLostError):
        store.commit("w/lost", [(KEYS[0], stale)])
    store.drop(KEYS[0], stale)
    assert store.stats().quarantined_slots == 2, "the end of an older writer is none"
    if how == "commit":
        with pytest.raises(ChunkLostError):
            store.commit("w/lost", [(KEYS[0], first)])
    elif how == "drop":
        store.drop(KEYS[0], first)
    elif how == "release":
        store.release("w/lost")
    elif how == "start over":
        store.start_over("w/lost")
    else:
        store.apply_report(WriterNews(worker.writer, arena.life, begun=5, ended_before=1))
        assert store.stats().quarantined_slots == 2
        store.apply_report(WriterNews(worker.writer, arena.life, begun=5, ended_before=2))
    left = 1 if how in ("commit", "drop") else 0
    assert (store.stats().quarantined_slots, store.stats().used_slots) == (left, left)
    assert (store._failed(first.slot), store._failed(second.slot)) == (int(how == "drop"), 0)
    store.check_integrity()


# what is found wrong


def test_one_that_starts_over_lets_go_of_everything(store: ArenaStore) -> None:
    store.reserve_quota("a", 3)
    hold_new(store, "a", KEYS[:2])
    store.reserve_slots("a", [KEYS[2]], writer=OWNER)
    store.start_over("a")
    stats = store.stats()
    assert (stats.held_slots, stats.quota_slots, stats.used_slots) == (0, 0, 2) and store.holders() == []


def test_a_slot_fails_once_for_each_chunk_whatever_number_of_readers_finds_it(
    store: ArenaStore, caplog: pytest.LogCaptureFixture
) -> None:
    [ref] = hold_new(store, "a", [KEYS[0]])
    store.hold("b", [KEYS[0]])
    store.arena.chunks[ref.slot, 3] ^= 1
    for _ in range(3):
        store.drop(KEYS[0], ref)
    store.drop(KEYS[1], ref)  # another chunk's
    stats = store.stats()
    assert (stats.dropped_chunks, stats.bad_slots, stats.held_slots, stats.stored_chunks) == (1, 0, 1, 0)
    assert store._failed(ref.slot) == 1 and not store.arena.is_sealed(ref, KEYS[0])
    store.release("a")
    assert store.stats().used_slots == 1, "the other one holds it"
    store.release("b")
    assert store.stats().used_slots == 0 and caplog.text == ""
    # of the free ones it is taken last
    places = store.reserve_slots("c", KEYS[1 : SLOTS + 1], writer=OWNER)
    assert [place.ref.slot for place in places].index(ref.slot) == SLOTS - 1
    last = places[-1]
    with caplog.at_level(logging.ERROR):
        store.drop(last.key, last.ref)  # its writer found other bytes there than it wrote
        store.drop(last.key, last.ref)
    assert caplog.text.count("bad memory: slot") == 1
    assert f"slot {ref.slot} of {store.arena.path} held wrong bytes 2 times" in caplog.text
    assert store.stats().bad_slots == 0 and store.stats().dropped_chunks == 1
    store.release("c")
    stats = store.stats()
    assert (stats.bad_slots, stats.used_slots) == (1, 1)
    assert store.arena.writer_of(ref.slot) == RETIRED and store.arena.sealed_key(ref.slot) is None
    store.check_integrity()
    assert adopted(store).stats().bad_slots == 1


def test_a_chunk_that_nobody_holds_is_freed_when_it_is_dropped(store: ArenaStore) -> None:
    [ref] = hold_new(store, "a", [KEYS[0]])
    store.release("a")
    store.drop(KEYS[0], SlotRef(ref.slot, ref.generation + 1))
    assert store.keys() == [KEYS[0]]
    store.drop(KEYS[0], ref)
    stats = store.stats()
    assert (stats.used_slots, stats.dropped_chunks, stats.stored_chunks) == (0, 1, 0)
    assert store.arena.sealed_key(ref.slot) is None and store.find([KEYS[0]]) == [None]
    store.check_integrity()


# who else answers for a chunk


def test_only_what_was_known_at_the_mark_becomes_a_copy(store: ArenaStore) -> None:
    keep(store, KEYS[:2])
    mark = store.mark
    store.set_copied(KEYS[:1], True, since=mark)
    assert store.copied() == KEYS[:1], "what was answered for at the mark itself is known"
    keep(store, [KEYS[2]])
    assert store.mark > mark
    store.set_copied([KEYS[2], KEYS[9]], True, since=mark)
    assert store.copied() == KEYS[:1]
    store.set_copied([KEYS[2]], True, since=store.mark)
    assert sorted(store.copied()) == [KEYS[0], KEYS[2]]
    # one that it comes to answer for again
    mark = store.mark
    store.set_copied([KEYS[0]], False)
    assert store.mark > mark and store.copied() == [KEYS[2]]
    store.set_copied([KEYS[0]], True, since=mark)
    assert store.copied() == [KEYS[2]]
    assert store.stats().copied_slots == 1
    store.set_copied([KEYS[0]], True)
    assert sorted(store.copied()) == [KEYS[0], KEYS[2]] and store.stats().copied_slots == 2
    store.check_integrity()


def test_what_comes_with_another_to_answer_for_it_is_a_copy(store: ArenaStore) -> None:
    store.pin(ALICE, KEYS[:2])
    keep(store, KEYS[:1], copied=True)
    keep(store, KEYS[1:3])
    assert store.copied() == KEYS[:1]
    stats = store.stats()
    assert (stats.pinned_slots, stats.copied_slots) == (1, 1), "pinned or not"
    assert store.pin_share("alice").pinned == 1
    store.check_integrity()
    store.set_copied(KEYS[:1], False)
    assert store.stats().pinned_slots == 2
    store.set_copied(KEYS[:2], True)
    stats = store.stats()
    assert (stats.pinned_slots, stats.copied_slots) == (0, 2) and store.pin_share("alice").pinned == 0
    store.check_integrity()
    keep(store, KEYS[5:10])
    assert store.stored(KEYS[:3]) == [False, False, True], "copies go first"
    assert store.copied() == []
    store.check_integrity()


# what is pinned


def test_pins_of_two_tenants_are_counted_apart(arena: Arena) -> None:
    store = ArenaStore(arena, pin_limits=PinLimits(0.5, 0.34))  # 3 slots, 2 of one tenant
    hold_new(store, "a", KEYS[:4])
    assert store.pin(ALICE, KEYS[:3]) == 1
    assert store.pin(BOB, [KEYS[3]]) == 0
    assert store.stats().pinned_slots == 0, "they are held"
    store.release("a")
    stats = store.stats()
    assert stats.pinned_slots == 3
    share = store.pin_share("alice")
    assert (share.pinned, share.limit, share.pinned_by_all, share.limit_of_all) == (3, 2, 3, 3)
    assert share.sessions == ((ALICE, 3),)
    assert len(store.coldest(9)) == 1 and store.coldest(9)[0] in KEYS[:3]
    assert store.pin(BOB, KEYS[3:5]) == 0
    keep(store, [KEYS[4]])
    assert store.stats().pinned_slots == 3 and len(store.coldest(9)) == 2
    assert store.pin(BOB, KEYS[3:5]) == 1
    store.unpin(ALICE)
    assert store.stats().pinned_slots == 2 and store.pin_share("alice").pinned == 0
    assert store.pin(BOB, KEYS[3:5]) == 0
    assert len(store.coldest(9)) == 3
    store.check_integrity()


def test_a_pin_takes_the_last_slot_that_is_not_promised(store: ArenaStore) -> None:
    keep(store, KEYS[:3])
    store.reserve_quota("a", SLOTS - 1)
    assert store.pin(ALICE, KEYS[:2]) == 1
    assert store.stats().pinned_slots == 1
    store.reserve_quota("a", SLOTS - 2)
    assert store.stats().pinned_slots == 2
    assert store.pin(BOB, [KEYS[2]]) == 1
    store.unpin(ALICE)
    assert store.stats().pinned_slots == 1, "what had to yield is kept"
    store.reserve_quota("a", SLOTS - 1)
    with pytest.raises(OverloadedError):
        store.reserve_quota("a", SLOTS)
    store.check_integrity()


def test_what_yields_goes_last(store: ArenaStore) -> None:
    keep(store, KEYS[:3])
    store.reserve_quota("a", SLOTS)
    assert store.pin(ALICE, [KEYS[0]]) == 1
    assert store.coldest(9) == [KEYS[1], KEYS[2], KEYS[0]]
    hold_new(store, "a", KEYS[5:10])
    assert store.keys()[0] == KEYS[0] and store.stored(KEYS[1:3]) == [False, False]
    hold_new(store, "a", [KEYS[10]])
    assert store.stored([KEYS[0]]) == [False] and store.stats().evicted_chunks == 3
    store.check_integrity()
