"""The arena's file: layout of its arrays, number of slots, ownership, and clean-up after errors."""

import errno
import gc
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import xxhash

from forecache.workers.errors import ArenaError, ArenaMissingError, ChunkLostError
from forecache.workers.memory.arena import arena as arena_module
from forecache.workers.memory.arena.arena import Arena, ArenaDescription, describe, remove_abandoned
from forecache.workers.memory.arena.headers import FIRST_WRITER, NO_WRITER, OWNER, RETIRED, Headers
from forecache.workers.memory.format.layout import attention_layout
from forecache.workers.memory.format.slots import SlotRef

LAYOUT = attention_layout("m", layers=1, kv_heads=1, head_dim=8, chunk_tokens=16, dtype=torch.float32)
NBYTES = LAYOUT.nbytes
INDEX_NBYTES = 100
SLOTS, RECORDS = 4, 3
MIB = 1 << 20
KEY, OTHER = bytes(range(1, 17)), bytes(range(101, 117))


def create(directory: Path, name: str = "test", *, records: int = RECORDS, fingerprint: str = "index") -> Arena:
    return Arena.create(
        directory,
        name,
        layout=LAYOUT,
        index_nbytes=INDEX_NBYTES,
        index_fingerprint=fingerprint,
        capacity_bytes=2 * MIB + SLOTS * NBYTES,
        record_bytes=records * (INDEX_NBYTES + 64),
    )


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    return create(tmp_path)


