"""Slots with bad memory: wrong bytes are found at the write or at a read, and the slot is retired."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from forecache.workers.core.requests import CacheOptions, GenerateRequest, SamplingParams
from forecache.workers.errors import OverloadedError
from forecache.workers.llm import LLM
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.layout import attention_layout
from forecache.workers.memory.format.slots import SlotRef
from forecache.workers.memory.hot.snapshot_store import SnapshotStore
from forecache.workers.memory.tier.transfer import read, store_batch
from forecache.workers.models.backbone import expected_layout, load_config

LAYOUT = attention_layout("m", layers=1, kv_heads=1, head_dim=8, chunk_tokens=16, dtype=torch.float32)
INDEX_NBYTES = 64
SLOTS = 4
KEYS = [bytes([number]) * 16 for number in range(1, 10)]


def small_arena(directory: Path) -> Arena:
    return Arena.create(
        directory,
        "bad",
        layout=LAYOUT,
        index_nbytes=INDEX_NBYTES,
        index_fingerprint="index",
        capacity_bytes=(2 << 20) + SLOTS * LAYOUT.nbytes,
    )


@pytest.fixture
def store(tmp_path: Path) -> ArenaStore:
    return ArenaStore(small_arena(tmp_path))


def put(store: ArenaStore, holder: str, key: bytes) -> SlotRef:
    [place] = store.reserve_slots(holder, [key])
    chunk, index = np.full(LAYOUT.nbytes, key[0], np.uint8), np.full(INDEX_NBYTES, key[0], np.uint8)
    store.arena.put(place.ref, key, chunk, index)
    store.commit(holder, [(key, place.ref)])
    return place.ref


def fail(store: ArenaStore, key: bytes) -> int:
    """Store a chunk, flip a bit of it, and let a reader find that. Returns its slot."""
    ref = put(store, "w", key)
    store.release("w")
    store.arena.chunks[ref.slot, 9] ^= 4
    store.hold("r", [key])
    assert len(read(store, [key])) == 0
    store.drop(key, ref)  # the next one that has read it
    store.release("r")
    store.check_integrity()
    return ref.slot


def test_a_slot_that_has_failed_is_taken_last(store: ArenaStore) -> None:
    failed = fail(store, KEYS[0])
    slots = [put(store, "w", key).slot for key in KEYS[1 : SLOTS + 1]]
    assert slots[-1] == failed and len(set(slots)) == SLOTS
    assert store.stats().bad_slots == 0


def test_a_slot_that_has_failed_twice_is_never_used_again(store: ArenaStore, caplog: pytest.LogCaptureFixture) -> None:
    failed = fail(store, KEYS[0])
    for key in KEYS[1:SLOTS]:
        put(store, "others", key)
    assert fail(store, KEYS[SLOTS]) == failed
    assert "bad memory: slot" in caplog.text
    stats = store.stats()
    assert (stats.bad_slots, stats.used_slots, stats.held_slots) == (1, SLOTS, SLOTS - 1)
    with pytest.raises(OverloadedError, match="1 have bad memory"):
        store.reserve_slots("w", [KEYS[5]])
    with pytest.raises(OverloadedError, match="1 are out of use"):
        store.reserve_quota("w", SLOTS)
    store.reserve_quota("w", SLOTS - 1)
    store.release("w")
    store.release("others")
    for number in range(3 * SLOTS):
        assert put(store, "w", bytes([50 + number]) * 16).slot != failed
        store.release("w")
    store.check_integrity()
    store.arena.close()
    successor = ArenaStore(Arena.adopt(store.arena.path))
    assert successor.stats().bad_slots == 1, "a new tier gets the same memory"
    assert len(successor.reserve_slots("w", KEYS[: SLOTS - 1])) == SLOTS - 1
    with pytest.raises(OverloadedError):
        successor.reserve_slots("w", [KEYS[8]])
    successor.check_integrity()


def test_a_writer_that_finds_its_own_bytes_wrong_is_believed(store: ArenaStore) -> None:
    """Also where the slot holds what was sealed: the writer knows its source, the store only the seal."""
    for key in KEYS[1:SLOTS]:
        put(store, "others", key)
    for _ in range(2):
        [place] = store.reserve_slots("w", [KEYS[0]])
        chunk, index = np.full(LAYOUT.nbytes, 7, np.uint8), np.full(INDEX_NBYTES, 7, np.uint8)
        store.arena.put(place.ref, KEYS[0], chunk, index)
        store.drop(KEYS[0], place.ref)
        store.release("w")
        store.check_integrity()
    assert store.stats().bad_slots == 1


def test_slots_may_turn_out_bad_after_they_were_promised(store: ArenaStore) -> None:
    store.reserve_quota("a", SLOTS)
    fail(store, KEYS[0])
    for key in KEYS[1:SLOTS]:
        put(store, "b", key)
    fail(store, KEYS[SLOTS])
    assert store.stats().bad_slots == 1
    store.check_integrity()
    with pytest.raises(OverloadedError):
        store.reserve_quota("c", 1)
    assert store.reserve_quota_up_to("c", 1) == 0
    store.reserve_quota("a", SLOTS - 1)  # what it has, it may make less
    store.release("a")
    store.reserve_quota("c", SLOTS - 1)


def test_a_reader_that_reads_wrongly_retires_no_slot(store: ArenaStore, caplog: pytest.LogCaptureFixture) -> None:
    """The tier finds the sealed bytes unchanged, so the chunk is stored again and no slot is retired."""
    for key in KEYS[:3]:
        ref = put(store, "w", key)
        store.hold("r", [key])
        for _ in range(2):  # two readers of one device
            store.drop(key, ref)
        assert store.stored([key]) == [False] and caplog.text.count("it read wrongly") == 1
        caplog.clear()
        store.release("r")
        store.release("w")
        store.check_integrity()
    [first, second] = [store.reserve_slots(holder, [KEYS[3]])[0].ref for holder in ("v", "w")]
    for holder, place in (("v", first), ("w", second)):
        store.arena.put(place, KEYS[3], np.zeros(LAYOUT.nbytes, np.uint8), np.zeros(INDEX_NBYTES, np.uint8))
        store.commit(holder, [(KEYS[3], place)])
    store.drop(KEYS[3], second)  # committed second, and private to its holder
    assert caplog.text.count("it read wrongly") == 1
    assert not any(map(store._failed, range(SLOTS))) and store.stats().bad_slots == 0
    store.release("v")
    store.release("w")
    store.check_integrity()


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Slots with a bit that does not keep the value written to it."""
    slots: set[int] = set()
    copy, arenas = Arena._copy, list[Arena]()
    init = Arena.__init__

    def remember(arena: Arena, *given: object, **named: object) -> None:
        init(arena, *given, **named)  # type: ignore[arg-type]
        arenas.append(arena)

    def copy_but_one_bit(target: npt.NDArray[np.uint8], source: npt.NDArray[np.uint8]) -> None:
        copy(target, source)
        addresses = {arena.chunks[slot].data_ptr() for arena in arenas for slot in slots}
        if target.ctypes.data in addresses:
            target[7] = source[7] ^ 1

    monkeypatch.setattr(Arena, "__init__", remember)
    monkeypatch.setattr(Arena, "_copy", staticmethod(copy_but_one_bit))
    yield slots
    arenas.clear()


