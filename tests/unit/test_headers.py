"""Slot headers in the arena's file: every byte of them, and what their readers return."""

import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from forecache.workers.memory.arena import headers as headers_module
from forecache.workers.memory.arena.headers import (
    FIRST_WRITER,
    HEADER,
    NO_WRITER,
    OPEN,
    OWNER,
    RETIRED,
    SEALED_BYTES,
    UNKNOWN,
    Headers,
)
from forecache.workers.memory.format.slots import SlotRef

SLOTS = 6
KEY, OTHER = bytes(range(1, 17)), bytes(range(101, 117))
SUMS = (0x1111111111111111, 0x2222222222222222)
DEVICE = 0x3333333333333333


@pytest.fixture
def array() -> npt.NDArray[np.void]:
    return np.zeros(SLOTS, HEADER)


@pytest.fixture
def headers(array: npt.NDArray[np.void]) -> Headers:
    return Headers(array)


def sealed(headers: Headers, slot: int, key: bytes = KEY) -> SlotRef:
    ref = SlotRef(slot, headers.renew(slot))
    headers.seal(ref, key, SUMS, DEVICE)
    return ref


def number(value: int) -> bytes:
    return value.to_bytes(8, "little")


def test_the_bytes_of_a_header_are_those_that_other_versions_read(array: npt.NDArray[np.void]) -> None:
    """An arena outlives its process: the next one may be of another version."""
    headers = Headers(array)
    headers.renew(3)
    headers.renew(3)
    headers.set_writer(3, 0x4444444444444444)
    headers.seal(SlotRef(3, 2), KEY, SUMS, DEVICE)
    fields = KEY + number(2) + number(SUMS[0]) + number(SUMS[1]) + number(DEVICE)
    seal = number(xxhash.xxh3_64_intdigest(fields, 3))
    assert array[3].tobytes() == fields + seal + number(0x4444444444444444)
    assert (len(fields), HEADER.itemsize) == (SEALED_BYTES, 64) == (48, 64)
    assert array.tobytes().count(0) == (SLOTS - 1) * 64 + array[3].tobytes().count(0), "other headers were written"


def test_a_new_file_says_that_its_slots_are_open_and_have_no_writer(headers: Headers) -> None:
    """It is all zeros."""
    assert headers.read_only()[0]["seal"] == OPEN == 0
    assert headers.writer(0) == NO_WRITER == 0
    assert headers.generation(0) == 0 and headers.sealed_key(0) is None
    assert not headers.is_sealed(SlotRef(0, 0), bytes(16))
    assert (OWNER, UNKNOWN, RETIRED, FIRST_WRITER) == (1, 2, 3, 16)


def test_a_slot_is_opened_with_a_new_generation_or_with_its_own(headers: Headers) -> None:
    ref = sealed(headers, 1)
    assert headers.generation(1) == ref.generation == 1
    headers.clear(1)
    assert headers.read_only()[1]["seal"] == 0 and headers.generation(1) == 1
    sealed(headers, 1)
    assert headers.renew(1) == 3 == headers.generation(1)
    assert headers.read_only()[1]["seal"] == 0
    assert headers.generations(np.array([1, 0, 1])).tolist() == [3, 0, 3]


def test_the_writer_is_kept_apart_from_what_is_sealed(headers: Headers) -> None:
    headers.set_writer(2, 2**61 + 5)
    ref = sealed(headers, 2)
    assert headers.writer(2) == 2**61 + 5 and headers.writer(1) == NO_WRITER
    headers.set_writer(2, NO_WRITER)
    assert headers.writer(2) == NO_WRITER and headers.is_sealed(ref, KEY)


