"""Headers of an arena's slots: key, generation and checksums of the bytes there, under a seal.

The owner of the arena and the worker that writes a slot both write its header, and a worker that lost the slot may
still write at any moment. So a header counts as sealed only if its ``seal`` is the checksum of its other fields (the
generation among them) and of the slot's number. Mixed fields of two writers, or those of an earlier generation, are not
sealed.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from forecache.workers.memory.format.keys import KEY_BYTES, ChunkKey
from forecache.workers.memory.format.slots import SlotRef

OPEN = 0
"""Seal of a header whose slot holds no chunk, or whose writer has not finished."""

NO_WRITER = 0
"""Writer of a slot: none."""
OWNER = 1
"""Writer of a slot: the process that owns the arena. A new owner knows that the old one is gone."""
UNKNOWN = 2
"""Writer of a slot: any process that has the arena mapped."""
RETIRED = 3
"""In place of a writer: the slot's memory is bad, and it is not used any more."""
FIRST_WRITER = 16
"""Numbers from this one on are processes that have the arena mapped, see :attr:`Arena.writer`."""

HEADER = np.dtype(
    {
        "names": ["key", "generation", "checksum", "index_checksum", "device_checksum", "seal", "writer"],
        "formats": [(np.uint8, KEY_BYTES), np.uint64, np.uint64, np.uint64, np.uint64, np.uint64, np.uint64],
        "offsets": [0, 16, 24, 32, 40, 48, 56],
        "itemsize": 64,
    }
)
"""``checksum`` and ``index_checksum``: xxh3_64 of chunk and index bytes. ``device_checksum``: the chunk's
`ops.slot_checksums`, 0 when its writer had no GPU. ``seal``: xxh3_64 of all fields before it, with the slot's number as
seed. ``writer``: the process that may be writing the slot, or that wrote it; only the owner sets it."""

SEALED_BYTES = 48
"""The seal covers this many bytes from the start of a header."""


class Headers:
    """``HEADER [slots]`` over shared memory that other processes read and write too."""

    def __init__(self, array: npt.NDArray[np.void]) -> None:
        self._array = array
        self._bytes: npt.NDArray[np.uint8] = array.view(np.uint8).reshape(len(array), HEADER.itemsize)
        self._generations: npt.NDArray[np.uint64] = array["generation"]
        self._seals: npt.NDArray[np.uint64] = array["seal"]
        self._writers: npt.NDArray[np.uint64] = array["writer"]

    def read_only(self) -> npt.NDArray[np.void]:
        """A read-only view of all headers."""
        view = self._array.view()
        view.flags.writeable = False
        return view

    def generation(self, slot: int) -> int:
        return int(self._generations[slot])

    def generations(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """Current generations of ``slots``, both ``[n]``."""
        return self._generations[slots]

    def sealed_key(self, slot: int) -> ChunkKey | None:
        """The key that the slot is sealed as; ``None`` if it is not sealed."""
        header = self._snapshot(slot)
        return header[:KEY_BYTES] if _is_sound(slot, header) else None

    def sealed_checksums(self, ref: SlotRef, key: ChunkKey) -> tuple[int, int] | None:
        """Sealed xxh3_64 of the chunk and of the index bytes; ``None`` unless the slot is still ``ref`` and sealed as
        ``key``."""
        header = self._snapshot(ref.slot)
        if header[:KEY_BYTES] != key or _number(header, 16) != ref.generation or not _is_sound(ref.slot, header):
            return None
        return _number(header, 24), _number(header, 32)

    def is_sealed(self, ref: SlotRef, key: ChunkKey) -> bool:
        """Whether the slot is still ``ref`` and sealed as ``key``."""
        return self.sealed_checksums(ref, key) is not None

    def sealed(self, refs: Sequence[SlotRef], keys: Sequence[ChunkKey]) -> npt.NDArray[np.bool_]:
        """:meth:`is_sealed` of each pair: bool ``[n]``."""
        return self.all_sealed(refs, keys)[0]

    def all_sealed(
        self, refs: Sequence[SlotRef], keys: Sequence[ChunkKey]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint64]]:
        """:meth:`is_sealed` of each pair, bool ``[n]``, and the sealed chunk, index and device checksums, uint64 ``[n,
        3]``. Both come from one copy of the headers."""
        slots = _slots(refs)
        headers = self._array[slots]
        generations = np.fromiter((ref.generation for ref in refs), np.uint64, len(refs))
        names = np.frombuffer(b"".join(keys), np.uint8).reshape(len(refs), KEY_BYTES)
        same: npt.NDArray[np.bool_] = (headers["generation"] == generations) & (headers["key"] == names).all(1)
        raw = memoryview(headers.tobytes())
        starts = range(0, len(raw), HEADER.itemsize)
        digests = (
            _digest(slot, raw[start : start + SEALED_BYTES]) for slot, start in zip(slots.tolist(), starts, strict=True)
        )
        same &= headers["seal"] == np.fromiter(digests, np.uint64, len(refs))
        sums = [headers[name] for name in ("checksum", "index_checksum", "device_checksum")]
        return same, np.stack(sums, axis=1)

    def sealed_records(
        self, slots: npt.NDArray[np.int64], generations: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint64]]:
        """Which of ``slots`` are sealed in these ``generations``, under any key, bool ``[n]``; and the sealed checksums
        of their index bytes, uint64 ``[n]``."""
        headers = self._array[slots]
        same: npt.NDArray[np.bool_] = headers["generation"] == generations.astype(np.uint64)
        raw, size = headers.tobytes(), HEADER.itemsize
        for row in np.flatnonzero(same).tolist():
            same[row] = _is_sound(int(slots[row]), raw[row * size : (row + 1) * size])
        return same, headers["index_checksum"]

    def seal(self, ref: SlotRef, key: ChunkKey, checksums: tuple[int, int], device_checksum: int) -> None:
        """Write the header of ``ref``. If the slot is given away before or meanwhile, the header is not sealed: only
        the owner writes the generation, and the seal is valid for that of ``ref`` alone."""
        sums = (*checksums, device_checksum)
        sealed = key + b"".join(number.to_bytes(8, "little") for number in (ref.generation, *sums))
        header = self._array[ref.slot]
        header["seal"] = OPEN
        header["key"] = np.frombuffer(key, np.uint8)
        header["checksum"], header["index_checksum"], header["device_checksum"] = sums
        header["seal"] = _digest(ref.slot, sealed)

    def renew(self, slot: int) -> int:
        """Open the slot under a new generation; returns that."""
        self._seals[slot] = OPEN
        self._generations[slot] += np.uint64(1)
        return int(self._generations[slot])

    def clear(self, slot: int) -> None:
        """Open the slot under its old generation."""
        self._seals[slot] = OPEN

    def writer(self, slot: int) -> int:
        """The process that may be writing the slot, as the owner noted it last."""
        return int(self._writers[slot])

    def set_writer(self, slot: int, writer: int) -> None:
        self._writers[slot] = writer

    def _snapshot(self, slot: int) -> bytes:
        header: bytes = self._bytes[slot].tobytes()
        return header


def _digest(slot: int, sealed: bytes | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(sealed, slot) or 1  # 0 means open


def _is_sound(slot: int, header: bytes) -> bool:
    return _number(header, SEALED_BYTES) == _digest(slot, header[:SEALED_BYTES])


def _number(header: bytes, offset: int) -> int:
    return int.from_bytes(header[offset : offset + 8], "little")


def _slots(refs: Sequence[SlotRef]) -> npt.NDArray[np.int64]:
    return np.fromiter((ref.slot for ref in refs), np.int64, len(refs))
