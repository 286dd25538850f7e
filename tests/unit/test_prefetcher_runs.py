"""The copy thread under random operations, against a simple model, with equal and with fp8 cold chunks."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forecache.kernels.chunks import reference
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.layout import ChunkLayout, attention_layout, cold_layout
from forecache.workers.memory.format.slots import SlotRef
from forecache.workers.memory.hot.completions import Completion, PrefixHeld, Recalled, RecallItem, Released, WrittenBack
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.memory.hot.prefetcher import Prefetcher

HOT = attention_layout("m", layers=1, kv_heads=2, head_dim=8, chunk_tokens=16, dtype=torch.float32)
PLACES, CHUNKS, SLOTS = 6, 8, 12
HOLDERS = st.sampled_from(["a", "b", "c"])


def key_of(number: int) -> ChunkKey:
    return number.to_bytes(16, "little")


def through_cold(hot: torch.Tensor, cold: ChunkLayout) -> torch.Tensor:
    """The chunks [slots, nbytes] of the pool after a round trip through cold memory."""
    if cold == HOT:
        return hot.clone()
    slots, back = torch.arange(len(hot)), torch.zeros_like(hot)
    rows = torch.zeros(len(hot), cold.nbytes, dtype=torch.uint8)
    kv, scale = cold.view(rows, "kv"), cold.view(rows, "scale")
    reference.quantize_chunks(HOT.view(hot, "kv"), slots, kv, scale, slots)
    reference.dequantize_chunks(kv, scale, slots, HOT.view(back, "kv"), slots)
    return back


class PrefetcherMachine(RuleBasedStateMachine):
    """Holders write chunks back, find prefixes, recall and release; chunks get damaged. No wrong bytes are recalled."""

    cold_dtype: Literal["auto", "fp8"] = "auto"

    @initialize()
    def open(self) -> None:
        self.directory = TemporaryDirectory(prefix="prefetcher-test-", dir="/dev/shm")
        cold = cold_layout(HOT, self.cold_dtype)
        self.arena = Arena.create(
            Path(self.directory.name),
            "runs",
            layout=cold,
            index_nbytes=8,
            index_fingerprint="index",
            capacity_bytes=(2 << 20) + PLACES * cold.nbytes,
        )
        assert self.arena.slots == PLACES
        self.store = ArenaStore(self.arena)
        self.pool = HotPool(HOT, SLOTS, torch.device("cpu"))
        # chunk n lies in slot n
        kv = self.pool.view("kv")
        kv.copy_(torch.randn(kv.shape, generator=torch.Generator().manual_seed(3)))
        self.expected = through_cold(self.pool.memory, cold)
        self.prefetcher = Prefetcher(self.pool, self.store, lambda slot: self.pool.memory[slot, :8], cold)
        self.places: dict[tuple[str, int], SlotRef] = {}
        self.flipped: dict[SlotRef, set[int]] = {}  # bytes that are wrong

    def teardown(self) -> None:
        self.prefetcher.close()
        self.arena.close()
        self.directory.cleanup()

    def done(self) -> list[Completion]:
        for _ in range(2):  # what was refused together is tried again, chunk by chunk, behind the first one
            self.prefetcher.flush()
        return [done for done in self.prefetcher.drain() if not isinstance(done, Released)]

    @rule(holder=HOLDERS, numbers=st.lists(st.integers(0, CHUNKS - 1), min_size=1, max_size=5, unique=True))
    def write_back(self, holder: str, numbers: list[int]) -> None:
        for number in numbers:
            self.prefetcher.write_back(holder, key_of(number), number)
        news = self.done()
        assert [done.slot for done in news if isinstance(done, WrittenBack)] == numbers
        for done in news:
            assert isinstance(done, WrittenBack)
            if done.ref is None:
                assert "no room" in done.failure
                assert self.store.stats().held_slots == PLACES
            else:
                self.places[holder, done.slot] = done.ref
                assert done.key in set(self.store.keys())

    @rule(holder=HOLDERS, last=st.integers(1, CHUNKS))
    def find(self, holder: str, last: int) -> None:
        keys = [key_of(number) for number in range(last)]
        self.prefetcher.find_prefix(holder, keys)
        [held] = self.done()
        assert isinstance(held, PrefixHeld) and not any(map(self.is_damaged, held.refs))
        assert self.arena.sealed(held.refs, keys[: len(held.refs)]).all()
        for number, ref in enumerate(held.refs):
            self.places[holder, number] = ref

    @precondition(lambda self: self.places)
    @rule(data=st.data())
    def recall(self, data: st.DataObject) -> None:
        known = st.sampled_from(sorted(self.places, key=repr))
        chosen = data.draw(st.lists(known, min_size=1, max_size=4, unique=True))
        items = [
            RecallItem(key_of(number), self.places[holder, number], CHUNKS + i)
            for i, (holder, number) in enumerate(chosen)
        ]
        # the first reader that found the damage dropped the chunk; its other holders keep the slot
        wrong = [item for item in items if self.is_damaged(item.ref) or not self.arena.is_sealed(item.ref, item.key)]
        self.prefetcher.recall(items)
        [recalled] = self.done()
        assert isinstance(recalled, Recalled)
        assert recalled.lost == tuple(wrong)
        for item, (_, number) in zip(items, chosen, strict=True):
            if item not in recalled.lost:
                assert torch.equal(self.pool.memory[item.slot], self.expected[number])

    @precondition(lambda self: self.places)
    @rule(data=st.data(), byte=st.integers(0, 200))
    def damage(self, data: st.DataObject, byte: int) -> None:
        ref = self.places[data.draw(st.sampled_from(sorted(self.places, key=repr)))]
        self.arena.chunks[ref.slot, byte] ^= 1
        self.flipped.setdefault(ref, set()).symmetric_difference_update({byte})

    def is_damaged(self, ref: SlotRef) -> bool:
        return bool(self.flipped.get(ref))

    @rule(holder=HOLDERS)
    def release(self, holder: str) -> None:
        self.prefetcher.release_holder(holder)
        assert self.done() == []
        self.places = {place: ref for place, ref in self.places.items() if place[0] != holder}

    @invariant()
    def sound(self) -> None:
        self.store.check_integrity()
        # a prefix that ends at damage leaves more held than its holder was told of
        assert self.store.stats().held_slots >= len({ref.slot for ref in self.places.values()})
        for (_, number), ref in self.places.items():
            assert self.arena.generation_of(ref.slot) == ref.generation, f"chunk {number} was given away"


class Fp8PrefetcherMachine(PrefetcherMachine):
    cold_dtype = "fp8"


MACHINE_SETTINGS = settings(max_examples=100, stateful_step_count=25, deadline=None)
TestPrefetcher = PrefetcherMachine.TestCase
TestPrefetcher.settings = MACHINE_SETTINGS
TestFp8Prefetcher = Fp8PrefetcherMachine.TestCase
TestFp8Prefetcher.settings = MACHINE_SETTINGS
