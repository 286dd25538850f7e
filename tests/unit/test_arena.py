import gc
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forecache.workers.errors import ArenaError, ChunkLostError
from forecache.workers.memory.arena.arena import PAGE_BYTES, Arena, remove_abandoned
from forecache.workers.memory.arena.headers import HEADER, OPEN
from forecache.workers.memory.format.layout import ChunkLayout, attention_layout
from forecache.workers.memory.format.slots import SlotRef

LAYOUT = attention_layout("m", layers=2, kv_heads=1, head_dim=8, chunk_tokens=16, dtype=torch.float32)
INDEX_NBYTES = 100
CAPACITY_BYTES = (2 << 20) + 4 * LAYOUT.nbytes
KEY = bytes(range(16))

OWNER = """
import sys, torch
from pathlib import Path
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.format.layout import attention_layout
from forecache.workers.memory.format.slots import SlotRef
layout = attention_layout("m", layers=2, kv_heads=1, head_dim=8, chunk_tokens=16, dtype=torch.float32)
arena = Arena.create(
    Path(sys.argv[1]), "owned", layout=layout, index_nbytes=100, index_fingerprint="index",
    capacity_bytes=(2 << 20) + 4 * layout.nbytes,
)
ref = SlotRef(1, arena.renew(1))
arena.chunks[1] = 7
arena.index[1] = 9
arena.seal(ref, bytes(range(16)), arena.digests(ref.slot))
print("ready", flush=True)
sys.stdin.read()
"""


def create(
    directory: Path, name: str = "test", layout: ChunkLayout = LAYOUT, capacity_bytes: int = CAPACITY_BYTES
) -> Arena:
    return Arena.create(
        directory,
        name,
        layout=layout,
        index_nbytes=INDEX_NBYTES,
        index_fingerprint="index",
        capacity_bytes=capacity_bytes,
    )


def write(arena: Arena, slot: int, key: bytes, seed: int = 0) -> SlotRef:
    generator = torch.Generator().manual_seed(seed)
    ref = SlotRef(slot, arena.renew(slot))
    arena.chunks[slot] = torch.randint(256, (LAYOUT.nbytes,), dtype=torch.uint8, generator=generator)
    arena.index[slot] = torch.randint(256, (INDEX_NBYTES,), dtype=torch.uint8, generator=generator)
    arena.seal(ref, key, arena.digests(ref.slot))
    return ref


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    return create(tmp_path)


@pytest.mark.parametrize("capacity_bytes", [CAPACITY_BYTES, (2 << 20) + LAYOUT.nbytes, 5 << 20])
def test_file_is_reserved_and_holds_as_many_slots_as_fit(tmp_path: Path, capacity_bytes: int) -> None:
    arena = create(tmp_path, capacity_bytes=capacity_bytes)
    stat = arena.path.stat()
    assert stat.st_size == arena.description.file_bytes <= capacity_bytes
    assert stat.st_blocks * 512 >= stat.st_size
    assert capacity_bytes - stat.st_size < LAYOUT.nbytes + INDEX_NBYTES + HEADER.itemsize + (2 << 20)
    assert arena.chunks.shape == (arena.slots, LAYOUT.nbytes)
    assert arena.index.shape == (arena.slots, INDEX_NBYTES)
    assert arena.path.name == "forecache-test"


def test_arrays_do_not_overlap(arena: Arena) -> None:
    description = arena.description
    assert HEADER.itemsize == 64
    assert PAGE_BYTES + arena.slots * 64 <= description.index_start
    assert description.index_start + arena.slots * INDEX_NBYTES <= description.chunks_start
    assert description.chunks_start % (2 << 20) == 0
    refs = [write(arena, slot, bytes([slot]) * 16, seed=slot) for slot in range(arena.slots)]
    assert all(arena.check(ref, bytes([ref.slot]) * 16) for ref in refs)


