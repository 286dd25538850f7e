"""Headers of an arena's slots: whose bytes lie there, since when, and their checksums."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from forecache.workers.memory.keys import KEY_BYTES, ChunkKey

if TYPE_CHECKING:  # protocol.py names Arena in its annotations
    from forecache.workers.memory.protocol import SlotRef

OPEN = 0
"""Header state: the bytes are nobody's, or a writer is not done with them."""
SEALED = 1
"""Header state: the bytes are those of the header's key."""

HEADER = np.dtype(
    {
        "names": ["key", "generation", "state", "checksum", "index_checksum", "device_checksum"],
        "formats": [(np.uint8, KEY_BYTES), np.uint64, np.uint32, np.uint64, np.uint64, np.uint64],
        "offsets": [0, 16, 24, 32, 40, 48],
        "itemsize": 64,
    }
)
"""``checksum`` and ``index_checksum``: xxh3_64 of chunk and index bytes; ``device_checksum``: the chunk's
`ops.slot_checksums`, 0 when its writer had no GPU."""


class Headers:
    """``HEADER [slots]`` over shared memory: other processes read and write it too."""

    def __init__(self, array: npt.NDArray[np.void]) -> None:
        self._array = array
        self._generations: npt.NDArray[np.uint64] = array["generation"]
        self._states: npt.NDArray[np.uint32] = array["state"]
        self._keys: npt.NDArray[np.uint8] = array["key"]
        self._device_checksums: npt.NDArray[np.uint64] = array["device_checksum"]

    def read_only(self) -> npt.NDArray[np.void]:
        """A view that can't be written."""
        view = self._array.view()
        view.flags.writeable = False
        return view

    def generation(self, slot: int) -> int:
        return int(self._generations[slot])

    def generations(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """Of ``slots``, both ``[n]``, as they are now."""
        return self._generations[slots]

    def checksums(self, slot: int) -> tuple[int, int]:
        """xxh3_64 of the chunk and of the index bytes, as they were sealed."""
        header = self._array[slot]
        return int(header["checksum"]), int(header["index_checksum"])

    def all_checksums(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """Of ``slots`` [n]: chunk, index and device checksum, uint64 ``[n, 3]``."""
        names = ("checksum", "index_checksum", "device_checksum")
        return np.stack([self._array[name][slots] for name in names], axis=1)

    def device_checksums(self, refs: Sequence["SlotRef"]) -> npt.NDArray[np.uint64]:
        """Of the slots of ``refs``, uint64 ``[n]``; 0 where there is none."""
        return self._device_checksums[_slots(refs)]

    def is_sealed(self, ref: "SlotRef", key: ChunkKey) -> bool:
        """Is the slot still ``ref``, and does it hold ``key``?"""
        return bool(
            self._states[ref.slot] == SEALED
            and self._generations[ref.slot] == ref.generation
            and self._keys[ref.slot].tobytes() == key
        )

    def sealed(self, refs: Sequence["SlotRef"], keys: Sequence[ChunkKey]) -> npt.NDArray[np.bool_]:
        """:meth:`is_sealed` of each pair: bool ``[n]``."""
        slots = _slots(refs)
        generations = np.fromiter((ref.generation for ref in refs), np.uint64, len(refs))
        names = np.frombuffer(b"".join(keys), np.uint8).reshape(len(refs), KEY_BYTES)
        same_slot = (self._states[slots] == SEALED) & (self._generations[slots] == generations)
        same: npt.NDArray[np.bool_] = same_slot & (self._keys[slots] == names).all(1)
        return same

    def seal(self, slot: int, key: ChunkKey, checksums: tuple[int, int], device_checksum: int) -> None:
        header = self._array[slot]
        header["checksum"], header["index_checksum"] = checksums
        header["device_checksum"] = device_checksum
        header["key"] = np.frombuffer(key, np.uint8)
        header["state"] = SEALED  # last: a reader believes the rest once it sees this

    def renew(self, slot: int) -> int:
        """Open the slot under a new generation, which is returned."""
        self._states[slot] = OPEN
        self._generations[slot] += np.uint64(1)
        return int(self._generations[slot])

    def clear(self, slot: int) -> None:
        """Open the slot; its generation stays."""
        self._states[slot] = OPEN


def _slots(refs: Sequence["SlotRef"]) -> npt.NDArray[np.int64]:
    return np.fromiter((ref.slot for ref in refs), np.int64, len(refs))