def bytes_of(seed: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """A chunk and its index record."""
    generator = np.random.default_rng(seed)
    return generator.integers(256, size=NBYTES, dtype=np.uint8), generator.integers(
        256, size=INDEX_NBYTES, dtype=np.uint8
    )


def put(arena: Arena, slot: int, key: bytes = KEY) -> SlotRef:
    ref = SlotRef(slot, arena.renew(slot))
    arena.put(ref, key, *bytes_of(slot))
    return ref


def header_bytes(arena: Arena, slot: int) -> bytes:
    return bytes(arena.headers()[slot].tobytes())


@contextmanager
def no_file_stays_open() -> Iterator[None]:
    files = Path("/proc/self/fd")
    before = set(files.iterdir())
    yield
    if not set(files.iterdir()) <= before:
        gc.collect()  # an error's traceback may still lead to a mapping
    assert set(files.iterdir()) <= before


# the file


def test_the_first_page_is_what_other_versions_read(arena: Arena) -> None:
    page = arena.path.read_bytes()[:4096]
    length = int.from_bytes(page[12:16], "little")
    assert page[:8] == b"forecach" and int.from_bytes(page[8:12], "little") == 4
    assert json.loads(page[16 : 16 + length]) == {
        "layout_fingerprint": LAYOUT.fingerprint,
        "index_fingerprint": "index",
        "slots": SLOTS,
        "nbytes": NBYTES,
        "index_nbytes": INDEX_NBYTES,
        "record_slots": RECORDS,
    }
    assert set(page[16 + length : 4088]) == {0}
    assert int.from_bytes(page[4088:], "little") == 1, "the life of its first owner"


def test_a_new_file_holds_nothing_but_its_first_page(arena: Arena) -> None:
    content = arena.path.read_bytes()
    assert content.count(0, 4096) == len(content) - 4096
    other = Arena.attach(arena.path)
    assert content == arena.path.read_bytes(), "attaching changes nothing"
    assert not other.owner and other.writer >= FIRST_WRITER
    assert (arena.owner, arena.writer, arena.slots, arena.record_slots) == (True, OWNER, SLOTS, RECORDS)
    assert (other.layout_fingerprint, other.index_fingerprint) == (LAYOUT.fingerprint, "index")


def test_an_owner_changes_the_count_of_lives_alone(arena: Arena) -> None:
    put(arena, 0)
    assert arena.life == 1
    content = arena.path.read_bytes()
    with pytest.raises(ArenaError, match="living owner"):
        Arena.adopt(arena.path)
    arena.close()
    adopted = Arena.adopt(arena.path)
    assert adopted.owner and adopted.writer == OWNER
    after = adopted.path.read_bytes()
    assert after[:4088] == content[:4088] and after[4096:] == content[4096:]
    assert adopted.life == arena.life == Arena.attach(arena.path).life == 2


def test_arrays_lie_one_after_another_each_at_its_own_alignment(arena: Arena) -> None:
    assert arena.description == ArenaDescription(LAYOUT.fingerprint, "index", SLOTS, NBYTES, INDEX_NBYTES, RECORDS)
    assert (arena.description.index_start, arena.description.chunks_start) == (8192, 2 * MIB)
    assert arena.description.file_bytes == arena.path.stat().st_size == 2 * MIB + SLOTS * NBYTES
    large = ArenaDescription("l", "i", slots=1000, nbytes=4096, index_nbytes=4096, record_slots=24)
    assert large.index_start == 4096 + 1024 * 64
    assert large.chunks_start == 6 * MIB  # the records end a page and the headers behind 4 MiB
    assert large.file_bytes == 6 * MIB + 1000 * 4096
    assert ArenaDescription("l", "i", slots=1, nbytes=1, index_nbytes=1).record_slots == 0
    for slot in range(SLOTS + RECORDS):
        arena.index[slot] = 100 + slot
        arena.renew(slot, 200 + slot)
    arena.chunks[:] = 7
    content = np.frombuffer(arena.path.read_bytes(), np.uint8)
    assert arena.index.shape == (SLOTS + RECORDS, INDEX_NBYTES) and arena.chunks.shape == (SLOTS, NBYTES)
    records = content[8192 : 8192 + (SLOTS + RECORDS) * INDEX_NBYTES].reshape(-1, INDEX_NBYTES)
    assert [set(record.tolist()) for record in records] == [{100 + slot} for slot in range(SLOTS + RECORDS)]
    assert content[4096 : 4096 + (SLOTS + RECORDS) * 64].reshape(-1, 64)[:, 56].tolist() == list(range(200, 207))
    assert (content[2 * MIB :] == 7).all() and not content[8192 + records.size : 2 * MIB].any()


@pytest.mark.parametrize("index_nbytes", [1, 100, 4000])
@pytest.mark.parametrize("slots", [1, 2, 3, 500, 521, 2000])
def test_as_many_slots_as_fit(index_nbytes: int, slots: int) -> None:
    def described(capacity_bytes: int) -> ArenaDescription:
        return describe(LAYOUT, index_nbytes, "index", capacity_bytes)

    wanted = ArenaDescription(LAYOUT.fingerprint, "index", slots, NBYTES, index_nbytes)
    assert described(wanted.file_bytes) == wanted
    if slots > 1:
        assert described(wanted.file_bytes - 1).slots == slots - 1
    else:
        with pytest.raises(ArenaError, match=rf"one of {NBYTES} bytes needs an arena of {wanted.file_bytes} bytes"):
            described(wanted.file_bytes - 1)


def test_as_many_record_slots_as_fit() -> None:
    for record_bytes, count in [(0, 0), (163, 0), (164, 1), (10 * 164, 10), (11 * 164 - 1, 10)]:
        found = describe(LAYOUT, INDEX_NBYTES, "index", 5 * MIB, record_bytes)
        assert found.record_slots == count
        assert found.slots == describe(LAYOUT, INDEX_NBYTES, "index", 5 * MIB).slots


def test_fingerprints_fill_the_first_page_at_most(tmp_path: Path) -> None:
    short = create(tmp_path, "short")
    used = 16 + int.from_bytes(short.path.read_bytes()[12:16], "little")
    fitting = "i" * (4088 - used + len("index"))
    full = create(tmp_path, "full", fingerprint=fitting)
    assert full.life == 1 and Arena.attach(full.path).index_fingerprint == fitting
    with no_file_stays_open(), pytest.raises(ArenaError, match="fingerprints are too long"):
        create(tmp_path, "over", fingerprint=fitting + "i")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["forecache-full", "forecache-short"]


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_file_that_can_not_be_reserved_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_gone: bool
) -> None:
    """The error has the reason, even if the file was removed meanwhile."""
    stat = os.statvfs(tmp_path)
    free_bytes = stat.f_bavail * stat.f_frsize

    opened, sizes = list[int](), list[int]()
    free_bytes_now = arena_module.room_bytes

    def told_free(directory: Path) -> int:
        sizes.append(os.fstat(opened[0]).st_size)
        return free_bytes_now(directory)

    monkeypatch.setattr(arena_module, "room_bytes", told_free)

    def refuse(fd: int, offset: int, length: int) -> None:
        assert (offset, length) == (0, 2 * MIB + SLOTS * NBYTES)
        os.pwrite(fd, bytes(MIB), 0)  # so much of it there was
        opened.append(fd)
        if is_gone:
            (tmp_path / "forecache-test").unlink()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with (
        no_file_stays_open(),
        pytest.raises(ArenaError, match=r"No space left on device.*Lower --cold-bytes") as caught,
    ):
        create(tmp_path)
    [told] = re.findall(r"(\d+) bytes free", str(caught.value))
    assert free_bytes / 2 < int(told) < free_bytes * 2
    assert sizes == [0], "what was reserved is not free yet"
    assert list(tmp_path.iterdir()) == []


