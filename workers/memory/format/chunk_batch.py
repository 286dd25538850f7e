"""Chunks, and parts of them, in transit between tiers, or to and from a disk."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import xxhash

from forecache.workers.memory.format.keys import ChunkKey


@dataclass(frozen=True)
class ChunkBatch:
    """``chunks``: uint8 ``[n, nbytes]``; ``index``: uint8 ``[n, index_nbytes]``; ``checksums``: uint64 ``[n, 3]``,
    those of a slot's header: xxh3_64 of chunk and index bytes, and the device checksum. ``mark``: that of the source
    store, taken before they were read; see :meth:`.store.ArenaStore.set_copied`."""

    keys: tuple[ChunkKey, ...]
    chunks: npt.NDArray[np.uint8]
    index: npt.NDArray[np.uint8]
    checksums: npt.NDArray[np.uint64]
    mark: int = 0

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        return self.chunks.nbytes + self.index.nbytes

    def __add__(self, other: "ChunkBatch") -> "ChunkBatch":
        """These, then those of ``other``, with the mark of these."""
        if not len(other):
            return self
        return ChunkBatch(
            self.keys + other.keys,
            np.concatenate([self.chunks, other.chunks]),
            np.concatenate([self.index, other.index]),
            np.concatenate([self.checksums, other.checksums]),
            self.mark,
        )

    def only(self, rows: npt.NDArray[np.bool_]) -> "ChunkBatch":
        """The chunks of ``rows``, bool ``[n]``."""
        if rows.all():
            return self
        keys = tuple(key for key, row in zip(self.keys, rows.tolist(), strict=True) if row)
        return replace(
            self, keys=keys, chunks=self.chunks[rows], index=self.index[rows], checksums=self.checksums[rows]
        )

    def sound(self) -> "ChunkBatch":
        """The chunks whose bytes have the checksums that they came with."""
        digests = [
            (xxhash.xxh3_64_intdigest(chunk), xxhash.xxh3_64_intdigest(index))
            for chunk, index in zip(self.chunks, self.index, strict=True)
        ]
        found = np.array(digests, np.uint64).reshape(len(self), 2)
        return self.only((found == self.checksums[:, :2]).all(1))


@dataclass(frozen=True)
class RecordBatch:
    """Index records alone. ``index``: uint8 ``[n, index_nbytes]``; ``checksums``: uint64 ``[n]``, xxh3_64 of each."""

    keys: tuple[ChunkKey, ...]
    index: npt.NDArray[np.uint8]
    checksums: npt.NDArray[np.uint64]

    @classmethod
    def of(cls, batch: ChunkBatch) -> "RecordBatch":
        """The index records of ``batch``."""
        return cls(batch.keys, batch.index, batch.checksums[:, 1])

    def sound(self) -> "RecordBatch":
        """The chunks whose bytes have the checksums that they came with."""
        digests = np.array([xxhash.xxh3_64_intdigest(record) for record in self.index], np.uint64)
        rows = digests == self.checksums
        keys = tuple(key for key, row in zip(self.keys, rows.tolist(), strict=True) if row)
        return RecordBatch(keys, self.index[rows], self.checksums[rows])


@dataclass(frozen=True)
class LayerBatch:
    """One layer of chunks. ``rows``: uint8 ``[n, ChunkLayout.layer_nbytes]``; ``checksum``: xxh3_64 of all of them."""

    keys: tuple[ChunkKey, ...]
    rows: npt.NDArray[np.uint8]
    checksum: int

    @classmethod
    def sealed(cls, keys: tuple[ChunkKey, ...], rows: npt.NDArray[np.uint8]) -> "LayerBatch":
        return cls(keys, rows, xxhash.xxh3_64_intdigest(rows.tobytes()))

    @property
    def is_sound(self) -> bool:
        """Whether the bytes are those that were sent."""
        return xxhash.xxh3_64_intdigest(self.rows.tobytes()) == self.checksum
