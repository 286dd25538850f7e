"""What a step read of the arena where it lies, and whether those were the bytes that were stored.

Such reads are verified after the last of them: before, the place could still be given away. Until then nothing of the
step may be used.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from forecache.workers.core.sequence import Chunk
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.format.keys import ChunkKey
from forecache.workers.memory.format.slots import SlotRef


@dataclass(frozen=True)
class ColdReads:
    """Chunks of one sequence that a step read from the arena: ``numbers``, ``keys`` and slots ``refs``, n of each.

    ``sums``: int64 [n] on a GPU, to which every read adds the chunk's `ops.slot_checksums`; ``None`` on a CPU.
    """

    request_id: str
    numbers: tuple[int, ...]
    keys: tuple[ChunkKey, ...]
    refs: tuple[SlotRef, ...]
    sums: Tensor | None = None

    @classmethod
    def of(cls, request_id: str, chunks: Iterable[Chunk], sums: Tensor | None = None) -> "ColdReads":
        """The reads of ``chunks``, which are stored in this node's arena."""
        read = [(chunk.number, chunk.key, chunk.ref) for chunk in chunks if chunk.ref is not None]
        return cls(
            request_id,
            tuple(number for number, _, _ in read),
            tuple(key for _, key, _ in read),
            tuple(ref for _, _, ref in read),
            sums,
        )

    def damaged(self, sums: npt.NDArray[np.int64] | None, arena: Arena | None) -> list[int]:
        """The numbers of the chunks whose bytes differ from the stored ones. ``sums``: the GPU's sums, on the host.

        Costs one more read of each chunk on a CPU, and of each chunk whose writer had no GPU.
        """
        if not self.refs:
            return []
        assert arena is not None, "something was read of an arena that there is not"
        if sums is None:
            sound = np.array([arena.check(ref, key) for ref, key in zip(self.refs, self.keys, strict=True)], np.bool_)
        else:
            sealed, expected = arena.sealed_device_checksums(self.refs, self.keys)
            sound = sealed & (expected == sums.view(np.uint64))
            for number in np.flatnonzero(sealed & (expected == 0)).tolist():
                sound[number] = arena.check(self.refs[number], self.keys[number])
        return [self.numbers[number] for number in np.flatnonzero(~sound).tolist()]
