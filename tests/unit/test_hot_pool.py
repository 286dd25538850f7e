"""The hot pool against a simple model of it, under random operations."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from forecache.workers.memory.format.layout import attention_layout
from forecache.workers.memory.hot.pool import HotPool

LAYOUT = attention_layout("m", layers=1, kv_heads=1, head_dim=4, chunk_tokens=4, dtype=torch.float32)


class PoolMachine(RuleBasedStateMachine):
    """Holders take, complete, clean and drop slots. A referenced slot must never change."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = HotPool(LAYOUT, slots=6, device=torch.device("cpu"))
        self.open: list[int] = []
        self.held: list[tuple[int, bytes]] = []
        self.dirty: list[tuple[int, bytes]] = []
        self.stamp = 0
        self.discarded: set[int] = set()

    def write(self, slot: int) -> None:
        self.stamp += 1
        self.pool.memory[slot] = self.stamp % 256

    @rule()
    def allocate(self) -> None:
        in_use = {*self.open, *(slot for slot, _ in [*self.held, *self.dirty])}
        slot = self.pool.allocate()
        if slot is None:
            assert len(in_use) == self.pool.num_slots
            return
        assert slot not in in_use
        self.write(slot)
        self.open.append(slot)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), name=st.integers(0, 4), dirty=st.booleans())
    def complete(self, data: st.DataObject, name: int, dirty: bool) -> None:
        slot = data.draw(st.sampled_from(self.open))
        self.open.remove(slot)
        key = bytes([name]) * 16
        self.pool.complete(slot, key, dirty=dirty)
        assert self.pool.lookup(key) is not None
        self.held.append((slot, key))
        if dirty:
            self.dirty.append((slot, key))
            self.discarded.discard(slot)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(self.open))
        self.open.remove(slot)
        self.pool.release(slot)

    @rule(name=st.integers(0, 4))
    def acquire(self, name: int) -> None:
        key = bytes([name]) * 16
        slot = self.pool.lookup(key)
        if slot is not None:
            self.held.append((self.pool.acquire(slot), key))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.held))
        self.held.remove(entry)
        self.pool.release(entry[0])

    @precondition(lambda self: self.dirty)
    @rule(data=st.data())
    def clean(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.dirty))
        self.dirty.remove(entry)
        self.pool.mark_clean(entry[0])

    @rule(name=st.integers(0, 4))
    def write_back_again(self, name: int) -> None:
        slot = self.pool.lookup(bytes([name]) * 16)
        if slot is not None:
            self.pool.mark_dirty(slot)
            self.dirty.append((slot, bytes([name]) * 16))

    @invariant()
    def what_cold_memory_lacks_is_found(self) -> None:
        for slot, key in self.dirty:
            if slot not in self.discarded:
                assert self.pool.lookup(key) is not None

    @rule(name=st.integers(0, 4))
    def discard(self, name: int) -> None:
        key = bytes([name]) * 16
        self.pool.discard(key)
        self.discarded |= {slot for slot, its_key in self.dirty if its_key == key}
        assert self.pool.lookup(bytes([name]) * 16) is None

    @rule()
    def evict_all(self) -> None:
        self.pool.evict_all()
        assert self.pool.used == len({*self.open, *(slot for slot, _ in [*self.held, *self.dirty])})

    @invariant()
    def sound(self) -> None:
        self.pool.check_integrity()
        assert self.pool.referenced == len({*self.open, *(slot for slot, _ in self.held)})
        assert self.pool.dirty == len({slot for slot, _ in self.dirty})


TestHotPool = PoolMachine.TestCase
TestHotPool.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_least_recently_used_goes_first() -> None:
    pool = HotPool(LAYOUT, slots=2, device=torch.device("cpu"))
    for name in (b"a" * 16, b"b" * 16):
        slot = pool.allocate()
        assert slot is not None
        pool.complete(slot, name, dirty=False)
        pool.release(slot)
    a = pool.lookup(b"a" * 16)
    assert a is not None
    pool.release(pool.acquire(a))
    assert pool.allocate() is not None
    assert pool.lookup(b"a" * 16) == a
    assert pool.lookup(b"b" * 16) is None


def test_dirty_slots_are_never_evicted() -> None:
    pool = HotPool(LAYOUT, slots=1, device=torch.device("cpu"))
    slot = pool.allocate()
    assert slot is not None
    pool.complete(slot, b"k" * 16, dirty=True)
    pool.release(slot)
    assert pool.allocate() is None
    pool.mark_clean(slot)
    assert pool.allocate() == slot
