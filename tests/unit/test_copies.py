"""Copies between hot pool and arena, on the CPU and (marked gpu) on side streams: order, contents, damage."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import pytest
import torch

from forecache.kernels.chunks import reference
from forecache.workers.errors import ArenaError
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.format.layout import ChunkLayout, attention_layout, cold_layout
from forecache.workers.memory.format.slots import SlotRef
from forecache.workers.memory.hot import cuda_copies
from forecache.workers.memory.hot.completions import Recalled, WrittenBack
from forecache.workers.memory.hot.copies import BATCH_CHUNKS, Copies, CopyItem, CpuCopies, Mark
from forecache.workers.memory.hot.cuda_copies import CudaCopies
from forecache.workers.memory.hot.cuda_host import RegisteredMemory
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.memory.hot.prefetcher import Prefetcher

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
)
INDEX_NBYTES = 64
SLEEP_CYCLES = 200_000_000  # about 0.1 s, far longer than any copy here

ColdDtype = Literal["auto", "fp8"]


def layout_of(dtype: torch.dtype) -> ChunkLayout:
    return attention_layout("m", layers=2, kv_heads=2, head_dim=16, chunk_tokens=16, dtype=dtype)


@dataclass(frozen=True)
class Setup:
    """A pool, an arena of ``cold`` chunks, and the copies between them."""

    pool: HotPool
    arena: Arena
    cold: ChunkLayout
    copies: Copies

    @property
    def kv(self) -> torch.Tensor:
        return self.pool.view("kv")

    def item(self, slot: int, place: int) -> CopyItem:
        """A copy item of the chunk named after ``place``."""
        return CopyItem(key_of(place), SlotRef(place, self.arena.generation_of(place)), slot)

    def items(self, count: int, first_slot: int = 0) -> list[CopyItem]:
        return [self.item(first_slot + number, number) for number in range(count)]

    def store(self, items: list[CopyItem], after: Mark = None) -> None:
        """Store all items, in batches."""
        marks = [after if after is not None else self.copies.mark()]
        for start in range(0, len(items), BATCH_CHUNKS):
            assert self.copies.store(items[start : start + BATCH_CHUNKS], marks).lost == ()

    def lost(self, items: list[CopyItem]) -> list[int]:
        """The slots of the items that a recall reports as lost."""
        return [item.slot for item in self.copies.recall(items, [self.copies.mark()]).lost]


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "little")


def record_of(kv: torch.Tensor) -> Callable[[int], torch.Tensor]:
    """A test index record: the first bytes of its chunk."""

    def record(slot: int) -> torch.Tensor:
        return kv[slot].flatten()[: INDEX_NBYTES // kv.dtype.itemsize].view(torch.uint8)

    return record


@contextmanager
def open_copies(
    device: str, hot: ChunkLayout, cold_dtype: ColdDtype = "auto", *, slots: int = 24, places: int = 24
) -> Iterator[Setup]:
    """Open copies between a pool, whose ``slots`` hold random numbers, and ``places`` free arena slots."""
    cold = cold_layout(hot, cold_dtype)
    with ExitStack() as cleanup:
        # a GPU takes no page-locked memory of other file systems
        directory = cleanup.enter_context(TemporaryDirectory(prefix="copies-test-", dir="/dev/shm"))
        capacity_bytes = (2 << 20) + places * cold.nbytes + (places * (64 + INDEX_NBYTES) >> 21 << 21)
        arena = Arena.create(
            Path(directory),
            "copies",
            layout=cold,
            index_nbytes=INDEX_NBYTES,
            index_fingerprint="index",
            capacity_bytes=capacity_bytes,
        )
        cleanup.callback(arena.close)
        assert arena.slots >= places
        pool = HotPool(hot, slots, torch.device(device))
        pool.view("kv").copy_(torch.randn(pool.view("kv").shape, generator=torch.Generator().manual_seed(1)))
        if device == "cuda":
            cleanup.enter_context(RegisteredMemory(arena.chunks))
        make = CudaCopies if device == "cuda" else CpuCopies
        yield Setup(pool, arena, cold, make(pool, cold, arena, record_of(pool.view("kv"))))


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["auto", "fp8"])
def cold_dtype(request: pytest.FixtureRequest) -> ColdDtype:
    return "fp8" if request.param == "fp8" else "auto"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy two chunks at a time on a GPU, so that staging buffers are reused."""
    monkeypatch.setattr(cuda_copies, "PIECE_CHUNKS", 2)


