"""A thousand stored chunks with one flipped bit each: all are detected, and none is used."""

from pathlib import Path

import numpy as np
import pytest
import torch

from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.format.layout import attention_layout
from forecache.workers.memory.hot.completions import PrefixHeld, Recalled, RecallItem
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.memory.hot.prefetcher import Prefetcher
from forecache.workers.memory.tier.transfer import read, store_batch

CHUNKS = 1000
LAYOUT = attention_layout("m", layers=1, kv_heads=1, head_dim=8, chunk_tokens=16, dtype=torch.float32)
INDEX_NBYTES = 32
KEYS = [number.to_bytes(16, "little") for number in range(CHUNKS)]


@pytest.fixture
def store(tmp_path: Path) -> ArenaStore:
    """All chunks, of random bytes."""
    arena = Arena.create(
        tmp_path,
        "bits",
        layout=LAYOUT,
        index_nbytes=INDEX_NBYTES,
        index_fingerprint="index",
        capacity_bytes=(4 << 20) + CHUNKS * (LAYOUT.nbytes + INDEX_NBYTES + 64),
    )
    store = ArenaStore(arena)
    generator = torch.Generator().manual_seed(1)
    places = store.reserve_slots("writer", KEYS)
    for place in places:
        arena.chunks[place.ref.slot] = torch.randint(256, (LAYOUT.nbytes,), generator=generator, dtype=torch.uint8)
        arena.index[place.ref.slot] = torch.randint(256, (INDEX_NBYTES,), generator=generator, dtype=torch.uint8)
        arena.seal(place.ref, place.key, arena.digests(place.ref.slot))
    store.commit("writer", [(place.key, place.ref) for place in places])
    store.release("writer")
    return store


def flip_a_bit_of_each(store: ArenaStore) -> None:
    """Flip one bit per chunk, in its bytes or in its index record."""
    rng = np.random.default_rng(2)
    for ref in store.hold("flip", KEYS):
        assert ref is not None
        bit = int(rng.integers(8 * (LAYOUT.nbytes + INDEX_NBYTES)))
        bytes_of_slot, byte = store.arena.chunks[ref.slot], bit // 8
        if byte >= LAYOUT.nbytes:
            bytes_of_slot, byte = store.arena.index[ref.slot], byte - LAYOUT.nbytes
        bytes_of_slot[byte] ^= 1 << bit % 8
    store.release("flip")


def drained(prefetcher: Prefetcher, kind: type) -> list[PrefixHeld | Recalled]:
    prefetcher.flush()
    return [done for done in prefetcher.drain() if isinstance(done, kind)]


def test_sound_ones_are_served(store: ArenaStore) -> None:
    assert read(store, KEYS).keys == tuple(KEYS)


def test_none_is_recalled(store: ArenaStore) -> None:
    pool = HotPool(LAYOUT, CHUNKS, torch.device("cpu"))
    prefetcher = Prefetcher(pool, store, None)
    refs = store.hold("sequence", KEYS)
    flip_a_bit_of_each(store)
    items = []
    for key, ref in zip(KEYS, refs, strict=True):
        slot = pool.allocate()
        assert slot is not None and ref is not None
        items.append(RecallItem(key, ref, slot))
    prefetcher.recall(items)
    [recalled] = drained(prefetcher, Recalled)
    assert isinstance(recalled, Recalled) and set(recalled.lost) == set(items) and recalled.recalled_chunks == 0
    assert store.stats().dropped_chunks == CHUNKS and store.keys() == []
    prefetcher.close()
    store.release("sequence")
    store.check_integrity()


def test_none_is_found(store: ArenaStore) -> None:
    """Each damaged chunk is the first of a prefix."""
    prefetcher = Prefetcher(HotPool(LAYOUT, 1, torch.device("cpu")), store, None)
    flip_a_bit_of_each(store)
    for number, key in enumerate(KEYS):
        prefetcher.find_prefix(f"sequence {number}", [key])
    found = drained(prefetcher, PrefixHeld)
    assert [done.refs for done in found if isinstance(done, PrefixHeld)] == [()] * CHUNKS
    assert store.stats().dropped_chunks == CHUNKS
    prefetcher.close()
    store.check_integrity()


def test_none_is_sent_to_another_tier_and_none_is_taken_in(store: ArenaStore, tmp_path: Path) -> None:
    sound = read(store, KEYS)
    flip_a_bit_of_each(store)
    assert len(read(store, KEYS)) == 0
    assert store.stats().dropped_chunks == CHUNKS
    # on the way it happens too
    for row, (chunk, index) in enumerate(zip(sound.chunks, sound.index, strict=True)):
        (index if row % 7 == 0 else chunk)[row % INDEX_NBYTES] ^= 1 << row % 8
    assert store_batch(store, sound) == []
    assert store.keys() == []
    store.check_integrity()
