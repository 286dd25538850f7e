"""The shared-memory file of a node's cold chunks: one process owns it, every worker of the node maps it."""

import json
import mmap
import os
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from forecache.workers.errors import ArenaError, ArenaMissingError, ChunkLostError
from forecache.workers.free_memory import room_bytes
from forecache.workers.memory.arena.headers import FIRST_WRITER, HEADER, NO_WRITER, OWNER, RETIRED, Headers
from forecache.workers.memory.arena.owned_file import (
    create_owned,
    disown,
    is_byte_locked,
    lock_own_byte,
    locked_bytes,
    open_existing,
    own,
)
from forecache.workers.memory.format.chunk_batch import ChunkBatch
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.layout import ChunkLayout
from forecache.workers.memory.format.slots import SlotRef

FILE_PREFIX = "forecache-"
MAGIC = b"forecach"
VERSION = 4
PAGE_BYTES = 4096
LIFE_START = PAGE_BYTES - 8
CHUNKS_ALIGNMENT_BYTES = 2 << 20


def _align(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment


@dataclass(frozen=True)
class ArenaDescription:
    """The first page of the file, from which the offsets of its three arrays follow. Sizes in bytes.

    The last ``record_slots`` slots, behind those of chunks, have a header and an index record but no chunk: see
    `records.py`.
    """

    layout_fingerprint: str
    index_fingerprint: str
    slots: int
    nbytes: int
    index_nbytes: int
    record_slots: int = 0

    @property
    def index_start(self) -> int:
        return _align(PAGE_BYTES + self._headers * HEADER.itemsize, PAGE_BYTES)

    @property
    def chunks_start(self) -> int:
        return _align(self.index_start + self._headers * self.index_nbytes, CHUNKS_ALIGNMENT_BYTES)

    @property
    def _headers(self) -> int:
        return self.slots + self.record_slots

    @property
    def file_bytes(self) -> int:
        return self.chunks_start + self.slots * self.nbytes


class Arena:
    """Slots of ``nbytes`` chunk bytes and ``index_nbytes`` index bytes, each with a 64-byte header.

    ``chunks`` (uint8 ``[slots, nbytes]``) and ``index`` (uint8 ``[slots + record slots, index_nbytes]``) are tensors
    over the mapping, which lives as long as any of them, even after :meth:`close` and :meth:`unlink`.

    Only the owner (:meth:`create`, :meth:`adopt`) may call :meth:`renew` and :meth:`clear`. It holds a lock on the
    file, which the kernel releases when the owner dies.
    """

    chunks: torch.Tensor
    index: torch.Tensor

    def __init__(self, path: Path, fd: int, description: ArenaDescription, *, owner: bool) -> None:
        """Takes over ``fd``. Use :meth:`create`, :meth:`adopt` or :meth:`attach`."""
        self.path = path
        self.owner = owner
        self.writer = OWNER if owner else lock_own_byte(fd, path, first=FIRST_WRITER)
        """The number of this process as a writer of the file; no other process has the same."""
        self.description = description
        self._fd = fd
        # Not closed explicitly: the numpy arrays pin it, and the last of them unmaps it.
        mapping = mmap.mmap(fd, description.file_bytes)
        slots, headers = description.slots, description.slots + description.record_slots
        self._life = np.ndarray(1, np.uint64, mapping, LIFE_START)
        if owner:
            self._life += np.uint64(1)
        self._inode = os.fstat(fd).st_ino
        self._headers = Headers(np.ndarray(headers, HEADER, mapping, PAGE_BYTES))
        index_shape, chunks_shape = (headers, description.index_nbytes), (slots, description.nbytes)
        self._index = np.ndarray(index_shape, np.uint8, mapping, description.index_start)
        self._chunks = np.ndarray(chunks_shape, np.uint8, mapping, description.chunks_start)
        self.index = torch.from_numpy(self._index)
        self.chunks = torch.from_numpy(self._chunks)

    @classmethod
    def create(
        cls,
        directory: Path,
        name: str,
        *,
        layout: ChunkLayout,
        index_nbytes: int,
        index_fingerprint: str,
        capacity_bytes: int,
        record_bytes: int = 0,
    ) -> "Arena":
        """Create the file ``directory/forecache-<name>`` of ``capacity_bytes`` with as many slots as fit, and in
        addition as many record slots as fit into ``record_bytes``.

        Raises :class:`ArenaError` when not one slot fits, the name is taken, or the memory can't be reserved.
        """
        description = describe(layout, index_nbytes, index_fingerprint, capacity_bytes, record_bytes)
        path = directory / f"{FILE_PREFIX}{name}"
        fd = create_owned(path)
        try:
            try:
                # With a sparse file, the first write that finds no memory would kill the process (SIGBUS).
                os.posix_fallocate(fd, 0, description.file_bytes)
            except OSError as error:
                os.ftruncate(fd, 0)  # free what was reserved before it failed, so that the message counts it as free
                raise ArenaError(
                    f"can't reserve the arena {path}: {description.file_bytes} bytes needed, "
                    f"{room_bytes(directory)} bytes free in {directory} ({error.strerror}). "
                    "Lower --cold-bytes or choose another --arena-dir."
                ) from error
            text = json.dumps(asdict(description)).encode()
            page = VERSION.to_bytes(4, "little") + len(text).to_bytes(4, "little") + text
            if len(MAGIC) + len(page) > LIFE_START:
                raise ArenaError(f"the fingerprints are too long for the first page of {path}")
            os.pwrite(fd, page, len(MAGIC))
            os.pwrite(fd, MAGIC, 0)  # last: a file without it is not finished
            return cls(path, fd, description, owner=True)
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(fd)
            raise

    @classmethod
    def attach(cls, path: Path | str) -> "Arena":
        """Map an arena that another process owns. Raises :class:`ArenaError` if there is none at ``path``."""
        path = Path(path)
        fd = open_existing(path)
        try:
            arena = cls(path, fd, _read_description(path, fd), owner=False)
        except BaseException:
            os.close(fd)
            raise
        # The mapping has a duplicate of the descriptor, and with it the lock on this writer's byte: both last as long
        # as any tensor over the mapping.
        arena.close()
        return arena

    @classmethod
    def adopt(cls, path: Path) -> "Arena":
        """Become the owner of an arena whose owner died. Raises :class:`ArenaError` if there is none."""
        fd = open_existing(path)
        try:
            if not own(fd, path):
                raise ArenaError(f"the arena {path} has a living owner: give this one another name")
            return cls(path, fd, _read_description(path, fd), owner=True)
        except BaseException:
            os.close(fd)
            raise

    @property
    def life(self) -> int:
        """How many owners this file has had. A new owner does not know which slots the last one handed out."""
        return int(self._life[0])

    def writers(self) -> Set[int]:
        """Numbers of all processes that have the file mapped, except its owner (owner only)."""
        return locked_bytes(self._fd)

    def living(self, writers: Set[int]) -> Set[int]:
        """The ``writers`` that may still write: their process, or a child that it forked, has the file mapped. Owner
        only."""
        if self._fd < 0:
            return writers  # closed: the locks can't be read
        return {writer for writer in writers if writer == OWNER or is_byte_locked(self._fd, writer)}

    def writer_of(self, slot: int) -> int:
        """The process that may be writing ``slot``, as its owner noted it."""
        return self._headers.writer(slot)

    def is_intact(self) -> bool:
        """Whether the mapping still is the whole file at :attr:`path`. Reading from a truncated file would kill the
        process."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return False
        return stat.st_ino == self._inode and stat.st_size == self.description.file_bytes

    @property
    def slots(self) -> int:
        return self.description.slots

    @property
    def record_slots(self) -> int:
        return self.description.record_slots

    @property
    def layout_fingerprint(self) -> str:
        return self.description.layout_fingerprint

    @property
    def index_fingerprint(self) -> str:
        return self.description.index_fingerprint

    def headers(self) -> npt.NDArray[np.void]:
        """A read-only view of all headers: ``HEADER [slots + record slots]``."""
        return self._headers.read_only()

    def generation_of(self, slot: int) -> int:
        """Current generation of one slot."""
        return self._headers.generation(slot)

    def generation(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """Current generations of ``slots``, both ``[n]``."""
        return self._headers.generations(slots)

    def put(
        self,
        ref: SlotRef,
        key: ChunkKey,
        chunk: npt.NDArray[np.uint8],
        index: npt.NDArray[np.uint8],
        device_checksum: int = 0,
    ) -> None:
        """Copy ``chunk``, uint8 ``[nbytes]``, and ``index``, uint8 ``[index_nbytes]``, into their reserved slot, and
        seal them as ``key``.

        No other process may write to the sources: the checksums are of them, not of what the slot holds after the copy.
        Raises the same as :meth:`seal`.
        """
        self._write(ref, key, chunk, index, _digests(chunk, index), device_checksum)

    def seal(self, ref: SlotRef, key: ChunkKey, checksums: tuple[int, int], device_checksum: int = 0) -> None:
        """Seal the slot as ``key``, if its bytes have ``checksums``.

        ``checksums``: xxh3_64 of the chunk and index bytes that the writer copied into the slot. A slot with other
        bytes has another writer, or bad memory. ``device_checksum``: unsigned, the chunk's `ops.slot_checksums`; 0: the
        writer had no GPU.

        Raises :class:`ChunkLostError` if the slot was given away, or holds other bytes.
        """
        self._check_is_ours(ref)
        found = self.digests(ref.slot)
        if found != checksums:
            raise ChunkLostError(
                f"slot {ref.slot} of {self.path} does not hold what was just written to it: its memory is bad, or "
                "another process wrote there. Reserve another slot."
            )
        self.seal_verified(ref, key, found, device_checksum)

    def seal_verified(self, ref: SlotRef, key: ChunkKey, checksums: tuple[int, int], device_checksum: int = 0) -> None:
        """As :meth:`seal`, for a slot whose bytes the caller has verified to have these checksums."""
        self._headers.seal(ref, key, checksums, device_checksum)
        self._check_is_ours(ref)

    def digests(self, slot: int) -> tuple[int, int]:
        """Current xxh3_64 of the chunk and of the index bytes of ``slot``; 0 for the chunk of a record slot."""
        return _digests(self._chunks[slot] if slot < self.slots else None, self._index[slot])

    def read(self, refs: Sequence[SlotRef], keys: Sequence[ChunkKey]) -> ChunkBatch:
        """Copy the chunks ``keys`` from ``refs`` (n of each); leaves out those whose bytes are not what was sealed."""
        slots = np.fromiter((ref.slot for ref in refs), np.int64, len(refs))
        chunks, index = self._chunks[slots], self._index[slots]
        sealed, sums = self._headers.all_sealed(refs, keys)  # after the copy
        return ChunkBatch(tuple(keys), chunks, index, sums).only(sealed).sound()

    def write(self, ref: SlotRef, batch: ChunkBatch, row: int) -> None:
        """Copy chunk ``row`` of ``batch``, which is :meth:`ChunkBatch.sound`, into its reserved slot, and seal it with
        the checksums that it came with. Raises the same as :meth:`seal`."""
        chunk, index, device = batch.checksums[row].tolist()
        self._write(ref, batch.keys[row], batch.chunks[row], batch.index[row], (chunk, index), device)

    def write_record(self, ref: SlotRef, key: ChunkKey, record: npt.NDArray[np.uint8], checksum: int) -> None:
        """Copy ``record``, of xxh3_64 ``checksum``, into its slot (owner only), and seal it as that of ``key``. Raises
        the same as :meth:`seal`."""
        self._index[ref.slot] = record
        self.seal(ref, key, (0, checksum))

    def is_sealed(self, ref: SlotRef, key: ChunkKey) -> bool:
        """Whether the header says that the slot is still ``ref`` and holds ``key``. Reads no chunk bytes."""
        return self._headers.is_sealed(ref, key)

    def sealed(self, refs: Sequence[SlotRef], keys: Sequence[ChunkKey]) -> npt.NDArray[np.bool_]:
        """:meth:`is_sealed` of each pair of ``refs`` and ``keys``, both of length n: bool ``[n]``."""
        return self._headers.sealed(refs, keys)

    def sealed_device_checksums(
        self, refs: Sequence[SlotRef], keys: Sequence[ChunkKey]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint64]]:
        """:meth:`sealed`, bool ``[n]``, and the sealed device checksums, uint64 ``[n]``; 0 where the writer had no
        GPU."""
        sealed, sums = self._headers.all_sealed(refs, keys)
        return sealed, sums[:, 2]

    def check(self, ref: SlotRef, key: ChunkKey) -> bool:
        """Whether the slot is still ``ref``, and its bytes (remote: its record's) are those sealed as ``key``.

        Copy first, then check: this compares the generation again after the checksums, so a reader that finds True has
        copied the right bytes.
        """
        sealed = self._headers.sealed_checksums(ref, key)
        return sealed is not None and sealed == self.digests(ref.slot) and self.is_sealed(ref, key)

    def sound_records(self, slots: npt.NDArray[np.int64], generations: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of ``slots`` still have these ``generations`` and the index bytes that were sealed: bool ``[n]``. As
        with :meth:`check`, read first, then ask."""
        sound, expected = self._headers.sealed_records(slots, generations)
        for row in np.flatnonzero(sound).tolist():
            sound[row] = xxhash.xxh3_64_intdigest(self._index[slots[row]]) == expected[row]
        sound &= self.generation(slots) == generations.astype(np.uint64)
        return sound

    def sealed_key(self, slot: int) -> ChunkKey | None:
        """The key that ``slot`` is sealed as; ``None`` if it is not sealed. Reads no chunk bytes."""
        return self._headers.sealed_key(slot)

    def _write(
        self,
        ref: SlotRef,
        key: ChunkKey,
        chunk: npt.NDArray[np.uint8],
        index: npt.NDArray[np.uint8],
        checksums: tuple[int, int],
        device_checksum: int,
    ) -> None:
        self._check_is_ours(ref)
        self._copy(self._chunks[ref.slot], chunk)
        self._copy(self._index[ref.slot], index)
        self.seal(ref, key, checksums, device_checksum)

    @staticmethod
    def _copy(target: npt.NDArray[np.uint8], source: npt.NDArray[np.uint8]) -> None:
        """A separate method, which tests interrupt: other processes may see a part of the bytes copied."""
        np.copyto(target, source)

    def _check_is_ours(self, ref: SlotRef) -> None:
        if self._headers.generation(ref.slot) != ref.generation:
            raise ChunkLostError(f"slot {ref.slot} of {self.path} was given away before it was written: reserve again")

    def renew(self, slot: int, writer: int = OWNER) -> int:
        """Give ``slot`` away, to be written by ``writer`` (owner only): all references to it become stale. Returns the
        new generation."""
        self._headers.set_writer(slot, writer)
        return self._headers.renew(slot)

    def forget_writer(self, slot: int) -> None:
        """No process writes ``slot`` from now on (owner only)."""
        self._headers.set_writer(slot, NO_WRITER)

    def retire(self, slot: int) -> None:
        """Take ``slot`` out of use (owner only), also for later owners."""
        self._headers.clear(slot)
        self._headers.set_writer(slot, RETIRED)

    def clear(self, slot: int) -> None:
        """The bytes of ``slot`` stop being a chunk (owner only); its generation stays."""
        self._headers.clear(slot)

    def close(self) -> None:
        """Close the file and release the owner's lock. Tensors over the mapping stay valid."""
        if self._fd >= 0:
            if self.owner:
                disown(self._fd)
            os.close(self._fd)
            self._fd = -1

    def unlink(self) -> None:
        """Remove the file's name; its memory is freed when the last process has unmapped it."""
        self.path.unlink(missing_ok=True)


def remove_abandoned(directory: Path) -> list[Path]:
    """Delete the arena files in ``directory`` whose owner is gone; returns them."""
    files = [path for path in sorted(directory.glob(f"{FILE_PREFIX}*")) if path.is_file() and not path.is_symlink()]
    return [path for path in files if _remove_if_abandoned(path)]


def _remove_if_abandoned(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except (FileNotFoundError, PermissionError):
        return False  # deleted meanwhile, or owned by another user
    try:
        if not own(fd, path):
            return False
        # An unfinished file has no magic yet; any other file without it is not an arena.
        if os.fstat(fd).st_size and os.pread(fd, len(MAGIC), 0) not in (MAGIC, bytes(len(MAGIC))):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(fd)


def describe(
    layout: ChunkLayout, index_nbytes: int, index_fingerprint: str, capacity_bytes: int, record_bytes: int = 0
) -> ArenaDescription:
    """The arena with as many slots as fit into ``capacity_bytes``. Raises :class:`ArenaError` if none does."""
    slot_bytes = layout.nbytes + index_nbytes + HEADER.itemsize

    def with_slots(slots: int) -> ArenaDescription:
        return ArenaDescription(layout.fingerprint, index_fingerprint, slots, layout.nbytes, index_nbytes)

    slots = capacity_bytes // slot_bytes
    while slots > 0 and (excess := with_slots(slots).file_bytes - capacity_bytes) > 0:
        slots -= max(1, excess // slot_bytes)
    if slots < 1:
        raise ArenaError(
            f"--cold-bytes {capacity_bytes} holds no chunk: one of {layout.nbytes} bytes needs an arena of "
            f"{with_slots(1).file_bytes} bytes. Raise --cold-bytes."
        )
    return replace(with_slots(slots), record_slots=record_bytes // (index_nbytes + HEADER.itemsize))


def _read_description(path: Path, fd: int) -> ArenaDescription:
    page = os.pread(fd, PAGE_BYTES, 0)
    version, length = (int.from_bytes(page[i : i + 4], "little") for i in (8, 12))
    if page[:8] != MAGIC or version != VERSION:
        raise ArenaMissingError(f"{path} is no arena of version {VERSION}: delete it")
    try:
        fields: dict[str, Any] = json.loads(page[16 : 16 + length])
        description = ArenaDescription(**fields)
    except (ValueError, TypeError) as error:
        raise ArenaError(f"the first page of {path} is damaged: delete it") from error
    if os.fstat(fd).st_size != description.file_bytes:
        raise ArenaMissingError(f"{path} has {os.fstat(fd).st_size} bytes, not {description.file_bytes}: delete it")
    return description


def _digests(chunk: npt.NDArray[np.uint8] | None, index: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """xxh3_64 of chunk and index bytes; 0 for a missing chunk."""
    return (0 if chunk is None else xxhash.xxh3_64_intdigest(chunk.data)), xxhash.xxh3_64_intdigest(index.data)