def test_what_a_tier_takes_in_goes_to_another_slot(tmp_path: Path, stuck: set[int]) -> None:
    store = ArenaStore(small_arena(tmp_path))
    put(store, "w", KEYS[0])
    batch = read(store, KEYS[:1])
    [ref] = store.find(KEYS[:1])
    assert ref is not None
    store.release("w")
    store.drop(KEYS[0], ref)
    stuck.add(store._free[-1])
    assert store_batch(store, batch) == KEYS[:1]
    assert (read(store, KEYS[:1]).chunks == 1).all()
    store.check_integrity()
    for number in range(3):  # until it is found bad again
        others = [put(store, "o", bytes([60 + number, other]) * 8) for other in range(SLOTS - 2)]
        assert {one.slot for one in others}.isdisjoint(stuck)
        renamed = type(batch)((bytes([90 + number]) * 16,), batch.chunks, batch.index, batch.checksums)
        store_batch(store, renamed)
        store.release("o")
    store.check_integrity()
    assert store.stats().bad_slots <= 1


def test_a_slot_that_does_not_keep_a_snapshot_is_found_bad(tmp_path: Path, stuck: set[int]) -> None:
    """The snapshots with a piece in this slot are not stored; after two failures the slot is retired."""
    store, states = ArenaStore(small_arena(tmp_path)), SnapshotStore(pieces=SLOTS, every_chunks=1)
    stuck.add(1)
    snapshot = torch.arange(SLOTS * LAYOUT.nbytes, dtype=torch.int32).to(torch.uint8)
    for number in range(2):
        states.store(store, "w", KEYS[number], snapshot)
        store.check_integrity()
        store.release("w")
        assert store._failed(1) == number + 1 and store.keys() == []
    assert store.stats().bad_slots == 1
    states = SnapshotStore(pieces=SLOTS - 1, every_chunks=1)
    states.store(store, "w", KEYS[2], snapshot[: (SLOTS - 1) * LAYOUT.nbytes])
    count, refs = states.find(store, "r", KEYS[2:3])
    assert count == 1 and states.load(store.arena, KEYS[2], refs) is not None


