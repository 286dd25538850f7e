"""Limits of pins: shares of memory for each tenant and for all, so that the rest serves requests."""

from pathlib import Path

import pytest
import torch

from forecache.cluster.errors import PinLimitError, from_exception
from forecache.cluster.http.sessions import over_limit
from forecache.cluster.tenants import Anonymous, Tenant
from forecache.workers.errors import OverloadedError
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.ledger import PinLimits, PinShare
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.format.layout import attention_layout

LAYOUT = attention_layout("m", layers=1, kv_heads=1, head_dim=8, chunk_tokens=16, dtype=torch.float32)
SLOTS = 40
ALICE, BOB, ANYBODY = Tenant(name="alice"), Tenant(name="bob"), Anonymous()


def keys(first: int, count: int) -> list[bytes]:
    return [number.to_bytes(16, "little") for number in range(first, first + count)]


def make_store(directory: Path, limits: PinLimits | None = None) -> ArenaStore:
    arena = Arena.create(
        directory, "t", layout=LAYOUT, index_nbytes=8, index_fingerprint="i",
        capacity_bytes=(2 << 20) + SLOTS * LAYOUT.nbytes,
    )  # fmt: skip
    assert arena.slots == SLOTS
    store = ArenaStore(arena, pin_limits=limits)
    write(store, keys(0, SLOTS))
    return store


def write(store: ArenaStore, some: list[bytes]) -> None:
    for place in store.reserve_slots("w/past", some):
        if not place.stored:
            store.arena.chunks[place.ref.slot] = 1
            store.arena.index[place.ref.slot] = 1
            store.arena.seal(place.ref, place.key, store.arena.digests(place.ref.slot))
            store.commit("w/past", [(place.key, place.ref)])
    store.release("w/past")


@pytest.fixture
def store(tmp_path: Path) -> ArenaStore:
    return make_store(tmp_path)