def test_files_of_other_kinds_and_versions_are_refused(arena: Arena, tmp_path: Path) -> None:
    whole = arena.path.read_bytes()
    other = tmp_path / "other"
    for content, message in [
        (whole[:8] + b"\3" + whole[9:], "no arena of version 4"),
        (whole[:8] + b"\5" + whole[9:], "no arena of version 4"),
        (b"x" + whole[1:], "no arena of version 4"),
        (whole + b"\0", f"has {len(whole) + 1} bytes, not {len(whole)}"),
        (whole[:-1], f"has {len(whole) - 1} bytes, not {len(whole)}"),
    ]:
        other.write_bytes(content)
        for opened in (Arena.attach, Arena.adopt):
            with no_file_stays_open(), pytest.raises(ArenaMissingError, match=message):
                opened(other)
    other.write_bytes(whole[:16] + b"]" + whole[17:])
    with no_file_stays_open(), pytest.raises(ArenaError, match="damaged"):
        Arena.attach(other)


def test_an_arena_whose_file_was_cut_replaced_or_removed_is_not_intact(arena: Arena, tmp_path: Path) -> None:
    assert arena.is_intact() is True
    twin = create(tmp_path, "twin")
    kept = arena.path.rename(tmp_path / "kept")
    assert arena.is_intact() is False
    twin.path.rename(arena.path)
    assert arena.is_intact() is False, "another file of the same size"
    kept.rename(arena.path)
    assert arena.is_intact() is True
    os.truncate(arena.path, arena.description.file_bytes + 4096)
    assert arena.is_intact() is False


# closing and removing


def test_closing_lets_go_of_file_and_lock(tmp_path: Path) -> None:
    with no_file_stays_open():
        arena = create(tmp_path)
        row = arena.chunks[0]
        arena.close()
        arena.close()
        adopted = Arena.adopt(arena.path)
        with pytest.raises(ArenaError, match="living owner"):
            Arena.adopt(arena.path)
        adopted.close()
        del arena, adopted, row
    other = Arena.adopt(tmp_path / "forecache-test")
    reader = Arena.attach(other.path)
    reader.close()
    with pytest.raises(ArenaError, match="living owner"):
        Arena.adopt(other.path)
    other.unlink()
    other.unlink()
    assert not other.path.exists()


def test_a_process_without_standard_input_has_arenas_too(tmp_path: Path) -> None:
    """The arena's file descriptor may be 0."""
    kept = os.dup(0)
    try:
        os.close(0)
        arena = create(tmp_path)
        assert os.fstat(0).st_ino == arena.path.stat().st_ino
        assert arena.living({FIRST_WRITER, OWNER}) == {OWNER}
        arena.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(0)
    finally:
        os.dup2(kept, 0)
        os.close(kept)


