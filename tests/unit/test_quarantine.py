"""Slots taken back from a worker that may still write to them: they are reused only when it has finished."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from forecache.workers.errors import ChunkLostError, OverloadedError
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.headers import FIRST_WRITER, OWNER
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.arena.writers import OpenWrites
from forecache.workers.memory.format.layout import attention_layout
from forecache.workers.memory.format.slots import SlotRef
from forecache.workers.memory.hot.copies import CopyItem, CpuCopies
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.memory.tier.transfer import read, store_batch

LAYOUT = attention_layout("m", layers=1, kv_heads=1, head_dim=8, chunk_tokens=16, dtype=torch.float32)
INDEX_NBYTES = 64
SLOTS = 4
KEYS = [bytes([number]) * 16 for number in range(1, 10)]

WRITER = """
import sys
from forecache.workers.memory.arena.arena import Arena
arena = Arena.attach(sys.argv[1])
print(arena.writer, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    return Arena.create(
        tmp_path,
        "quarantine",
        layout=LAYOUT,
        index_nbytes=INDEX_NBYTES,
        index_fingerprint="index",
        capacity_bytes=(2 << 20) + SLOTS * LAYOUT.nbytes,
    )


class Worker:
    """A process that maps the arena, and reports its writes as `RemoteMemory` does."""

    def __init__(self, arena: Arena) -> None:
        self.arena = Arena.attach(arena.path)
        self.writes = OpenWrites(self.arena)

    def reserve_slots(self, store: ArenaStore, holder: str, keys: list[bytes]) -> list[SlotRef]:
        number, news = self.writes.begin(), self.writes.news()
        store.apply_report(news)
        places = store.reserve_slots(holder, keys, writer=news.writer, begun=news.begun)
        refs = [place.ref for place in places]
        self.writes.answered(number, holder, refs)
        return refs

    def write(self, ref: SlotRef, key: bytes) -> None:
        self.arena.put(ref, key, np.full(LAYOUT.nbytes, key[0], np.uint8), np.full(INDEX_NBYTES, key[0], np.uint8))


def restarted(store: ArenaStore) -> ArenaStore:
    """The tier's process died, and another one adopts its file."""
    store.arena.close()
    return ArenaStore(Arena.adopt(store.arena.path))


def waiting(store: ArenaStore) -> int:
    store.check_integrity()
    return store.stats().quarantined_slots


@pytest.mark.parametrize("is_restarted", [False, True])
@pytest.mark.parametrize("is_numbered", [False, True])
def test_a_late_copy_never_reaches_the_slot_of_another(arena: Arena, is_restarted: bool, is_numbered: bool) -> None:
    """The first writer's slot is taken back, and its memcpy ends at the worst moment, while the second writer copies.

    It is taken back because the tier died, or because the writer counts as a dead worker.
    """
    store, first, second = ArenaStore(arena), Worker(arena), Worker(arena)
    pools = [HotPool(LAYOUT, 1, torch.device("cpu")) for _ in range(3)]
    pools[0].memory[:], pools[1].memory[:] = 0x11, 0x22
    if is_numbered:
        [late] = first.reserve_slots(store, "w1/a", [KEYS[0]])
    else:
        late = store.reserve_slots("w1/a", [KEYS[0]])[0].ref
    if is_restarted:
        store = restarted(store)
    else:
        store.release_prefix("w1/")
    [ref] = second.reserve_slots(store, "w2/b", [KEYS[1]])
    assert ref.slot != late.slot and waiting(store) == 1

    def record(_: int) -> torch.Tensor:
        first.arena.chunks[late.slot].copy_(pools[0].memory[0])
        return torch.zeros(INDEX_NBYTES, dtype=torch.uint8)

    copies = CpuCopies(pools[1], LAYOUT, second.arena, record)
    assert copies.store([CopyItem(KEYS[1], ref, 0)], []).lost == ()
    store.commit("w2/b", [(KEYS[1], ref)])
    store.release("w2/b")
    [found] = store.hold("reader", [KEYS[1]])
    assert found is not None
    assert CpuCopies(pools[2], LAYOUT, first.arena, None).recall([CopyItem(KEYS[1], found, 0)], []).lost == ()
    assert (pools[2].memory == 0x22).all() and (read(store, [KEYS[1]]).chunks == 0x22).all()


def test_the_end_of_a_process_frees_what_it_wrote(arena: Arena) -> None:
    """The process may end in any way; here it is killed."""
    store = ArenaStore(arena)
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(arena.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        writer = int(process.stdout.readline())
        assert arena.writers() == {writer} and writer >= FIRST_WRITER
        store.reserve_slots("w/a", KEYS[:2], writer=writer, begun=1)
        store.release_prefix("w/")
        assert waiting(store) == 2
        store = restarted(store)
        assert waiting(store) == 2
        with pytest.raises(OverloadedError, match="2 are in quarantine until a worker ends"):
            store.reserve_slots("x", KEYS[:3], writer=OWNER)
        process.send_signal(signal.SIGKILL)
    assert store.arena.writers() == set() and waiting(store) == 0
    assert len(store.reserve_slots("x", KEYS[:SLOTS], writer=OWNER)) == SLOTS


def test_writers_are_told_apart_and_live_as_long_as_their_mappings(arena: Arena) -> None:
    workers = [Arena.attach(arena.path) for _ in range(5)]
    numbers = {worker.writer for worker in workers}
    assert arena.writers() == numbers and len(numbers) == 5
    row = workers[0].chunks[0]
    kept = workers[0].writer
    del workers
    assert arena.writers() == {kept}, "a tensor over the mapping can be written"
    assert arena.living({kept, kept + 1, OWNER}) == {kept, OWNER}
    del row
    assert arena.writers() == set()


@pytest.mark.parametrize("how", ["commit", "release", "drop", "news"])
def test_a_writer_that_lives_says_when_it_has_ended(arena: Arena, how: str) -> None:
    store, worker = ArenaStore(arena), Worker(arena)
    [ref] = worker.reserve_slots(store, "w/a", [KEYS[0]])
    store.release_prefix("w/")
    store.apply_report(worker.writes.news())
    assert waiting(store) == 1, "it was told of before it was over"
    worker.write(ref, KEYS[0])
    if how == "commit":
        with pytest.raises(ChunkLostError, match="not reserved by w/a any more"):
            store.commit("w/a", [(KEYS[0], ref)])
    elif how == "release":
        store.release("w/a")
    elif how == "drop":
        store.drop(KEYS[0], ref)
    else:
        worker.writes.ended([ref])
        store.apply_report(worker.writes.news())
    assert waiting(store) == 0 and store.keys() == []
    assert store.stats().used_slots == 0


def test_news_from_before_an_answer_came_free_nothing(arena: Arena) -> None:
    """The tier has reserved a slot, and the worker reports its writes before the answer arrives."""
    store, worker = ArenaStore(arena), Worker(arena)
    number, news = worker.writes.begin(), worker.writes.news()
    [place] = store.reserve_slots("w/a", [KEYS[0]], writer=news.writer, begun=news.begun)
    store.release_prefix("w/")
    store.apply_report(worker.writes.news())
    assert waiting(store) == 1
    worker.writes.answered(number, "w/a", [place.ref])
    late_news = worker.writes.news()
    worker.writes.released("w/a")
    store.apply_report(worker.writes.news())
    assert waiting(store) == 0
    worker.reserve_slots(store, "w/b", [KEYS[1]])
    store.release_prefix("w/")
    store.apply_report(late_news)
    assert waiting(store) == 1, "news that were overtaken free nothing"


def test_after_a_restart_writers_say_what_they_still_write(arena: Arena) -> None:
    store, worker, other = ArenaStore(arena), Worker(arena), Worker(arena)
    sealed, unsealed = worker.reserve_slots(store, "w/a", KEYS[:2])
    store.reserve_slots("transfer/x", [KEYS[2]], writer=OWNER)
    worker.write(sealed, KEYS[0])
    news_of_the_former_life = worker.writes.news()
    store = restarted(store)
    assert store.keys() == [KEYS[0]], "who seals has written"
    assert waiting(store) == 1, "slots written by the tier itself, and unwritten ones, are free"
    worker.writes.ended([unsealed])
    store.apply_report(news_of_the_former_life)
    store.apply_report(other.writes.news())
    assert waiting(store) == 1
    [ref] = worker.reserve_slots(store, "w/b", [KEYS[3]])  # tells that the one before has ended
    assert ref.slot != unsealed.slot and waiting(store) == 1
    worker.writes.ended([ref])
    store.apply_report(worker.writes.news())
    assert waiting(store) == 1, "of the reservation a place is still open"
    worker.writes.ended([sealed])
    store.apply_report(worker.writes.news())
    assert waiting(store) == 0


def test_a_release_in_another_thread_does_not_free_what_the_tier_writes(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of another node arrive for a sequence that ends meanwhile."""
    store, reader = ArenaStore(arena), Worker(arena)
    for key in KEYS[:2]:
        [ref] = reader.reserve_slots(store, "w/a", [key])
        reader.write(ref, key)
        store.commit("w/a", [(key, ref)])
    batch = read(store, KEYS[:2])
    store.release("w/a")
    for key, ref in zip(KEYS[:2], store.find(KEYS[:2]), strict=True):
        assert ref is not None
        store.drop(key, ref)
    copy = Arena._copy

    def released_meanwhile(target: npt.NDArray[np.uint8], source: npt.NDArray[np.uint8]) -> None:
        store.release("w/host")
        store.release_prefix("w/")
        taken = {place.ref.slot for place in store.reserve_slots("w2", [KEYS[5]], writer=OWNER)}
        assert all(store.arena.chunks[slot].data_ptr() != target.ctypes.data for slot in taken)
        store.release("w2")
        copy(target, source)

    monkeypatch.setattr(Arena, "_copy", staticmethod(released_meanwhile))
    assert store_batch(store, batch, "w/host") == KEYS[:2]
    monkeypatch.undo()
    assert store.holders() == ["w/host"]
    store.release("w/host")
    assert read(store, KEYS[:2]).keys == tuple(KEYS[:2])
    store.check_integrity()