def test_one_tenants_pins_leave_room_for_requests_and_for_other_tenants(store: ArenaStore) -> None:
    assert store.pin(ALICE.scoped_name("all"), keys(0, SLOTS)) == SLOTS - SLOTS // 4
    assert store.stats().pinned_slots == SLOTS // 4
    store.reserve_quota("w/bobs", SLOTS - SLOTS // 4)
    store.release("w/bobs")
    assert store.pin(BOB.scoped_name("b"), keys(0, 0)) == 0
    store.check_integrity()


def test_pins_of_all_tenants_leave_half_of_memory_to_requests(store: ArenaStore) -> None:
    quarter = SLOTS // 4
    for number, tenant in enumerate((ALICE, BOB)):
        assert store.pin(tenant.scoped_name("s"), keys(number * quarter, quarter)) == 0
    assert store.pin(Tenant(name="carol").scoped_name("s"), keys(2 * quarter, 1)) == 1
    assert store.stats().pinned_slots == 2 * quarter
    store.reserve_quota("w/a", SLOTS // 2)
    with pytest.raises(OverloadedError, match="Try again later"):
        store.reserve_quota("w/b", 1)
    store.release("w/a")
    # what only unpinning makes room for is not told to wait
    with pytest.raises(OverloadedError, match=r"20 are pinned\. Unpin sessions"):
        store.reserve_quota("w/c", SLOTS // 2 + 1)
    store.check_integrity()


def test_without_keys_there_is_one_share(store: ArenaStore) -> None:
    assert store.pin(ANYBODY.scoped_name("s"), keys(0, SLOTS // 2)) == 0
    assert store.pin(ANYBODY.scoped_name("t"), keys(SLOTS // 2, 3)) == 3
    assert store.stats().pinned_slots == SLOTS // 2


def test_the_share_holds_for_chunks_that_come_later_and_for_sessions_that_grow(store: ArenaStore) -> None:
    few = SLOTS // 4
    assert store.pin(ALICE.scoped_name("s"), keys(100, SLOTS)) == 0  # nothing of it is here yet
    write(store, keys(100, SLOTS))
    assert store.stats().pinned_slots == few
    store.check_integrity()
    assert store.pin(ALICE.scoped_name("s"), keys(100, few)) == 0
    assert store.pin(ALICE.scoped_name("s"), keys(100, few + 5)) == 5
    assert store.stats().pinned_slots == few
    store.reserve_quota("w/rest", SLOTS - few)


def test_what_a_sequence_holds_counts(store: ArenaStore) -> None:
    """Chunks that a sequence holds count, since they will be idle and pinned later."""
    few = SLOTS // 4
    store.hold("w/runs", keys(0, few))
    assert store.pin(ALICE.scoped_name("s"), keys(0, few)) == 0
    assert store.pin(ALICE.scoped_name("t"), keys(few, 2)) == 2
    store.unpin(ALICE.scoped_name("t"))
    store.release("w/runs")
    assert store.stats().pinned_slots == few
    store.check_integrity()


def test_chunks_that_another_tier_answers_for_take_no_share_here(store: ArenaStore) -> None:
    few = SLOTS // 4
    store.set_copied(keys(0, few), True)
    assert store.pin(ALICE.scoped_name("s"), keys(0, 2 * few)) == 0
    assert store.stats().pinned_slots == few
    store.set_copied(keys(0, 1), False)
    assert store.stats().pinned_slots == few
    assert store.pin(ALICE.scoped_name("s"), keys(0, 2 * few)) == 1
    store.check_integrity()


def test_a_session_that_is_let_go_of_makes_room_for_what_had_to_yield(store: ArenaStore) -> None:
    few = SLOTS // 4
    store.pin(ALICE.scoped_name("s"), keys(0, few))
    assert store.pin(ALICE.scoped_name("t"), keys(few, 3)) == 3
    assert store.pin(BOB.scoped_name("b"), keys(2 * few, few)) == 0
    store.unpin(ALICE.scoped_name("s"))
    assert store.pin(ALICE.scoped_name("t"), keys(few, 3)) == 0
    assert store.stats().pinned_slots == few + 3
    store.check_integrity()


def test_no_pin_is_kept_where_none_may_be(tmp_path: Path) -> None:
    store = make_store(tmp_path, PinLimits(0.0, 1.0))
    assert store.pin("s", keys(0, 3)) == 3
    assert store.stats().pinned_slots == 0


def test_a_refusal_says_what_to_unpin_and_names_no_other_tenants_session(store: ArenaStore) -> None:
    few = SLOTS // 4
    store.pin(BOB.scoped_name("bobs secret"), keys(0, few))
    store.pin(ALICE.scoped_name("old"), keys(few, few - 2))
    store.pin(ALICE.scoped_name("older"), keys(2 * few, 2))
    assert store.pin(ALICE.scoped_name("new"), keys(3 * few, 4)) == 4
    share = store.pin_share("alice")
    assert (share.pinned, share.limit, share.pinned_by_all, share.limit_of_all) == (14, 10, 20, 20)
    refused = over_limit(ALICE.scoped_name("new"), [PinShare(0, few, 0, 2 * few), share])
    assert isinstance(refused, PinLimitError)
    told = from_exception(refused)
    assert (told.status, told.type, told.code) == (400, "invalid_request_error", "pin_limit_exceeded")
    assert "pins may keep 10 chunks of a node and would keep 14" in told.message
    assert "'old' (8 chunks), 'older' (2 chunks)" in told.message and "DELETE /v1/sessions/ID" in told.message
    assert "bob" not in told.message and "secret" not in told.message and "alice" not in told.message

    alone = over_limit(ALICE.scoped_name("big"), [PinShare(14, 10, 14, 20, ((ALICE.scoped_name("big"), 14),))])
    assert "None of your other sessions is pinned" in str(alone) and "--max-tenant-pinned-fraction" in str(alone)
    of_all = over_limit(ALICE.scoped_name("s"), [PinShare(5, 10, 25, 20, ((ALICE.scoped_name("s"), 5),))])
    assert "all pins may keep 20" in str(of_all) and "--max-pinned-fraction" in str(of_all)
    assert "--max-pinned-fraction" in str(over_limit("s", [PinShare(25, 20, 20, 20, (("s", 25),))]))
    assert over_limit("s", [PinShare(20, 20, 20, 20)]) is None and over_limit("s", []) is None