def test_abandoned_files_are_removed_and_no_others(arena: Arena, tmp_path: Path) -> None:
    for name in ("closed", "unfinished", "zeros", "foreign", "short"):
        (tmp_path / f"forecache-{name}").touch()
    (tmp_path / "forecache-closed").write_bytes(b"forecach" + bytes(100))
    (tmp_path / "forecache-zeros").write_bytes(bytes(4096))
    (tmp_path / "forecache-foreign").write_bytes(b"something" * 10)
    (tmp_path / "forecache-short").write_bytes(b"fore")
    (tmp_path / "other").write_bytes(b"forecach" + bytes(100))
    (tmp_path / "forecache-folder").mkdir()
    (tmp_path / "forecache-link").symlink_to(tmp_path / "forecache-closed")
    with no_file_stays_open():
        removed = remove_abandoned(tmp_path)
    assert [path.name for path in removed] == ["forecache-closed", "forecache-unfinished", "forecache-zeros"]
    left = ["forecache-folder", "forecache-foreign", "forecache-link", "forecache-short", "forecache-test", "other"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_files_that_go_or_become_links_while_they_are_looked_at(
    arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert arena_module._remove_if_abandoned(tmp_path / "forecache-gone") is False
    assert arena_module._remove_if_abandoned(arena.path) is False
    foreign = tmp_path / "forecache-foreign"
    foreign.write_bytes(b"something" * 10)
    assert arena_module._remove_if_abandoned(foreign) is False
    target, link = tmp_path / "target", tmp_path / "forecache-link"
    target.touch()
    link.symlink_to(target)
    with suppress(OSError):
        arena_module._remove_if_abandoned(link)
    assert link.is_symlink() and target.exists()
    unfinished = tmp_path / "forecache-unfinished"
    unfinished.touch()
    own = arena_module.own

    def then_removed(fd: int, path: Path) -> bool:
        owned = own(fd, path)
        path.unlink()
        return owned

    monkeypatch.setattr(arena_module, "own", then_removed)
    assert arena_module._remove_if_abandoned(unfinished) is True


# writers


def test_writers_are_known_while_they_have_the_file_mapped(arena: Arena) -> None:
    assert arena.writers() == set()
    reader = Arena.attach(arena.path)
    writer = reader.writer
    assert arena.writers() == {writer}
    assert arena.living({writer, writer + 1, OWNER}) == {writer, OWNER}
    assert arena.living({writer + 1}) == set()
    del reader
    assert arena.writers() == set() and arena.living({writer}) == set()
    arena.close()
    assert arena.living({writer, OWNER}) == {writer, OWNER}, "nothing can be told of a closed one"


def test_a_slot_has_the_writer_that_it_was_given_to(arena: Arena) -> None:
    assert arena.writer_of(1) == NO_WRITER
    assert arena.renew(1) == 1 and arena.writer_of(1) == OWNER
    assert arena.renew(1, 77) == 2 and arena.writer_of(1) == 77
    assert arena.generation_of(1) == 2
    arena.forget_writer(1)
    assert arena.writer_of(1) == NO_WRITER and arena.generation_of(1) == 2


def test_a_retired_slot_is_open_and_stays_retired(arena: Arena) -> None:
    ref = put(arena, 2)
    arena.retire(2)
    assert not arena.is_sealed(ref, KEY) and arena.sealed_key(2) is None
    arena.close()
    assert Arena.adopt(arena.path).writer_of(2) == RETIRED


# bytes and seals


def test_what_is_put_lies_in_its_slot_with_its_checksums(arena: Arena) -> None:
    chunk, index = bytes_of(1)
    ref = put(arena, 1)
    sums = (xxhash.xxh3_64_intdigest(chunk.tobytes()), xxhash.xxh3_64_intdigest(index.tobytes()))
    assert (arena.chunks[1].numpy() == chunk).all() and (arena.index[1].numpy() == index).all()
    assert arena.digests(1) == sums
    header = arena.headers()[1]
    assert (int(header["checksum"]), int(header["index_checksum"]), int(header["device_checksum"])) == (*sums, 0)
    for seal in (lambda: arena.seal(ref, KEY, arena.digests(ref.slot)), lambda: arena.seal_verified(ref, KEY, sums)):
        arena.put(ref, KEY, chunk, index, 55)
        assert arena.headers()["device_checksum"][[ref.slot]].tolist() == [55]
        seal()
        assert arena.headers()["device_checksum"][[ref.slot]].tolist() == [0], "no GPU, no device checksum"
        assert arena.check(ref, KEY)
    arena.seal(ref, KEY, sums, 99)
    sealed, device_sums = arena.sealed_device_checksums([ref, SlotRef(0, 0)], [KEY, KEY])
    assert sealed.tolist() == [True, False] and device_sums.tolist() == [99, 0]
    assert arena.sealed_key(1) == KEY and arena.is_sealed(ref, KEY)
    assert not arena.chunks[[0, 2, 3]].any() and not arena.index[[0, 2, 3]].any()


def test_a_late_writer_leaves_header_and_bytes_as_they_are(arena: Arena) -> None:
    stale = put(arena, 1)
    current = put(arena, 1, OTHER)
    before = header_bytes(arena, 1), arena.chunks[1].clone(), arena.index[1].clone()
    for write in (
        lambda: arena.put(stale, KEY, *bytes_of(9)),
        lambda: arena.seal(stale, KEY, arena.digests(stale.slot)),
        lambda: arena.seal(stale, KEY, checksums=arena.digests(1)),
    ):
        with pytest.raises(ChunkLostError, match=r"slot 1 of .* given away"):
            write()
        assert header_bytes(arena, 1) == before[0]
        assert torch.equal(arena.chunks[1], before[1]) and torch.equal(arena.index[1], before[2])
    assert arena.check(current, OTHER)


def test_a_writer_that_becomes_late_while_it_seals_is_told(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = SlotRef(1, arena.renew(1))
    seal = Headers.seal

    def then_given_away(self: Headers, *given: object) -> None:
        seal(self, *given)  # type: ignore[arg-type]
        arena.renew(1)

    monkeypatch.setattr(Headers, "seal", then_given_away)
    with pytest.raises(ChunkLostError, match="given away"):
        arena.put(ref, KEY, *bytes_of(1))


def test_other_bytes_than_those_that_were_written_are_not_sealed(arena: Arena) -> None:
    ref = put(arena, 1)
    sums = arena.digests(1)
    for wrong in [(sums[0] + 1, sums[1]), (sums[0], sums[1] + 1)]:
        arena.clear(1)
        with pytest.raises(ChunkLostError, match="does not hold what was just written"):
            arena.seal(ref, KEY, wrong)
        assert not arena.is_sealed(ref, KEY)
    arena.seal(ref, KEY, sums)
    assert arena.check(ref, KEY)


@pytest.mark.parametrize("part", ["chunk", "index"])
def test_changed_bytes_are_sealed_and_not_sound(arena: Arena, part: str) -> None:
    ref, other = put(arena, 1), put(arena, 2, OTHER)
    (arena.chunks if part == "chunk" else arena.index)[1, -1] ^= 128
    assert arena.is_sealed(ref, KEY) and not arena.check(ref, KEY)
    batch = arena.read([ref, other], [KEY, OTHER])
    assert batch.keys == (OTHER,) and (batch.chunks[0] == bytes_of(2)[0]).all()
    (arena.chunks if part == "chunk" else arena.index)[1, -1] ^= 128
    assert arena.check(ref, KEY) and arena.read([ref], [KEY]).keys == (KEY,)
    assert not arena.check(SlotRef(1, ref.generation + 1), KEY) and not arena.check(ref, OTHER)


def test_a_batch_is_written_with_the_checksums_it_came_with(arena: Arena, tmp_path: Path) -> None:
    refs = [put(arena, 0), SlotRef(1, arena.renew(1))]
    arena.put(refs[1], OTHER, *bytes_of(1), 2**64 - 5)
    batch = arena.read(refs, [KEY, OTHER])
    receiver = create(tmp_path, "receiver")
    for slot, row in ((3, 0), (2, 1)):
        ref = SlotRef(slot, receiver.renew(slot))
        receiver.write(ref, batch, row)
        assert receiver.check(ref, batch.keys[row])
        assert receiver.digests(slot) == arena.digests(row)
    assert receiver.headers()["device_checksum"][[2, 3]].tolist() == [2**64 - 5, 0]
    batch.chunks[0][5] ^= 1
    with pytest.raises(ChunkLostError, match="does not hold"):
        receiver.write(SlotRef(1, receiver.renew(1)), batch, 0)


def test_records_have_no_chunk(arena: Arena) -> None:
    _, record = bytes_of(5)
    checksum = xxhash.xxh3_64_intdigest(record.tobytes())
    slots = np.arange(SLOTS, SLOTS + RECORDS)
    refs = [SlotRef(int(slot), arena.renew(int(slot))) for slot in slots]
    for ref in refs:
        arena.write_record(ref, KEY, record, checksum)
        assert arena.digests(ref.slot) == (0, checksum)
        assert arena.check(ref, KEY) and (arena.index[ref.slot].numpy() == record).all()
        assert int(arena.headers()[ref.slot]["checksum"]) == 0
    generations = np.ones(RECORDS, np.int64)
    assert arena.sound_records(slots, generations).tolist() == [True] * 3
    arena.index[SLOTS + 1, 7] ^= 2
    assert arena.sound_records(slots, generations).tolist() == [True, False, True]
    arena.renew(SLOTS + 2)
    assert arena.sound_records(slots[::-1], generations).tolist() == [False, False, True]
    with pytest.raises(ChunkLostError, match="does not hold"):
        arena.write_record(refs[0], KEY, record, checksum + 1)
    assert not arena.chunks.any()


def test_a_record_that_changes_while_it_is_looked_at_is_not_sound(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = SlotRef(SLOTS, arena.renew(SLOTS))
    _, record = bytes_of(5)
    arena.write_record(ref, KEY, record, xxhash.xxh3_64_intdigest(record.tobytes()))
    sealed_records = Headers.sealed_records

    def then_given_away(
        self: Headers, *asked: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint64]]:
        found = sealed_records(self, *asked)
        arena.renew(SLOTS)
        return found

    monkeypatch.setattr(Headers, "sealed_records", then_given_away)
    assert arena.sound_records(np.array([SLOTS]), np.array([1])).tolist() == [False]