@pytest.mark.parametrize("cold_chunks", [70, 600])
def test_an_answer_loses_two_chunks_at_most_to_a_bad_slot(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cold_chunks: int
) -> None:
    """The slot's memory loses its bytes every time. A nearly full arena has to use the slot a second time."""
    bad: set[int] = set()
    commit = ArenaStore.commit

    def commit_and_forget(
        store: ArenaStore, holder: str, refs: list[tuple[ChunkKey, SlotRef]], *, copied: bool = False
    ) -> None:
        commit(store, holder, refs, copied=copied)
        for _, ref in refs:
            if ref.slot in bad:
                store.arena.chunks[ref.slot, 100] ^= 32

    monkeypatch.setattr(ArenaStore, "commit", commit_and_forget)
    layout = expected_layout(load_config(tiny_model), chunk_tokens=16, dtype=torch.float32)
    with LLM(
        str(tiny_model),
        skip_tokenizer=True,
        keep_ratio=0.2,
        min_resident_tokens=0,
        chunk_tokens=16,
        dtype="float32",
        hot_bytes=24 * layout.nbytes,
        cold_bytes=cold_chunks * (layout.nbytes + 4096) + (2 << 20),
        window_steps=16,
        threads=1,
        arena_dir=tmp_path,
    ) as llm:
        bad.add(llm.memory._free[-20])
        prompt = torch.randint(3, 256, (700,), generator=torch.Generator().manual_seed(7)).tolist()
        sampling = SamplingParams(max_tokens=400, ignore_eos=True)
        llm.engine.add_request(GenerateRequest("a", tuple(prompt), sampling, CacheOptions("random")))
        tokens, reason = 0, None
        for _ in range(3000):
            for event in llm.engine.step():
                tokens += len(event.token_ids)
                reason = event.finish_reason or reason
            if reason is not None:
                break
        assert (tokens, reason) == (400, "length")
        lost = llm.engine.stats().counters.lost_chunks
        assert 1 <= lost <= 2 and llm.memory.stats().dropped_chunks == lost
        assert llm.memory.stats().bad_slots == (lost == 2)
        llm.engine.check_integrity()
        llm.memory.check_integrity()
