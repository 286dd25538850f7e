"""Index records of chunks on other nodes, under random operations, and the holds of spread sequences."""

import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import xxhash
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from forecache.workers.errors import ChunkLostError, OverloadedError
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.records import RecordSlots
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.format.chunk_batch import LayerBatch, RecordBatch
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.layout import attention_layout
from forecache.workers.memory.format.slots import SlotRef
from forecache.workers.memory.format.spread_quota import spread_quota

LAYOUT = attention_layout("m", layers=2, kv_heads=1, head_dim=8, chunk_tokens=16, dtype=torch.float8_e4m3fn)
INDEX_NBYTES, SLOTS, RECORDS = 8, 4, 5
KEYS = [bytes([i]) * 16 for i in range(1, 10)]
HOLDERS = ["a/0", "a/1", "b/0"]


def small_arena(directory: Path) -> Arena:
    return Arena.create(
        directory,
        "records",
        layout=LAYOUT,
        index_nbytes=INDEX_NBYTES,
        index_fingerprint="index",
        capacity_bytes=(2 << 20) + SLOTS * LAYOUT.nbytes,
        record_bytes=RECORDS * (INDEX_NBYTES + 64),
    )


def batch_of(keys: list[bytes]) -> RecordBatch:
    index = np.stack([np.full(INDEX_NBYTES, key[0], np.uint8) for key in keys])
    return RecordBatch(tuple(keys), index, np.array([xxhash.xxh3_64_intdigest(row) for row in index], np.uint64))


class RecordsMachine(RuleBasedStateMachine):
    """Operations of several holders, against a model of who holds which keys."""

    @initialize()
    def open(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.arena = small_arena(Path(self.directory.name))
        assert (self.arena.slots, self.arena.record_slots) == (SLOTS, RECORDS)
        self.records = RecordSlots(self.arena)
        self.held: dict[str, set[bytes]] = {holder: set() for holder in HOLDERS}

    def teardown(self) -> None:
        self.arena.close()
        self.directory.cleanup()

    @rule(holder=st.sampled_from(HOLDERS), keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=4, unique=True))
    def put(self, holder: str, keys: list[bytes]) -> None:
        before = {key for held in self.held.values() for key in held}
        refs = self.records.put(holder, batch_of(keys))
        for key, ref in zip(keys, refs, strict=True):
            if ref is None:
                assert key not in before and len({key for held in self.held.values() for key in held}) == RECORDS
                continue
            assert ref.remote and ref.slot >= SLOTS and self.arena.check(ref, key)
            assert self.arena.index[ref.slot].tolist() == [key[0]] * INDEX_NBYTES
            self.held[holder].add(key)

    @rule(holder=st.sampled_from(HOLDERS), keys=st.lists(st.sampled_from(KEYS), max_size=4, unique=True))
    def hold(self, holder: str, keys: list[bytes]) -> None:
        for key, ref in zip(keys, self.records.hold(holder, keys), strict=True):
            if any(key in held for held in self.held.values()):
                assert ref is not None
            if ref is not None:
                assert self.arena.check(ref, key)
                self.held[holder].add(key)

    @rule(holder=st.sampled_from(HOLDERS))
    def release(self, holder: str) -> None:
        self.records.release(holder)
        self.held[holder].clear()

    @rule()
    def damage_one(self) -> None:
        for key in KEYS:
            [ref] = self.records.hold("damage", [key])
            self.records.release("damage")
            if ref is not None:
                self.arena.index[ref.slot, 0] ^= 255
                assert not self.arena.check(ref, key)
                [again] = self.records.put("damage", batch_of([key]))
                self.records.release("damage")
                assert again == ref and self.arena.check(ref, key)
                return

    @rule()
    def restart(self) -> None:
        """A new owner finds the records without holds; holders repeat theirs."""
        self.records = RecordSlots(self.arena)
        for holder, keys in self.held.items():
            assert None not in self.records.hold(holder, sorted(keys))

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "records"):
            self.records.check_integrity()
            assert self.records.held == len({key for held in self.held.values() for key in held})


TestRecords = RecordsMachine.TestCase
TestRecords.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


def test_no_more_records_are_promised_than_there_is_room_for(tmp_path: Path) -> None:
    records = RecordSlots(small_arena(tmp_path))
    records.reserve_quota("a/0", 3)
    with pytest.raises(OverloadedError, match="index records of 3 chunks"):
        records.reserve_quota("a/1", 3)
    records.reserve_quota("a/0", 5)
    records.release("a/0")
    records.reserve_quota("a/1", 3)