def assert_same(after: torch.Tensor, before: torch.Tensor, cold_dtype: ColdDtype) -> None:
    """``after`` is ``before``, [..., tokens, head_dim], or as near as fp8 and a rounding to its dtype allow.

    float8_e4m3fn has 3 bits of mantissa, and below 2^-6 of its scale steps of 2^-9 (OCP OFP8, table 1).
    """
    if cold_dtype == "auto":
        assert torch.equal(after, before)
        return
    scale = before.float().abs().amax((-1, -2), keepdim=True) / 448
    bound = (before.float().abs() * 2**-4).maximum(scale * 2**-10) * 1.01
    assert ((after.float() - before.float()).abs() <= bound).all()
    assert not torch.equal(after, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_stored_comes_back(device: str, dtype: torch.dtype, cold_dtype: ColdDtype, small_pieces: None) -> None:
    with open_copies(device, layout_of(dtype), cold_dtype) as setup:
        before = setup.kv[:11].clone()
        setup.store(setup.items(11))
        setup.pool.memory.fill_(255)
        assert setup.lost(setup.items(11, first_slot=12)) == []
        assert_same(setup.kv[12:23], before, cold_dtype)
        untouched = torch.cat([setup.pool.memory[:12], setup.pool.memory[23:]])
        assert (untouched == 255).all()


def test_cold_bytes_are_those_of_the_reference(device: str, small_pieces: None) -> None:
    """The padding after the scales must be zero, since it is part of the checksum."""
    with open_copies(device, layout_of(torch.bfloat16), "fp8") as setup:
        setup.store(setup.items(7))
        expected = torch.zeros(7, setup.cold.nbytes, dtype=torch.uint8)
        kv, scale = (setup.cold.view(expected, name) for name in ("kv", "scale"))
        reference.quantize_chunks(setup.kv.cpu(), torch.arange(7), kv, scale, torch.arange(7))
        assert torch.equal(setup.arena.chunks[:7], expected)


def test_a_pool_that_is_fp8_itself_is_stored_as_it_is(device: str) -> None:
    hot = layout_of(torch.float8_e4m3fn)
    with open_copies(device, hot, "fp8") as setup:
        setup.pool.memory.copy_(torch.randint(256, setup.pool.memory.shape, dtype=torch.uint8))
        setup.store(setup.items(3))
        assert torch.equal(setup.arena.chunks[:3], setup.pool.memory[:3].cpu())


def test_sealed_with_the_index_record_and_both_checksums(device: str, cold_dtype: ColdDtype) -> None:
    with open_copies(device, layout_of(torch.float32), cold_dtype) as setup:
        items = setup.items(5)
        setup.store(items)
        assert all(setup.arena.check(item.ref, item.key) for item in items)
        records = [record_of(setup.kv)(item.slot).cpu() for item in items]
        assert torch.equal(setup.arena.index[:5], torch.stack(records))
        sums = setup.arena.headers()["device_checksum"][[item.ref.slot for item in items]]
        if device == "cpu":
            assert sums.tolist() == [0] * 5
        else:
            expected = reference.slot_checksums(setup.arena.chunks, torch.arange(5))
            assert sums.tolist() == expected.numpy().view(np.uint64).tolist()


def test_every_flipped_bit_is_found(device: str, cold_dtype: ColdDtype) -> None:
    count = 1000
    with open_copies(device, layout_of(torch.bfloat16), cold_dtype, slots=count + 2, places=count + 2) as setup:
        items = setup.items(count + 2)
        setup.store(items)
        assert setup.lost(items) == []
        bits = torch.randint(setup.cold.nbytes * 8, (count,), generator=torch.Generator().manual_seed(2))
        for place, bit in enumerate(bits.tolist(), start=1):
            setup.arena.chunks[place, bit // 8] ^= 1 << bit % 8
        assert setup.lost(items) == list(range(1, count + 1))


def test_what_was_given_away_is_lost(device: str, cold_dtype: ColdDtype) -> None:
    with open_copies(device, layout_of(torch.float32), cold_dtype) as setup:
        items = setup.items(6)
        setup.store(items)
        setup.arena.renew(2)
        setup.arena.seal(SlotRef(3, items[3].ref.generation), key_of(77), setup.arena.digests(3))
        setup.arena.clear(4)
        assert setup.lost(items) == [2, 3, 4]


def test_a_place_given_away_is_not_sealed(device: str, cold_dtype: ColdDtype) -> None:
    with open_copies(device, layout_of(torch.float32), cold_dtype) as setup:
        items = setup.items(4)
        setup.arena.renew(1)
        assert setup.copies.store(items, [setup.copies.mark()]).lost == (items[1],)
        sealed = setup.arena.sealed([item.ref for item in items], [item.key for item in items])
        assert sealed.tolist() == [True, False, True, True]
        assert not setup.arena.is_sealed(setup.item(1, 1).ref, key_of(1))


def test_sound_prefix_reads_bytes_on_a_cpu_and_headers_on_a_gpu(device: str) -> None:
    with open_copies(device, layout_of(torch.float32)) as setup:
        items = setup.items(6)
        setup.store(items)
        assert setup.copies.store([], []).lost == setup.copies.recall([], []).lost == ()
        keys, refs = [item.key for item in items], [item.ref for item in items]
        assert setup.copies.sound_prefix(keys, []) == 0
        assert setup.copies.sound_prefix([*keys, key_of(9)], refs) == 6
        setup.arena.chunks[3, 5] ^= 1
        assert setup.copies.sound_prefix(keys, refs) == (3 if device == "cpu" else 6)
        setup.arena.clear(1)
        assert setup.copies.sound_prefix(keys, refs) == 1


def test_an_arena_of_another_layout_is_refused(device: str) -> None:
    hot = layout_of(torch.float32)
    with open_copies(device, hot) as setup:
        make = CudaCopies if device == "cuda" else CpuCopies
        with pytest.raises(ArenaError, match="--cold-dtype"):
            make(setup.pool, cold_layout(hot, "fp8"), setup.arena, None)


def test_a_foreign_write_during_the_copy_is_found(
    device: str, cold_dtype: ColdDtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that lost the slot writes to it again, between the copy and the seal."""
    with open_copies(device, layout_of(torch.float32), cold_dtype) as setup:
        items = setup.items(4)
        foreign = Arena.attach(setup.arena.path)
        digests = Arena.digests

        def after_a_foreign_write(self: Arena, slot: int) -> tuple[int, int]:
            if slot == 1:
                foreign.chunks[1, 7] += 1
            if slot == 2:
                foreign.index[2, 7] += 1
            return digests(self, slot)

        monkeypatch.setattr(Arena, "digests", after_a_foreign_write)
        assert setup.copies.store(items, [setup.copies.mark()]).lost == (items[1], items[2])
        monkeypatch.undo()
        assert [setup.arena.check(item.ref, item.key) for item in items] == [True, False, False, True]


def test_a_slot_that_changes_while_it_is_recalled_is_lost(
    device: str, cold_dtype: ColdDtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slot gets another owner and other bytes before the copy, but after any check that precedes the copy."""
    with open_copies(device, layout_of(torch.float32), cold_dtype) as setup:
        items = setup.items(1)
        setup.store(items)
        sealed = Arena.check if device == "cpu" else Arena.sealed_device_checksums

        def then_given_away(self: Arena, *asked: object) -> object:
            found = sealed(self, *asked)  # type: ignore[arg-type]
            setup.arena.renew(0)
            setup.arena.chunks[0] = 1
            return found

        monkeypatch.setattr(Arena, sealed.__name__, then_given_away)
        before = setup.kv[0].clone()
        if setup.lost([CopyItem(items[0].key, items[0].ref, 12)]) != [12]:
            assert_same(setup.kv[12], before, cold_dtype)  # its bytes came before the slot was given away


def test_the_seconds_of_a_copy_are_part_of_those_that_it_took(device: str, cold_dtype: ColdDtype) -> None:
    with open_copies(device, layout_of(torch.float32), cold_dtype) as setup:
        items = setup.items(4)
        for copy in (setup.copies.store, setup.copies.recall):
            start = time.perf_counter()
            copied = copy(items, [setup.copies.mark()])
            assert copied.lost == () and 0 < copied.duration_s <= time.perf_counter() - start


def test_nothing_to_copy_is_nothing_lost(device: str, cold_dtype: ColdDtype) -> None:
    with open_copies(device, layout_of(torch.float32), cold_dtype) as setup:
        before = setup.pool.memory.clone()
        assert setup.copies.store([], []).lost == setup.copies.recall([], []).lost == ()
        assert torch.equal(setup.pool.memory, before)
        assert setup.arena.headers()["seal"].tolist() == [0] * setup.arena.slots


def test_without_an_index_the_records_are_zero(device: str) -> None:
    with open_copies(device, layout_of(torch.float32)) as setup:
        make = CudaCopies if device == "cuda" else CpuCopies
        copies = make(setup.pool, setup.cold, setup.arena, None)
        setup.arena.index.fill_(255)
        items = setup.items(3)
        assert copies.store(items, [copies.mark()]).lost == ()
        assert (setup.arena.index[:3] == 0).all() and (setup.arena.index[3:] == 255).all()
        assert copies.recall(items, [copies.mark()]).lost == ()


@pytest.mark.parametrize("device", [CUDA])
class TestStreams:
    def test_chunks_of_a_writer_without_a_gpu_are_verified_by_xxh3(self, device: str, cold_dtype: ColdDtype) -> None:
        with open_copies(device, layout_of(torch.float32), cold_dtype) as setup:
            items = setup.items(6)
            setup.store(items)
            for item in items[::2]:
                setup.arena.seal(item.ref, item.key, setup.arena.digests(item.ref.slot))
            assert setup.lost(items) == []
            setup.arena.chunks[2:4, 100] ^= 16
            assert setup.lost(items) == [2, 3]

    def test_a_chunk_is_stored_as_the_step_before_it_left_it(self, device: str, cold_dtype: ColdDtype) -> None:
        with open_copies(device, layout_of(torch.float32), cold_dtype) as setup:
            late = torch.randn_like(setup.kv[:4])
            setup.kv[:4] = 7
            torch.cuda._sleep(SLEEP_CYCLES)
            setup.kv[:4] = late
            mark = setup.copies.mark()
            assert isinstance(mark, torch.cuda.Event)
            setup.store(setup.items(4), mark)
            assert mark.query()
            records = [record_of(late)(slot).cpu() for slot in range(4)]
            assert torch.equal(setup.arena.index[:4], torch.stack(records))
            setup.pool.memory.zero_()
            assert setup.lost(setup.items(4)) == []
            assert_same(setup.kv[:4], late, cold_dtype)

    def test_a_slot_is_written_when_the_step_before_has_read_it(self, device: str, cold_dtype: ColdDtype) -> None:
        with open_copies(device, layout_of(torch.float32), cold_dtype) as setup:
            setup.store(setup.items(4))
            old = setup.kv[4:8].clone()
            torch.cuda.synchronize()
            torch.cuda._sleep(SLEEP_CYCLES)
            read = setup.kv[4:8].clone()
            mark = setup.copies.mark()
            items = setup.items(4, first_slot=4)
            assert setup.copies.recall(items, [mark]).lost == ()
            assert torch.equal(read, old)
            assert_same(setup.kv[4:8], setup.kv[:4], cold_dtype)

    def test_copies_wait_for_nothing_that_was_asked_for_later(self, device: str, cold_dtype: ColdDtype) -> None:
        """The engine's stream still runs long after the mark, and the copies end before it does."""
        with open_copies(device, layout_of(torch.float32), cold_dtype) as setup:
            items = setup.items(4)
            setup.store(items)  # whatever is made at the first call is there
            assert setup.lost(items) == []
            mark = setup.copies.mark()
            torch.cuda._sleep(20 * SLEEP_CYCLES)
            later = setup.copies.mark()
            assert isinstance(later, torch.cuda.Event)
            assert setup.copies.store(items, [mark]).lost == ()
            assert setup.copies.recall(items, [mark]).lost == ()
            assert not later.query()
            torch.cuda.synchronize()

    def test_the_copy_thread_comes_after_the_steps_before_a_job(self, device: str, cold_dtype: ColdDtype) -> None:
        """The engine's order: it launches a step, queues its write-backs, and the next step reads the slots."""
        with open_copies(device, layout_of(torch.float32), cold_dtype) as setup:
            prefetcher = Prefetcher(setup.pool, ArenaStore(setup.arena), record_of(setup.kv), setup.cold)
            late = torch.randn_like(setup.kv[:20])
            setup.kv[:20] = 7
            torch.cuda._sleep(SLEEP_CYCLES)
            setup.kv[:20] = late
            for slot in range(20):
                prefetcher.write_back("a", key_of(slot), slot)
            prefetcher.flush()
            written = [done for done in prefetcher.drain() if isinstance(done, WrittenBack)]
            refs = [done.ref for done in written if done.ref is not None]
            assert len(refs) == 20 and all(done.duration_s > 0 for done in written)
            torch.cuda._sleep(SLEEP_CYCLES)
            read = setup.kv[:20].clone()
            prefetcher.recall([CopyItem(key_of(19 - slot), refs[19 - slot], slot) for slot in range(20)])
            prefetcher.flush()
            [recalled] = prefetcher.drain()
            assert isinstance(recalled, Recalled) and recalled.lost == () and recalled.recalled_chunks == 20
            assert torch.equal(read, late)
            assert_same(setup.kv[:20], late.flip(0), cold_dtype)
            prefetcher.close()