def test_what_was_sealed_is_told_of_that_slot_key_and_generation_alone(headers: Headers) -> None:
    ref = sealed(headers, 4)
    assert headers.sealed_key(4) == KEY
    assert headers.sealed_checksums(ref, KEY) == SUMS
    assert headers.is_sealed(ref, KEY) is True
    for slot, generation, key in [(4, 1, OTHER), (4, 2, KEY), (4, 0, KEY), (3, 1, KEY), (3, 0, bytes(16))]:
        other = SlotRef(slot, generation)
        assert headers.sealed_checksums(other, key) is None
        assert headers.is_sealed(other, key) is False
    _, sums = headers.all_sealed([ref, SlotRef(0, 0)], [KEY, KEY])
    assert sums[:, 2].tolist() == [DEVICE, 0]


@pytest.mark.parametrize("byte", range(SEALED_BYTES + 8))
def test_any_other_byte_breaks_the_seal(array: npt.NDArray[np.void], byte: int) -> None:
    headers = Headers(array)
    ref = sealed(headers, 1)
    raw = array.view(np.uint8).reshape(SLOTS, 64)
    raw[1, byte] ^= 0x40
    key, generation = raw[1, :16].tobytes(), int(array[1]["generation"])
    assert headers.sealed_key(1) is None
    assert headers.sealed_checksums(SlotRef(1, generation), key) is None
    assert headers.all_sealed([SlotRef(1, generation)], [key])[0].tolist() == [False]
    assert headers.sealed_records(np.array([1]), np.array([generation]))[0].tolist() == [False]
    raw[1, byte] ^= 0x40
    assert headers.is_sealed(ref, KEY)


def test_many_are_asked_for_at_once(headers: Headers) -> None:
    refs = [sealed(headers, slot, bytes([slot]) * 16) for slot in range(4)]
    keys = [bytes([slot]) * 16 for slot in range(4)]
    headers.clear(1)
    headers.renew(2)
    for pairs, names, expected in [
        (refs, keys, [True, False, False, True]),
        (refs[::-1], keys[::-1], [True, False, False, True]),
        ([refs[0], refs[3]], [keys[3], keys[3]], [False, True]),
        ([SlotRef(3, 2), SlotRef(0, 0)], [keys[3], keys[0]], [False, False]),
        ([], [], []),
    ]:
        said, sums = headers.all_sealed(pairs, names)
        assert said.tolist() == expected == headers.sealed(pairs, names).tolist()
        assert sums.shape == (len(pairs), 3)
        assert all(row == [*SUMS, DEVICE] for row, ref in zip(sums.tolist(), pairs, strict=True) if ref.slot < 4)
    slots = np.array([3, 5, 0, 1, 2, 3])
    said, sums = headers.sealed_records(slots, np.array([1, 0, 1, 1, 1, 2]))
    assert said.tolist() == [True, False, True, False, False, False]
    assert sums.tolist()[0] == sums.tolist()[2] == SUMS[1]


def test_a_seal_that_does_not_come_to_its_end_leaves_the_slot_open(headers: Headers) -> None:
    """Its bytes are other ones by then."""
    ref = sealed(headers, 1)
    with pytest.raises(ValueError, match="broadcast"):
        headers.seal(ref, b"too short", SUMS, DEVICE)
    assert headers.sealed_key(1) is None and not headers.is_sealed(ref, KEY)


def test_a_checksum_that_happens_to_be_that_of_open_slots_is_a_seal(
    headers: Headers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of 2**64 headers has it."""
    monkeypatch.setattr(headers_module.xxhash, "xxh3_64_intdigest", lambda data, seed: 0)
    ref = sealed(headers, 1)
    assert headers.read_only()[1]["seal"] == 1
    assert headers.is_sealed(ref, KEY) and headers.sealed_key(1) == KEY
    headers.clear(1)
    assert not headers.is_sealed(ref, KEY)


def test_what_is_handed_out_to_be_read_can_not_be_written(headers: Headers) -> None:
    view = headers.read_only()
    with pytest.raises(ValueError, match="read-only"):
        view["writer"] = np.uint64(1)
    assert len(view) == SLOTS
    headers.set_writer(0, 7)
    assert view[0]["writer"] == 7, "it is no copy"