def test_another_mapping_sees_the_same_bytes(arena: Arena) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of buffers that can't be written
        other = Arena.attach(arena.path)
    assert other.description == arena.description
    assert (other.layout_fingerprint, other.index_fingerprint) == (LAYOUT.fingerprint, "index")
    ref = SlotRef(2, arena.renew(2))
    other.chunks[2] = 5
    other.index[2] = 6
    other.seal(ref, KEY, other.digests(ref.slot))
    assert arena.check(ref, KEY)
    assert (arena.chunks[2] == 5).all()
    assert (arena.index[2] == 6).all()
    assert other.generation(np.array([2, 1])).tolist() == [1, 0]


def test_a_forgotten_mapping_leaves_no_open_file(arena: Arena) -> None:
    files = Path("/proc/self/fd")
    gc.collect()  # of the arenas of other tests
    before = len(list(files.iterdir()))
    for _ in range(10):
        assert Arena.attach(arena.path).slots == arena.slots
    gc.collect()
    assert len(list(files.iterdir())) == before


def test_typed_view_writes_through(arena: Arena) -> None:
    kv = LAYOUT.view(arena.chunks, "kv")
    kv[3].copy_(torch.arange(kv[3].numel(), dtype=torch.float32).view_as(kv[3]))
    other = LAYOUT.view(Arena.attach(arena.path).chunks, "kv")
    torch.testing.assert_close(other[3], kv[3], rtol=0, atol=0)


def test_headers_can_be_read_and_not_written(arena: Arena) -> None:
    write(arena, 0, KEY)
    assert arena.headers()[0]["key"].tobytes() == KEY
    with pytest.raises(ValueError, match="read-only"):
        arena.headers()["generation"] += np.uint64(1)


def test_key_of_zero_bytes_is_a_key(arena: Arena) -> None:
    ref = write(arena, 0, bytes(16))
    assert arena.check(ref, bytes(16))
    assert not arena.check(ref, b"\1" + bytes(15))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(position=st.integers(0, LAYOUT.nbytes + INDEX_NBYTES - 1), bit=st.integers(0, 7))
def test_check_finds_a_flipped_bit(arena: Arena, position: int, bit: int) -> None:
    ref = write(arena, 1, KEY)
    assert arena.check(ref, KEY)
    record = arena.chunks[1] if position < LAYOUT.nbytes else arena.index[1]
    position %= LAYOUT.nbytes
    record[position] ^= 1 << bit
    assert not arena.check(ref, KEY)
    assert arena.is_sealed(ref, KEY)
    record[position] ^= 1 << bit
    assert arena.check(ref, KEY)


def test_stale_references_are_refused(arena: Arena) -> None:
    stale = write(arena, 1, KEY)
    arena.renew(1)
    assert not arena.check(stale, KEY)
    with pytest.raises(ChunkLostError, match="given away"):
        arena.seal(stale, KEY, arena.digests(stale.slot))
    ref = write(arena, 1, KEY)
    assert ref.generation == stale.generation + 2
    assert arena.check(ref, KEY)
    assert not arena.check(stale, KEY)
    arena.clear(1)
    assert not arena.check(ref, KEY)
    assert arena.headers()[1]["seal"] == OPEN


def test_device_checksums_are_kept_in_the_header(arena: Arena) -> None:
    ref, other = write(arena, 1, KEY), SlotRef(0, 0)
    assert arena.sealed_device_checksums([ref, other], [KEY, KEY])[1].tolist() == [0, 0]
    largest = 2**64 - 3
    arena.seal(ref, KEY, arena.digests(ref.slot), largest)
    assert Arena.attach(arena.path).sealed_device_checksums([ref, other], [KEY, KEY])[1].tolist() == [largest, 0]
    assert arena.check(ref, KEY), "the xxh3 of CPU readers stays"
    arena.seal(ref, KEY, arena.digests(ref.slot))
    assert arena.sealed_device_checksums([ref], [KEY])[1].tolist() == [0], "another writer's checksum is gone"