def test_a_damaged_record_may_be_dropped_and_is_written_anew(tmp_path: Path) -> None:
    arena = small_arena(tmp_path)
    store, records = ArenaStore(arena), RecordSlots(arena)
    [ref] = records.put("a/0", batch_of(KEYS[:1]))
    assert ref is not None and ref.slot >= arena.slots
    arena.index[ref.slot, 0] ^= 255
    store.drop(KEYS[0], ref)
    store.check_integrity()
    assert records.put("a/0", batch_of(KEYS[:1])) == [ref] and arena.check(ref, KEYS[0])
    records.check_integrity()
    assert store.stats().dropped_chunks == 0


def test_a_record_whose_slot_does_not_keep_it_gets_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = small_arena(tmp_path)
    records, write_record = RecordSlots(arena), Arena.write_record
    [held, idle] = records.put("a/0", batch_of(KEYS[:2]))
    assert held is not None and idle is not None
    records.release("a/0")
    assert records.hold("a/1", KEYS[:1]) == records.hold("b/0", KEYS[:1]) == [held]
    bad = {held.slot, idle.slot}

    def write_but_one_bit(
        arena: Arena, ref: SlotRef, key: ChunkKey, record: npt.NDArray[np.uint8], checksum: int
    ) -> None:
        if ref.slot not in bad:
            return write_record(arena, ref, key, record, checksum)
        arena.index[ref.slot] = torch.from_numpy(record ^ np.uint8(1))
        raise ChunkLostError("its memory is bad")

    monkeypatch.setattr(Arena, "write_record", write_but_one_bit)
    for slot in bad:
        arena.index[slot, 0] ^= 255
    assert records.put("b/0", batch_of(KEYS[:2])) == [None, None]
    records.check_integrity()
    assert records.hold("b/1", KEYS[:2]) == [None, None] and records.held == 0
    assert arena.generation_of(held.slot) != held.generation, "who holds it sees that its place was given away"
    again = records.put("b/0", batch_of(KEYS[:2]))
    assert all(
        ref is not None and ref.slot not in bad and arena.check(ref, key) for key, ref in zip(KEYS, again, strict=False)
    )
    records.check_integrity()
    for holder in ("a/1", "b/0", "b/1"):
        records.release(holder)
    records.check_integrity()


def test_a_store_promises_what_it_has_and_lets_go_of_single_chunks(tmp_path: Path) -> None:
    arena = small_arena(tmp_path)
    store = ArenaStore(arena)
    store.reserve_quota("a/0", 1)
    assert store.reserve_quota_up_to("b/0", 10) == SLOTS - 1
    assert store.reserve_quota_up_to("a/0", 3) == 1
    assert store.reserve_quota_up_to("b/0", 1) == SLOTS - 1  # what was promised stays
    places = store.reserve_slots("b/0", KEYS[:3])
    for place in places:
        arena.seal(place.ref, place.key, arena.digests(place.ref.slot))
    store.commit("b/0", [(place.key, place.ref) for place in places])
    store.release_chunks("b/0", [KEYS[1], KEYS[8]])
    store.check_integrity()
    assert store.stats().held_slots == 2
    store.release_chunks("b/0", KEYS[:3])
    store.check_integrity()
    assert store.stats().held_slots == 0 and store.stats().stored_chunks == 3


def test_a_share_is_never_more_than_the_arena() -> None:
    for slots in (*range(3, 40), 1000):
        share = spread_quota(slots)
        assert share.max_in_flight >= 1 and share.slots <= slots
    assert spread_quota(1000).slots == 250 and spread_quota(1000).local_chunks == 126


def test_a_layer_of_a_chunk_is_what_its_fields_say() -> None:
    memory = torch.randint(0, 256, (3, LAYOUT.nbytes), dtype=torch.uint8)
    kv, scale = LAYOUT.view(memory, "kv"), LAYOUT.view(memory, "scale")
    for layer in range(2):
        rows = torch.cat([memory[:, part] for part in LAYOUT.layer_parts(layer)], dim=1)
        assert rows.shape == (3, LAYOUT.layer_nbytes)
        assert torch.equal(LAYOUT.layer_view(rows, "kv").view(torch.uint8), kv[:, layer : layer + 1].view(torch.uint8))
        got, wanted = LAYOUT.layer_view(rows, "scale"), scale[:, layer : layer + 1]
        assert torch.equal(got.view(torch.int32), wanted.contiguous().view(torch.int32))


def test_a_layer_that_was_changed_on_its_way_is_found() -> None:
    rows = np.arange(20, dtype=np.uint8).reshape(4, 5)
    batch = LayerBatch.sealed(tuple(KEYS[:4]), rows)
    assert batch.is_sound
    rows[2, 3] ^= 1
    assert not batch.is_sound