def test_many_headers_at_once_say_what_each_says(arena: Arena) -> None:
    names = [bytes([slot]) * 16 for slot in range(arena.slots)]
    refs = [write(arena, slot, names[slot]) for slot in range(arena.slots)]
    assert arena.sealed(refs, names).tolist() == [True] * len(refs)
    assert arena.sealed([], []).tolist() == []
    arena.clear(0)
    write(arena, 1, names[1])
    pairs = [*zip(refs, names, strict=True), (refs[2], names[3]), (refs[3], b"\1" + names[3][1:])]
    said = arena.sealed([ref for ref, _ in pairs], [name for _, name in pairs])
    assert said.tolist() == [arena.is_sealed(ref, name) for ref, name in pairs]
    assert said.tolist() == [False, False, *[True] * (len(refs) - 2), False, False]


def test_tensors_outlive_close_and_unlink(arena: Arena) -> None:
    ref = write(arena, 1, KEY)
    expected = arena.chunks[1].clone()
    row = arena.chunks[1]
    arena.close()
    arena.close()
    arena.unlink()
    assert arena.check(ref, KEY)
    path = arena.path
    del arena
    assert torch.equal(row, expected)
    assert not path.exists()


def test_too_small_and_too_large_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ArenaError, match=rf"one of {LAYOUT.nbytes} bytes .* Raise --cold-bytes"):
        create(tmp_path, capacity_bytes=2 << 20)
    with pytest.raises(ArenaError, match=r"\d+ bytes needed, \d+ bytes free .* Lower --cold-bytes"):
        create(tmp_path, capacity_bytes=1 << 62)  # more than a file may have: it fails at once
    with pytest.raises(ArenaError, match="--arena-dir"):
        create(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


def test_name_is_taken_once(arena: Arena) -> None:
    with pytest.raises(ArenaError, match="File exists"):
        create(arena.path.parent)
    with pytest.raises(ArenaError, match="living owner"):
        Arena.adopt(arena.path)
    assert Arena.attach(arena.path).slots == arena.slots


def test_damaged_files_are_refused(arena: Arena, tmp_path: Path) -> None:
    with pytest.raises(ArenaError, match="can't open"):
        Arena.attach(tmp_path / "forecache-absent")
    whole = arena.path.read_bytes()
    damaged = tmp_path / "damaged"
    for content, message in [
        (b"", "no arena"),
        (b"x" + whole[1:], "no arena"),
        (whole[:-1], "bytes, not"),
        (whole[:16] + b"]" + whole[17:], "first page"),
    ]:
        damaged.write_bytes(content)
        with pytest.raises(ArenaError, match=message):
            Arena.attach(damaged)


def test_remove_abandoned_keeps_the_living_and_the_foreign(arena: Arena, tmp_path: Path) -> None:
    closed = create(tmp_path, "closed")
    closed.close()
    unfinished = tmp_path / "forecache-unfinished"
    unfinished.touch()
    foreign = tmp_path / "forecache-notes"
    foreign.write_text("not an arena")
    folder, link = tmp_path / "forecache-folder", tmp_path / "forecache-link"
    folder.mkdir()
    link.symlink_to(unfinished)
    reader = Arena.attach(arena.path)
    assert remove_abandoned(tmp_path) == [closed.path, unfinished]
    assert sorted(tmp_path.iterdir()) == sorted([foreign, folder, link, arena.path])
    assert reader.slots == arena.slots


def test_the_arena_of_a_killed_owner_is_adopted_or_removed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"ready\n"
        path = tmp_path / "forecache-owned"
        reader = Arena.attach(path)
        assert reader.check(SlotRef(1, 1), KEY)
        assert remove_abandoned(tmp_path) == []
        with pytest.raises(ArenaError, match="living owner"):
            Arena.adopt(path)
        owner.send_signal(signal.SIGKILL)
    adopted = Arena.adopt(path)
    assert adopted.check(SlotRef(1, 1), KEY)
    assert (adopted.chunks[1] == 7).all()
    assert remove_abandoned(tmp_path) == []
    adopted.close()
    assert remove_abandoned(tmp_path) == [path]
    assert reader.check(SlotRef(1, 1), KEY)


def test_the_checksums_are_those_of_the_source(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process writes to the slot while it is filled: its bytes must not be sealed."""
    other = Arena.attach(arena.path)
    chunk, index = np.full(LAYOUT.nbytes, 0x22, np.uint8), np.full(INDEX_NBYTES, 0x33, np.uint8)
    ref = SlotRef(1, arena.renew(1))
    copy = Arena._copy
    for foreign in (other.chunks[1], other.index[1]):

        def copy_and_be_overwritten(target: np.ndarray, source: np.ndarray, foreign: torch.Tensor = foreign) -> None:
            copy(target, source)
            if source is index:
                foreign[5] = 0x11

        monkeypatch.setattr(Arena, "_copy", staticmethod(copy_and_be_overwritten))
        with pytest.raises(ChunkLostError, match="does not hold what was just written"):
            arena.put(ref, KEY, chunk, index)
        assert not arena.is_sealed(ref, KEY)
        monkeypatch.undo()
        arena.put(ref, KEY, chunk, index)
        assert arena.check(ref, KEY)
        arena.clear(1)


def test_a_late_writer_can_not_seal(arena: Arena) -> None:
    """The writer has compared the generation, and is stopped before it writes the header."""
    stale = SlotRef(1, arena.renew(1))
    other = Arena.attach(arena.path)
    arena.renew(1)
    other._headers.seal(stale, KEY, (1, 2), 3)
    assert other.sealed_key(1) is None
    assert not any(other.is_sealed(SlotRef(1, generation), KEY) for generation in range(4))
    with pytest.raises(ChunkLostError, match="given away"):
        other.seal_verified(stale, KEY, (1, 2))


@pytest.mark.parametrize("field", ["key", "generation", "checksum", "index_checksum", "device_checksum", "seal"])
def test_a_header_of_two_writers_is_not_sealed(arena: Arena, field: str) -> None:
    first, second = write(arena, 1, KEY, seed=1), write(arena, 2, bytes(16), seed=2)
    arena.seal(second, bytes(16), arena.digests(second.slot), 7)
    headers = arena._headers._array
    own = headers[1].copy()
    if field == "generation":
        headers[1][field] += np.uint64(1)
    else:
        headers[1][field] = headers[2][field]
    key, generation = headers[1]["key"].tobytes(), int(headers[1]["generation"])
    assert arena.sealed_key(1) is None
    assert not arena.is_sealed(SlotRef(1, generation), key)
    assert arena.sealed([SlotRef(1, generation)], [key]).tolist() == [False]
    headers[1] = headers[2]  # the whole header of another slot is none either
    assert not arena.is_sealed(SlotRef(1, second.generation), bytes(16))
    headers[1] = own
    assert arena.check(first, KEY)


def test_a_renewed_slot_is_open(arena: Arena) -> None:
    """Also after a late writer has written the old generation back."""
    ref = write(arena, 1, KEY)
    arena.renew(1)
    assert arena.headers()[1]["seal"] == OPEN
    arena._headers._array[1]["generation"] = ref.generation
    assert not arena.is_sealed(ref, KEY) and arena.sealed_key(1) is None


def test_check_compares_the_generation_after_the_checksums(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot gets another owner and other bytes after its checksums were computed."""
    ref = write(arena, 1, KEY)
    digests = Arena.digests

    def then_given_away(self: Arena, slot: int) -> tuple[int, int]:
        found = digests(self, slot)
        arena.renew(slot)
        arena.chunks[slot] = 1
        return found

    monkeypatch.setattr(Arena, "digests", then_given_away)
    assert not arena.check(ref, KEY)
